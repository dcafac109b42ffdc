"""`realm-jax doctor`: a good run, and runs with one thing wrong each."""

import json

import pytest

from realm_jax import config as config_lib
from realm_jax.cli import actions
from realm_jax.evaluation import doctor
from realm_jax.runtime import files
from realm_jax.runtime import process

# The figures of a healthy run, at its end.
_GOOD = {
    'train/loss': 1.5, 'train/grad_norm': 1.0, 'train/null_share': 0.2,
    'train/retrieval_utility': 1.2, 'train/answer_in_candidates': 0.5,
    'time/examples_per_second': 20.0, 'refresh/age_steps': 30.0,
    'refresh/probe_overlap': 0.8, 'refresh/builder_failures': 0.0,
    'refresh/adopted': 4.0, 'gates/reader_accuracy': 0.7,
    'gates/reader_utility': 2.5, 'gates/findable': 0.6,
    'gates/recall_at_20': 0.6, 'gates/answer_in_candidates': 0.5,
    'gates/null_share': 0.2, 'gates/trivial_share': 0.0,
}


def _run(workdir, objective='realm', snapshots=(), last=None, **changes):
  """Writes a workdir of 200 steps; `name__x=value` changes a figure name/x.

  A list has the value of each line, at the steps 10, 20, ...
  """
  config = config_lib.Config(objective=objective, corpus='corpus', steps=200)
  config.refresh.interval, config.refresh.lag = 50, 20
  for name in [name for name in changes if '__' not in name]:
    setattr(config, name, changes.pop(name))
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  changes = {n.replace('__', '/', 1): x for n, x in changes.items()}
  lines = []
  for number, step in enumerate(range(10, 201, 10)):
    line = {'step': step}
    for name, value in {**_GOOD, **changes}.items():
      # Gates are measured every 100 steps.
      if value is None or (name.startswith('gates/') and step % 100 > 10):
        continue
      line[name] = value[number] if isinstance(value, list) else value
    if 'gates/findable' in line:
      line['gates/step'] = step // 100 * 100
    lines.append(line)
  lines += [last] if last else []
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (workdir / 'metrics.jsonl').write_text(text)
  for step in snapshots:
    (workdir / 'retriever' / str(step)).mkdir(parents=True)
  return workdir


def _findings(workdir):
  return [(f.diagnosis, f.text) for f in doctor.examine(workdir).findings]


def test_a_good_run_is_healthy(tmp_path):
  report = doctor.examine(_run(tmp_path))
  assert report.findings == []
  assert (report.step, report.steps) == (200, 200)
  assert report.figures['gates/reader_accuracy'] == 0.7
  text = report.as_text()
  assert text.startswith(f'{tmp_path}: realm, step 200 of 200\n')
  assert 'gates/reader_utility' in text and 'Healthy' in text


@pytest.mark.parametrize(
    ('changes', 'diagnosis', 'text'),
    [
        ({'gates__reader_accuracy': 0.12}, 'cold reader',
         r'(gates/reader_accuracy) is 0.12, below'
         ' config.gates.reader_accuracy=0.5. The reader hardly uses'),
        ({'gates__reader_utility': 0.3}, 'cold reader',
         '(gates/reader_utility) is 0.3, below config.gates.reader_utility=1.'),
        ({'train__retrieval_utility': [1.0] * 10 + [-0.8] * 10}, 'cold reader',
         '(train/retrieval_utility) is -0.8, below -0.1. Passages mislead the'
         ' reader, so the retriever learns to avoid them: train `mlm` with more'
         ' of `article` and `random` in config.mlm.views.'),
        ({'train__retrieval_utility': -0.8,
          'optimizer': config_lib.OptimizerConfig(frozen=('reader',))},
         'cold reader',
         'in config.mlm.views, or take `reader` out of config.optimizer.frozen.'
         ),
        ({'gates__recall_at_20': 0.021}, 'cold retriever',
         '(gates/recall_at_20) is 0.021, below config.gates.recall_at_20=0.3.'
         ' There is little to learn from such candidates. Train `ict`'),
        ({'gates__recall_at_20': [0.98] * 10 + [0.24] * 10,
          'train__retrieval_utility': [-0.5] * 10 + [0.1] * 10},
         'falling recall',
         '(gates/recall_at_20) fell from 0.98 to 0.24. The retriever unlearns'
         ' what it had. If train/retrieval_utility begins below 0 (-0.5 nats'),
        ({'gates__answer_in_candidates': 0.1}, 'cold retriever',
         '(gates/answer_in_candidates) is 0.1, below'),
        ({'train__null_share': [0.3] * 10 + [0.99] * 10}, 'fled to null',
         'the mean of p(null|x) (gates/null_share) is 0.99, above'
         ' config.gates.null_share=0.9. No passage has an effect'),
        ({'refresh__age_steps': [5.0 + 10 * i for i in range(20)]},
         'stale index',
         '(refresh/age_steps) is up to 195 steps old, more than'
         ' config.refresh.interval + lag=70. The candidates are those of'),
        ({'refresh__probe_overlap': 0.1}, 'stale index',
         '(refresh/probe_overlap) is 0.1, below 0.5. Most candidates'),
        ({'refresh__builder_failures': 2.0}, 'stale index',
         'has failed 2 time(s) (refresh/builder_failures)'),
        ({'snapshots': (0, 50, 100, 150)}, 'stale index',
         'that of step 0, 150 steps before the newest snapshot'),
        ({'gates__trivial_share': 0.41}, 'trivial candidates',
         '(gates/trivial_share) is 0.41, above config.gates.trivial_share=0.05.'
         ' The reader copies'),
        ({'trivial': 'none'}, 'trivial candidates',
         'config.trivial=none lets passages with the text'),
        ({'gates__findable': 0.05, 'gates__answer_in_candidates': 0.02},
         'nothing to find',
         '(gates/findable) is 0.05, below config.gates.answer_in_candidates=0.3'
         '. For most sentences the null document is the right choice.'),
        ({'last': {'step': 203, 'train/loss': 'nan'}}, 'diverged',
         'the loss (train/loss) of step 203 is nan'),
        ({'objective': 'ict', 'train__accuracy': 0.08}, 'cold retriever',
         '(train/accuracy) is 0.08, below config.gates.recall_at_20=0.3.'),
    ],
)
def test_one_thing_wrong_is_one_finding(tmp_path, changes, diagnosis, text):
  found = _findings(_run(tmp_path, **changes))
  assert [name for name, _ in found] == [diagnosis]
  assert text in found[0][1]


