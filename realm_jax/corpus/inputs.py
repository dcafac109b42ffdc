"""Model inputs: wordpieces with [CLS] and [SEP], in numpy.

The special ids and their number are the tokenizer's: RoBERTa has two [SEP]
between two texts, `<s> title </s></s> body </s>`. Only this module knows that,
and the prefixes of a retriever. Batches are assembled as a whole from the
tables of a corpus.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib

Tokenizer = tokenizer_lib.Tokenizer

NULL_DOCUMENT = -1  # Its row number: empty title, empty body.


class Null(NamedTuple):
  """The retriever's input for the null document."""

  ids: tuple[int, ...]
  types: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Template:
  """How the retriever reads a query and a document.

  tokenizer: for the special ids.
  query_length: Q, wordpieces of a query with specials and prefix.
  document_length: S, those of a document.
  query_prefix, document_prefix: wordpieces behind [CLS].
  titles: as config.model.titles.
  separator: wordpieces between a title and its body, if they are one text.
  """

  tokenizer: Tokenizer
  query_length: int
  document_length: int
  query_prefix: tuple[int, ...] = ()
  document_prefix: tuple[int, ...] = ()
  titles: str = 'segments'
  separator: tuple[int, ...] = ()

  @classmethod
  def of(
      cls,
      model: config_lib.ModelConfig,
      lengths: config_lib.LengthsConfig,
      tokenizer: Tokenizer,
  ) -> 'Template':
    """Returns the template of a config.

    Raises:
      ValueError: a prefix leaves no room for a text, or runs into the text.
    """
    found = {}
    for what in ('query', 'document'):
      text, length = getattr(model, f'{what}_prefix'), getattr(lengths, what)
      found[what] = tuple(tokenizer.encode(text)) if text else ()
      if not text:
        continue
      count = len(found[what])
      if count + tokenizer.num_specials >= length:
        raise ValueError(
            f'config.model.{what}_prefix={text!r} has {count} wordpieces, and'
            f' config.lengths.{what}={length} leaves no room for a text after'
            ' it and the special ones. Make the length larger.'
        )
      if tokenizer.encode(f'{text}a') != [*found[what], *tokenizer.encode('a')]:
        # In byte-level BPE, a blank belongs to the word behind it.
        mend = 'leave out' if text.endswith(' ') else 'end it with'
        raise ValueError(
            f'config.model.{what}_prefix={text!r} runs into the text after it:'
            f' {mend} a space.'
        )
    separator: list[int] = []
    if model.titles == 'text':
      separator = tokenizer.encode(model.title_separator)
    return cls(
        tokenizer,
        lengths.query,
        lengths.document,
        found['query'],
        found['document'],
        model.titles,
        tuple(separator),
    )

  @property
  def text_length(self) -> int:
    """Wordpieces of `[CLS] x [SEP]`, which is a query without its prefix."""
    return self.query_length - len(self.query_prefix)

  def encode(self, texts: list[str]) -> np.ndarray:
    """Returns `[CLS] text [SEP]`, without the prefix: int32 [B, Q']."""
    return encode_queries(texts, self.text_length, self.tokenizer)

  def queries(self, ids_BQ: np.ndarray) -> np.ndarray:
    """Returns rows of `[CLS] x [SEP]` with the prefix behind [CLS]."""
    if not self.query_prefix:
      return ids_BQ
    prefix_BP = np.tile(
        np.asarray(self.query_prefix, ids_BQ.dtype), (len(ids_BQ), 1)
    )
    return np.concatenate([ids_BQ[:, :1], prefix_BP, ids_BQ[:, 1:]], axis=1)

  def documents(
      self,
      passages: corpus_lib.PassageTable,
      rows: np.ndarray,
      length: int | None = None,
      cut: tuple[np.ndarray, np.ndarray] | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns passages as the retriever reads them, padded.

    Args:
      passages: the table.
      rows: passage numbers, any shape; NULL_DOCUMENT for the null document.
      length: of the result; None: S. The title has priority over the body.
      cut: for each row, a range (start, limit) of body wordpieces to leave out.

    Returns:
      ids and types, int32 [..., S].
    """
    title, body = _title_and_body(passages, rows.reshape(-1), cut)
    cls_id, sep_id = self.tokenizer.cls_id, self.tokenizer.sep_id
    start: list[_Pieces | int] = [cls_id]
    if self.document_prefix:
      start.append(_repeated(self.document_prefix, np.ones(rows.size, bool)))
    middle: list[_Pieces | int] = [*self.tokenizer.between]
    if self.titles == 'text':
      present_N = title.lengths > 0
      middle = [_repeated(self.separator, present_N)] if self.separator else []
    parts = [*start, title, *middle, body, sep_id]
    segment = len(parts)  # No part has type 1.
    if self.titles == 'segments':
      segment = len(start) + 1 + len(middle)
    return _join(
        parts,
        length or self.document_length,
        first_segment=segment,
        shape=rows.shape,
        pad_id=self.tokenizer.pad_id,
    )

  @functools.cached_property
  def null(self) -> Null:
    """The null document, `[CLS] [SEP] [SEP]` without a prefix."""
    specials = (self.tokenizer.cls_id, *self.document_prefix)
    between = () if self.titles == 'text' else self.tokenizer.between
    ids = (*specials, *between, self.tokenizer.sep_id)
    last = int(self.titles == 'segments')
    return Null(ids, (0,) * (len(ids) - 1) + (last,))

  def overhead(self, title_lengths_N: np.ndarray) -> np.ndarray:
    """Returns the wordpieces of documents besides title and body, [N]."""
    if self.titles == 'text':
      between_N = np.where(title_lengths_N > 0, len(self.separator), 0)
      return between_N + len(self.document_prefix) + 2
    return np.full_like(title_lengths_N, len(self.null.ids))

  def lengths(self, passages: corpus_lib.PassageTable) -> np.ndarray:
    """Returns the wordpieces of all passages as documents, int32 [N]."""
    more_N = self.overhead(passages.title_lengths) - passages.num_specials
    return (passages.lengths + more_N).astype(np.int32)


def query(
    pieces: Sequence[int], length: int, tokenizer: Tokenizer
) -> list[int]:
  """Returns `[CLS] x [SEP]` of wordpieces, cut to `length`."""
  return [tokenizer.cls_id, *pieces[: length - 2], tokenizer.sep_id]


def encode_queries(
    texts: list[str], length: int, tokenizer: Tokenizer
) -> np.ndarray:
  """Returns `[CLS] text [SEP]`, cut and padded to `length`, int32 [B, Q]."""
  ids = np.full((len(texts), length), tokenizer.pad_id, np.int32)
  for row, pieces in zip(ids, tokenizer.encode_batch(texts), strict=True):
    cut = query(pieces, length, tokenizer)
    row[: len(cut)] = cut
  return ids


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
    length: of a row; longer sentences are cut.
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


def _repeated(ids: Sequence[int], present_N: np.ndarray) -> _Pieces:
  """Returns the same wordpieces for the rows that have them."""
  starts_N = np.zeros(len(present_N), np.int64)
  return _Pieces(np.asarray(ids), starts_N, np.where(present_N, len(ids), 0))


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
  ids = np.full(num_rows * length, pad_id, np.int32)
  end_N = np.arange(num_rows) * length  # Where the next part begins in `ids`.
  limit_N = segment_N = end_N + length
  for i, part in enumerate(parts):
    if i == first_segment:
      segment_N = end_N
    if isinstance(part, int):
      ids[end_N] = part
      end_N = end_N + 1
      continue
    singles = sum(isinstance(later, int) for later in parts[i + 1 :])
    size_N = np.minimum(part.lengths, limit_N - singles - end_N)
    within = np.arange(size_N.sum())  # arange(size) for each row.
    within -= np.repeat(np.cumsum(size_N) - size_N, size_N)
    at = np.repeat(end_N, size_N) + within
    if part.gap_starts is not None and part.gap_sizes is not None:
      after = within >= np.repeat(part.gap_starts, size_N)
      within += np.where(after, np.repeat(part.gap_sizes, size_N), 0)
    ids[at] = part.tokens[np.repeat(part.starts, size_N) + within]
    end_N = end_N + size_N
  column = np.arange(length, dtype=np.int32)
  first, last = (
      (x - limit_N + length).astype(np.int32)[:, None]
      for x in (segment_N, end_N)
  )
  types = ((column >= first) & (column < last)).astype(np.int32)
  shape = (*shape, length)
  return ids.reshape(shape), types.reshape(shape)
