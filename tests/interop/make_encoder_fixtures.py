"""Makes tests/fixtures/encoders: RoBERTa, XLM-R and ModernBERT, tiny.

  python3.11 -m venv hf && hf/bin/pip install torch transformers==5.* \
      tokenizers safetensors numpy
  hf/bin/python tests/interop/make_encoder_fixtures.py

Only a change of the fixtures needs this script and its environment. It writes
for each class a folder that `save_pretrained` made, with a tokenizer, and
`expected.npz` with inputs, PyTorch's outputs and gradients. Weights are random
and large, so that a wrong activation, epsilon or name shows.
`--length=8192 --output=FOLDER` writes ModernBERT alone, with its results at
that length. To compare:

  REALM_JAX_ENCODERS=FOLDER pytest -s -k gradients \
      tests/interop/encoder_parity_test.py
"""

import argparse
import copy
import pathlib

import fixture_models
import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers
import torch
import transformers

_OUTPUT = pathlib.Path(__file__).parents[1] / 'fixtures' / 'encoders'
_SPECIALS = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
_TEXTS = [
    'The capital of France is Paris, and that of Germany (Berlin) is older.',
    'Anna Gold was born in Vienna in 1901. She died in 1950, it is said.',
    'na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \u0442\u0435\u043a\u0441\u0442',
] * 4
_SIZES = dict(
    vocab_size=320,
    hidden_size=24,
    num_attention_heads=4,
    intermediate_size=40,
)


def _byte_level(specials: list[str]) -> tokenizers.Tokenizer:
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(
      _TEXTS,
      trainers.BpeTrainer(
          vocab_size=310,
          special_tokens=specials,
          initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
          show_progress=False,
      ),
  )
  return made


def _roberta(folder: pathlib.Path) -> None:
  made = _byte_level(_SPECIALS)
  made.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0))
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=made, **_names(*_SPECIALS)
  ).save_pretrained(folder)


def _xlm_roberta(folder: pathlib.Path) -> None:
  made = tokenizers.Tokenizer(models.Unigram())
  made.normalizer = normalizers.NFKC()
  made.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  made.decoder = decoders.Metaspace()
  made.train_from_iterator(
      _TEXTS,
      trainers.UnigramTrainer(
          vocab_size=120,
          special_tokens=_SPECIALS,
          unk_token='<unk>',
          show_progress=False,
      ),
  )
  made.post_processor = processors.TemplateProcessing(
      single='<s> $A </s>',
      pair='<s> $A </s> </s> $B </s>',
      special_tokens=[('<s>', 0), ('</s>', 2)],
  )
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=made, **_names(*_SPECIALS)
  ).save_pretrained(folder)


def _modernbert(folder: pathlib.Path) -> None:
  made = _byte_level([])
  made.normalizer = normalizers.NFC()
  specials = ['[CLS]', '[PAD]', '[SEP]', '[UNK]', '[MASK]']
  made.add_tokens(['    '])
  made.add_special_tokens(specials)
  ids = {name: made.token_to_id(name) for name in specials}
  made.post_processor = processors.TemplateProcessing(
      single='[CLS] $A [SEP]',
      pair='[CLS] $A [SEP] $B [SEP]',
      special_tokens=[(name, ids[name]) for name in ('[CLS]', '[SEP]')],
  )
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=made, **_names(*specials)
  ).save_pretrained(folder)


def _names(cls, pad, sep, unk, mask) -> dict[str, str]:
  return dict(
      cls_token=cls, pad_token=pad, sep_token=sep, unk_token=unk,
      mask_token=mask,
  )


def _model(name: str, pad_id: int, length: int) -> torch.nn.Module:
  """Returns a model of random weights."""
  if name == 'modernbert':
    config = transformers.ModernBertConfig(
        **_SIZES, num_hidden_layers=5, max_position_embeddings=length,
        local_attention=128, pad_token_id=pad_id,
    )
    config._attn_implementation = 'eager'
    model = transformers.ModernBertForMaskedLM(config)
  else:
    kind = {'roberta': 'Roberta', 'xlm-roberta': 'XLMRoberta'}[name]
    config = getattr(transformers, f'{kind}Config')(
        **_SIZES, num_hidden_layers=2, max_position_embeddings=length + 2,
        type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=pad_id,
    )
    model = getattr(transformers, f'{kind}ForMaskedLM')(config)
  return fixture_models.randomize(model, seed=len(name))


def _results(
    model: torch.nn.Module, lengths: list[int], pad_id: int
) -> dict[str, np.ndarray]:
  """Returns inputs, hidden states, logits at some positions, gradients."""
  rng = np.random.default_rng(0)
  ids = np.full((len(lengths), max(lengths)), pad_id)
  for row, size in enumerate(lengths):
    drawn = rng.integers(0, _SIZES['vocab_size'] - 1, size)
    ids[row, :size] = np.where(drawn == pad_id, drawn + 1, drawn)
  positions = np.stack([rng.integers(0, size, 4) for size in lengths])
  targets = rng.integers(0, _SIZES['vocab_size'], positions.shape)
  mask = torch.tensor(ids != pad_id)
  given = dict(input_ids=torch.tensor(ids), attention_mask=mask.long())

  def logits_and_loss(
      of: torch.nn.Module,
  ) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.tensor(positions)[..., None]
    logits = torch.take_along_dim(of(**given).logits, at, 1)
    logp = torch.log_softmax(logits, -1)
    picked = torch.take_along_dim(logp, torch.tensor(targets)[..., None], 2)
    return logits, -picked.mean()

  exact = model
  if ids.shape[1] > 1000:
    # At 8,192, float32 is off by 2e-5 (eager) and 5e-5 (`sdpa`). The backward
    # pass of eager attention would keep 1 GB a layer.
    exact = copy.deepcopy(model).double()
    model.set_attn_implementation('sdpa')
  with torch.no_grad():
    hidden = exact.base_model(**given).last_hidden_state
    logits, loss = logits_and_loss(exact)
  logits_and_loss(model)[1].backward()
  arrays = dict(
      ids=ids.astype(np.int32), positions=positions, targets=targets,
      hidden=(hidden * mask[..., None]).float().numpy(),
      logits=logits.float().numpy(), loss=loss.float().numpy(),
  )
  for name, p in model.named_parameters():
    arrays[f'gradient/{name}'] = p.grad.numpy()
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--output', type=pathlib.Path, default=_OUTPUT)
  parser.add_argument('--length', type=int)
  given = parser.parse_args()
  arrays = {}
  for name, tokenizer in (
      ('roberta', _roberta),
      ('xlm-roberta', _xlm_roberta),
      ('modernbert', _modernbert),
  ):
    lengths = [300, 171, 2] if name == 'modernbert' else [30, 17, 2]
    if given.length:
      lengths = [given.length]
    if given.length and name != 'modernbert':
      continue
    folder = given.output / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    _SIZES['vocab_size'] = len(loaded)
    model = _model(name, loaded.pad_token_id, max(lengths))
    model.save_pretrained(folder)
    results = _results(model, lengths, loaded.pad_token_id)
    for key, value in results.items():
      arrays[f'{name}/{key}'] = value
    if not given.length:
      texts = [*_TEXTS[:3], 'a    b </s> [SEP]']
      arrays[f'{name}/texts'] = np.array(texts)
      for i, text in enumerate(texts[:3]):
        arrays[f'{name}/text_{i}'] = np.array(
            loaded(text, text[:20])['input_ids'], np.int32
        )
  np.savez_compressed(given.output / 'expected.npz', **arrays)


if __name__ == '__main__':
  main()
