"""Files for people: JSON, Markdown, plots, and what happens without them."""

import builtins
import json

import pytest

from realm_jax.evaluation import report


def _result(step, recall=0.25, masked=True):
  group = {
      'questions': 8,
      'with_gold_passage': 8,
      'gold': {'recall_at_1': recall, 'recall_at_5': 0.5, 'mrr': 0.4},
      'answer': {'recall_at_1': 0.3, 'mrr': 0.45},
  }
  result = {'step': step, 'questions': {'all': group, 'held_out': group}}
  if masked:
    result['masked'] = {
        'sentences': 12,
        'accuracy_with_retrieval': 0.75,
        'accuracy_with_random_passages': 0.25,
        'accuracy_without_retrieval': 0.02,
        'retrieval_utility': 3.25,
        'null_share': 0.01,
    }
  return result


def _metrics(workdir):
  lines = [
      {
          'step': step,
          'train/loss': 9.0 / step if step < 40 else 'nan',
          'train/null_share': 0.1,
          'train/retrieval_utility': 0.5,
          'refresh/age_steps': step % 20,
      }
      for step in range(10, 50, 10)
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (workdir / 'metrics.jsonl').write_text(text)


def test_results_are_read_back_in_order(tmp_path):
  for step in (100, 20, 3):
    report.save(tmp_path, _result(step))
  (tmp_path / 'evaluation' / 'notes.json').write_text('{}')
  assert [r['step'] for r in report.load_all(tmp_path)] == [3, 20, 100]
  assert report.load_all(tmp_path)[2] == _result(100)
  assert report.load_all(tmp_path / 'nowhere') == []


def test_table():
  text = report.table([_result(0, masked=False), _result(50, 0.875)])
  rows = [
      [cell.strip() for cell in line.strip('|').split('|')]
      for line in text.splitlines()
      if line.startswith('|')
  ]
  retrieval = [row for row in rows if len(row) == 16]
  assert retrieval[0][:4] == ['step', 'facts', 'questions', 'recall@1']
  assert retrieval[2][:5] == ['0', 'all', '8', '25.0', '50.0']
  assert retrieval[5][:5] == ['50', 'held_out', '8', '87.5', '50.0']
  assert retrieval[2][5] == ''  # recall@20 was not measured.
  masked = [row for row in rows if len(row) == 8]
  assert masked[0][5] == 'same reader, null document alone'
  assert masked[2][:2] == ['50', '12']
  assert masked[2][3:] == ['0.750', '0.250', '0.020', '3.250', '0.010']
  assert len(masked) == 3
  assert report.table([]) == ''


def test_the_table_says_what_was_resampled_and_what_was_excluded():
  result = _result(50)
  group = result['questions']['all']
  group['clusters'] = 3
  group['open_qa'] = {'exact_match': 0.5, 'exact_match_interval': [0.25, 0.75]}
  result['masked'] |= {
      'clusters': 4,
      'accuracy_with_retrieval_interval': [0.5, 1.0],
      'trivial': 'passage',
      'trivial_in_training': 'passage',
  }
  text = report.table([result])
  assert '95 % interval, resampled by cluster: the article of the gold' in text
  assert '| 50 | all | 8 | 3 | 50.0 (25.0 to 75.0) |' in text
  assert '| 50 | 12 | 4 | 0.750 (0.500 to 1.000) | 0.250 | 0.020 |' in text
  assert 'trained with' not in text
  result['masked']['trivial_in_training'] = 'none'
  assert (
      'Step 50: measured with config.trivial=passage, trained with none.'
      in report.table([result])
  )


def test_the_table_says_what_figures_of_questions_depend_on():
  result = _result(50, masked=False)
  result['answer_match'] = {'dpr': 6, 'regex': 2}
  result['unknown_gold'] = {
      'ids': 7, 'questions': 3, 'first': ['a b', 'c'], 'counted': 'they count'
  }
  result['questions']['all'] |= {'with_gold_passage': 5, 'with_answers': 8}
  text = report.table([result])
  assert 'by the rule `dpr` (6 questions), `regex` (2 questions)' in text
  assert "7 gold passages of 3 questions are not in the corpus ('a b'," in text
  assert 'all: the figures of the 8 questions are over 5 of them by gold' in (
      text
  )
  assert 'by answer.' not in text
  assert 'Step' not in report.table([_result(50)])


def test_write_draws_what_there_is(tmp_path):
  pytest.importorskip('matplotlib')
  _metrics(tmp_path)
  for step in (0, 50):
    report.save(tmp_path, _result(step, step / 100))
  # Some readers of lines end one at this character.
  questions = tmp_path / 'evaluation' / f'50{report.QUESTIONS}'
  questions.write_text('{"question": "a\u2028b"}\n', encoding='utf-8')
  printed = report.write(tmp_path, [_result(50)])
  folder = tmp_path / 'evaluation'
  for name in ('recall.png', 'training.png'):
    assert (folder / name).read_bytes().startswith(b'\x89PNG')
    assert name in printed
  text = (folder / 'report.md').read_text()
  assert '![recall](recall.png)' in text
  assert '| 0 | all |' in text and '| 50 | all |' in text
  assert '| 0 | all |' not in printed and '| 50 | all |' in printed


def test_curves_hold_the_figures(tmp_path):
  panels = report.recall_panels([_result(0, 0.1), _result(50, 0.6)])
  assert panels['gold passage, held_out questions']['recall@1'] == [
      (0, 0.1), (50, 0.6),
  ]
  assert panels['masked spans filled in']['without'] == [(0, 0.02), (50, 0.02)]
  _metrics(tmp_path)
  lines = [json.loads(x) for x in (tmp_path / 'metrics.jsonl').open()]
  training = report.training_panels(lines)
  assert training['loss'][''] == [(10, 0.9), (20, 0.45), (30, 0.3)]
  assert training['age of the index in steps'][''][1] == (20, 0)


def test_without_matplotlib_the_table_is_still_written(
    tmp_path, monkeypatch, caplog
):
  real_import = builtins.__import__

  def no_matplotlib(name, *args, **kwargs):
    if name.split('.')[0] == 'matplotlib':
      raise ImportError('no such package')
    return real_import(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', no_matplotlib)
  report.save(tmp_path, _result(5))
  with pytest.raises(ImportError, match=r'pip install .*\[plot\]'):
    report.plot(tmp_path)
  report.write(tmp_path, [_result(5)])
  assert '| 5 | all |' in (tmp_path / 'evaluation' / 'report.md').read_text()
  assert 'pip install' in caplog.text
