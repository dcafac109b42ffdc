// The page of `realm-jax serve`. Texts become text nodes, never HTML.
'use strict';

const TABS = {
  ask: {
    label: 'Question', button: 'Ask', field: 'question',
    hint: 'The reader answers with a span of a passage.',
  },
  fill: {
    label: 'Sentence with [MASK]', button: 'Fill in', field: 'sentence',
    hint: 'Each [MASK] stands for one wordpiece; adjacent ones are one blank.',
  },
  search: {
    label: 'Search the passages', button: 'Search', field: 'query',
    hint: 'Passages by inner product of their embedding with the query.',
  },
};
const get = (id) => document.getElementById(id);
let about = null;
let tab = 'ask';
let latest = 0;  // Number of the newest request; older answers are dropped.

// Makes an element with attributes and children; strings become text.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function call(path, body) {
  const headers = {};
  const token = sessionStorage.getItem('token');
  if (token) headers.authorization = 'Bearer ' + token;
  const options = {headers};
  if (body) {
    headers['content-type'] = 'application/json';
    Object.assign(options, {method: 'POST', body: JSON.stringify(body)});
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw new Error('The server cannot be reached.');
  }
  if (response.status === 401) {
    await askForToken();
    return call(path, body);
  }
  const found = await response.json();
  if (!response.ok) throw new Error(found.error.message);
  return found;
}

let login = null;  // One dialog for all requests that wait for the token.
function askForToken() {
  login = login || new Promise((resolve) => {
    const dialog = get('login');
    dialog.addEventListener('close', () => {
      sessionStorage.setItem('token', get('token').value);
      login = null;
      resolve();
    }, {once: true});
    dialog.showModal();
  });
  return login;
}

const share = (value) => value < 0.0005 ? '<0.001' : value.toFixed(3);

function shareBar(label, value) {
  const fill = make('div', {class: 'fill'});
  fill.style.width = 100 * Math.max(0, Math.min(1, value)) + '%';
  return make(
      'div', {class: 'share'}, make('span', {}, label),
      make('div', {class: 'track', 'aria-hidden': 'true'}, fill),
      make('span', {class: 'number'}, share(value)));
}

function duration(seconds) {
  for (const [unit, size] of
      [['days', 86400], ['hours', 3600], ['minutes', 60]]) {
    if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit}`;
  }
  return `${Math.round(seconds)} seconds`;
}

// The text of a passage; [start, limit) counts characters, not UTF-16 units.
function passageText(passage) {
  const text = make('p');
  if (passage.start < passage.limit) {
    const letters = Array.from(passage.text);
    const part = (from, to) => letters.slice(from, to).join('');
    text.append(part(0, passage.start),
        make('mark', {}, part(passage.start, passage.limit)),
        part(passage.limit));
  } else {
    text.append(passage.text);
  }
  return text;
}

function saying(label, said, probability) {
  return make('tr', {}, make('th', {scope: 'row'}, label),
      make('td', {}, said || '(nothing)'),
      make('td', {class: 'number'},
          probability === null ? '' : share(probability)));
}

function card(passage, rows, best) {
  const similar = new URLSearchParams({q: passage.text});
  return make('article', {class: best ? 'card best' : 'card'},
      make('h3', {}, passage.title || '(no title)'),
      make('span', {class: 'id'}, passage.id),
      passageText(passage), ...rows,
      make('p', {class: 'quiet last'},
          make('span', {class: 'number'}, `score ${passage.score.toFixed(2)}`),
          make('a', {href: '#search?' + similar}, 'Similar passages')));
}

function column(title, cards, note) {
  return make('div', {}, make('h2', {class: 'column'}, title),
      note ? make('p', {class: 'quiet'}, note) : null, ...cards);
}

const SHOW = {
  ask(found) {
    const likely = found.marginal.filter((one, i) =>
      !i || (i < 5 && one.probability >= 0.0005));
    const rows = likely.map((one, i) => saying(
        i ? '' : 'summed over the passages', one.answer, one.probability));
    const box = make('div', {class: 'answer'},
        make('h2', {}, found.answer || '(no answer)'),
        make('p', {class: 'quiet'},
            `probability of passage and span ${share(found.probability)}`),
        make('table', {},
            ...rows,
            saying('without a passage', 'nothing: this reader answers with a' +
                ' span of a passage', null)));
    const cards = found.passages.map((passage, i) => card(passage, [
      shareBar('p(z|x)', passage.probability),
      make('table', {}, saying('the reader says', passage.answer,
          passage.answer_probability)),
    ], i === found.best));
    return [box, column('Passages of the retriever', cards)];
  },
  fill(found) {
    const words = (one) => one.fillings.join(' | ');
    const none = found.without_passages;
    const box = make('div', {class: 'answer'},
        make('h2', {}, words(found)),
        make('table', {},
            saying('marginalised over the passages', words(found.marginal),
                found.marginal.probability),
            saying('without a passage', words(none), none.probability)),
        shareBar('p(no passage | x)', none.null_probability));
    const cards = found.passages.map((passage) => card(passage, [
      shareBar('p(z|x)', passage.probability),
      make('table', {}, saying('the reader says', words(passage.prediction),
          passage.prediction.probability)),
    ]));
    return [box, column('Passages of the retriever', cards)];
  },
  search(found) {
    const cards = found.results.map((one) => card(one, []));
    return [null, column('Passages of the retriever', cards)];
  },
};

async function bm25(text) {
  try {
    const query = text.replaceAll('[MASK]', ' ').trim() || text;
    const found = await call('search', {query, k: 10, method: 'bm25'});
    const cards = found.results.map((one) => card(one, []));
    return column('Passages of BM25',
        cards.length ? cards : ['No passage has a word of the query.'],
        found.note);
  } catch (error) {
    return column('Passages of BM25',
        [message(error.message)]);
  }
}

// Commands stand between backticks.
function message(text) {
  const parts = text.split('`').map((part, i) =>
    i % 2 ? make('code', {}, part) : part);
  return make('p', {class: 'missing'}, ...parts);
}

