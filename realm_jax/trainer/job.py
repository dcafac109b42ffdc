"""The start of a job: checks, then initial or restored parameters."""

from collections.abc import Collection, Iterator
import contextlib
import dataclasses
import logging
import os
import pathlib
import shutil
import socket
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.corpus import masking
from realm_jax.models import components as components_lib
from realm_jax.models import encoders
from realm_jax.models import fused_attention
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import extension
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.trainer import initial
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages
from realm_jax.trainer import step

log = logging.getLogger(__name__)

_SHARED_SECONDS = 30.0  # Until a file of another host must be visible.


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything that stays the same while a job runs."""

  workdir: pathlib.Path
  config: config_lib.Config  # Resolved.
  corpus: corpus_lib.Corpus
  mesh: jax.sharding.Mesh
  stage: stages.Stage
  components: step.Components
  lineage: dict[str, str]  # Saved with every checkpoint, compared on resume.

  @property
  def layout(self) -> str:
    """Processes and devices in words; saved with every checkpoint."""
    axes = ', '.join(f'{name} {n}' for name, n in self.mesh.shape.items())
    return (
        f'{jax.process_count()} process(es) x {jax.local_device_count()}'
        f' device(s) ({axes})'
    )


def validate(config: config_lib.Config) -> None:
  """Checks a config with the checks of its stage.

  Raises:
    ValueError: names every wrong field, and what would be right.
  """
  config_lib.validate(config, lambda: _problems(config))


def _problems(config: config_lib.Config) -> stages.Problems:
  stage = stages.load(config)
  extension.load('config.masking', config.masking, masking.MASKS)
  yield from encoders.load(config.model).problems(config.model)
  longest = stage.longest_input(config)
  if longest > config.model.max_positions:
    yield (
        'model.max_positions',
        f'is less than the longest input, {longest} wordpieces',
    )
  yield from _frozen_problems(config, stage.components)
  yield from stage.problems(config)


def _frozen_problems(
    config: config_lib.Config, components: tuple[str, ...]
) -> stages.Problems:
  frozen, parameters, parts = config.optimizer.frozen, list(components), ''
  if set(frozen) - set(components):
    parameters = [
        f'{component}.{name}'
        for component, one in stages.components_of(config).items()
        for name in one.abstract
    ]
    modules = ['.'.join(name.split('.')[:2]) for name in parameters]
    parts = f' with the parts {", ".join(dict.fromkeys(modules))}'
  for prefix in frozen:
    if not any(f'{name}.'.startswith(f'{prefix}.') for name in parameters):
      yield (
          'optimizer.frozen',
          f'no parameter is named {prefix}.*; the objective'
          f' {config.objective!r} has the components {components}{parts}',
      )
  if all(components_lib.is_frozen(config, name) for name in parameters):
    yield 'optimizer.frozen', 'leaves nothing to learn'


def open_job(
    config: config_lib.Config,
    workdir: pathlib.Path | str,
    explicit: Collection[str] = (),
) -> Job:
  """Makes all checks that need no expensive work, and opens the job.

  Nothing is written; see `begin`. A job whose workdir has a checkpoint must
  agree with its config.json in everything that determines the result, except
  that `steps` may grow.

  Args:
    config: of the job.
    workdir: of the job; it need not exist.
    explicit: fields given on the command line, such as 'model.width', which
      the workdirs of config.init_from may not change.

  Raises:
    ValueError: a wrong config, a workdir of another config or corpus, a corpus
      that is too small, a mesh that does not fit; processes that differ in any
      of these.
    FileNotFoundError: no corpus, or no workdir to start from.
    ImportError: a package that config.log_to needs is not installed.
  """
  workdir = pathlib.Path(workdir).absolute()
  if getattr(config, 'init_from', ''):
    config_lib.validate(config)  # The stage's checks need the sizes.
  else:
    validate(config)
  metrics_lib.loggers(config)  # Their packages are installed.
  stage_class = stages.load(config)
  corpus = corpus_lib.Corpus.open(config.corpus, '--config.corpus')
  saved = _saved_config(workdir)
  if initial.sources(config):
    if saved is None:
      config = initial.follow(config, stage_class, corpus.tokenizer, explicit)
    else:
      config = initial.follow_saved(config, stage_class, saved, explicit)
    validate(config)
  default_warmup = config.optimizer.warmup_steps < 0
  config = config_lib.resolve(config)
  vocab_size = corpus.tokenizer.vocab_size
  if config.model.vocab_size not in (0, vocab_size):
    raise ValueError(
        f'config.model.vocab_size={config.model.vocab_size}, but the tokenizer'
        f' of {config.corpus} has {vocab_size} wordpieces; 0 takes it over.'
    )
  corpus.tokenizer.complete(config.model)
  # Absolute: the index builder and `evaluate` may run in another folder.
  config.corpus = str(corpus.directory.absolute())
  stage_class.complete(config)
  stage = stage_class(config, corpus)
  lineage = {
      'config_digest': config_lib.digest(config),
      'corpus_fingerprint': corpus.fingerprint,
      'tokenizer_digest': corpus.tokenizer.digest,
      **stage.lineage,
  }
  _check_same_processes(config, lineage)
  if saved is not None:
    _check_same_job(workdir, config, saved, lineage, default_warmup)
  cuts.warn_of_passages(corpus, config)
  if stage_class.searches:
    _warn_of_refreshes(config)
  mesh = mesh_lib.make_mesh(config.mesh, config.batch_size)
  mesh_lib.check(config, mesh)
  fused_attention.check(config.model, mesh.devices.flat[0])
  components = stages.components_of(config)
  return Job(workdir, config, corpus, mesh, stage, components, lineage)


def replaces_a_start(job: Job) -> bool:
  """Whether config.json is of another job, which ended before it saved a step.

  Snapshots and generations of that start are not those of this job.
  """
  path = job.workdir / 'config.json'
  if not path.is_file() or _saved_config(job.workdir) is not None:
    return False
  before = config_lib.read(job.workdir)
  differing = config_lib.differences(job.config, before)
  if not differing and before.corpus == job.config.corpus:
    return False
  log.info(
      '%s is of a start that saved no step; it is replaced.%s', path,
      ''.join(f'\n  {line}' for line in differing),
  )
  return True


def begin(job: Job) -> None:
  """Writes config and tokenizer of a job whose first step is about to run."""
  job.workdir.mkdir(parents=True, exist_ok=True)
  # The tokenizer, too: a model is exported and embeds without its corpus.
  job.corpus.tokenizer.save(job.workdir, settings=True)
  files.write_json(
      job.workdir / 'config.json', config_lib.to_dict(job.config)
  )


def names_in(folder: pathlib.Path) -> set[str]:
  """Returns the names in a folder; none if it does not exist."""
  return set(os.listdir(folder)) if folder.is_dir() else set()


@contextlib.contextmanager
def removes_failed_start(
    workdir: pathlib.Path, before: set[str]
) -> Iterator[None]:
  """Removes what a start has made, if it fails before config.json is written.

  Args:
    workdir: of the job, locked.
    before: names of the files that were there before the lock.
  """
  try:
    yield
  except BaseException:
    if not (workdir / 'config.json').exists():
      made = {checkpoint.CHECKPOINTS, 'profile', *metrics_lib.FILES}
      for name in made - before:
        shutil.rmtree(workdir / name, ignore_errors=True)
        with contextlib.suppress(OSError):
          (workdir / name).unlink()
      if '.trainer.lock' not in before:
        (workdir / '.trainer.lock').unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # It has other files.
        workdir.rmdir()
    raise


def start_or_resume(
    job: Job,
    checkpoints: checkpoint.Checkpoints,
    tx: optax.GradientTransformation,
) -> tuple[step.TrainState, dict[str, Any]]:
  """Returns the state to continue from, and what was saved with it.

  The state comes from the newest checkpoint of the workdir, which may have been
  saved on other devices or processes. Without one, parameters come from the
  workdirs in config.init_from (`initial.load`), all others are drawn at random
  from config.seed.

  Raises:
    ValueError: naming the parameters whose presence or shape differs.
  """
  shardings = step.state_shardings(job.config, job.components, tx, job.mesh)
  # Process 0 decides: hosts may see a shared folder in different states.
  latest = distributed.broadcast(checkpoints.latest)
  if latest is not None:
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        step.abstract_state(job.components, tx),
        shardings,
    )
    rest = {
        'step': state.step, 'opt_state': state.opt_state, 'rng': state.rng
    }
    params, rest = checkpoints.restore(latest, state.params, rest)
    log.info('Resuming %s at step %d.', job.workdir, latest)
    saved = checkpoint.saved_about(job.workdir, latest)
    before = saved.get('layout', job.layout)
    if before != job.layout:
      log.info(
          'It was on %s, now it is on %s. The batches stay the same, in the'
          ' same order; sums over devices may differ in their last bits.',
          before,
          job.layout,
      )
    return step.TrainState(params=params, **rest), saved

  def fresh(loaded: dict[str, components_lib.Params]) -> step.TrainState:
    params = {}
    for name, component in job.components.items():
      params[name] = loaded.get(name, {})
      if params[name].keys() != component.abstract.keys():
        params[name] = {**component.init(job.config.seed), **params[name]}
    root = jax.random.key(job.config.seed)
    return step.TrainState(jnp.int32(0), params, tx.init(params), root)

  loaded = initial.load(
      job.config, job.components, job.stage.searches
  )
  return jax.jit(fresh, out_shardings=shardings)(loaded), {}


def _warn_of_refreshes(config: config_lib.Config) -> None:
  """Logs if refreshes change nothing."""
  policy = config.refresh.policy
  if policy != 'none' and config_lib.documents_are_frozen(config):
    log.warning(
        'config.refresh.policy=%s embeds the corpus again and again, but'
        ' config.optimizer.frozen=%s leaves all documents as they are. Set'
        ' config.refresh.policy=none in a new workdir.',
        policy, config.optimizer.frozen,
    )


def _check_same_processes(
    config: config_lib.Config, lineage: dict[str, str]
) -> None:
  """Checks that all processes run the same job on the same kind of host."""
  values = config_lib.flat(config)
  del values['corpus']  # Its path may differ; its fingerprint may not.
  distributed.same('config', values)
  inputs = {name: x for name, x in lineage.items() if name != 'config_digest'}
  distributed.same('corpus', inputs)
  host = {
      'devices': jax.local_device_count(),
      'device': jax.local_devices()[0].device_kind,
      'jax': jax.__version__,
  }
  distributed.same('host', host)


def check_shared(job: Job, file: str) -> None:
  """Checks that all processes see a file that process 0 has written.

  Raises:
    ValueError: they do not share the folder.
  """
  distributed.barrier(f'{file} is written')
  deadline = time.monotonic() + _SHARED_SECONDS
  while not (job.workdir / file).exists():
    if time.monotonic() > deadline:
      raise ValueError(
          f'{job.workdir} on {socket.gethostname()} is not the folder that'
          ' process 0 writes to: --workdir must be on storage that all hosts'
          ' share.'
      )
    time.sleep(0.1)


def _saved_config(workdir: pathlib.Path) -> config_lib.Config | None:
  """Returns the config of a workdir that has a checkpoint, or None.

  A start that ended before its first checkpoint binds no later one.
  """
  if not (workdir / 'config.json').exists():
    return None
  if not checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS):
    return None
  return config_lib.read(workdir)


def _check_same_job(
    workdir: pathlib.Path,
    config: config_lib.Config,
    theirs: config_lib.Config,
    lineage: dict[str, str],
    default_warmup: bool,
) -> None:
  """Checks that a job may continue in a workdir.

  Args:
    workdir: with a checkpoint.
    config: resolved, of the job.
    theirs: the config of the workdir.
    lineage: of the job.
    default_warmup: whether optimizer.warmup_steps was derived from the steps.
  """
  step = checkpoint.newest_step(workdir)
  now = dataclasses.replace(config, steps=theirs.steps)
  warmup = theirs.optimizer.warmup_steps
  if default_warmup and warmup == config_lib.default_warmup(theirs.steps):
    now.optimizer = dataclasses.replace(now.optimizer, warmup_steps=warmup)
  grows = config.steps > theirs.steps
  differing = config_lib.differences(now if grows else config, theirs)
  if differing:
    lines = '\n  '.join(differing)
    raise ValueError(
        f'{workdir} is the workdir of another config:\n  {lines}\nResume with'
        ' the same config; only config.steps may grow. Or start another job'
        ' from these parameters, without their optimizer state and step:'
        f' --workdir=NEW --config.init_from={workdir}'
    )
  if grows:
    component = stages.load(config).components[0]
    rates = [
        optimizer.learning_rates(one, [component], step)[component]
        for one in (config, theirs)
    ]
    log.info(
        'config.steps grows from %d to %d. The schedule is that of %d steps, of'
        ' which %d are the warm-up: after step %d, where the job resumes, the'
        ' learning rate is %.3g, not %.3g.',
        theirs.steps, config.steps, config.steps,
        config.optimizer.warmup_steps, step, *rates,
    )
  saved = checkpoint.saved_about(workdir, step)
  for name, digest in lineage.items():
    if name != 'config_digest' and saved[name] != digest:
      where = {
          'questions_digest': config.open_qa.questions or config.ict.questions,
          'tagged_digest': config.tagger.files,
      }.get(name, config.corpus)
      raise ValueError(
          f'{workdir} was trained on something else: {name}'
          f' {saved[name][:16]} in its checkpoint {step}, {digest[:16]} in'
          f' {where}.'
      )
