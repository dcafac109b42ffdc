"""The command line, as a user has it: processes, exit codes, messages."""

import inspect
import json
import logging
import os
import pathlib
import subprocess
import sys

from absl import flags
import pytest

from realm_jax import config as config_lib
from realm_jax import main
from realm_jax.cli import commands
from realm_jax.trainer import loop

_ROOT = pathlib.Path(__file__).parents[2]
_STAGE = f'{_ROOT}/experiments/quickstart.py'
# A job of seconds: one narrow layer, few steps.
_SMALL = (
    '--config.steps=8 --config.batch_size=8 --config.num_candidates=3'
    ' --config.model.num_layers=1 --config.model.width=32'
    ' --config.model.mlp_width=64 --config.optimizer.warmup_steps=2'
    ' --config.refresh.interval=4 --config.refresh.lag=2'
    ' --config.checkpoint.interval=4 --config.log_interval=1'
).split()


def _run(*arguments, timeout=300):
  # One device, as on a user's machine, and not the eight of the tests.
  return subprocess.run(
      [sys.executable, '-m', 'realm_jax', *map(str, arguments)],
      cwd=_ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
      timeout=timeout,
  )


def _works(*arguments):
  done = _run(*arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture
def fails(monkeypatch, capsys):
  """Returns a call of a wrong command line that returns its messages.

  In this process: most of the seconds of a process are its imports.
  """
  known = set(flags.FLAGS)
  root = logging.getLogger()
  before = root.level, [*root.handlers]

  def call(*arguments):
    monkeypatch.setattr(sys, 'argv', ['realm-jax', *arguments])
    # An experiment file is executed in its last module.
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)
    with pytest.raises(SystemExit) as end:
      main.run()
    assert end.value.code in (1, 2)
    return capsys.readouterr().err

  monkeypatch.chdir(_ROOT)
  yield call
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)
  flags.FLAGS.mark_as_parsed()
  root.setLevel(before[0])
  root.handlers[:] = before[1]


def test_all_of_it_with_a_separate_index_builder(tmp_path):
  corpus = tmp_path / 'corpus'
  counts = json.loads(
      _works('prepare', '--source=world:5:20', f'--output={corpus}')
  )
  assert counts['passages'] > 50
  for stage in ('mlm', 'ict'):
    summary = json.loads(
        _works('train', f'--config={_STAGE}:{stage}', *_SMALL,
               f'--workdir={tmp_path}/{stage}', f'--config.corpus={corpus}')
    )
    assert summary['step'] == 8
  realm = tmp_path / 'realm'
  summary = json.loads(
      _works('train', f'--config={_STAGE}:realm', *_SMALL,
             f'--workdir={realm}', f'--config.corpus={corpus}',
             f'--config.init_from={tmp_path}/mlm,{tmp_path}/ict',
             '--with_index_builder')
  )
  assert summary['index_generation'] == 4
  assert (realm / 'index_builder.log').read_text().count('Published') >= 2
  table = _works('evaluate', f'--workdir={realm}', '--steps=all', '--limit=50')
  assert 'recall@5' in table and 'accuracy with retrieval' in table
  for name in ('0.json', '8.json', 'report.md', 'recall.png', 'training.png'):
    assert (realm / 'evaluation' / name).stat().st_size > 0
  page = tmp_path / 'page.html'
  shown = _works('inspect', f'--workdir={realm}', f'--html={page}',
                 'The pet of Falik was a [MASK].')
  assert 'p(z|x)' in shown
  assert 'Falik' in page.read_text()
  # Fresh indexes can also be made afterwards, and evaluate takes them.
  assert str(realm / 'index') in _works('index', f'--workdir={realm}')
  found = json.loads(_works('index', 'info', f'--workdir={realm}', '--json'))
  assert [one['step'] for one in found['generations']][-1] == 8
  assert found['generations'][-2]['checkpoints'] == [8]
  shard = realm / 'index' / '8' / 'shard-00000.npy'
  shard.write_bytes(shard.read_bytes()[:-1])
  done = _run('index', 'verify', f'--workdir={realm}')
  assert done.returncode == 1 and done.stdout.count('sound') >= 1
  assert f'{realm}/index/8: 1 PROBLEM(S)' in done.stdout


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_an_action_takes_the_flags_of_its_command(name):
  command = commands.COMMANDS[name]
  names = [flag.name for flag in command.flags]
  assert len(set(names)) == len(names)
  inspect.signature(command.action).bind(**dict.fromkeys(names))


def test_deterministic_sets_the_flag_of_xla_and_the_config(monkeypatch):
  flag, seen = '--xla_gpu_deterministic_ops=true', []

  def train(config, *_, **__):
    seen.append((config.deterministic, os.environ['XLA_FLAGS'].split()))
    return {}

  monkeypatch.setattr(loop, 'train', train)
  command = commands.COMMANDS['train']
  options = {x.name: x.default for x in command.flags}
  for given in (False, True):
    monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=x')
    config = config_lib.Config(objective='ict')
    command.action(
        **{**options, 'config': config, 'workdir': 'w', 'deterministic': given}
    )
  assert seen == [
      (False, ['--xla_dump_to=x']), (True, ['--xla_dump_to=x', flag])
  ]


