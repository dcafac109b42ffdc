"""The head of a retriever: folders of sentence-transformers, DPR, and others.

A folder has the files of transformers, and `modules.json`, which lists the
modules behind the encoder with a folder for each. The same head describes the
retrievers of other projects, which have no such file. `export` writes folders.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import logging
import pathlib
from typing import Any

from realm_jax import config as config_lib
from realm_jax.interop import weights
from realm_jax.runtime import files

log = logging.getLogger(__name__)

MODULES = 'modules.json'
LENGTHS = 'sentence_bert_config.json'
SETTINGS = 'config_sentence_transformers.json'
PACKAGE = 'sentence_transformers'
# Our poolings by their names in config.json of the module.
POOLINGS = {'cls': 'cls', 'mean': 'mean', 'lasttoken': 'last'}
# Before version 5, a flag for each pooling.
FLAGS = {
    'pooling_mode_cls_token': 'cls',
    'pooling_mode_mean_tokens': 'mean',
    'pooling_mode_max_tokens': 'max',
    'pooling_mode_mean_sqrt_len_tokens': 'mean_sqrt_len_tokens',
    'pooling_mode_weightedmean_tokens': 'weightedmean',
    'pooling_mode_lasttoken': 'lasttoken',
}
_PROMPTS = {
    'query_prefix': ('query',),
    'document_prefix': ('document', 'passage', 'corpus'),
}
TANH, IDENTITY = 'activation.Tanh', 'linear.Identity'
TORCH = 'torch.nn.modules.'
# Epsilon of a LayerNorm in PyTorch, which the module does not change.
EPS = 1e-5
_LEAST_LENGTH = 4
FILES = (MODULES, LENGTHS, SETTINGS)
_CLASSES = ('Transformer', 'Pooling', 'Dense', 'LayerNorm', 'Normalize')
# The modules that each may follow. A Dense with tanh is a pooler, one without
# is a projection.
_AFTER = {
    'Transformer': ('',),
    'Pooling': ('Transformer',),
    'Pooler': ('Pooling',),
    'Projection': ('Pooling', 'Pooler'),
    'LayerNorm': ('Projection',),
    'Normalize': ('Pooling', 'Pooler', 'Projection', 'LayerNorm'),
}
# The module inside, and the name of our parameters.
_PARAMETERS = {
    'Pooler': ('linear', 'encoder.pooler'),
    'Projection': ('linear', 'projection.dense'),
    'LayerNorm': ('norm', 'projection.norm'),
}
# The encoders of DPR by the prefix of their tensors.
QUESTION = ('question_encoder.', 'question_model.')
CONTEXT = ('ctx_encoder.', 'ctx_model.')
_DPR_PROJECTION = 'encode_proj'
# Classes that are a BERT with a pooling.
_ARCHITECTURES = {'Contriever': 'mean'}


@dataclasses.dataclass(frozen=True)
class Head:
  """How a checkpoint makes an embedding of the states of its encoder.

  fields: of ModelConfig.
  modules: prefixes of the names of tensors, to those of the embedder's
    parameters.
  max_length: wordpieces of a text with specials; None: as many as there are
    positions.
  """

  fields: dict[str, Any]
  modules: dict[str, str] = dataclasses.field(default_factory=dict)
  max_length: int | None = None

  def apply(self, config: config_lib.ModelConfig) -> None:
    """Sets the fields; without a projection, E is the encoder's width."""
    for name, value in self.fields.items():
      setattr(config, name, value)
    if config.projection == 'none':
      config.embedding_width = config.width

  def with_fields(self, given: Mapping[str, Any]) -> 'Head':
    """Returns a head with other fields, those of the command line.

    Raises:
      ValueError: they contradict the checkpoint's pooling.
    """
    pooling, theirs = given.get('pooling'), self.fields['pooling']
    if pooling not in (None, theirs):
      raise ValueError(
          f'--pooling={pooling} contradicts the checkpoint, whose pooling is'
          f' {theirs!r}.'
      )
    return dataclasses.replace(self, fields={**self.fields, **given})


def named_head(
    values: Mapping[str, Any], given: Mapping[str, Any]
) -> Head | None:
  """Returns the head of a BERT without `modules.json`, or None.

  `given` are fields of ModelConfig of the command line.
  """
  listed = values.get('architectures')
  first = listed[0] if isinstance(listed, list) and listed else ''
  pooling = _ARCHITECTURES.get(str(first), given.get('pooling'))
  if pooling in (None, 'cls_tanh'):
    return None
  fields = {'pooling': pooling, 'projection': 'none', 'titles': 'text'}
  return Head(fields).with_fields(given)


