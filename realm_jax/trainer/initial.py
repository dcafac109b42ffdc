"""The initial parameters of a job, from the workdirs in config.init_from.

The paper starts the reader from BERT and the retriever from ICT (Guu et al.
2020, section 3.4), and ICT from BERT (Lee et al. 2019). So a component starts
from the same component of another job, or from the BERT of another component.
"""

from collections.abc import Collection, Iterator, Mapping
import copy
import dataclasses
import json
import logging
import pathlib
import re
from typing import Any

import jax

from realm_jax import config as config_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.models import components as components_lib
from realm_jax.models import embedder
from realm_jax.runtime import checkpoint
from realm_jax.trainer import stages

log = logging.getLogger(__name__)

# Components whose BERT a component takes if a source lacks the component.
_BERT_OF = {
    'embedder': ('reader',),
    'span_reader': ('reader',),
    'tagger': ('reader', 'embedder'),
}
# The objective that trains a component for the stages that search.
_TRAINED_BY = {'embedder': 'ict', 'reader': 'mlm', 'span_reader': 'mlm'}
# Fields of config.model that parameters fix: those of every BERT, and those of
# the rest of a component.
_OF_BERT = (
    'num_layers', 'width', 'num_heads', 'mlp_width', 'vocab_size',
    'max_positions', 'activation', 'layer_norm_eps', 'encoder',
    'encoder_options',
)
_OF_COMPONENT = {
    'embedder': ('embedding_width', 'towers', *config_lib.HEAD_FIELDS),
    'span_reader': ('span_width', 'span_norm_eps'),
    'tagger': ('entity_types', 'capitals'),
}
# A parameter of an encoder; an embedder has one in each tower.
_IN_BERT = re.compile(r'((query_)?encoder\.)?(?P<name>bert\..+)')
# Fields that parameters do not fix: a flag of the command line is kept.
_FREE = (
    'normalize', 'query_prefix', 'document_prefix', 'titles', 'title_separator'
)
# Each is initialised from those before it, so a job may have more towers.
_TOWERS = ('shared', 'shared_bert', 'separate')


@dataclasses.dataclass(frozen=True)
class _Giver:
  """The workdir and the component in it that a component starts from.

  whole: the same component, and none of its parameters is random.
  """

  source: str
  step: int  # Checkpoint.
  name: str
  whole: bool


@dataclasses.dataclass(frozen=True)
class _Offer:
  """Parameters that a source has for one component of the job."""

  source: str  # Workdir.
  step: int  # Checkpoint.
  giver: str  # The component of the source that has them.
  available: dict[str, jax.ShapeDtypeStruct]  # All parameters of the giver.
  # Names of the job's parameters -> names in the giver. Others are random.
  names: dict[str, str]
  extra: list[str]  # Parameters of the giver that the job's component lacks.


def sources(config: config_lib.Config) -> list[str]:
  """Returns the workdirs in config.init_from."""
  return [part.strip() for part in config.init_from.split(',') if part.strip()]


