"""REALM: a language model and a document retriever, trained together in JAX.

Array names end in their shape, one capital letter per dimension:

  B queries (examples)       K candidate documents, the null document first
  J retrieved, J = K - 1     Q query length, S document length
  T joint length, T = Q + S  M masked positions
  V vocabulary               D width of the encoder
  F width of its MLP         H attention heads
  C size of one head         E width of the retrieval embedding
  N documents in the corpus  R row ranges excluded from a search

`L` is any sequence length (Q, S or T) where the code serves all of them.
"""

__version__ = '0.1.0'
