"""The start of a job: checks, then initial or restored parameters."""

import dataclasses
import logging
import pathlib
import socket
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.models import attention
from realm_jax.models import components as components_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import initial
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


def open_job(config: config_lib.Config, workdir: pathlib.Path | str) -> Job:
  """Makes all checks that need no expensive work, and opens the job.

  The first job in a workdir writes config.json. A later one must agree with it
  in everything that determines the result.

  Raises:
    ValueError: a wrong config, a workdir of another config or corpus, a corpus
      that is too small, a mesh that does not fit; processes that differ in any
      of these or do not share the folder.
    FileNotFoundError: no corpus, or no workdir to start from.
  """
  workdir = pathlib.Path(workdir).absolute()
  stage_class = stages.validate(config)
  corpus = corpus_lib.Corpus.open(config.corpus)
  config = config_lib.resolve(config)
  vocab_size = corpus.tokenizer.vocab_size
  if config.model.vocab_size not in (0, vocab_size):
    raise ValueError(
        f'config.model.vocab_size={config.model.vocab_size}, but the tokenizer'
        f' of {config.corpus} has {vocab_size} wordpieces; 0 takes it over.'
    )
  config.model.vocab_size = vocab_size
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
  _check_same_job(workdir, config, lineage)
  _warn_of_cuts(config, corpus)
  mesh = mesh_lib.make_mesh(config.mesh, config.batch_size)
  mesh_lib.check(config, mesh)
  attention.check(config.model, mesh.devices.flat[0])
  for source in initial.sources(config):
    config_lib.read(source)  # Raises if it is no workdir.
  if distributed.is_main():
    files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  _check_shared(workdir)
  components = stages.components_of(config)
  return Job(workdir, config, corpus, mesh, stage, components, lineage)


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
      job.config,
      job.components,
      job.lineage['tokenizer_digest'],
      job.stage.searches,
  )
  return jax.jit(fresh, out_shardings=shardings)(loaded), {}


def _warn_of_cuts(config: config_lib.Config, corpus: corpus_lib.Corpus) -> None:
  if config.objective == 'mlm' and config.mlm.without_passages:
    return
  length = config.lengths.document
  too_long = int((corpus.passages.lengths > length).sum())
  if too_long:
    log.warning(
        '%d of the %d passages have more than config.lengths.document=%d'
        ' wordpieces, up to %d; the rest of them is cut off. A corpus of'
        ' `realm-jax prepare --max_wordpieces=%d` has shorter ones.',
        too_long,
        len(corpus.passages),
        length,
        corpus.passages.lengths.max(),
        length,
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


def _check_shared(workdir: pathlib.Path) -> None:
  distributed.barrier('config.json is written')
  deadline = time.monotonic() + _SHARED_SECONDS
  while not (workdir / 'config.json').exists():
    if time.monotonic() > deadline:
      raise ValueError(
          f'{workdir} on {socket.gethostname()} is not the folder that process'
          ' 0 writes to: --workdir must be on storage that all hosts share.'
      )
    time.sleep(0.1)


def _check_same_job(
    workdir: pathlib.Path, config: config_lib.Config, lineage: dict[str, str]
) -> None:
  if not (workdir / 'config.json').exists():
    return
  theirs = config_lib.read(workdir)
  if config_lib.digest(theirs) != lineage['config_digest']:
    differing = '\n  '.join(config_lib.differences(config, theirs))
    raise ValueError(
        f'{workdir} is the workdir of another config:\n  {differing}\nResume'
        ' with the same config, or give another --workdir.'
    )
  steps_saved = checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS)
  if not steps_saved:
    return
  saved = checkpoint.saved_about(workdir, steps_saved[-1])
  for name, digest in lineage.items():
    if name != 'config_digest' and saved[name] != digest:
      where = {
          'questions_digest': config.open_qa.questions or config.ict.questions,
          'tagged_digest': config.tagger.files,
      }.get(name, config.corpus)
      raise ValueError(
          f'{workdir} was trained on something else: {name}'
          f' {saved[name][:16]} in its checkpoint {steps_saved[-1]},'
          f' {digest[:16]} in {where}.'
      )
