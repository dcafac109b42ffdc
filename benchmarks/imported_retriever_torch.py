"""The PyTorch side of benchmarks/imported_retriever.py, which starts this file.

Runs in the Python given as --torch_python, with PyTorch and
sentence-transformers, whose `encode` sorts texts by length.
"""

from importlib import metadata
import time
from typing import Any

import harness
import numpy as np
import sentence_transformers

_BATCH = 32  # The default of `encode`.
_model: sentence_transformers.SentenceTransformer | None = None


def _answer(do: str, request: dict[str, Any]) -> dict[str, Any]:
  global _model
  if do == 'load':
    _model = sentence_transformers.SentenceTransformer(
        request['folder'], device='cpu'
    )
    packages = ('torch', 'transformers', 'sentence-transformers')
    return {'versions': {name: metadata.version(name) for name in packages}}
  assert _model is not None
  encode = _model.encode_query if request['query'] else _model.encode_document
  start = time.perf_counter()
  found = encode(
      request['texts'],
      batch_size=_BATCH,
      normalize_embeddings=False,
      show_progress_bar=False,
  )
  seconds = time.perf_counter() - start
  np.save(request['output'], found.astype(np.float32))
  return {'seconds': seconds}


if __name__ == '__main__':
  harness.serve(_answer)
