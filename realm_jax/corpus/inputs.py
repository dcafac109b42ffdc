"""Model inputs: wordpieces with [CLS] and [SEP], in numpy.

Only this module writes special ids; they and their number are the tokenizer's:
RoBERTa has two [SEP] between two texts, `<s> title </s></s> body </s>`. Batches
are assembled as a whole from the tables of a corpus.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib

Tokenizer = tokenizer_lib.Tokenizer

NULL_DOCUMENT = -1  # Its row number: empty title, empty body.


def null_document(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the ids of the null document, `[CLS] [SEP] [SEP]`."""
  return tokenizer.cls_id, *tokenizer.between, tokenizer.sep_id


def null_types(ids: Sequence[int]) -> tuple[int, ...]:
  """Returns the segments of `null_document`."""
  return (*(0 for _ in ids[1:]), 1)


def query(
    pieces: Sequence[int], length: int, tokenizer: Tokenizer
) -> list[int]:
  """Returns `[CLS] x [SEP]` of wordpieces, cut to `length`."""
  return [tokenizer.cls_id, *pieces[: length - 2], tokenizer.sep_id]


def document(
    title: Sequence[int],
    body: Sequence[int],
    length: int,
    tokenizer: Tokenizer,
) -> tuple[list[int], list[int]]:
  """Returns `[CLS] title [SEP]` and `body [SEP]`; the title has priority."""
  between, specials = tokenizer.between, tokenizer.num_specials
  first = [tokenizer.cls_id, *title[: length - specials], *between]
  return first, [*body[: length - 1 - len(first)], tokenizer.sep_id]


def add_specials(
    ids_NL: np.ndarray, sizes_N: np.ndarray, tokenizer: Tokenizer
) -> None:
  """Puts [CLS] before and [SEP] after the wordpieces, which start at 1."""
  ids_NL[:, 0] = tokenizer.cls_id
  ids_NL[np.arange(len(ids_NL)), sizes_N + 1] = tokenizer.sep_id


def encode_queries(
    texts: list[str], length: int, tokenizer: Tokenizer
) -> np.ndarray:
  """Returns `[CLS] text [SEP]`, cut and padded to `length`, int32 [B, Q]."""
  ids = np.full((len(texts), length), tokenizer.pad_id, np.int32)
  for row, pieces in zip(ids, tokenizer.encode_batch(texts), strict=True):
    cut = query(pieces, length, tokenizer)
    row[: len(cut)] = cut
  return ids


def passage_table(
    passages: Sequence[tuple[str, str]], tokenizer: Tokenizer
) -> corpus_lib.PassageTable:
  """Returns the table of pairs of title and body."""
  titles = tokenizer.encode_batch([title for title, _ in passages])
  bodies = tokenizer.encode_batch([body for _, body in passages])
  pieces = [t + b for t, b in zip(titles, bodies, strict=True)]
  return corpus_lib.PassageTable(
      tokens=np.array([piece for row in pieces for piece in row], np.uint32),
      offsets=np.cumsum([0, *map(len, pieces)]),
      title_lengths=np.array([len(title) for title in titles], np.int32),
      articles=np.arange(len(pieces), dtype=np.int32),
      num_specials=tokenizer.num_specials,
  )


