"""The initial parameters of a job, from the workdirs in config.init_from.

The paper starts the reader from BERT and the retriever from ICT (Guu et al.
2020, section 3.4), and ICT from BERT (Lee et al. 2019). So a component starts
from the same component of another job, or from the BERT of another component.
"""

from collections.abc import Mapping
import dataclasses
import logging

import jax

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib
from realm_jax.models import embedder
from realm_jax.runtime import checkpoint

log = logging.getLogger(__name__)

# Components whose BERT a component takes if a source lacks the component.
_BERT_OF = {
    'embedder': ('reader',),
    'span_reader': ('reader',),
    'tagger': ('reader', 'embedder'),
}
# The objective that trains a component for the stages that search.
_TRAINED_BY = {'embedder': 'ict', 'reader': 'mlm', 'span_reader': 'mlm'}


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
  whole: bool  # The same component, and no parameter is random.


def sources(config: config_lib.Config) -> list[str]:
  """Returns the workdirs in config.init_from."""
  return [part.strip() for part in config.init_from.split(',') if part.strip()]


def load(
    config: config_lib.Config,
    components: Mapping[str, components_lib.Component],
    tokenizer_digest: str,
    searches: bool,
) -> dict[str, components_lib.Params]:
  """Loads parameters for a job from the workdirs in config.init_from.

  A component comes from the last workdir that has all of it, otherwise from
  the last workdir that has a BERT for it; an embedder with `at_random`
  parameters (the projection of an imported BERT) counts as the latter. A query
  tower that a workdir lacks is initialised from its document tower. The log
  says where each component comes from and which modules are random.

  Args:
    config: resolved.
    components: of the job.
    tokenizer_digest: of the job's corpus.
    searches: whether the job searches an index, which needs trained networks.

  Returns:
    numpy arrays by component and name; missing ones are to be drawn at random.

  Raises:
    FileNotFoundError: a workdir has no checkpoint.
    ValueError: a workdir has nothing for the job, or its parameters are of
      another tokenizer, model or size.
  """
  chosen: dict[str, _Offer] = {}
  for source in sources(config):
    _check_same_tokenizer(config, source, tokenizer_digest)
    _check_same_model(config.model, config_lib.read(source).model, source)
    offers = _offers(components, source)
    if not offers:
      raise ValueError(
          f'config.init_from: {source} has the components'
          f' {checkpoint.components_in(source)}, the objective'
          f' {config.objective!r} trains {sorted(components)}.'
      )
    for name, offer in offers.items():
      if name not in chosen or offer.whole >= chosen[name].whole:
        chosen[name] = offer
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


def _offers(
    components: Mapping[str, components_lib.Component], source: str
) -> dict[str, _Offer]:
  """Returns the parameters of a workdir's newest checkpoint by component."""
  step = checkpoint.newest_step(source)
  found = checkpoint.abstract_in(source, step)
  at_random = set(checkpoint.saved_about(source, step).get('at_random', ()))
  offers = {}
  for name, component in components.items():
    givers = (name, *_BERT_OF.get(name, ()))
    giver = next((g for g in givers if g in found), None)
    if giver is None:
      continue
    names = {}
    for ours in component.abstract:
      other: str | None = ours
      if giver != name:
        other = components_lib.bert_parameter(ours, giver)
      elif ours not in found[giver]:
        other = ours.removeprefix(embedder.QUERY_PREFIX)
      if other is not None and f'{giver}/{other}' not in at_random:
        names[ours] = other
    whole = giver == name and len(names) == len(component.abstract)
    extra = [
        n
        for n in found[giver].keys() - set(names.values())
        if f'{giver}/{n}' not in at_random
        and (giver == name or components_lib.bert_parameter(n, giver) == n)
    ]
    offers[name] = _Offer(
        source, step, giver, found[giver], names, extra, whole
    )
  return offers


def _check(offer: _Offer, component: components_lib.Component) -> None:
  """Checks names and shapes of an offer against the job's component."""
  same = offer.giver == component.name
  if same and any(n.startswith(embedder.QUERY_PREFIX) for n in offer.extra):
    theirs = config_lib.read(offer.source).model.towers
    raise ValueError(
        f'config.init_from: {offer.source} was trained with'
        f' config.model.towers={theirs!r}, this job has'
        f' {component.config.towers!r}, which has no place for all of its query'
        f' tower. Give --config.model.towers={theirs}.'
    )
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


def _check_same_tokenizer(
    config: config_lib.Config, source: str, ours: str
) -> None:
  """Refuses another vocabulary, even of equal size."""
  saved = checkpoint.saved_about(source, checkpoint.newest_step(source))
  theirs = saved['tokenizer_digest']
  if theirs != ours:
    raise ValueError(
        f'config.init_from: {source} was trained with another tokenizer,'
        f' {theirs[:16]}; that of {config.corpus} is {ours[:16]}. Prepare'
        ' the corpus with the --vocab of that model or of its corpus.'
    )


def _check_same_model(
    ours: config_lib.ModelConfig, theirs: config_lib.ModelConfig, source: str
) -> None:
  """Compares fields that change the function but no shape."""
  differing = [
      f'{name}: {getattr(theirs, name)!r} there, {getattr(ours, name)!r} here'
      for name in ('activation', 'num_heads', 'layer_norm_eps')
      if getattr(theirs, name) != getattr(ours, name)
  ]
  if differing:
    raise ValueError(
        f'config.init_from: {source} holds parameters of another model;'
        f' config.model.{", ".join(differing)}.'
    )
