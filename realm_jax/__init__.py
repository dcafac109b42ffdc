"""REALM: a language model and a document retriever, trained together in JAX.

Array names end in their shape, one capital letter per dimension:

  B queries (examples)       K candidate documents, the null document first
  J retrieved, J = K - 1     Q query length, S document length
  T joint length, T = Q + S  M masked positions
  V vocabulary               D width of the encoder
  F width of its MLP         H attention heads
  C size of one head         E width of the retrieval embedding
  N documents in the corpus  R row ranges excluded from a search
  P answer spans             A gold answers

`L` is any sequence length (Q, S or T) where the code serves all of them.

Public: `Retriever`, `OpenQA`, loaded when first used.
"""

import importlib
from typing import Any

__version__ = '0.1.0'


# Where each is. Not imported here: workers of the input pipeline import this
# module and must stay light.
_PUBLIC = {
    'OpenQA': 'realm_jax.inference.answering',
    'Retriever': 'realm_jax.api.retriever',
}


def __getattr__(name: str) -> Any:
  if name in _PUBLIC:
    return getattr(importlib.import_module(_PUBLIC[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