def assemble_queries(
    table: corpus_lib.SentenceTable,
    rows: np.ndarray,
    length: int,
    tokenizer: Tokenizer,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `[CLS] x [SEP]` of sentences, padded.

  Args:
    table: the sentences.
    rows: sentence numbers, [B].
    length: Q; longer sentences are cut.
    tokenizer: for the special ids.

  Returns:
    ids, int32 [B, Q], and the number of ids before the padding, int32 [B].
  """
  pieces = _Pieces(table.tokens, table.starts[rows], table.lengths[rows])
  ids, _ = _join(
      [tokenizer.cls_id, pieces, tokenizer.sep_id],
      length,
      first_segment=3,
      shape=rows.shape,
      pad_id=tokenizer.pad_id,
  )
  return ids, np.minimum(pieces.lengths + 2, length).astype(np.int32)


def assemble_documents(
    passages: corpus_lib.PassageTable,
    rows: np.ndarray,
    length: int,
    tokenizer: Tokenizer,
    cut: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `[CLS] title [SEP] body [SEP]` of passages, padded.

  Args:
    passages: the table.
    rows: passage numbers, any shape; NULL_DOCUMENT for the null document.
    length: S; the title has priority over the body.
    tokenizer: for the special ids.
    cut: for each row, a range (start, limit) of body wordpieces to leave out.

  Returns:
    ids and types (segment 0 up to the first [SEP], then 1), int32 [..., S].
  """
  title, body = _title_and_body(passages, rows.reshape(-1), cut)
  first: list[_Pieces | int] = [tokenizer.cls_id, title, *tokenizer.between]
  return _join(
      [*first, body, tokenizer.sep_id],
      length,
      first_segment=len(first),
      shape=rows.shape,
      pad_id=tokenizer.pad_id,
  )


def assemble_joint(
    passages: corpus_lib.PassageTable,
    rows: np.ndarray,
    query_ids: np.ndarray,
    query_lengths: np.ndarray,
    length: int,
    tokenizer: Tokenizer,
    titles: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the reader's input `[CLS] x [SEP] body [SEP]`, padded.

  Args:
    passages: the table.
    rows: passage numbers [B, K]; NULL_DOCUMENT for the null document.
    query_ids: `[CLS] x [SEP]`, padded, [B, Q].
    query_lengths: number of ids before the padding, [B].
    length: T.
    tokenizer: for the special ids.
    titles: whether to put `title [SEP]` in front of the body.

  Returns:
    ids and types (0 for the sentence, 1 for the rest), int32 [B, K, T].
  """
  num_queries, width = query_ids.shape
  starts = np.arange(num_queries) * width
  queries = _Pieces(
      query_ids.reshape(-1),
      np.repeat(starts, rows.shape[1]),
      np.repeat(query_lengths, rows.shape[1]),
  )
  title, body = _title_and_body(passages, rows.reshape(-1), None)
  # The query brings the first [SEP] between the two texts.
  first: list[_Pieces | int] = [queries, *tokenizer.between[1:]]
  before: list[_Pieces | int] = [title, tokenizer.sep_id] if titles else []
  return _join(
      [*first, *before, body, tokenizer.sep_id],
      length,
      first_segment=len(first),
      shape=rows.shape,
      pad_id=tokenizer.pad_id,
  )


def body_bounds(
    passages: corpus_lib.PassageTable,
    rows: np.ndarray,
    query_lengths: np.ndarray,
    length: int,
    tokenizer: Tokenizer,
    titles: bool = False,
) -> np.ndarray:
  """Returns the half-open range of the body in `assemble_joint`.

  The arguments are those of `assemble_joint`; the result is int32 [B, K, 2].
  """
  title, body = _title_and_body(passages, rows.reshape(-1), None)
  starts = np.repeat(query_lengths, rows.shape[1]).astype(np.int64)
  starts += len(tokenizer.between) - 1
  if titles:
    starts = starts + np.minimum(title.lengths, length - 2 - starts) + 1
  limits = np.minimum(starts + body.lengths, length - 1)
  return np.stack([starts, limits], -1).astype(np.int32).reshape(*rows.shape, 2)


@dataclasses.dataclass(frozen=True)
class _Pieces:
  """A range of wordpieces for each row: start and length in `tokens`.

  With gaps, `gap_sizes` wordpieces are skipped after the first `gap_starts`.
  """

  tokens: corpus_lib.Tokens
  starts: np.ndarray
  lengths: np.ndarray
  gap_starts: np.ndarray | None = None
  gap_sizes: np.ndarray | None = None


def _title_and_body(
    passages: corpus_lib.PassageTable,
    rows: np.ndarray,
    cut: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[_Pieces, _Pieces]:
  real, safe = rows >= 0, np.maximum(rows, 0)
  starts, limits = passages.offsets[safe], passages.offsets[safe + 1]
  titles = np.where(real, passages.title_lengths[safe], 0)
  bodies = np.where(real, limits - starts, 0) - titles
  tokens = passages.tokens
  title = _Pieces(tokens, starts, titles)
  body = _Pieces(tokens, starts + titles, bodies)
  if cut is not None:
    gap_starts, gap_limits = cut
    sizes = gap_limits - gap_starts
    body = _Pieces(tokens, body.starts, bodies - sizes, gap_starts, sizes)
  return title, body


def _join(
    parts: list[_Pieces | int],
    length: int,
    first_segment: int,
    shape: tuple[int, ...],
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Concatenates ranges of wordpieces and single ids in each row.

  A range is cut so that the single ids after it still fit. Parts from index
  `first_segment` on have type 1.
  """
  num_rows = next(len(p.lengths) for p in parts if isinstance(p, _Pieces))
  column = np.arange(length)[None]
  ids = np.full((num_rows, length), pad_id, np.int32)
  types = np.zeros((num_rows, length), np.int32)
  filled = np.zeros(num_rows, np.int64)
  for i, part in enumerate(parts):
    if isinstance(part, int):
      size = np.ones(num_rows, np.int64)
    else:
      singles = sum(isinstance(later, int) for later in parts[i + 1 :])
      size = np.minimum(part.lengths, length - singles - filled)
    inside = column - filled[:, None]
    here = (inside >= 0) & (inside < size[:, None])
    if isinstance(part, int):
      values: Any = part
    else:
      if part.gap_starts is not None and part.gap_sizes is not None:
        after = inside >= part.gap_starts[:, None]
        inside = inside + np.where(after, part.gap_sizes[:, None], 0)
      flat = np.where(here, part.starts[:, None] + inside, 0)
      values = part.tokens[flat]
    ids = np.where(here, values, ids)
    if i >= first_segment:
      types = np.where(here, 1, types)
    filled = filled + size
  return (
      ids.astype(np.int32).reshape(*shape, length),
      types.astype(np.int32).reshape(*shape, length),
  )
