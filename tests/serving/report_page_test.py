"""The page of `realm-jax report`: what it says, escaped, on any screen."""

import html.parser

import browser
import helpers
import pytest

from realm_jax import config as config_lib
from realm_jax.cli import commands
from realm_jax.evaluation import inspect as inspect_lib
from realm_jax.runtime import files
from realm_jax.serving import elements
from realm_jax.serving import report_page

_BAD = '<script>alert(1)</script> & "x"'


class _Page(html.parser.HTMLParser):
  """The texts and elements of a page; checks that elements are closed."""

  def __init__(self, path):
    super().__init__()
    self.texts, self.elements, self._open = [], [], []
    self.source = path.read_text(encoding='utf-8')
    self.feed(self.source)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in ('meta', 'link'):
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open and self._open[-1] != 'style' and data.strip():
      self.texts.append(data)

  @property
  def text(self):
    return '\n'.join(self.texts)

  def row(self, head):
    """The cells after a heading, up to the next row."""
    return self.texts[self.texts.index(head) + 1 :]


def _make(workdir, steps=40, recall=0.25, **fields):
  """Writes what a finished job leaves, apart from checkpoints."""
  config = config_lib.Config(corpus='nowhere', steps=steps)
  for name, value in fields.items():
    setattr(config, name, value)
  files.write_json(
      workdir / 'config.json', config_lib.to_dict(config_lib.resolve(config))
  )
  lines = [
      {
          'step': step,
          'train/loss': 8 / step,
          'train/null_share': 0.25,
          'time/compute_seconds': 3.0,
          'time/data_seconds': 1.0,
          'time/examples_per_second': 50.0 + step,
          'refresh/age_steps': 30 - step % 20,
          'refresh/adopted': step // 10,
      }
      for step in range(10, steps + 1, 10)
  ]
  helpers.write_records(workdir / 'metrics.jsonl', lines)
  group = {'questions': 8, 'clusters': 8, 'gold': {'recall_at_5': recall}}
  group['open_qa'] = {'exact_match': 0.5, 'exact_match_interval': [0.25, 0.75]}
  for step in (0, steps):
    result = {'step': step, 'questions': {'all': group}}
    files.write_json(workdir / 'evaluation' / f'{step}.json', result)
  records = [
      {
          'question': f'Question {i}? {_BAD}', 'answers': [_BAD],
          'gold_rank': i % 2, 'answer_rank': 3, 'cluster': i,
          'prediction': _BAD,
          'probability': 0.5, 'exact_match': i % 2,
          'retrieved': [{'id': f'passage-{i}', 'score': 1.0}],
      }
      for i in range(20)
  ]
  helpers.write_records(
      workdir / 'evaluation' / f'{steps}.questions.jsonl', records
  )
  return workdir


def test_an_element_escapes_texts_and_values():
  made = elements.element(
      'p', _BAD, elements.element('b', 1), None, class_='a"b', aria_label='<'
  )
  assert made == (
      '<p class="a&quot;b" aria-label="&lt;">&lt;script&gt;alert(1)&lt;/script'
      '&gt; &amp; &quot;x&quot;<b>1</b></p>'
  )


def test_a_curve_has_its_points_in_place():
  drawn = elements.panel('<a>', {'b': [(0, 0.0), (5, 2.0), (10, float('nan'))]})
  # From the left edge, 54, at the bottom, 176, to the right edge and the top.
  assert 'points="54.0,176.0 348.0,10.0"' in drawn
  assert 'aria-label="&lt;a&gt;: b 2 at step 5"' in drawn
  assert '<li class="c0">b</li>' in drawn
  other = elements.panel('', {'b': [(0, 1.0)]}, order=['a', 'b'])
  assert 'class="curve c1"' in other
  assert '<polyline' not in elements.panel('', {'': []})
  many = elements.thinned([(step, 1.0) for step in range(1000)])
  assert len(many) <= 300 and many[-1] == (999, 1.0)


