"""The PyTorch side of benchmarks/imported_retriever.py: sentence-transformers.

Its `encode` sorts texts by length.
"""

import harness
import numpy as np
import sentence_transformers


class Side:

  def __init__(self, folder):
    self._model = sentence_transformers.SentenceTransformer(
        folder, device='cpu'
    )

  def embed(self, texts, query, output):
    """Writes embeddings; returns the seconds."""
    encode = self._model.encode_query if query else self._model.encode_document
    seconds, found = harness.timed(
        lambda: encode(
            texts,
            batch_size=32,  # The default of `encode`.
            normalize_embeddings=False,
            show_progress_bar=False,
        )
    )
    np.save(output, found.astype(np.float32))
    return seconds


if __name__ == '__main__':
  harness.serve(Side)
