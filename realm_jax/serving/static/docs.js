// The operations of openapi.json, each with a form to try it.
'use strict';

const EXAMPLES = {
  '/ask': {question: 'Where was Ada Lovelace born?'},
  '/fill': {sentence: 'The capital of France is [MASK].'},
  '/search': {query: 'the first program', k: 5, method: 'retriever'},
  '/embed': {texts: ['the first program'], kind: 'query'},
  '/v1/embeddings': {input: ['the first program'], model: 'realm-jax:query'},
};
const get = (id) => document.getElementById(id);

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function headers() {
  const token = get('token').value || sessionStorage.getItem('token');
  return token ? {authorization: 'Bearer ' + token} : {};
}

async function send(method, path, body) {
  const options = {method, headers: headers()};
  if (body !== null) {
    options.body = body;
    options.headers['content-type'] = 'application/json';
  }
  const response = await fetch(path.slice(1), options);
  const text = await response.text();
  let shown = text;
  try {
    shown = JSON.stringify(JSON.parse(text), null, 2);
  } catch (error) { /* Not JSON, such as /metrics. */ }
  return `${response.status} ${response.statusText}\n${shown}`;
}

function fields(schema) {
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => {
    const needed = (schema.required || []).includes(name);
    const type = field.enum ? field.enum.join(' | ') :
      field.type || (field.anyOf || []).map((one) => one.type).join(' | ');
    const range = ['minimum', 'maximum', 'minLength', 'maxLength', 'minItems',
      'maxItems'].filter((key) => key in field).map(
        (key) => `${key} ${field[key]}`).join(', ');
    return make('tr', {}, make('th', {scope: 'row'}, make('code', {}, name)),
        make('td', {}, type), make('td', {}, needed ? 'required' :
          [('default' in field) ? 'default ' + field.default : '', range]
          .filter(Boolean).join('; ')));
  });
  return make('table', {}, ...rows);
}

function operation(path, method, about, schemas) {
  const id = 'body' + path.replaceAll('/', '-');
  const section = make('section', {class: 'operation'},
      make('h2', {}, make('code', {}, `${method.toUpperCase()} ${path}`)),
      make('p', {}, about.summary || ''));
  let input = null;
  const content = about.requestBody && about.requestBody.content;
  if (content) {
    const reference = content['application/json'].schema.$ref || '';
    section.append(fields(schemas[reference.split('/').pop()] || {}));
    input = make('textarea', {id, rows: 3, spellcheck: 'false'});
    input.value = JSON.stringify(EXAMPLES[path] || {});
    section.append(make('label', {for: id}, 'Body'), input);
  }
  const button = make('button', {type: 'button',
    'aria-label': `Send ${path}`}, 'Send');
  const output = make('pre', {'aria-live': 'polite', hidden: ''});
  button.addEventListener('click', async () => {
    output.hidden = false;
    try {
      output.textContent = await send(
          method.toUpperCase(), path, input && input.value);
    } catch (error) {
      output.textContent = 'The server cannot be reached.';
    }
  });
  section.append(make('p', {}, button), output);
  return section;
}

async function show() {
  const response = await fetch('openapi.json', {headers: headers()});
  if (response.status === 401) {
    get('operations').replaceChildren('Give the token to see the operations.');
    return;
  }
  const found = await response.json();
  const schemas = (found.components || {}).schemas || {};
  get('operations').replaceChildren(
      ...Object.entries(found.paths).flatMap(([path, methods]) =>
        Object.entries(methods).map(([method, about]) =>
          operation(path, method, about, schemas))));
}

get('key').addEventListener('submit', (event) => event.preventDefault());
get('token').addEventListener('change', show);
show();
