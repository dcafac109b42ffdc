"""`realm-jax ask`: questions answered on the command line.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import dataclasses
import json
import sys
from typing import Any

from absl import app
from absl import flags

from realm_jax.cli import flags as flags_lib

FLAGS = flags.FLAGS


def _ask_flags() -> None:
  flags_lib.workdir_flag()
  flags.DEFINE_integer(
      'k', None, 'Passages to read; default: as many as in training.'
  )
  flags.DEFINE_integer('step', None, 'Of a checkpoint; default: the newest.')
  flags.DEFINE_boolean('json', False, 'One JSON object for each question.')


def _ask(argv: Sequence[str]) -> None:
  if len(argv) > 2:
    raise app.UsageError(
        f'Give one question, in quotes, or none; got {len(argv) - 1}.'
    )
  flags_lib.quiet_jax()
  from realm_jax.api import open_qa

  loaded = open_qa.OpenQA.load(FLAGS.workdir, FLAGS.step)
  if len(argv) == 2:
    print(_shown(loaded, argv[1]))
    return
  terminal = sys.stdin.isatty()
  if terminal:
    print('A question in each line; an empty line ends.')
  while True:
    if terminal:
      print('> ', end='', flush=True)
    line = sys.stdin.readline().strip()
    if not line:
      return
    print(_shown(loaded, line), flush=True)


def _shown(loaded: Any, question: str) -> str:
  answer = loaded.answer(question, FLAGS.k)
  age = loaded.index_age_seconds
  index = {
      'checkpoint': loaded.step,
      'index_generation': loaded.index_generation,
      'index_age_seconds': None if age is None else round(age),
  }
  if FLAGS.json:
    # A reader of spans has nothing to read from without a passage.
    values = {**dataclasses.asdict(answer), 'without_retrieval': '', **index}
    return json.dumps(values, ensure_ascii=False)
  lines = [f'{answer.text or "(no answer)"}   p={answer.probability:.2f}', '']
  for number, passage in enumerate(answer.passages):
    mark = '*' if number == answer.best else ' '
    lines.append(
        f'{mark} p(z|x)={passage.probability:.2f}'
        f' answer p={passage.answer_probability:.2f}  {passage.id}'
        f'  {passage.title}'
    )
    lines.append(f'    {_marked(passage)}')
  lines += [
      '',
      'Without retrieval: nothing; this reader answers with a part of a'
      ' passage.',
      f'Checkpoint {index["checkpoint"]}, index generation'
      f' {index["index_generation"]}'
      + ('.' if age is None else f', published {_ago(age)} ago.'),
  ]
  return '\n'.join(lines)


def _marked(passage: Any) -> str:
  text = passage.text.encode('utf-8')
  parts = (
      text[: passage.start],
      text[passage.start : passage.limit],
      text[passage.limit :],
  )
  before, answer, after = (part.decode('utf-8') for part in parts)
  return f'{before}[{answer}]{after}' if answer else before + after


def _ago(seconds: float) -> str:
  for unit, size in (('days', 86_400), ('hours', 3_600), ('minutes', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:.0f} {unit}'
  return f'{seconds:.0f} seconds'


COMMANDS = {
    'ask': flags_lib.Command(
        'Answers questions from the passages of a corpus.',
        'realm-jax ask --workdir=runs/open_qa "who founded Delatuk?"',
        _ask_flags,
        _ask,
        positional='[QUESTION]',
    ),
}
