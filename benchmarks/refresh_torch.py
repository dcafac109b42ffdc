"""The PyTorch side of benchmarks/refresh.py, which starts this file.

Runs in the Python given as --torch_python, with PyTorch and transformers
4.40.2. RealmEmbedder embeds passages; a variant is three words:

  bucketed|padded   sorted by length and padded to the longest of the batch, or
                    every batch padded to the longest passage there can be
  sdpa|eager        PyTorch's fused attention, or attention as transformers
                    has it
  4096, ...         wordpieces of a batch
"""

import time

import harness
import numpy as np
import torch
import train_step_torch
import transformers


class _Side:
  """The model, and the passages of every round."""

  def __init__(self, spec):
    torch.set_num_threads(spec['threads'])
    config = transformers.RealmConfig(**spec['config'])
    self._longest = spec['longest']
    self._models = {}
    with np.load(spec['weights']) as file:
      weights = {name: torch.from_numpy(file[name]) for name in file.files}
    for attention in ('eager', 'sdpa'):
      model = transformers.RealmEmbedder(config).eval()
      missing, unexpected = model.load_state_dict(weights, strict=False)
      missing = [name for name in missing if 'position_ids' not in name]
      if missing or unexpected:
        raise ValueError(f'Of the weights, {missing=} {unexpected=}.')
      if attention == 'sdpa':
        for layer in model.realm.encoder.layer:
          layer.attention.self.__class__ = train_step_torch.Sdpa
      self._models[attention] = model
    with np.load(spec['passages']) as file:
      self._passages = {name: file[name] for name in file.files}

  @torch.inference_mode()
  def embed(self, round_, variant):
    """Embeds the passages of a round; returns the seconds and the result."""
    how, attention, budget = variant.split()
    model, budget = self._models[attention], int(budget)
    offsets = self._passages[f'{round_}/offsets']
    tokens = self._passages[f'{round_}/tokens']
    segments = self._passages[f'{round_}/segments']
    start = time.perf_counter()
    lengths = np.diff(offsets)
    order = np.argsort(-lengths, kind='stable')
    found = np.zeros((len(lengths), 128), np.float32)
    first = 0
    while first < len(order):
      width = self._longest if how == 'padded' else lengths[order[first]]
      mine = order[first : first + max(budget // int(width), 1)]
      ids = np.zeros((len(mine), width), np.int64)
      types = np.zeros_like(ids)
      for row, passage in enumerate(mine):
        begin, end = offsets[passage], offsets[passage + 1]
        ids[row, : end - begin] = tokens[begin:end]
        types[row, : end - begin] = segments[begin:end]
      output = model(
          input_ids=torch.from_numpy(ids),
          token_type_ids=torch.from_numpy(types),
          attention_mask=torch.from_numpy((ids != 0).astype(np.int64)),
      )
      found[mine] = output.projected_score.numpy()
      first += len(mine)
    return time.perf_counter() - start, found


def main():
  side = None

  def answer(do, request):
    nonlocal side
    if do == 'open':
      transformers.logging.set_verbosity_error()
      side = _Side(request)
      return {
          'torch': torch.__version__, 'transformers': transformers.__version__
      }
    seconds, found = side.embed(request['round'], request['variant'])
    if request.get('save'):
      np.save(request['save'], found)
    return {'seconds': seconds}

  harness.serve(answer)


if __name__ == '__main__':
  main()
