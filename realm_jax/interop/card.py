"""The model card of an export: where it comes from, how good, how to use it.

Public: `model_card`, `tokenizer_files`.
"""

import json
import pathlib
from typing import Any

import realm_jax
from realm_jax.interop import exported
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files

_HEAD = """---
library_name: {library}
language: en
tags: [realm, retrieval, open-domain-question-answering]
---

# {title}

{summary}

| | |
|---|---|
{facts}

## Use

{usage}
"""


def model_card(
    workdir: exported.Workdir,
    title: str,
    library: str,
    summary: str,
    usage: str,
) -> str:
  """Returns README.md; `usage` is Markdown."""
  model = workdir.config.model
  facts: dict[str, Any] = {
      'training step': workdir.step,
      'objective': workdir.config.objective,
      'corpus fingerprint': workdir.about.get('corpus_fingerprint') or 'none',
      'tokenizer digest': workdir.tokenizer.digest,
      'layers, width, heads': (
          f'{model.num_layers}, {model.width}, {model.num_heads}'
      ),
      'retrieval embedding': f'{model.embedding_width}, inner product',
      'towers': model.towers,
      **{
          f'parameters of the {name}': checkpoint.params_digest(params)[:16]
          for name, params in sorted(workdir.params.items())
      },
      **_metrics(workdir),
      'made with': f'realm_jax {realm_jax.__version__}',
  }
  for one in workdir.imported:
    local = pathlib.Path(one.name)
    name = local.name if local.exists() else one.name
    facts[f'imported from ({one.kind})'] = name
  return _HEAD.format(
      title=title,
      library=library,
      summary=summary,
      facts='\n'.join(f'| {name} | {value} |' for name, value in facts.items()),
      usage=usage.strip(),
  )


def _metrics(workdir: exported.Workdir) -> dict[str, str]:
  """The figures of `realm-jax evaluate` for this step, if it was run."""
  path = workdir.path / 'evaluation' / f'{workdir.step}.json'
  if not path.is_file():
    return {}
  found: dict[str, str] = {}

  def visit(prefix: str, value: Any) -> None:
    if isinstance(value, dict):
      for name, part in value.items():
        visit(f'{prefix} {name}'.strip(), part)
    elif isinstance(value, float):
      found[prefix] = f'{value:.4g}'

  visit('', files.read_json(path))
  return found


def tokenizer_files(
    folder: pathlib.Path, workdir: exported.Workdir, tokenizer_class: str
) -> None:
  """Writes what transformers reads a WordPiece tokenizer from."""
  workdir.tokenizer.save(folder)
  specials = {
      f'{name}_token': f'[{name.upper()}]'
      for name in ('pad', 'unk', 'cls', 'sep', 'mask')
  }
  settings = {
      'do_lower_case': workdir.tokenizer.lowercase,
      'model_max_length': workdir.config.model.max_positions,
      'strip_accents': None,
      'tokenize_chinese_chars': True,
      'tokenizer_class': tokenizer_class,
      **specials,
  }
  for name, values in (
      ('tokenizer_config.json', settings),
      ('special_tokens_map.json', specials),
  ):
    (folder / name).write_text(json.dumps(values, indent=2) + '\n', 'utf-8')