def test_help_lists_commands_and_flags():
  usage = _works('--help')
  for command in ('prepare', 'train', 'index', 'index verify', 'inspect'):
    assert command in usage
    assert f'usage: realm-jax {command}' in _works(*command.split(), '--help')
  assert '  index info: ' in _works('index', '--help')
  assert '--pretraining_source' in _works('prepare', '--help')
  assert '--with_index_builder' in _works('train', '--help')
  assert 'index, metrics. (required)' in _works('train', '--help')
  assert 'h100' in _works('plan', '--chip=list')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['index', '--wrokdir=x'], 'Did you mean: workdir'),
        (['index'], 'realm-jax index: --workdir is missing.'),
        (['plan'], '--config is missing'),
        (['index', '--workdir=/nowhere/at/all'], 'is not a workdir'),
        (['evaluate', '--workdir=/nowhere/at/all'], '/nowhere/at/all'),
        (['index', 'update', '--workdir=/nowhere/at/all', '--input=x'],
         '/nowhere/at/all'),
        (['index', 'delete', '--workdir=/nowhere/at/all', '--input=x'],
         '/nowhere/at/all'),
        (['export', '--workdir=/nowhere/at/all', '--format=index',
          '--output=/tmp/never'], '/nowhere/at/all'),
        (['questions', '--source=/no/such.jsonl', '--output=/tmp/never'],
         '/no/such.jsonl'),
        (['inspect', '--workdir=x'], 'Give one sentence with a [MASK]'),
        (['compare', 'a'], 'usage: realm-jax compare [--flag=value ...]'),
        (['index', '--workdir=x', 'extra'], "flags only, not 'extra'"),
        (['index', '--workdir=x', 'info'], 'Put it first: `realm-jax index'),
        (['index', 'verfiy', '--workdir=x'], 'Did you mean `index verify`?'),
        (['index', 'verify', '--follow'], "Unknown command line flag 'follow'"),
        (['prepare', '--source=/no/such.jsonl', '--output=/tmp/never'],
         '/no/such.jsonl'),
        (['train', f'--config={_STAGE}:ict', '--workdir=x'],
         'give the folder that `prepare` wrote'),
        (['train', f'--config={_STAGE}:ict', '--workdir=x',
          '--config.batchsize=3'],
         '--config.batchsize: there is no such field. Did you mean'
         ' --config.batch_size?'),
        (['train', f'--config={_STAGE}:ict', '--workdir=x',
          '--config.refresh.lagg=3'], 'Did you mean --config.refresh.lag?'),
        (['train', f'--config={_STAGE}:ict', '--workdir=x',
          '--config.batch_size=many'], 'many'),
        (['train', f'--config={_STAGE}:ict', '--workdir=x',
          '--config.lengths=3'],
         '--config.lengths is a section; set its fields,'
         ' --config.lengths.query, --config.lengths.document, --config'),
        (['train', f'--config={_STAGE}:ict', '--workdir=x',
          '--config.mlm.views=own'], 'is no JSON (Expecting value'),
        (['train', f'--config={_STAGE}:realm', '--workdir=x',
          '--config.mips.backend=scan'], 'must be one of'),
        (['train', f'--config={_STAGE}:ict2', '--workdir=x'],
         "No stage 'ict2'; there are mlm, ict, realm"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_a_line(fails, arguments, message):
  assert message in fails(*arguments)


@pytest.mark.parametrize(
    'words',
    ['--config={}', '--config={} --config.steps=3', '--config {}'],
)
@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('other.py', '', '--config: there is no file {}. Did you mean {}'),
        ('mine.py', 'x = 1', '{} has no function get_config'),
        ('mine.py', 'x = 1 +', '{}, line 1: SyntaxError: invalid syntax'),
        ('mine.py', 'import nothing_such', '{}, line 1: ModuleNotFoundError'),
        ('mine.py', '\nopen("/no/such")', '{}: [Errno 2] No such file or'),
        ('mine.py', 'def get_config():\n  {}[1]', '{}, line 2: KeyError: 1'),
    ],
)
def test_an_experiment_file_that_cannot_be_used(
    fails, tmp_path, name, text, message, words
):
  (tmp_path / 'mine.py').write_text(text)
  (tmp_path / 'others.py').touch()
  words = words.format(tmp_path / name).split()
  said = fails('train', '--workdir=x', *words)
  expected = message.replace('{}', str(tmp_path / name), 1)
  assert expected.replace('{}', str(tmp_path / 'others.py')) in said
  assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        (['trian'], 2, "No command 'trian'. Did you mean `train`?"),
        (['train', f'--config={_STAGE}:ict', '--workdir=x',
          '--config.corpus=/no/corpus'], 1, 'There is no corpus /no/corpus'),
    ],
)
def test_a_failed_process_has_an_exit_code_and_no_traceback(
    arguments, code, message
):
  done = _run(*arguments)
  assert done.returncode == code and message in done.stderr
  assert 'Traceback' not in done.stderr