function notice(text) {
  get('notice').replaceChildren(...(text ? [message(text)] : []));
}

async function submit(text) {
  const mine = ++latest;
  const second = get('bm25').checked;
  get('submit').disabled = true;
  notice('');
  try {
    const compared = second ? bm25(text) : null;
    const found = await call(tab, {[TABS[tab].field]: text});
    const other = await compared;
    if (mine !== latest) return;
    const [box, passages] = SHOW[tab](found);
    const columns = make('div', {class: other ? 'columns two' : 'columns'},
        passages, other);
    get('results').replaceChildren(...(box ? [box, columns] : [columns]));
    notice(found.note);
    get('results').focus({preventScroll: true});
  } catch (error) {
    if (mine !== latest) return;
    get('results').replaceChildren();
    notice(error.message);
  } finally {
    if (mine === latest) get('submit').disabled = false;
    loadAbout();
  }
}

// The server draws the panels: SVG with escaped texts, parsed without effect.
function drawn(panel) {
  return new DOMParser().parseFromString(panel.html, 'text/html').body.firstChild;
}

async function training() {
  const mine = ++latest;
  try {
    const found = await call('training');
    if (mine !== latest) return;
    get('results').replaceChildren(found.panels.length ?
        make('div', {class: 'panels'}, ...found.panels.map(drawn)) :
        make('p', {class: 'missing'}, 'The workdir has no metrics.jsonl yet;' +
            ' `realm-jax train` writes it, and `realm-jax evaluate` adds' +
            ' recall.'));
  } catch (error) {
    notice(error.message);
  }
}

async function loadAbout() {
  try {
    about = await call('about');
  } catch (error) {
    get('about').replaceChildren(error.message);
    return;
  }
  const known = (value) => value === null ? 'none' : value;
  const lines = [
    `${about.workdir}: checkpoint ${known(about.checkpoint)}, index` +
    ` generation ${known(about.index_generation)}` +
    (about.index_age_seconds === null ? '' :
      `, published ${duration(about.index_age_seconds)} ago`) +
    (about.passages ? `, ${about.passages.toLocaleString('en')} passages` : '')+
    (about.documents_version ?
      `, version ${about.documents_version} of the documents` : '') + '.',
  ];
  if (about.refused) lines.push('Not adopted: ' + about.refused);
  get('about').replaceChildren(...lines.map((line) => make('p', {}, line)));
}

function showTab() {
  const entry = TABS[tab];
  for (const link of document.querySelectorAll('nav a[data-tab]')) {
    if (link.dataset.tab === tab) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  get('query').hidden = !entry;
  get('results').replaceChildren();
  notice('');
  if (!entry) return;
  get('label').textContent = entry.label;
  get('submit').textContent = entry.button;
  get('submit').disabled = false;
  get('hint').textContent = entry.hint;
  const missing = about && about.missing[tab];
  if (missing) notice(missing);
  const examples = (about && !missing && about.examples[tab]) || [];
  get('examples').replaceChildren(...examples.map((example) => {
    const button = make('button', {type: 'button', class: 'example'}, example);
    button.addEventListener('click', () => go(example));
    return button;
  }));
}

// The address has the tab and the query, so that a result can be linked to.
function go(text) {
  const values = {q: text};
  if (get('bm25').checked) values.bm25 = '1';
  const hash = `#${tab}?${new URLSearchParams(values)}`;
  if (hash === location.hash) route();
  else location.hash = hash;
}

function route() {
  const [name, rest = ''] = location.hash.slice(1).split('?');
  const first = ['ask', 'fill', 'search'].find(
      (one) => about && !(one in about.missing));
  tab = name in TABS || name === 'training' ? name : first || 'ask';
  showTab();
  if (tab === 'training') return training();
  const values = new URLSearchParams(rest);
  const text = values.get('q') || '';
  get('text').value = text;
  if (values.has('bm25')) get('bm25').checked = true;
  if (text) return submit(text);
  latest++;
  get('text').focus();
}

get('query').addEventListener('submit', (event) => {
  event.preventDefault();
  go(get('text').value);
});
get('text').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    get('query').requestSubmit();
  }
});
get('bm25').addEventListener('change', () => {
  if (get('results').childElementCount) go(get('text').value);
});
window.addEventListener('hashchange', route);
loadAbout().then(route);
setInterval(loadAbout, 30000);