def follow(
    config: config_lib.Config,
    stage: type[stages.Stage],
    tokenizer: tokenizer_lib.Tokenizer,
    explicit: Collection[str] = (),
) -> config_lib.Config:
  """Returns a config whose model is that of the workdirs in config.init_from.

  Their sizes, activation and towers replace those of the config; the lengths
  are shortened to their number of positions. The log has a line of the changes.

  Args:
    config: of the job, with right types; not changed.
    stage: of the job.
    tokenizer: of the job's corpus.
    explicit: fields that must not change, such as 'model.width': those of the
      command line.

  Raises:
    FileNotFoundError: one is no workdir, or has no checkpoint.
    ValueError: one has nothing for the job; or they contradict each other,
      `explicit` or the vocabulary, with a line for each contradiction.
  """
  given, config = config_lib.resolve(config), copy.deepcopy(config)
  explicit = set(explicit)
  if 'model.preset' in explicit:  # It decides the sizes that are not set.
    sizes = ('num_layers', 'width', 'num_heads', 'mlp_width')
    unset = [name for name in sizes if not getattr(config.model, name)]
    explicit.update(f'model.{name}' for name in unset)
  # Field -> value -> source; a dictionary counts as its JSON.
  values: dict[str, dict[Any, str]] = {}
  givers = _givers(given, stage.components)
  for name, giver in givers.items():
    model = config_lib.resolve(config_lib.read(giver.source)).model
    more = _OF_COMPONENT.get(name, ()) if giver.whole else ()
    for field in (*_OF_BERT, *more):
      value = getattr(model, field)
      if isinstance(value, dict):
        value = json.dumps(value, sort_keys=True)
      values.setdefault(field, {}).setdefault(value, giver.source)
    if 'model.preset' not in explicit:
      config.model.preset = model.preset
  problems, changes = [], []
  for field, found in values.items():
    if len(found) > 1:
      each = ', '.join(f'{value!r} in {at}' for value, at in found.items())
      problems.append(f'config.model.{field}: {each}')
      continue
    ((theirs, source),) = found.items()
    ours = getattr(given.model, field)
    if isinstance(ours, dict):
      theirs = json.loads(theirs)
    if field == 'towers' and _TOWERS.index(ours) > _TOWERS.index(theirs):
      continue
    if field == 'score_scale' or field == 'learn_score_scale' and ours:
      continue  # The job's own.
    if field in _FREE and f'model.{field}' in explicit:
      continue
    if f'model.{field}' in explicit and ours != theirs:
      problems.append(
          f'config.model.{field}: {ours!r} on the command line, {theirs!r} in'
          f' {source}'
      )
      continue
    setattr(config.model, field, theirs)
    # The tokenizer decides a vocab_size of 0.
    if ours != theirs and (field, ours) != ('vocab_size', 0):
      changes.append(f'config.model.{field}={theirs!r} (not {ours!r})')
  for field, ours, most in _shorten(config, stage):
    if field in explicit:
      problems.append(
          f'config.{field}: {ours} on the command line, at most {most} with'
          f' config.model.max_positions={config.model.max_positions} of'
          f' {config.init_from}'
      )
    changes.append(f'config.{field}={most} (not {ours})')
  taken = dict.fromkeys(giver.source for giver in givers.values())
  for source in taken:
    problems += _vocabulary_problems(config, source, tokenizer)
  if problems:
    raise ValueError(
        f'config.init_from={config.init_from} contradicts this job:\n  '
        + '\n  '.join(problems)
        + '\nSizes and vocabulary are those of the checkpoint: leave out such'
        ' flags, or start from another checkpoint.'
    )
  if changes:
    log.info('As in %s: %s.', ', '.join(taken), ', '.join(changes))
  return config


def follow_saved(
    config: config_lib.Config,
    stage: type[stages.Stage],
    saved: config_lib.Config,
    explicit: Collection[str] = (),
) -> config_lib.Config:
  """Returns the config of a job that resumes with the model of its start.

  `follow` decided it then; the workdirs of config.init_from may be gone.
  """
  config = copy.deepcopy(config)
  fields = [*_OF_BERT, 'preset']
  for more in _OF_COMPONENT.values():
    fields += more
  if 'model.preset' in explicit:
    fields = [f for f in fields if f not in _OF_BERT[:4]]
  for field in fields:
    if f'model.{field}' not in explicit:
      setattr(config.model, field, getattr(saved.model, field))
  list(_shorten(config, stage))
  return config


