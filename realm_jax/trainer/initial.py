"""The parameters that a new job begins with, and where each comes from.

Public: `sources`, `load`. The paper starts the reader from BERT and the
retriever from ICT (Guu et al. 2020, section 3.4), ICT itself from BERT (Lee et
al. 2019); so a component begins with its own kind or with another one's BERT.
"""

from collections.abc import Mapping
import dataclasses
import logging
import re

import jax

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import checkpoint

log = logging.getLogger(__name__)

# Whose BERT a component takes from a source that does not have the component.
_BERT_OF = {
    'embedder': ('reader',),
    'span_reader': ('reader',),
    'tagger': ('reader', 'embedder'),
}
# Parameters of a BERT; an embedder has one in each tower.
_IN_BERT = re.compile(r'(?P<tower>(?:query_)?encoder\.)?(?P<name>bert\..+)')
_QUERY = 'query_'  # Prefix of the parameters that only queries pass through.
# The objective that trains a component for those that search.
_TRAINED_BY = {'embedder': 'ict', 'reader': 'mlm', 'span_reader': 'mlm'}


@dataclasses.dataclass(frozen=True)
class _Offer:
  """Parameters of a source for one component of the job.

  source: workdir.
  step: of its checkpoint.
  giver: the component of the source that has them.
  there: all parameters of the giver.
  names: parameters of ours to those of the giver; the others are at random.
  extra: parameters of the giver that have no place in ours.
  whole: whether the giver is of our kind and no parameter is at random.
  """

  source: str
  step: int
  giver: str
  there: dict[str, jax.ShapeDtypeStruct]
  names: dict[str, str]
  extra: list[str]
  whole: bool


def sources(config: config_lib.Config) -> list[str]:
  """Returns the workdirs in config.init_from."""
  return [part.strip() for part in config.init_from.split(',') if part.strip()]


def load(
    config: config_lib.Config,
    components: Mapping[str, components_lib.Component],
    tokenizer_digest: str,
    searches: bool,
) -> dict[str, components_lib.Params]:
  """Loads what the workdirs in config.init_from have for a job.

  A component is taken from the last workdir that has all of it. If there is
  none, it takes the BERT of the last workdir that has one for it; an embedder
  with `at_random` parameters (an imported BERT's projection) counts as such. A
  query tower that a workdir does not have begins as its document tower. The log
  says where each component comes from, and what begins at random.

  Args:
    config: resolved.
    components: of the job.
    tokenizer_digest: of the job's corpus.
    searches: whether the job searches an index, which needs trained networks.

  Returns:
    numpy arrays by component and name; what is missing begins at random.

  Raises:
    FileNotFoundError: if a workdir has no checkpoint.
    ValueError: if a workdir has nothing for the job, or what is taken from it
      is of another tokenizer, model or size.
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
    abstract = {offer.giver: offer.there for offer in taken.values()}
    step = next(iter(taken.values())).step
    loaded, _ = checkpoint.load_params(source, abstract, step)
    # As numpy arrays, which belong to no process' devices.
    loaded = jax.device_get(loaded)
    for name, offer in taken.items():
      theirs = loaded[offer.giver]
      params[name] = {n: theirs[other] for n, other in offer.names.items()}
  for name, component in components.items():
    _say(config, component, chosen.get(name), searches)
  return params


def _offers(
    components: Mapping[str, components_lib.Component], source: str
) -> dict[str, _Offer]:
  """Returns what a workdir's newest checkpoint has for each component."""
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
        other = _bert_name(ours, giver)
      elif ours not in found[giver]:
        other = ours.removeprefix(_QUERY)
      if other is not None and f'{giver}/{other}' not in at_random:
        names[ours] = other
    whole = giver == name and len(names) == len(component.abstract)
    extra = [
        n
        for n in found[giver].keys() - set(names.values())
        if f'{giver}/{n}' not in at_random
        and (giver == name or _bert_name(n, giver) == n)
    ]
    offers[name] = _Offer(
        source, step, giver, found[giver], names, extra, whole
    )
  return offers


def _bert_name(ours: str, giver: str) -> str | None:
  """Name in the giver of a parameter of our BERT; None outside a BERT."""
  match = _IN_BERT.fullmatch(ours)
  if match is None:
    return None
  return ('encoder.' if giver == 'embedder' else '') + match['name']


def _check(offer: _Offer, component: components_lib.Component) -> None:
  """Compares names and shapes of what is taken with ours."""
  own_kind = offer.giver == component.name
  if own_kind and any(name.startswith(_QUERY) for name in offer.extra):
    theirs = config_lib.read(offer.source).model.towers
    raise ValueError(
        f'config.init_from: {offer.source} was trained with'
        f' config.model.towers={theirs!r}, this job has'
        f' {component.config.towers!r}, which has no place for all of its query'
        f' tower. Give --config.model.towers={theirs}.'
    )
  what = component.name if own_kind else f'{component.name} from {offer.giver}'
  found = {name: offer.there[name] for name in offer.extra}
  for ours, other in offer.names.items():
    if other in offer.there:
      found[ours] = offer.there[other]
  expected = {ours: component.abstract[ours] for ours in offer.names}
  checkpoint.check_leaves(
      {what: found},
      {what: expected},
      f'config.init_from: {offer.source}',
  )


def _say(
    config: config_lib.Config,
    component: components_lib.Component,
    offer: _Offer | None,
    searching: bool,
) -> None:
  """Logs where a component comes from; a warning if it should not be cold."""
  name = component.name
  first = ''
  if searching:
    first = f' Train the objective {_TRAINED_BY[name]!r} first'
    first += ', or import a checkpoint (docs/learning.md).'
  if offer is None:
    if config.init_from or searching:
      text = f'{name}: no workdir of config.init_from has it; it begins at'
      text += f' random.{first}'
    else:
      text = f'{name} begins at random.'
    log.log(logging.WARNING if searching else logging.INFO, '%s', text)
    return
  text = f'{name} from {offer.source}, step {offer.step}'
  if offer.giver != name:
    text = f'{name}: its BERT from the {offer.giver} of {offer.source}, step'
    text += f' {offer.step}'
  if any(o.startswith(_QUERY) and o != n for o, n in offer.names.items()):
    text += '; its query tower begins as the document tower'
  cold = component.abstract.keys() - offer.names.keys()
  if not cold:
    log.info('%s.', text)
    return
  modules = sorted({n.rpartition('.')[0] or n for n in cold})
  text += f'; {", ".join(modules)} at random.'
  # No other objective trains the head of a span reader.
  if searching and name != 'span_reader':
    log.warning('%s%s', text, first)
  else:
    log.info('%s', text)


def _check_same_tokenizer(
    config: config_lib.Config, source: str, ours: str
) -> None:
  """Refuses another vocabulary, which may be of the same size."""
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
  """Compares what changes the function but not the shapes."""
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
