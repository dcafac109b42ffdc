"""The PyTorch side of benchmarks/accelerator.py: the same REALM step.

Two BertModels of transformers 5 with SDPA, autocast to bfloat16 on a GPU, fused
AdamW, the vocabulary at the masked positions only, the null document embedded
once; no input is padded, so SDPA needs no mask and may use its fastest kernel.
"""

import time
from typing import Any

import harness
import torch
from torch import nn
import transformers


class _Side:
  """Models, optimizer and one batch of random wordpieces."""

  def __init__(self, spec: dict[str, Any]):
    self._device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if self._device.type == 'cpu':  # Toy sizes, which threads only slow down.
      torch.set_num_threads(1)
    torch.manual_seed(0)
    width, vocab_size = spec['width'], spec['vocab_size']
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=spec['layers'],
        num_attention_heads=spec['heads'],
        intermediate_size=4 * width,
        max_position_embeddings=512,
        hidden_act='gelu_new',
        hidden_dropout_prob=spec['dropout'],
        attention_probs_dropout_prob=spec['attention_dropout'],
        attn_implementation='sdpa',
    )
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
    self._parameters = list(self._model.parameters())
    self._optimizer = torch.optim.AdamW(
        self._parameters, lr=1e-5, eps=1e-6, weight_decay=0.01, fused=True
    )
    b, k, q, s = (
        spec[name] for name in ('batch', 'candidates', 'query', 'document')
    )

    def ids(*shape: int) -> torch.Tensor:
      return torch.randint(5, vocab_size, shape, device=self._device)

    self._query, self._docs = ids(b, q), ids(b * (k - 1), s)
    self._null = torch.tensor([[101, 102, 102]], device=self._device)
    self._joint, self._targets = ids(b * k, q + s), ids(b, spec['masks'])
    self._types = torch.ones_like(self._joint)
    self._types[:, :q] = 0
    self._positions = torch.arange(1, spec['masks'] + 1, device=self._device)

  def steps(self, count: int) -> float:
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
      nn.utils.clip_grad_norm_(self._parameters, 1.0)
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
    if not torch.isfinite(loss):  # Waits for the device.
      raise FloatingPointError(f'The loss is {loss.item()}.')
    if self._device.type == 'cuda':
      torch.cuda.synchronize()
    return (time.perf_counter() - start) / count

  def memory(self) -> float | None:
    """GB of the device that PyTorch held at its peak."""
    if self._device.type != 'cuda':
      return None
    return torch.cuda.max_memory_reserved() / 1e9

  def _embed(self, ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
    output = self._model['embedder'](ids, token_type_ids=types)
    return self._model['projection'](output.pooler_output)

  def _loss(self) -> torch.Tensor:
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


def main() -> None:
  side: Any = None

  def answer(do: str, request: dict[str, Any]) -> dict[str, Any]:
    nonlocal side
    if do == 'open':
      side = None  # Frees the one before.
      if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
      side = _Side(request)
      return {
          'torch': torch.__version__, 'transformers': transformers.__version__
      }
    if do == 'steps':
      return {'seconds': side.steps(request['count'])}
    return {'gigabytes': side.memory()}

  harness.serve(answer)


if __name__ == '__main__':
  main()
