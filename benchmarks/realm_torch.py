"""REALM of transformers 4.40.2: the other side of several benchmarks.

train_step.py, refresh.py and open_qa_step.py run this file, with the name of a
class, in the Python given as --torch_python (`harness.Child`).
"""

import itertools
import json
import pathlib
import sys
import time

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


def _set_attention(model, sdpa):
  """Chooses PyTorch's fused attention, or that of transformers."""
  for module in model.modules():
    if isinstance(module, modeling_realm.RealmSelfAttention):
      module.__class__ = Sdpa if sdpa else modeling_realm.RealmSelfAttention


def _load(model, path):
  """Takes over the weights that the other side wrote."""
  with np.load(path) as file:
    weights = {name: torch.from_numpy(file[name]) for name in file.files}
  unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
  if unexpected or not weights:
    raise ValueError(f'{path}: the model has no {unexpected}.')


class Step:
  """A pretraining step: RealmScorer, RealmKnowledgeAugEncoder, AdamW.

  Variants:
    shipped: as they are: the vocabulary projected at every position.
    masked_head: the projection at the masked positions only.
    null_once: masked_head, and the null document embedded once, unpadded.
    sdpa: null_once, and PyTorch's fused attention.
  """

  def __init__(self, config, candidates, folder, null):
    config = transformers.RealmConfig(**config, num_candidates=candidates)
    self._scorer = modeling_realm.RealmScorer(config)
    self._encoder = modeling_realm.RealmKnowledgeAugEncoder(config)
    _load(self._scorer, f'{folder}/scorer.npz')
    _load(self._encoder, f'{folder}/encoder.npz')
    self._both = torch.nn.ModuleList((self._scorer, self._encoder)).train()
    self._optimizer = torch.optim.AdamW(
        self._both.parameters(), lr=1e-5, eps=1e-6, weight_decay=0.01,
        fused=True,
    )
    with np.load(f'{folder}/batch.npz') as file:
      self._x = {
          name.rpartition('_')[0]: torch.as_tensor(file[name].astype(np.int64))
          for name in file.files
      }
    x, size = self._x, len(null[0])
    # Here the null document is a document like the others.
    for name, values in zip(('doc_ids', 'doc_types'), null, strict=True):
      padded = torch.zeros_like(x[name][:, :1])
      padded[..., :size] = torch.tensor(values)
      x[name] = torch.cat([padded, x[name]], 1)
    self._null = [x[name][:1, 0, :size] for name in ('doc_ids', 'doc_types')]
    labels = torch.full_like(x['joint_ids'][:, 0], -100)
    x['labels'] = labels.scatter(1, x['positions'], x['targets'])

  def loss(self, variant):
    self._use(variant)
    self._both.eval()
    with torch.no_grad():
      value = float(self._loss(self._scores()))
    self._both.train()
    return value

  def time(self, part, variant):
    """Seconds of a part of the step, or of all of it."""
    self._use(variant)
    if part == 'optimizer':
      for p in self._both.parameters():
        p.grad = torch.zeros_like(p)
    seconds, _ = harness.timed(self._run, part)
    self._optimizer.zero_grad(set_to_none=True)
    return seconds

  def _use(self, variant):
    self._variant = variant
    _set_attention(self._both, variant == 'sdpa')

  def _run(self, part):
    if part == 'optimizer':
      self._update()
    elif part.startswith('embed'):
      result = self._scores().sum()
    elif part.startswith('read'):
      result = self._loss(torch.zeros(self._x['doc_ids'].shape[:2]))
    else:
      result = self._loss(self._scores())
    if part in ('step', 'embed', 'read'):
      result.backward()
    if part == 'step':
      self._update()

  def _update(self):
    torch.nn.utils.clip_grad_norm_(self._both.parameters(), 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)

  def _scores(self):
    x = self._x
    if self._variant in ('shipped', 'masked_head'):
      return self._scorer(
          input_ids=x['query_ids'],
          attention_mask=(x['query_ids'] != 0).long(),
          candidate_input_ids=x['doc_ids'],
          candidate_attention_mask=(x['doc_ids'] != 0).long(),
          candidate_token_type_ids=x['doc_types'],
      ).relevance_score

    def embed(ids, types):
      return self._scorer.embedder(
          ids, attention_mask=(ids != 0).long(), token_type_ids=types
      ).projected_score

    query = embed(x['query_ids'], torch.zeros_like(x['query_ids']))
    real = embed(
        x['doc_ids'][:, 1:].flatten(0, 1), x['doc_types'][:, 1:].flatten(0, 1)
    ).unflatten(0, (len(query), -1))
    return torch.cat(
        [
            query @ embed(*self._null).T,
            torch.einsum('bd,bnd->bn', query, real),
        ],
        1,
    )

  def _loss(self, scores):
    x = self._x
    if self._variant == 'shipped':
      return self._encoder(
          input_ids=x['joint_ids'],
          attention_mask=(x['joint_ids'] != 0).long(),
          token_type_ids=x['joint_types'],
          relevance_score=scores,
          labels=x['labels'],
          mlm_mask=(x['labels'] != -100).long(),
      ).loss
    ids = x['joint_ids'].flatten(0, 1)
    hidden = self._encoder.realm(
        ids,
        attention_mask=(ids != 0).long(),
        token_type_ids=x['joint_types'].flatten(0, 1),
    )[0]
    candidates = scores.shape[1]
    positions = x['positions'].repeat_interleave(candidates, 0)
    at_masks = hidden.gather(
        1, positions[..., None].expand(-1, -1, hidden.shape[-1])
    )
    logits = self._encoder.cls(at_masks).float()
    logp = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        x['targets'].repeat_interleave(candidates, 0).flatten(),
        reduction='none',
    ).view(len(scores), candidates, -1)
    joint = scores.log_softmax(-1)[..., None] + logp
    return -joint.logsumexp(1).mean()