def dpr_prefixes(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
  """Returns those of `QUESTION` or `CONTEXT` that a checkpoint has."""
  found = [name.partition('.')[0] + '.' for name in names]
  return [prefix for prefix in known if prefix in found]


def dpr_head(
    tensors: Mapping[str, weights.FileTensor],
    prefix: str,
    given: Mapping[str, Any],
) -> Head:
  """Returns the head of an encoder of DPR, whose tensors have the prefix."""
  fields: dict[str, Any] = {
      'pooling': 'cls', 'projection': 'none', 'titles': 'pair'
  }
  name = prefix + _DPR_PROJECTION
  weight = tensors.get(f'{name}.weight')
  if weight is None or len(weight.shape) != 2:
    return Head(fields).with_fields(given)
  fields |= {'projection': 'linear', 'embedding_width': weight.shape[0]}
  return Head(fields, {name: 'projection.dense'}).with_fields(given)


def read(
    folder: pathlib.Path, given: Mapping[str, Any]
) -> tuple[pathlib.Path, Head, dict[str, weights.FileTensor]]:
  """Reads the modules of a folder with modules.json.

  Returns:
    The folder of the encoder; the head; the tensors of the other modules, whose
    names begin with the module's folder, as `2_Dense/linear.weight`.

  Raises:
    FileNotFoundError: a module lacks its files.
    ValueError: a module is unknown, at another place than in a retriever, or
      has an unknown setting.
  """
  fields: dict[str, Any] = {'projection': 'none', 'titles': 'text'}
  fields |= _prefixes(folder)
  modules: dict[str, str] = {}
  tensors: dict[str, weights.FileTensor] = {}
  encoder, before = folder, ''
  for name, kind in _modules(folder):
    place = folder / name
    settings = _settings(place, kind)
    if kind == 'Dense':
      kind = _dense(place, settings)
    if before not in _AFTER[kind]:
      raise ValueError(
          f'{folder / MODULES}: {kind} ({name!r}) follows'
          f' {before or "nothing"}; it can be read only after'
          f' {" or ".join(_AFTER[kind]) or "nothing"}.'
      )
    before = kind
    if kind == 'Transformer':
      encoder = place
    elif kind == 'Pooling':
      fields['pooling'] = _pooling(place, settings)
    elif kind == 'Normalize':
      fields['normalize'] = True
    else:
      inner, ours = _PARAMETERS[kind]
      modules[f'{name}/{inner}'] = ours
      for key, tensor in weights.open_folder(place).items():
        long = f'{name}/{key}'
        tensors[long] = dataclasses.replace(tensor, name=long)
      fields |= _fields(kind, place, settings, fields)
  if 'pooling' not in fields:
    raise ValueError(f'{folder / MODULES} has no Pooling.')
  head = Head(fields, modules, _max_length(encoder)).with_fields(given)
  saved = files.read_object(folder / SETTINGS, optional=True)
  is_cosine = saved.get('similarity_fn_name') == 'cosine'
  if is_cosine and not head.fields.get('normalize'):
    log.info(
        '%s compares embeddings by their cosine; here their inner product is'
        ' the score, unless --normalize is given.', folder,
    )
  return encoder, head, tensors


def folders(folder: pathlib.Path) -> list[str]:
  """Returns the paths of the modules that have a folder of their own."""
  if not (folder / MODULES).is_file():
    return []
  return [name for name, _ in _modules(folder) if name]


def _modules(folder: pathlib.Path) -> list[tuple[str, str]]:
  """Returns the path in the folder and the class of each module."""
  path = folder / MODULES
  listed = files.read_json(path)
  found = []
  for entry in listed if isinstance(listed, list) else [None]:
    kind = entry.get('type') if isinstance(entry, dict) else None
    name = entry.get('path') if isinstance(entry, dict) else None
    if not isinstance(kind, str) or not isinstance(name, str):
      raise ValueError(f'{path} must be a list of modules with type and path.')
    if pathlib.PurePath(name).is_absolute() or '..' in name:
      raise ValueError(f'{path}: the path {name!r} leaves the folder.')
    package, short = kind.split('.')[0], kind.rpartition('.')[2]
    if package != PACKAGE or short not in _CLASSES:
      raise ValueError(
          f'{path} has the module {kind!r}, which is not known; known are'
          f' {", ".join(_CLASSES)} of {PACKAGE}.'
      )
    found.append((name, short))
  return found


def _settings(place: pathlib.Path, kind: str) -> dict[str, Any]:
  path = place / 'config.json'
  if kind in ('Transformer', 'Normalize'):  # Without settings of their own.
    return {}
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}, which {MODULES} needs.')
  return files.read_object(path)


