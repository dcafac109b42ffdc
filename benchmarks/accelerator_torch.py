"""The PyTorch side of benchmarks/accelerator.py: the same REALM step.

Two BertModels of transformers 5 with SDPA, autocast to bfloat16 on a GPU, fused
AdamW, the vocabulary at the masked positions only, the null document embedded
once; no input is padded, so SDPA needs no mask and may use its fastest kernel.
"""

import time

import harness
import torch
from torch import nn
import transformers


class Side:
  """Models, optimizer and one batch of random wordpieces."""

  def __init__(
      self, model, batch, candidates, query, document, masks,
  ):
    self._device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if self._device.type == 'cpu':  # Toy sizes, which threads only slow down.
      torch.set_num_threads(1)
    else:
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = transformers.BertConfig(**model, attn_implementation='sdpa')
    width, vocab_size = config.hidden_size, config.vocab_size
    self._model = nn.ModuleDict({
        'embedder': transformers.BertModel(config, add_pooling_layer=True),
        'projection': nn.Sequential(nn.Linear(width, 128), nn.LayerNorm(128)),
        'reader': transformers.BertModel(config, add_pooling_layer=False),
        'head': nn.Sequential(
            nn.Linear(width, width), nn.GELU('tanh'), nn.LayerNorm(width)
        ),
    })
    self._model.register_parameter(
        'bias', nn.Parameter(torch.zeros(vocab_size))
    )
    self._model.to(self._device).train()
    self._optimizer = torch.optim.AdamW(
        self._model.parameters(), lr=1e-5, eps=1e-6, weight_decay=0.01,
        fused=True,
    )

    def ids(*shape):
      return torch.randint(5, vocab_size, shape, device=self._device)

    self._query, self._docs = (
        ids(batch, query), ids(batch * (candidates - 1), document)
    )
    self._null = torch.tensor([[101, 102, 102]], device=self._device)
    self._joint = ids(batch * candidates, query + document)
    self._targets = ids(batch, masks)
    self._types = torch.ones_like(self._joint)
    self._types[:, :query] = 0
    self._positions = torch.arange(1, masks + 1, device=self._device)

  def steps(self, count):
    """Seconds of a step, of `count` that are queued without waiting."""
    start = time.perf_counter()
    for _ in range(count):
      with torch.autocast(
          self._device.type,
          torch.bfloat16,
          enabled=self._device.type == 'cuda',
      ):
        loss = self._loss()
      loss.backward()
      nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
    if not torch.isfinite(loss):  # Waits for the device.
      raise FloatingPointError(f'The loss is {loss.item()}.')
    if self._device.type == 'cuda':
      torch.cuda.synchronize()
    return (time.perf_counter() - start) / count

  def memory(self):
    """GB of the device that PyTorch held at its peak."""
    if self._device.type != 'cuda':
      return None
    return torch.cuda.max_memory_reserved() / 1e9

  def _embed(self, ids, types):
    output = self._model['embedder'](ids, token_type_ids=types)
    return self._model['projection'](output.pooler_output)

  def _loss(self):
    query = self._embed(self._query, torch.zeros_like(self._query))
    real = self._embed(self._docs, torch.ones_like(self._docs))
    null = self._embed(self._null, torch.zeros_like(self._null))
    real = real.unflatten(0, (len(query), -1))
    scores = torch.cat(
        [query @ null.T, torch.einsum('bd,bnd->bn', query, real)], 1
    ).float()
    hidden = self._model['reader'](
        self._joint, token_type_ids=self._types
    ).last_hidden_state
    embedding = self._model['reader'].embeddings.word_embeddings.weight
    logits = nn.functional.linear(
        self._model['head'](hidden[:, self._positions]),
        embedding,
        self._model.bias,
    ).float()
    candidates = scores.shape[1]
    logp = -nn.functional.cross_entropy(
        logits.flatten(0, 1),
        self._targets.repeat_interleave(candidates, 0).flatten(),
        reduction='none',
    ).view(len(scores), candidates, -1)
    return -(scores.log_softmax(-1) + logp.sum(-1)).logsumexp(1).mean()


if __name__ == '__main__':
  harness.serve(Side)
