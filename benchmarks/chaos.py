"""A job whose builder and trainer are killed again and again.

  python benchmarks/chaos.py --output=benchmarks/results/chaos.json \
      [--builder_kills=50] [--trainer_kills=20] [--seed=0] [--small]

`realm-jax train --with_index_builder` runs twice on a small generated world:
in peace, and with SIGKILL at random moments to the index builder, which its
trainer restarts, and to the trainer, which this script restarts. The seed
determines the moments: a step of the run, and some seconds after it. Checks:

  * every adopted generation came at the step that `scheduled` asks for, from
    the parameters of which the run in peace took a snapshot at that step;
  * all generations of both runs can be read, and hold the same bytes;
  * training ended with the parameters of the run in peace, bit for bit, and
    the same loss at every step.
"""

import collections
import dataclasses
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import harness
import numpy as np

from realm_jax.index import generation
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import process

_ADOPTED = re.compile(
    r'Step (?P<step>\d+): index generation (?P<generation>\d+) adopted'
    r'.* parameters (?P<digest>[0-9a-f]{64})'
)
# The longest delay of a kill after its step: a builder may still start, or be
# due to replace one that was killed.
_DELAY_SECONDS = {'builder': 6.0, 'trainer': 3.0}
_LAG = 10
_POLL_SECONDS = 0.2
_RECORDED = ('victim', 'seconds', 'at_step', 'found')  # Fields of `_Kill`.
_PATIENCE_SECONDS = 600.0  # Without any progress.


@dataclasses.dataclass
class _Kill:
  """One SIGKILL: its plan, and its time."""

  victim: str  # 'builder' or 'trainer'
  step: int  # That the trainer has to have reached.
  delay: float  # Seconds from then on.
  due: float | None = None
  seconds: float | None = None  # Since the start of the run.
  at_step: int | None = None
  found: str = ''  # State of the builder.


class _Run:
  """A job in a workdir, with or without kills."""

  def __init__(self, workdir: pathlib.Path, words: list[str]):
    self.workdir = workdir
    self._command = harness.command(
        'train', f'--workdir={workdir}', '--with_index_builder', *words
    )
    self.log = workdir.with_suffix('.log')
    self.progress: list[tuple[float, int]] = []

  def run(self, kills: list[_Kill]) -> float:
    """Runs to the end; returns the seconds."""
    start = time.monotonic()
    trainer = self._start()
    try:
      while True:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic() - start
        lines = metrics_lib.read_metrics(self.workdir)
        step = lines[-1]['step'] if lines else 0
        if not self.progress or step != self.progress[-1][1]:
          self.progress.append((now, step))
        code = trainer.poll()
        if code == 0:
          return now
        if code is not None and code != -signal.SIGKILL:
          raise RuntimeError(f'The trainer ended with {code}; see {self.log}.')
        if now - self.progress[-1][0] > _PATIENCE_SECONDS:
          raise RuntimeError(f'The job makes no progress; see {self.log}.')
        for kill in kills:
          if kill.seconds is None and step >= kill.step:
            kill.due = kill.due or now + kill.delay
            if now >= kill.due and self._kill(kill, trainer.pid):
              kill.seconds, kill.at_step = now, step
              if kill.victim == 'trainer':
                trainer.wait()
                trainer = self._start()
              break
    finally:
      if trainer.poll() is None:
        trainer.terminate()
        trainer.wait()

  def _kill(self, kill: _Kill, trainer: int) -> bool:
    """Kills the victim; returns whether it was there."""
    pid: int | None = trainer
    if kill.victim == 'builder':
      pid = _builder(trainer)
      if pid is None:
        # The trainer has yet to restart it. The delay starts again, so that
        # kills meet the builder in all its activities.
        kill.due = None
        return False
      kill.found = self._doing(pid)
    os.kill(pid, signal.SIGKILL)
    return True

  def _start(self) -> subprocess.Popen[bytes]:
    with self.log.open('ab') as file:
      return subprocess.Popen(
          self._command, stdout=subprocess.DEVNULL, stderr=file
      )

  def _doing(self, pid: int) -> str:
    heartbeat = process.read_heartbeat(self.workdir / generation.DIRECTORY)
    if heartbeat is None or heartbeat['pid'] != pid:
      return 'starting'  # Python and JAX.
    return heartbeat['state']

  def adoptions(self) -> list[dict[str, Any]]:
    text = self.log.read_text(errors='replace')
    return [
        match.groupdict()
        | {name: int(match[name]) for name in ('step', 'generation')}
        for match in _ADOPTED.finditer(text)
    ]


def _builder(trainer: int) -> int | None:
  """The process id of the trainer's index builder, if it runs."""
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      parent = int((path / 'stat').read_text().rpartition(')')[2].split()[1])
      if parent == trainer and b'--follow' in (path / 'cmdline').read_bytes():
        return int(path.name)
    except (FileNotFoundError, ProcessLookupError):
      continue
  return None


def _shards(workdir: pathlib.Path, step: int) -> list[str]:
  """SHA-256 of the embeddings of a generation, after checking every byte."""
  loaded = generation.load(workdir / generation.DIRECTORY / str(step))
  return [facts['sha256'] for facts in loaded.manifest['files']]