def _shorten(
    config: config_lib.Config, stage: type[stages.Stage]
) -> Iterator[tuple[str, int, int]]:
  """Shortens the lengths; yields the field, its old and its new value.

  Query and passage are shortened alone, and if the reader's input, which is
  both, is too long even so, the query to a quarter of the positions at most.
  """
  lengths, positions = config.lengths, config.model.max_positions
  before = copy.copy(lengths), config.tagger.length
  if stage.longest_input(config) > positions:
    lengths.query = min(lengths.query, positions)
    lengths.document = min(lengths.document, positions)
    config.tagger.length = min(config.tagger.length, positions)
  if stage.longest_input(config) > positions:
    lengths.query = min(lengths.query, max(4, positions // 4))
    lengths.document = min(lengths.document, positions - lengths.query)
  if lengths.query != before[0].query:
    lengths.masks = min(lengths.masks, max(1, lengths.query - 2))
  for name in ('query', 'document', 'masks'):
    old, new = getattr(before[0], name), getattr(lengths, name)
    if old != new:
      yield f'lengths.{name}', old, new
  if config.tagger.length != before[1]:
    yield 'tagger.length', before[1], config.tagger.length


def _vocabulary_problems(
    config: config_lib.Config, source: str, ours: tokenizer_lib.Tokenizer
) -> Iterator[str]:
  """Yields how the vocabulary of a workdir differs from the corpus'."""
  step = checkpoint.newest_step(source)
  theirs = checkpoint.saved_about(source, step)['tokenizer_digest']
  if theirs == ours.digest:
    return
  read = config_lib.read(source)
  size = read.model.vocab_size
  # Workdirs of older versions have no tokenizer of their own.
  own = (pathlib.Path(source) / 'vocab.txt').is_file()
  first = ''
  if own:
    first = _difference(tokenizer_lib.Tokenizer.from_saved(source), ours)
  yield (
      f'the vocabulary: {size} wordpieces, digest {theirs[:16]}, in {source};'
      f' {ours.vocab_size}, digest {ours.digest[:16]}, in the corpus'
      f' {config.corpus}{first}. Prepare the corpus with'
      f' --vocab={source if own else read.corpus}'
  )


def _difference(
    theirs: tokenizer_lib.Tokenizer, ours: tokenizer_lib.Tokenizer
) -> str:
  """Returns a difference between two vocabularies in words, or ''."""
  for name in ('pad', 'unk', 'cls', 'sep', 'mask'):
    ids = [getattr(one, f'{name}_id') for one in (theirs, ours)]
    pieces = [one.vocab[i] for one, i in zip((theirs, ours), ids, strict=True)]
    if ids[0] != ids[1] or pieces[0] != pieces[1]:
      return (
          f'; the special token {pieces[0]} has id {ids[0]} there,'
          f' {pieces[1]} has id {ids[1]} here'
      )
  for i, (there, here) in enumerate(
      zip(theirs.vocab, ours.vocab, strict=False)
  ):
    if there != here:
      return f'; wordpiece {i} is {there!r} there, {here!r} here'
  if theirs.lowercase != ours.lowercase:
    case = {True: 'lower-cased', False: 'not lower-cased'}
    return (
        f'; text is {case[theirs.lowercase]} there, {case[ours.lowercase]} here'
    )
  return ''


def load(
    config: config_lib.Config,
    components: Mapping[str, components_lib.Component],
    searches: bool,
) -> dict[str, components_lib.Params]:
  """Loads parameters for a job from the workdirs in config.init_from.

  A component comes from the last workdir that has all of it, otherwise from
  the last workdir that has a BERT for it; an embedder with `at_random`
  parameters (the projection of an imported BERT) counts as the latter. A query
  tower that a workdir lacks is initialised from its document tower. The log
  says where each component comes from and which modules are random.

  Args:
    config: resolved, of `follow`.
    components: of the job.
    searches: whether the job searches an index, which needs trained networks.

  Returns:
    numpy arrays by component and name; missing ones are to be drawn at random.

  Raises:
    FileNotFoundError: a workdir has no checkpoint.
    ValueError: a workdir has nothing for the job, or its parameters are of
      another size.
  """
  chosen = {
      name: _offer(components[name], giver)
      for name, giver in _givers(config, components).items()
  }
  for name, offer in chosen.items():
    _check(offer, components[name])
  params: dict[str, components_lib.Params] = {}
  for source in sources(config):
    taken = {n: offer for n, offer in chosen.items() if offer.source == source}
    if not taken:
      log.info('Nothing of %s is used.', source)
      continue
    abstract = {offer.giver: offer.available for offer in taken.values()}
    step = next(iter(taken.values())).step
    loaded, _ = checkpoint.load_params(source, abstract, step)
    loaded = jax.device_get(loaded)  # numpy: every process can place it.
    for name, offer in taken.items():
      theirs = loaded[offer.giver]
      params[name] = {n: theirs[other] for n, other in offer.names.items()}
  for name, component in components.items():
    _log_origin(config, component, chosen.get(name), searches)
  return params


def _givers(
    config: config_lib.Config, names: Collection[str]
) -> dict[str, _Giver]:
  """Returns what each component starts from, where a workdir has it."""
  chosen: dict[str, _Giver] = {}
  for source in sources(config):
    config_lib.read(source)  # Raises if it is no workdir.
    step = checkpoint.newest_step(source)
    found = sorted(checkpoint.abstract_in(source, step))
    saved = checkpoint.saved_about(source, step)
    at_random = {n.partition('/')[0] for n in saved.get('at_random', ())}
    useful = False
    for name in names:
      givers = (name, *_BERT_OF.get(name, ()))
      giver = next((g for g in givers if g in found), None)
      if giver is None:
        continue
      useful, whole = True, giver == name and name not in at_random
      if name not in chosen or whole >= chosen[name].whole:
        chosen[name] = _Giver(source, step, giver, whole)
    if not useful:
      raise ValueError(
          f'config.init_from: {source} has the components {found}, the'
          f' objective {config.objective!r} trains {sorted(names)}.'
      )
  return chosen


def _offer(component: components_lib.Component, giver: _Giver) -> _Offer:
  """Returns the parameters that a workdir has for a component."""
  available = checkpoint.abstract_in(giver.source, giver.step)[giver.name]
  saved = checkpoint.saved_about(giver.source, giver.step)
  at_random = set(saved.get('at_random', ()))
  same, names = giver.name == component.name, {}
  for ours in component.abstract:
    other: str | None = ours
    if not same:
      other = _bert_parameter(ours, giver.name)
    elif ours not in available:
      other = ours.removeprefix(embedder.QUERY_PREFIX)
      if ours == embedder.LOG_SCORE_SCALE:
        other = None  # Starts from config.model.score_scale.
    if other is not None and f'{giver.name}/{other}' not in at_random:
      names[ours] = other
  extra = [
      n
      for n in available.keys() - set(names.values())
      if giver.whole or _bert_parameter(n, giver.name) == n
  ]
  return _Offer(
      giver.source, giver.step, giver.name, available, names, extra
  )


def _bert_parameter(name: str, owner: str) -> str | None:
  """Returns what the component `owner` calls a parameter of another's BERT.

  None if `name` is not a parameter of a BERT.
  """
  match = _IN_BERT.fullmatch(name)
  if match is None:
    return None
  return ('encoder.' if owner == 'embedder' else '') + match['name']


def _check(offer: _Offer, component: components_lib.Component) -> None:
  """Checks names and shapes of an offer against the job's component."""
  same = offer.giver == component.name
  label = component.name if same else f'{component.name} from {offer.giver}'
  found = {name: offer.available[name] for name in offer.extra}
  for ours, other in offer.names.items():
    if other in offer.available:
      found[ours] = offer.available[other]
  expected = {ours: component.abstract[ours] for ours in offer.names}
  checkpoint.check_leaves(
      {label: found}, {label: expected}, f'config.init_from: {offer.source}'
  )


def _log_origin(
    config: config_lib.Config,
    component: components_lib.Component,
    offer: _Offer | None,
    searches: bool,
) -> None:
  """Logs where a component comes from; warns if it should be trained."""
  name = component.name
  cure = ''
  if searches:
    cure = (
        f' Train the objective {_TRAINED_BY[name]!r} first, or import a'
        ' checkpoint (docs/learning.md).'
    )
  if offer is None:
    lacking = ''
    if config.init_from or searches:
      lacking = ' (no workdir of config.init_from has it)'
    level = logging.WARNING if searches else logging.INFO
    log.log(level, '%s is initialised at random%s.%s', name, lacking, cure)
    return
  text = f'{name} from {offer.source}, step {offer.step}'
  if offer.giver != name:
    text = (
        f'{name}: its BERT from the {offer.giver} of {offer.source}, step'
        f' {offer.step}'
    )
  prefix = embedder.QUERY_PREFIX
  if any(o.startswith(prefix) and o != n for o, n in offer.names.items()):
    text += '; its query tower is initialised from the document tower'
  missing = component.abstract.keys() - offer.names.keys()
  missing -= {embedder.LOG_SCORE_SCALE}  # Has an initial value of its own.
  if not missing:
    log.info('%s.', text)
    return
  modules = sorted({n.rpartition('.')[0] or n for n in missing})
  text += f'; {", ".join(modules)} at random.'
  # No other objective trains the head of a span reader.
  if searches and name != 'span_reader':
    log.warning('%s%s', text, cure)
  else:
    log.info('%s', text)
