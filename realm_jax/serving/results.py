"""Answers and inspections as the JSON of the API; spans count characters."""

import dataclasses
from typing import Any

from realm_jax.evaluation import inspect
from realm_jax.inference import answering
from realm_jax.qa import answers as answers_lib

Json = dict[str, Any]


def of_answer(answer: answering.Answer) -> Json:
  """Returns an answer; `marginal` sums equal best spans of the passages."""
  passages = []
  together: dict[str, list[answering.Passage]] = {}
  for rank, passage in enumerate(answer.passages, 1):
    text = passage.text.encode('utf-8')  # `start` and `limit` count bytes.
    start = len(text[: passage.start].decode('utf-8'))
    limit = start + len(passage.answer)
    passages.append(_ranked(rank, passage) | {'start': start, 'limit': limit})
    if passage.answer:
      same = answers_lib.normalize_answer(passage.answer)
      together.setdefault(same, []).append(passage)
  marginal = [
      {
          # The form of the likeliest passage stands for all.
          'answer': max(same, key=lambda one: one.answer_probability).answer,
          'probability': sum(one.answer_probability for one in same),
      }
      for same in together.values()
  ]
  return {
      'question': answer.question,
      'answer': answer.text,
      'probability': answer.probability,
      'best': answer.best,
      'passages': passages,
      # Without a passage, a reader of spans has no answer.
      'without_passages': None,
      'marginal': sorted(marginal, key=lambda one: -one['probability']),
  }


def of_inspection(found: inspect.Inspection) -> Json:
  """Returns the fillings with all passages, with each, and with none."""
  marginal = dataclasses.asdict(found.marginal)
  return {
      'sentence': found.text,
      **marginal,
      'passages': [
          _ranked(rank, document)
          for rank, document in enumerate(found.documents, 1)
      ],
      'without_passages': {
          **dataclasses.asdict(found.null.prediction),
          'null_probability': found.null.probability,
      },
      'marginal': marginal,
  }


def _ranked(rank: int, passage: answering.Passage | inspect.Document) -> Json:
  fields = dataclasses.asdict(passage)
  del fields['row']
  return {'rank': rank, **fields}