def test_runs_side_by_side(tmp_path):
  first = _make(tmp_path / '<b>one', batch_size=32)
  second = _make(tmp_path / 'two', recall=0.75, batch_size=64)
  path = report_page.write([str(first), str(second)], tmp_path / 'out.html')
  page = _Page(path)
  names = ['<b>one', 'two']
  # Configs: what differs between the runs, apart from what both share.
  assert page.row('batch_size')[:2] == ['32', '64']
  assert page.row('corpus')[:2] == ['nowhere', 'nowhere']
  # Curves: one color for each run, in every panel.
  colors = [a['class'] for tag, a in page.elements if tag == 'polyline']
  assert colors and set(colors) == {'curve c0', 'curve c1'}
  labels = [a['aria-label'] for tag, a in page.elements if tag == 'svg']
  assert (
      'gold passage, all questions: recall@5: <b>one 0.25 at step 40, two 0.75'
      ' at step 40' in labels
  )
  rates = 'examples per second: <b>one 90 at step 40, two 90 at step 40'
  assert rates in labels
  # Evaluations, with intervals; the newest step of each run first.
  at = page.texts.index('Passages retrieved for questions, in per cent')
  assert page.texts[at + 1 :][:15] == [
      'run', 'step', 'facts', 'questions', 'recall@5',
      '<b>one', '40', 'all', '8', '25.0', 'two', '40', 'all', '8', '75.0',
  ]
  assert '50.0 (25.0 to 75.0)' in page.texts
  assert '<b>one, all evaluated steps: Questions answered, in per cent' in (
      page.texts
  )
  assert page.row('age of the index in steps, mean')[:2] == ['25', '25']
  assert page.row('age of the index in steps, largest')[:2] == ['30', '30']
  assert page.row('compute')[:2] == ['12.0 s, 75%'] * 2
  # Some questions, right and wrong, of both runs; the corpus has moved.
  asked = [text for text in page.texts if text.startswith('Question ')]
  assert len(asked) == 6 and f'Question 1? {_BAD}' in asked
  assert page.texts.count(f'{_BAD} (p=0.50)') == 12
  assert 'passage-1' in page.texts
  assert set(names) <= set(page.texts)


def test_nothing_runs_and_nothing_is_fetched(tmp_path):
  run = _make(tmp_path / 'job')
  page = _Page(report_page.write([str(run)], tmp_path / 'out.html'))
  assert not {'script', 'img', 'iframe'} & {tag for tag, _ in page.elements}
  for tag, attributes in page.elements:
    assert not any(name.startswith('on') for name in attributes), tag
    for name in ('href', 'src'):
      assert attributes.get(name, '#')[0] == '#' or (
          attributes[name] == 'data:,'
      )
  assert '@import' not in page.source and 'url(' not in page.source


def test_one_run_shows_what_differs_from_the_defaults(tmp_path):
  run = _make(tmp_path / 'job', batch_size=32)
  page = _Page(report_page.write([str(run)], tmp_path / 'out.html'))
  assert page.row('batch_size')[:2] == ['32', '512']
  assert 'seed' not in page.texts
  # The doctor finds the index too old only beyond interval + lag.
  assert ': healthy.' in page.texts


def test_what_is_missing_is_said(tmp_path):
  files.write_json(
      tmp_path / 'new' / 'config.json',
      config_lib.to_dict(config_lib.Config(corpus='nowhere')),
  )
  page = _Page(report_page.write([str(tmp_path / 'new')], tmp_path / 'o.html'))
  assert 'new: no metrics: ' in page.texts
  assert 'new: no evaluation: ' in page.texts
  assert 'realm-jax evaluate' in page.texts
  assert 'has no metrics: no step has been logged yet' in page.text
  assert 'No run has used an index.' in page.texts


def test_wrong_input_is_one_line_and_leaves_no_file(tmp_path):
  run = str(_make(tmp_path / 'job'))
  out = tmp_path / 'out.html'
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='empty is not a workdir'):
    report_page.write([run, str(tmp_path / 'empty')], out)
  with pytest.raises(ValueError, match='names no workdir'):
    report_page.write([], out)
  with pytest.raises(ValueError, match='is a folder'):
    report_page.write([run], tmp_path)
  with pytest.raises(ValueError, match=r'has no \[MASK\]'):
    report_page.write([run], out, 'A sentence.')
  (tmp_path / 'job' / 'evaluation' / '7.json').write_text('[]')
  with pytest.raises(ValueError, match=r'7\.json is no result'):
    report_page.write([run], out)
  assert not out.exists()