class Embedding:
  """RealmEmbedder, and the passages of every round."""

  def __init__(self, config, folder):
    config = transformers.RealmConfig(**config)
    self._model = transformers.RealmEmbedder(config).eval()
    _load(self._model, f'{folder}/weights.npz')
    with np.load(f'{folder}/passages.npz') as file:
      self._passages = {name: file[name] for name in file.files}

  @torch.inference_mode()
  def embed(self, number, variant, save):
    """Embeds the passages of a round; returns the seconds.

    Args:
      number: of the round.
      variant: `bucketed` (sorted by length, and padded to the longest of a
        batch) or `padded` (to the longest passage there can be), `sdpa` or
        `eager`, and the wordpieces of a batch.
      save: file for the embeddings.
    """
    how, attention, budget = variant.split()
    _set_attention(self._model, attention == 'sdpa')
    ids, types = (self._passages[f'{number}/{x}'] for x in ('ids', 'types'))
    start = time.perf_counter()
    lengths = (ids != 0).sum(1)
    order = np.argsort(-lengths, kind='stable')
    found = np.zeros((len(ids), 128), np.float32)
    first = 0
    while first < len(order):
      width = ids.shape[1] if how == 'padded' else lengths[order[first]]
      mine = order[first : first + max(int(budget) // int(width), 1)]
      some = torch.from_numpy(ids[mine, :width].astype(np.int64))
      output = self._model(
          input_ids=some,
          token_type_ids=torch.from_numpy(types[mine, :width].astype(np.int64)),
          attention_mask=(some != 0).long(),
      )
      found[mine] = output.projected_score.numpy()
      first += len(mine)
    seconds = time.perf_counter() - start
    np.save(save, found)
    return seconds


class OpenQA:
  """Steps of RealmForOpenQA, one question each."""

  def __init__(self, config, retrieved, folder):
    folder = pathlib.Path(folder)
    blocks, questions = (
        json.loads((folder / name).read_text())
        for name in ('blocks.json', 'questions.json')
    )
    self._tokenizer = transformers.RealmTokenizerFast(
        tokenizer_object=transformers.BertTokenizerFast(
            vocab_file=str(folder / 'vocab.txt'), do_lower_case=True
        )._tokenizer,
        unk_token='[UNK]', sep_token='[SEP]', pad_token='[PAD]',
        cls_token='[CLS]', mask_token='[MASK]',
    )
    config = transformers.RealmConfig(
        **config,
        num_block_records=len(blocks),
        searcher_beam_size=retrieved,
        reader_beam_size=5,
        reader_seq_len=320,
    )
    self._retriever = transformers.RealmRetriever(
        np.array([block.encode() for block in blocks], object), self._tokenizer
    )
    self._model = transformers.RealmForOpenQA(config, self._timed).train()
    self._optimizer = torch.optim.AdamW(
        self._model.parameters(), lr=1e-5, fused=True
    )
    self._questions = itertools.cycle(questions)

  def _timed(self, *args, **kwargs):
    self._spent, found = harness.timed(
        lambda: self._retriever(*args, **kwargs)
    )
    return found

  def step(self):
    """Returns the seconds of a step, and of retrieval among them."""
    question, answers = next(self._questions)
    encoded = self._tokenizer([question], return_tensors='pt')
    answer_ids = self._tokenizer(
        answers, add_special_tokens=False, return_token_type_ids=False,
        return_attention_mask=False,
    ).input_ids
    start = time.perf_counter()
    found = self._model(**encoded, answer_ids=answer_ids, return_dict=True)
    found.reader_output.loss.backward()
    self._optimizer.step()
    self._optimizer.zero_grad()
    return {'retrieve': self._spent, 'step': time.perf_counter() - start}


if __name__ == '__main__':
  transformers.logging.set_verbosity_error()
  sides = {side.__name__: side for side in (Step, Embedding, OpenQA)}
  harness.serve(sides[sys.argv[1]])
