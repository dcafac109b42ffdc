"""The PyTorch side of benchmarks/train_step.py, which starts this file.

Runs in the Python given as --torch_python, with PyTorch and transformers
4.40.2. RealmScorer and RealmKnowledgeAugEncoder make one pretraining step;
`variant` says how:

  shipped      as they are: the vocabulary projected at every position
  masked_head  the projection at the masked positions only
  null_once    masked_head, and the null document embedded once, unpadded
  sdpa         null_once, and PyTorch's fused attention
"""

import os
import time
from typing import Any

import harness
import numpy as np
import torch
import transformers
from transformers.models.realm import modeling_realm


class Sdpa(modeling_realm.RealmSelfAttention):
  """Self-attention through scaled_dot_product_attention."""

  def forward(self, hidden_states, attention_mask=None, *unused, **also_unused):
    del unused, also_unused
    mixed = torch.nn.functional.scaled_dot_product_attention(
        self.transpose_for_scores(self.query(hidden_states)),
        self.transpose_for_scores(self.key(hidden_states)),
        self.transpose_for_scores(self.value(hidden_states)),
        attn_mask=attention_mask.to(hidden_states.dtype),
        dropout_p=self.dropout.p if self.training else 0.0,
    )
    return (mixed.transpose(1, 2).flatten(2),)


class _Side:
  """Models, optimizer and one batch."""

  def __init__(self, spec: dict[str, Any]):
    self.spec = spec
    torch.set_num_threads(spec['threads'])
    config = transformers.RealmConfig(
        vocab_size=spec['vocab_size'],
        hidden_size=spec['width'],
        num_hidden_layers=spec['layers'],
        num_attention_heads=spec['heads'],
        intermediate_size=4 * spec['width'],
        max_position_embeddings=512,
        hidden_act='gelu_new',
        retriever_proj_size=128,
        num_candidates=spec['candidates'],
        hidden_dropout_prob=spec['dropout'],
        attention_probs_dropout_prob=spec['dropout'],
    )
    self.scorer = modeling_realm.RealmScorer(config)
    self.encoder = modeling_realm.RealmKnowledgeAugEncoder(config)
    self.parameters = list(
        {
            id(p): p
            for model in (self.scorer, self.encoder)
            for p in model.parameters()
        }.values()
    )
    self.optimizer = torch.optim.AdamW(
        self.parameters, lr=1e-5, eps=1e-6, weight_decay=0.01, fused=True
    )
    with np.load(spec['inputs']) as file:
      self.inputs = {
          name: torch.as_tensor(file[name].astype(np.int64))
          for name in file.files
      }
    self.plain = [
        module
        for module in (*self.scorer.modules(), *self.encoder.modules())
        if type(module) is modeling_realm.RealmSelfAttention
    ]

  def load(self, folder: str) -> None:
    """Takes over the weights that the other side wrote."""
    for name, model in (
        ('scorer', self.scorer), ('encoder', self.encoder)
    ):
      with np.load(f'{folder}/{name}.npz') as file:
        values = {key: torch.tensor(file[key]) for key in file.files}
      model.load_state_dict(values, strict=False)

  def use(self, variant: str) -> None:
    self.variant = variant
    kind = Sdpa if variant == 'sdpa' else modeling_realm.RealmSelfAttention
    for module in self.plain:
      module.__class__ = kind

  def scores(self) -> torch.Tensor:
    x = self.inputs
    if self.variant in ('shipped', 'masked_head'):
      return self.scorer(
          input_ids=x['query_ids'],
          attention_mask=(x['query_ids'] != 0).long(),
          candidate_input_ids=x['doc_ids'],
          candidate_attention_mask=(x['doc_ids'] != 0).long(),
          candidate_token_type_ids=x['doc_types'],
      ).relevance_score
    def embed(ids, types):
      return self.scorer.embedder(
          ids, attention_mask=(ids != 0).long(), token_type_ids=types
      ).projected_score

    query = embed(x['query_ids'], torch.zeros_like(x['query_ids']))
    null = embed(x['doc_ids'][:1, 0, :3], x['doc_types'][:1, 0, :3])
    real = embed(
        x['doc_ids'][:, 1:].flatten(0, 1), x['doc_types'][:, 1:].flatten(0, 1)
    ).unflatten(0, (len(query), -1))
    return torch.cat(
        [query @ null.T, torch.einsum('bd,bnd->bn', query, real)], 1
    )

  def loss(self, scores: torch.Tensor) -> torch.Tensor:
    x = self.inputs
    if self.variant == 'shipped':
      return self.encoder(
          input_ids=x['joint_ids'],
          attention_mask=(x['joint_ids'] != 0).long(),
          token_type_ids=x['joint_types'],
          relevance_score=scores,
          labels=x['labels'],
          mlm_mask=(x['labels'] != -100).long(),
      ).loss
    ids = x['joint_ids'].flatten(0, 1)
    hidden = self.encoder.realm(
        ids,
        attention_mask=(ids != 0).long(),
        token_type_ids=x['joint_types'].flatten(0, 1),
    )[0]
    candidates = scores.shape[1]
    positions = x['positions'].repeat_interleave(candidates, 0)
    at_masks = hidden.gather(
        1, positions[..., None].expand(-1, -1, hidden.shape[-1])
    )
    logits = self.encoder.cls(at_masks).float()
    logp = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        x['targets'].repeat_interleave(candidates, 0).flatten(),
        reduction='none',
    ).view(len(scores), candidates, -1)
    joint = scores.log_softmax(-1)[..., None] + logp
    return -joint.logsumexp(1).mean()

  def step(self) -> None:
    loss = self.forward()
    loss.backward()
    self.update()

  def forward(self) -> torch.Tensor:
    return self.loss(self.scores())

  def update(self) -> None:
    torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)

  def part(self, name: str) -> None:
    if name == 'step':
      self.step()
    elif name == 'embed_forward':
      self.scores()
    elif name == 'embed':
      self.scores().sum().backward()
    elif name in ('read', 'read_forward'):
      shape = self.inputs['doc_ids'].shape[:2]
      loss = self.loss(torch.zeros(shape))
      if name == 'read':
        loss.backward()
    elif name == 'optimizer':
      for p in self.parameters:
        if p.grad is None:
          p.grad = torch.zeros_like(p)
      start = time.perf_counter()
      self.update()
      self.seconds = time.perf_counter() - start

  def time(self, name: str) -> float:
    self.seconds = 0.0
    start = time.perf_counter()
    self.part(name)
    return self.seconds or time.perf_counter() - start

  def drop_gradients(self) -> None:
    self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
  side: Any = None

  def answer(do: str, request: dict[str, Any]) -> dict[str, Any]:
    nonlocal side
    match do:
      case 'open':
        threads = request['threads']
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)
        side = _Side(request)
        return {
            'torch': torch.__version__,
            'transformers': transformers.__version__,
        }
      case 'load':
        side.load(request['folder'])
      case 'use':
        side.use(request['variant'])
      case 'loss':
        models = torch.nn.ModuleList((side.scorer, side.encoder)).eval()
        with torch.no_grad():
          value = float(side.forward())
        models.train()
        return {'value': value}
      case 'time':
        seconds = side.time(request['part'])
        if request['part'] != 'step':
          side.drop_gradients()
        return {'seconds': seconds}
    return {}

  harness.serve(answer)


if __name__ == '__main__':
  main()