_SENTENCE = f'{_BAD} sells [MASK].'


def _inspection(workdir):
  said = inspect_lib.Prediction(('figs',), 0.5)
  document = inspect_lib.Document(3, 'town-3', 'Dunbar', _BAD, 0.75, 1.0, said)
  null = inspect_lib.Document(-1, '', '', '', 0.25, 0.0, said)
  return inspect_lib.Inspection(
      _SENTENCE, str(workdir), 5, 5, (document,), null, said
  )


def test_a_sentence_is_filled_in_by_each_run_that_can(tmp_path, monkeypatch):
  able, other = (_make(tmp_path / name) for name in ('able', 'other'))

  def inspect(workdir, text, corpus=None):
    assert (text, corpus) == (_SENTENCE, 'moved')
    if workdir == other:
      raise ValueError('has no reader')
    return _inspection(workdir)

  monkeypatch.setattr(inspect_lib, 'inspect', inspect)
  page = _Page(
      report_page.write(
          [str(able), str(other)], tmp_path / 'o.html', _SENTENCE, 'moved'
      )
  )
  assert page.row('0.750')[:3] == [f'Dunbar: {_BAD}', 'figs', '0.500']
  assert 'No passage (the null document)' in page.texts
  assert 'other: has no reader' in page.texts


def test_an_inspection_has_a_page_of_its_own(tmp_path):
  path = tmp_path / 'page.html'
  path.write_text(report_page.of_inspection(_inspection('job')))
  page = _Page(path)
  assert page.row('0.750')[:4] == [f'Dunbar: {_BAD}', 'figs', '0.500', 'town-3']
  assert 'job: checkpoint of step 5, index of step 5' in page.texts
  assert _SENTENCE in page.texts


def test_workdirs_of_one_name_are_told_apart(tmp_path):
  paths = [str(_make(tmp_path / folder / 'job')) for folder in 'ab']
  runs = report_page._open([*paths, paths[0] + '/'])
  assert [run.name for run in runs] == paths


@pytest.mark.skipif(
    not (browser.CHROMIUM and browser.DRIVER),
    reason='needs chromium and chromedriver (Debian: chromium-driver)',
)
@pytest.mark.parametrize(
    'width, dark', [(390, True), (1280, False)], ids=['phone', 'desktop']
)
def test_the_page_in_a_browser(tmp_path, width, dark):
  runs = [str(_make(tmp_path / name)) for name in ('one', 'two')]
  path = report_page.write(runs, tmp_path / 'out.html')
  with browser.Browser(width, 844, dark=dark) as window:
    window.open(path.absolute().as_uri())
    assert not window.log()
    shown, inner = window.run(
        'return [document.documentElement.scrollWidth, innerWidth]'
    )
    assert shown <= inner
    color = window.run('return getComputedStyle(document.body).color')
    assert (color == 'rgb(228, 233, 240)') == dark
    assert window.run('return document.querySelectorAll("script").length') == 0
    # Tab comes to the links of the parts, and to a table that scrolls.
    window.press('\ue004')
    assert window.run('return document.activeElement.textContent') == 'Runs'
    regions = window.run(
        'return [...document.querySelectorAll("[role=region]")].every('
        '(e) => e.tabIndex === 0 && e.ariaLabel)'
    )
    assert regions


def test_the_command_writes_the_file(tmp_path, monkeypatch, capsys):
  run = _make(tmp_path / 'job')
  monkeypatch.chdir(tmp_path)
  command = commands.COMMANDS['report']
  values = {flag.name: flag.default for flag in command.flags}
  command.action(**{**values, 'workdir': f'{run},{run}'})
  assert capsys.readouterr().out == 'Written to report.html.\n'
  assert 'Report of job<' in (tmp_path / 'report.html').read_text()
