"""Answers and inspections as the JSON of the API; spans count characters."""

from typing import Any

from realm_jax.evaluation import inspect
from realm_jax.inference import answering
from realm_jax.qa import answers as answers_lib

Json = dict[str, Any]


def of_answer(answer: answering.Answer) -> Json:
  """Returns an answer; `marginal` sums equal best spans of the passages."""
  passages = []
  together: dict[str, Json] = {}
  for rank, passage in enumerate(answer.passages, 1):
    text = passage.text.encode('utf-8')  # `start` and `limit` count bytes.
    start = len(text[: passage.start].decode('utf-8'))
    passages.append({
        'rank': rank,
        'id': passage.id,
        'title': passage.title,
        'text': passage.text,
        'score': passage.score,
        'probability': passage.probability,
        'answer': passage.answer,
        'answer_probability': passage.answer_probability,
        'start': start,
        'limit': start + len(passage.answer),
    })
    if passage.answer:
      # The form of the likeliest passage stands for all.
      found = together.setdefault(
          answers_lib.normalize_answer(passage.answer),
          {'answer': passage.answer, 'probability': 0.0, 'best': 0.0},
      )
      found['probability'] += passage.answer_probability
      if passage.answer_probability > found['best']:
        found['answer'] = passage.answer
        found['best'] = passage.answer_probability
  marginal = sorted(together.values(), key=lambda one: -one['probability'])
  return {
      'question': answer.question,
      'answer': answer.text,
      'probability': answer.probability,
      'best': answer.best,
      'passages': passages,
      # Without a passage, a reader of spans has no answer.
      'without_passages': None,
      'marginal': [
          {'answer': one['answer'], 'probability': one['probability']}
          for one in marginal
      ],
  }


def of_inspection(found: inspect.Inspection) -> Json:
  """Returns the fillings with all passages, with each, and with none."""
  def prediction(one: inspect.Prediction) -> Json:
    return {'fillings': list(one.fillings), 'probability': one.probability}

  return {
      'sentence': found.text,
      **prediction(found.marginal),
      'passages': [
          {
              'rank': rank,
              'id': document.id,
              'title': document.title,
              'text': document.text,
              'score': document.score,
              'probability': document.probability,
              'prediction': prediction(document.prediction),
          }
          for rank, document in enumerate(found.documents, 1)
      ],
      'without_passages': {
          **prediction(found.null.prediction),
          'null_probability': found.null.probability,
      },
      'marginal': prediction(found.marginal),
  }