def test_the_last_measurement_counts(tmp_path):
  """A reader that was cold at first and is warm now is no finding."""
  accuracy = [0.1] * 10 + [0.6] * 10
  assert _findings(_run(tmp_path, gates__reader_accuracy=accuracy)) == []


def test_several_things_are_all_said(tmp_path):
  workdir = _run(
      tmp_path, gates__reader_accuracy=0.0, gates__reader_utility=-0.2,
      gates__recall_at_20=0.01, train__retrieval_utility=-0.3,
      train__null_share=0.95,
  )
  names = [name for name, _ in _findings(workdir)]
  assert names == ['cold reader', 'cold reader', 'cold retriever',
                   'fled to null']
  text = doctor.examine(workdir).as_text()
  assert '4 finding(s)' in text and '\ncold retriever: ' in text


@pytest.mark.parametrize(
    ('frozen', 'stale'),
    [
        (('embedder',), []),
        (('embedder.encoder', 'embedder.projection'), []),
        (('embedder.encoder',), ['stale index']),  # The projection learns.
    ],
)
def test_the_index_of_frozen_documents_does_not_grow_stale(
    tmp_path, frozen, stale
):
  optimizer = config_lib.OptimizerConfig(frozen=frozen)
  changes = {'refresh__age_steps': 190.0, 'optimizer': optimizer}
  findings = _findings(_run(tmp_path, **changes))
  assert [name for name, _ in findings] == stale


def test_a_run_of_an_older_version_has_fewer_figures(tmp_path):
  older = {n.replace('/', '__'): None for n in _GOOD if n.startswith('gates')}
  report = doctor.examine(_run(tmp_path, **older))
  assert report.findings == []
  assert not any(name.startswith('gates') for name in report.figures)


def test_a_damaged_generation_is_named(tmp_path):
  workdir = _run(tmp_path)
  files.write_json(workdir / 'index' / '150' / 'manifest.json', {'version': 1})
  (workdir / 'index' / process.HEARTBEAT).write_text('{')
  ((diagnosis, text),) = _findings(workdir)
  assert diagnosis == 'damaged index'
  assert 'index/150' in text and 'realm-jax index verify' in text


def test_what_is_no_run_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match='is not a workdir'):
    doctor.examine(tmp_path)
  _run(tmp_path)
  (tmp_path / 'metrics.jsonl').write_text('')
  with pytest.raises(ValueError, match='no step has been logged yet, every'):
    doctor.examine(tmp_path)


def test_the_command_exits_with_1_if_something_is_wrong(tmp_path, capsys):
  workdir = _run(tmp_path)
  actions.doctor(workdir=str(workdir), json=True)
  assert json.loads(capsys.readouterr().out)['findings'] == []
  _run(tmp_path, gates__recall_at_20=0.0)
  with pytest.raises(SystemExit, match='1'):
    actions.doctor(workdir=str(workdir), json=True)
  report = json.loads(capsys.readouterr().out)
  assert [f['diagnosis'] for f in report['findings']] == ['cold retriever']
  assert report['figures']['gates/findable'] == 0.6
  with pytest.raises(SystemExit):
    actions.doctor(workdir=str(workdir), json=False)
  assert '\ncold retriever: the share of ' in capsys.readouterr().out
