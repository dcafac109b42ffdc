"""`realm-jax export --format=index`: the document embeddings, for other tools.

Public: `export`. `embeddings.npy` [N, E], `ids.jsonl` with the passage id of
each row, `index.json`; and `index.faiss` where FAISS is installed.
"""

import importlib.util
import json
import pathlib

import numpy as np

from realm_jax.interop import exported

_ROWS = 2**16


def export(
    workdir: exported.Workdir, output: exported.Path, dtype: str = 'float32'
) -> pathlib.Path:
  """Writes the embeddings of all documents by the workdir's parameters.

  Args:
    workdir: opened; its generation must have been built.
    output: folder to write; it appears, complete, at the very end.
    dtype: of embeddings.npy, 'float32' or 'float16'. FAISS has float32.

  Raises:
    FileExistsError: if `output` is there and not empty.
    FileNotFoundError: if there is no generation of these parameters.
    ValueError: if the workdir has no retriever or corpus, or an embedding
      does not fit into float16.
  """
  if dtype not in ('float32', 'float16'):
    raise ValueError(f"--dtype={dtype}: can be 'float32' or 'float16'.")
  if (
      'embedder' not in workdir.params
      or workdir.documents is None
      or workdir.corpus is None
  ):
    raise ValueError(f'{workdir.path} has no retriever over a corpus.')
  index = workdir.index()
  table, live = index.table, index.live_rows
  with exported.atomic_folder(output) as folder:
    rows = np.lib.format.open_memmap(
        folder / 'embeddings.npy',
        'w+',
        np.dtype(dtype),
        (len(live), table.shape[1]),
    )
    flat = None
    if importlib.util.find_spec('faiss') is not None:
      import faiss

      flat = faiss.IndexFlatIP(table.shape[1])
    for start in range(0, len(live), _ROWS):
      part_NE = table[live[start : start + _ROWS]].astype(np.float32)
      # Its largest number is 65,504.
      if dtype == 'float16' and np.abs(part_NE).max() > np.finfo(dtype).max:
        raise ValueError(
            'An embedding does not fit into float16; export float32.'
        )
      rows[start : start + _ROWS] = part_NE
      if flat is not None:
        flat.add(np.ascontiguousarray(part_NE))
    rows.flush()
    if flat is not None:
      faiss.write_index(flat, str(folder / 'index.faiss'))
    with open(folder / 'ids.jsonl', 'w', encoding='utf-8') as file:
      for row in live.tolist():
        file.write(json.dumps(workdir.corpus.passage_text(row)['id']) + '\n')
    lineage = index.generation.lineage
    about = {
        'rows': len(live),
        'width': table.shape[1],
        'dtype': dtype,
        'relevance': 'inner product',
        'step': workdir.step,
        'params_digest': lineage.params_digest,
        'tokenizer_digest': lineage.tokenizer_digest,
        'corpus_fingerprint': lineage.corpus_fingerprint,
        'documents': workdir.documents.about(),
        'faiss': 'index.faiss' if flat is not None else None,
    }
    (folder / 'index.json').write_text(json.dumps(about, indent=2) + '\n')
  return pathlib.Path(output)
