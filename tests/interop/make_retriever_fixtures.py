"""Makes tests/fixtures/retrievers: tiny retrievers, and PyTorch's results.

  python3.11 -m venv st && st/bin/pip install torch==2.14.1 \
      transformers==5.24.0 sentence-transformers==6.2.0 numpy safetensors
  st/bin/python tests/interop/make_retriever_fixtures.py

Only a change of the fixtures needs this script and its environment. Folders of
sentence-transformers are written by its own `save`, those of DPR by
transformers. `expected.npz` has embeddings of texts of several lengths in one
padded batch, and the gradient of a loss. Weights are random and large, so that
a wrong activation, pooling or epsilon shows.
"""

import json
import pathlib
import shutil

import fixture_models
import numpy as np
import sentence_transformers
from sentence_transformers.base import modules as base
from sentence_transformers.sentence_transformer import modules
import torch
import transformers

_VOCAB = [*fixture_models.VOCAB, ':']
_SIZES = dict(
    vocab_size=len(_VOCAB),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=32,
)
# Lengths with [CLS] and [SEP]: 8, 2, 32 (cut) and 5.
TEXTS = ['who is the cat of bo', '', 'the red cat ' * 20, 'a of c']
TITLES = ['cat', 'red of', '', 'a']
_FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'retrievers'


def _tokenizer(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'vocab.txt').write_text('\n'.join(_VOCAB) + '\n')
  settings = {
      'do_lower_case': True,
      'tokenizer_class': 'BertTokenizer',
      'model_max_length': _SIZES['max_position_embeddings'],
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def _gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict:
  loss.backward()
  return {
      name: p.grad.numpy()
      for name, p in model.named_parameters()
      if p.grad is not None and p.grad.abs().max() > 0
  }


def _weights(shape: torch.Size) -> torch.Tensor:
  return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def _sentence_transformer(name: str, seed: int, results: dict) -> None:
  """Makes a folder; the modules are those that the name lists."""
  scratch = _FOLDER / 'scratch'
  _tokenizer(scratch)
  config = transformers.BertConfig(**_SIZES, hidden_act='gelu')
  transformers.BertModel(config).save_pretrained(scratch)
  width, parts = _SIZES['hidden_size'], name.split('_')
  made = [
      base.Transformer(str(scratch), max_seq_length=32),
      modules.Pooling(width, parts[0]),
  ]
  if 'tanh' in parts:
    made.append(base.Dense(width, width))
  if 'dense' in parts:
    identity = torch.nn.Identity()
    made.append(base.Dense(width, 12, activation_function=identity))
    width = 12
  if 'layernorm' in parts:
    made.append(modules.LayerNorm(width))
  if 'normalize' in parts:
    made.append(base.Normalize())
  prompts = {}
  if 'prompts' in parts:
    prompts = {'query': 'who is : ', 'document': 'the cat : '}
  model = sentence_transformers.SentenceTransformer(
      modules=made, device='cpu', prompts=prompts
  )
  fixture_models.randomize(model, seed, _SIZES['hidden_size'])
  shutil.rmtree(_FOLDER / name, ignore_errors=True)
  model.save(str(_FOLDER / name), create_model_card=False)
  (_FOLDER / name / 'tokenizer.json').unlink()
  _tokenizer(_FOLDER / name)
  features = model.preprocess(TEXTS)
  embedding = model(features)['sentence_embedding']
  noise = _weights(embedding.shape)
  results[f'noise/{embedding.shape[1]}'] = noise.numpy()
  loss = (embedding * noise).sum()
  results[f'{name}/plain'] = embedding.detach().numpy()
  for key, value in _gradients(loss, model).items():
    results[f'{name}/gradient/{key}'] = value
  texts = [f'{t} {x}' if t else x for t, x in zip(TITLES, TEXTS, strict=True)]
  results[f'{name}/query'] = model.encode_query(TEXTS)
  results[f'{name}/document'] = model.encode_document(texts)
  shutil.rmtree(scratch)


def _dpr(projection: int, results: dict) -> None:
  """Makes the two folders of DPR, with a projection or without."""
  config = transformers.DPRConfig(
      **_SIZES, hidden_act='gelu', projection_dim=projection
  )
  for seed, (part, cls) in enumerate((
      ('question', transformers.DPRQuestionEncoder),
      ('context', transformers.DPRContextEncoder),
  )):
    folder = _FOLDER / f'dpr{projection}_{part}'
    shutil.rmtree(folder, ignore_errors=True)
    model = fixture_models.randomize(
        cls(config), seed, _SIZES['hidden_size']
    )
    model.save_pretrained(folder)
    _tokenizer(folder)
    tokenizer = transformers.BertTokenizerFast(
        str(folder / 'vocab.txt'), do_lower_case=True
    )
    texts = [TEXTS] if part == 'question' else [TITLES, TEXTS]
    inputs = tokenizer(
        *texts, padding=True, truncation=True, max_length=32,
        return_tensors='pt',
    )
    # As DPR was trained: all segments are 0.
    output = model(inputs['input_ids'], inputs['attention_mask']).pooler_output
    name = 'query' if part == 'question' else 'document'
    results[f'dpr{projection}/{name}'] = output.detach().numpy()


def main() -> None:
  _FOLDER.mkdir(exist_ok=True)
  results: dict = {}
  for seed, name in enumerate((
      'mean_normalize_prompts',
      'cls',
      'lasttoken_dense',
      'mean_dense_normalize',
      'cls_tanh_dense_layernorm',
  )):
    _sentence_transformer(name, seed, results)
  _dpr(0, results)
  _dpr(12, results)
  np.savez_compressed(_FOLDER / 'expected.npz', **results)
  for path in sorted(_FOLDER.rglob('*')):
    print(path.relative_to(_FOLDER), path.stat().st_size)


if __name__ == '__main__':
  main()