def _pooling(place: pathlib.Path, settings: Mapping[str, Any]) -> str:
  modes = settings.get('pooling_mode')
  if modes is None:
    modes = [mode for flag, mode in FLAGS.items() if settings.get(flag)]
    modes = modes or ['mean']  # As sentence-transformers does.
  modes = [modes] if isinstance(modes, str) else [*modes]
  if len(modes) != 1 or modes[0] not in POOLINGS:
    raise ValueError(
        f'{place / "config.json"} has the pooling {"+".join(map(str, modes))};'
        f' one of {", ".join(POOLINGS)} can be read.'
    )
  if settings.get('include_prompt') is False:
    raise ValueError(
        f'{place / "config.json"} has include_prompt=false: a pooling without'
        ' the words of the prompt cannot be read.'
    )
  return POOLINGS[modes[0]]


def _dense(place: pathlib.Path, settings: Mapping[str, Any]) -> str:
  """Returns whether a Dense is a `Pooler`, with tanh, or a `Projection`."""
  kinds = {TORCH + TANH: 'Pooler', TORCH + IDENTITY: 'Projection'}
  function = settings.get('activation_function', TORCH + TANH)
  usual = {
      'bias': True,
      'use_residual': False,
      'module_input_name': 'sentence_embedding',
      'module_output_name': 'sentence_embedding',
  }
  others = {
      key: settings[key]
      for key, value in usual.items()
      if settings.get(key, value) not in (value, None)
  }
  if function not in kinds or others:
    raise ValueError(
        f'{place / "config.json"}: a Dense with activation {function!r}'
        + ''.join(f', {key}={value!r}' for key, value in others.items())
        + f' cannot be read; the activation is one of {", ".join(kinds)}, and'
        f' usual are {usual}.'
    )
  return kinds[function]


def _fields(
    kind: str,
    place: pathlib.Path,
    settings: Mapping[str, Any],
    before: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the fields of ModelConfig that a module with weights sets."""
  if kind == 'Pooler':
    if before['pooling'] != 'cls':
      raise ValueError(
          f'{place / "config.json"}: a Dense with tanh follows the pooling'
          f' {before["pooling"]!r}; it can be read only after cls.'
      )
    return {'pooling': 'cls_tanh'}
  if kind == 'LayerNorm':
    return {'projection': 'layer_norm', 'projection_norm_eps': EPS}
  width = settings.get('out_features')
  if not isinstance(width, int) or width < 1:
    raise ValueError(
        f'{place / "config.json"} has out_features={width!r}; expected the'
        ' width of the embedding.'
    )
  return {'projection': 'linear', 'embedding_width': width}


def _prefixes(folder: pathlib.Path) -> dict[str, str]:
  """Returns the prompts of queries and documents as prefixes."""
  path = folder / SETTINGS
  values = files.read_object(path, optional=True)
  prompts = values.get('prompts')
  if not isinstance(prompts, dict):
    return {}
  # `encode` without a name of a prompt has the default for any text.
  default = prompts.get(str(values.get('default_prompt_name')), '')
  found, used = {}, {values.get('default_prompt_name')}
  for field, names in _PROMPTS.items():
    name = next((n for n in names if prompts.get(n)), None)
    text = prompts[name] if name else default
    if not isinstance(text, str):
      raise ValueError(f'{path} has a prompt that is not a text: {text!r}.')
    found[field] = text
    used.add(name)
  used |= {name for names in _PROMPTS.values() for name in names}
  others = sorted(set(prompts) - used)
  if others:
    log.info(
        '%s: the prompts %s are not taken; a retriever has those of queries and'
        ' documents.', path, ', '.join(others),
    )
  return found


def _max_length(encoder: pathlib.Path) -> int | None:
  path, key = encoder / LENGTHS, 'max_seq_length'
  length = files.read_object(path, optional=True).get(key)
  if length is None:  # From version 6 on, the tokenizer says it.
    path, key = encoder / 'tokenizer_config.json', 'model_max_length'
    length = files.read_object(path, optional=True).get(key)
  if length is None:
    return None
  if isinstance(length, float) and length.is_integer():
    length = int(length)
  if not isinstance(length, int) or length < _LEAST_LENGTH:
    raise ValueError(
        f'{path} has {key}={length!r}; expected a number of wordpieces from'
        f' {_LEAST_LENGTH} on.'
    )
  return length