def _check(peace: _Run, chaos: _Run) -> dict[str, Any]:
  """Returns the figures of the comparison."""
  wrong_digest, wrong_step = [], []
  adoptions = chaos.adoptions()
  for adoption in adoptions:
    number = adoption['generation']
    if adoption['digest'] != checkpoint.snapshot_digest(peace.workdir, number):
      wrong_digest.append(adoption)
    if adoption['step'] != (number + _LAG if number else 0):
      wrong_step.append(adoption)
  directory = generation.DIRECTORY
  steps = checkpoint.steps_in(peace.workdir / directory)
  differing = [
      step
      for step in steps
      if _shards(peace.workdir, step) != _shards(chaos.workdir, step)
  ]
  digests = [
      files.read_json(run.workdir / 'summary.json')['params_sha256']
      for run in (peace, chaos)
  ]
  curves = [
      [(line['step'], line['train/loss'], line['refresh/generation'])
       for line in metrics_lib.read_metrics(run.workdir)]
      for run in (peace, chaos)
  ]
  missing = set(steps) - set(checkpoint.steps_in(chaos.workdir / directory))
  unreadable = chaos.log.read_text(errors='replace').count(' is damaged')
  found = {
      'adoptions': len(adoptions),
      'adoptions_of_other_parameters': wrong_digest,
      'adoptions_at_another_step': wrong_step,
      'generations': len(steps),
      'generations_missing': sorted(missing),
      'generations_with_other_bytes': differing,
      'unreadable_generations_seen': unreadable,
      'params_sha256_in_peace': digests[0],
      'params_sha256': digests[1],
      'same_parameters': digests[0] == digests[1],
      'same_loss_and_generation_at_every_step': curves[0] == curves[1],
  }
  wrong = (wrong_digest, wrong_step, missing, differing, unreadable)
  found['ok'] = (
      found['same_parameters']
      and found['same_loss_and_generation_at_every_step']
      and not any(wrong)
  )
  return found


def _plot(
    output: pathlib.Path,
    chaos: _Run,
    kills: list[_Kill],
    adoptions: list[dict[str, Any]],
) -> None:
  figure, (axis,) = harness.panels(1, height=3.5)
  axis.plot(*zip(*chaos.progress, strict=True), color='0.6', lw=1, label='step')
  for victim, style in (('trainer', 'rX'), ('builder', 'yx')):
    mine = [kill for kill in kills if kill.victim == victim]
    axis.plot(
        [kill.seconds for kill in mine],
        [kill.at_step for kill in mine],
        style,
        label=f'{victim} killed',
    )
  steps = sorted({adoption['step'] for adoption in adoptions})
  seconds, reached = np.transpose(chaos.progress)
  at = seconds[np.argmax(reached >= np.array(steps)[:, None], axis=1)]
  axis.plot(at, steps, 'g.', label='generation first adopted')
  axis.set(xlabel='seconds', ylabel='training step')
  harness.save(figure, output)


def main() -> int:
  parser = harness.parser(__doc__, scratch='runs/chaos')
  parser.add_argument('--builder_kills', type=int, default=50)
  parser.add_argument('--trainer_kills', type=int, default=20)
  parser.add_argument('--steps', type=int, default=1500)
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  if arguments.small:
    arguments.builder_kills, arguments.trainer_kills = 3, 2
    arguments.steps = 200
  shutil.rmtree(arguments.scratch, ignore_errors=True)
  corpus = arguments.scratch / 'corpus'
  prepare.prepare(['world:0:100'], str(corpus), workers=1, progress=False)
  # Restarts take most of the time; a cache saves their compilation.
  os.environ.setdefault(
      'JAX_COMPILATION_CACHE_DIR', str((arguments.scratch / 'cache').absolute())
  )
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  settings = {
      'corpus': corpus,
      'steps': arguments.steps,
      'batch_size': 8,
      'log_interval': 1,
      'model.num_layers': 1,
      'model.width': 64,
      'model.mlp_width': 128,
      'model.dropout': 0.1,
      'optimizer.retriever_delay': 0,
      'refresh.interval': 25,
      'refresh.lag': _LAG,
      'refresh.keep': 0,
      'refresh.max_builder_failures': 0,
      'checkpoint.interval': 30,
      'checkpoint.keep': 2,
  }
  words = [
      f'--config={harness.EXPERIMENTS}/quickstart.py:realm',
      *harness.flags(settings),
  ]
  rng = random.Random(arguments.seed)
  kills = [
      _Kill(
          victim,
          rng.randrange(arguments.steps - 25),
          rng.uniform(0, _DELAY_SECONDS[victim]),
      )
      for victim, count in (
          ('builder', arguments.builder_kills),
          ('trainer', arguments.trainer_kills),
      )
      for _ in range(count)
  ]
  peace = _Run(arguments.scratch / 'peace', words)
  peace_seconds = peace.run([])
  chaos = _Run(arguments.scratch / 'chaos', words)
  chaos_seconds = chaos.run(kills)
  found = _check(peace, chaos)
  adoptions = chaos.adoptions()
  text = chaos.log.read_text(errors='replace')
  done = sorted(
      (kill for kill in kills if kill.seconds is not None),
      key=lambda kill: kill.seconds,
  )
  counts = collections.Counter(kill.victim for kill in done)
  figures = {
      'builder_kills': counts['builder'],
      'trainer_kills': counts['trainer'],
      'all_kills_done': len(done) == len(kills),
      **found,
      'steps': arguments.steps,
      # Adopted, lost with the trainer, and adopted once more.
      'adopted_again': len(adoptions) - len({a['step'] for a in adoptions}),
      'builder_kills_found_it': dict(
          collections.Counter(k.found for k in kills if k.found)
      ),
      'builder_restarts_by_the_trainer': text.count('it is started again in'),
      'seconds_in_peace': peace_seconds,
      'seconds': chaos_seconds,
      'seed': arguments.seed,
      'kills': [
          {name: getattr(kill, name) for name in _RECORDED} for kill in done
      ],
  }
  figures['ok'] = figures['ok'] and figures['all_kills_done']
  harness.write(arguments.output, figures, 'jax', 'flax')
  _plot(arguments.output, chaos, done, adoptions)
  return 0 if figures['ok'] else 1


if __name__ == '__main__':
  sys.exit(main())
