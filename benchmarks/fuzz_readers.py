"""Damaged files: every reader reads them or raises an error that names them.

  python benchmarks/fuzz_readers.py --inputs=20000 \
      --output=benchmarks/results/fuzz_readers.json

Small files of each format are made here and damaged: truncated, bits flipped,
bytes replaced by random ones, parts doubled or removed, in another encoding,
with a line of 10 MB, with JSON nested 100,000 deep, or with other values in
JSON. A reader may return, or raise a ValueError, FileNotFoundError or
ImportError whose message has the name of the file or of its folder. Anything
else is a failure, and so is an input that takes longer than --timeout. Input i
depends on --seed and i alone; --only=i repeats one.
"""

import argparse
import bz2
import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import logging
import lzma
import pathlib
import signal
import struct
import tempfile
import time
from typing import Any
import zipfile

import harness
import numpy as np
import pyarrow
from pyarrow import parquet

from realm_jax import config as config_lib
from realm_jax.corpus import entities
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.index import generation
from realm_jax.interop import importing
from realm_jax.interop import weights
from realm_jax.prepare import records
from realm_jax.prepare import sources
from realm_jax.qa import question_sets
from realm_jax.runtime import files

_ALLOWED = (ValueError, FileNotFoundError, ImportError)
_DEPTH, _LINE = 100_000, 10_000_000
_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e400, 2**70, '', 'x', [], {}, [[]], ['x'], [None]),
    *({'x': {}}, '\ud800', '\0', 'é' * 9, float('nan')),
)

Folder = Mapping[str, bytes]
Random = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader and undamaged inputs for it.

  read: reads the damaged file of a folder, or the folder.
  folders: files by name; the first is damaged, the others are as they are.
  """

  read: Callable[[pathlib.Path], object]
  folders: list[Folder]


# ------------------------------------------------------------ undamaged files


def _lines(*values: Any) -> bytes:
  return ''.join(f'{json.dumps(v)}\n' for v in values).encode()


_TEXT = 'Ada Lovelace wrote notes in 1843. Zoë met Łukasz; 北京 is far. ' * 3
_ARTICLES = [
    {'id': str(i), 'title': f'Title {i}', 'text': _TEXT, 'spans': [[0, 3]]}
    for i in range(4)
]
_WIKI = ''.join(
    f'<doc id="{i}" url="http://a.org/{i}" title="Ada">\nAda\n\n{_TEXT}\n'
    '</doc>\n'
    for i in range(2)
)
_DUMP = f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/"
 version="0.10" xml:lang="en"><siteinfo><sitename>W</sitename><dbname>w</dbname>
<namespaces><namespace key="0" case="first-letter" /></namespaces></siteinfo>
<page><title>Ada</title><ns>0</ns><id>1</id><revision><id>2</id>
<timestamp>2020-01-01T00:00:00Z</timestamp><model>wikitext</model>
<format>text/x-wiki</format><text bytes="9">'''Ada''' [[b|c]] {_TEXT}</text>
</revision></page></mediawiki>"""
_QUESTIONS = [
    {'question': f'who {i}?', 'answers': ['Ada', 'Bo'], 'id': str(i)}
    for i in range(3)
]
_TAGGED = [
    {'tokens': ['Ann', 'lives', 'in', 'York'], 'tags': ['B-P', 'O', 'O', 'I-L']}
] * 3
_VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcde', '##a', '##é']
_CONFIG = {
    'model_type': 'bert', 'hidden_size': 8, 'num_hidden_layers': 1,
    'num_attention_heads': 2, 'intermediate_size': 8, 'vocab_size': len(_VOCAB),
    'id2label': {'0': 'O', '1': 'B-A', '2': 'I-A'}, 'hidden_act': 'gelu',
}


def _tokenizer_json() -> bytes:
  return json.dumps({
      'version': '1.0',
      'added_tokens': [
          {'id': i, 'content': piece, 'special': True, 'single_word': False,
           'lstrip': False, 'rstrip': False, 'normalized': False}
          for i, piece in enumerate(_VOCAB[:5])
      ],
      'normalizer': {'type': 'BertNormalizer', 'clean_text': True,
                     'handle_chinese_chars': True, 'strip_accents': None,
                     'lowercase': True},
      'pre_tokenizer': {'type': 'BertPreTokenizer'},
      'model': {'type': 'WordPiece', 'unk_token': '[UNK]',
                'continuing_subword_prefix': '##',
                'max_input_chars_per_word': 100,
                'vocab': {piece: i for i, piece in enumerate(_VOCAB)}},
  }).encode()


def _safetensors() -> bytes:
  names = ('bert.embeddings.word_embeddings.weight', 'classifier.weight')
  header = {
      name: {'dtype': 'F32', 'shape': [4, 2], 'data_offsets': [i, i + 32]}
      for name, i in zip(names, (0, 32), strict=True)
  }
  text = json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + bytes(range(64))


def _pytorch() -> bytes:
  """Returns a zip file of PyTorch with a tensor of 4 x 2."""
  state = (
      b'\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01'
      b'ctorch._utils\n_rebuild_tensor_v2\nq\x02(('
      b'X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04'
      b'X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x08tq\x07Q'
      b'K\x00K\x04K\x02\x86q\x08K\x02K\x01\x86q\t\x89'
      b'ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs.'
  )
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('archive/data.pkl', state)
    archive.writestr('archive/data/0', bytes(range(32)))
    archive.writestr('archive/version', b'3\n')
  return file.getvalue()


def _separated(delimiter: str, records: list[dict[str, Any]]) -> bytes:
  """Returns a table with a header and quotes."""
  text = io.StringIO()
  names = list(dict.fromkeys(name for record in records for name in record))
  writer = csv.DictWriter(text, names, delimiter=delimiter)
  writer.writeheader()
  writer.writerows(records)
  return text.getvalue().encode()


def _parquet(records: list[dict[str, Any]]) -> bytes:
  data = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(records), data)
  return data.getvalue()


def _compressed(folder: Folder) -> list[Folder]:
  ((name, data),) = folder.items()
  return [
      {f'{name}.gz': gzip.compress(data, mtime=0)},
      {f'{name}.xz': lzma.compress(data)},
      {f'{name}.bz2': bz2.compress(data)},
  ]


def _manifest() -> bytes:
  manifest: dict[str, Any] = {'format_version': 1, 'num_rows': 3, 'width': 2}
  manifest['manifest_sha256'] = files.manifest_digest(manifest)
  return json.dumps(manifest).encode()


def _columns(separator: str, before: str = '') -> bytes:
  rows = [('Ann', 'B-P'), ('é', 'O'), ('York', 'B-L')]
  sentence = ''.join(
      separator.join([str(i), *row]) + '\n' for i, row in enumerate(rows)
  )
  return f'{before}{sentence}\n{before}{sentence}'.encode()


def readers() -> dict[str, Reader]:
  """Returns the readers by name; a new format is one more folder."""
  articles = {'a.jsonl': _lines(*_ARTICLES)}
  questions = {'q.jsonl': _lines(*_QUESTIONS)}
  qas = {'question': 'who?', 'id': 'a', 'answers': [{'text': 'Ada'}]}
  squad = [{'title': 'A', 'paragraphs': [{'context': _TEXT, 'qas': [qas]}]}]
  settings = json.dumps({'do_lower_case': True, 'unk_token': '[UNK]'}).encode()
  vocab = '\n'.join(_VOCAB).encode()
  return {
      'corpus': Reader(
          lambda path: list(
              records.Records(sources.find([str(path)])).check()
          ),
          [
              articles,
              *_compressed(articles),
              {'a.json': _lines(*_ARTICLES)},
              {'a.txt': _TEXT.encode()},
              {'wiki_00': _WIKI.encode()},
              {'wiki_00': _lines(*_ARTICLES)},
              {'a.xml': _DUMP.encode()},
              {'b.json': json.dumps(_ARTICLES, indent=1).encode()},
              {'a.csv': _separated(',', _ARTICLES)},
              {'a.tsv': _separated('\t', _ARTICLES)},
              {'collection.tsv': f'1\t{_TEXT}\n2\t{_TEXT}\n'.encode()},
              {'a.parquet': _parquet(_ARTICLES)},
              {
                  'corpus.jsonl': _lines(*_ARTICLES),
                  'queries.jsonl': _lines({'_id': 'q', 'text': 'who?'}),
              },
          ],
      ),
      'questions': Reader(
          question_sets.read,
          [
              questions,
              *_compressed(questions),
              {'a.json': json.dumps({'data': squad}).encode()},
              {'b.json': json.dumps({'Data': [
                  {'Question': 'who?', 'QuestionId': 'a',
                   'Answer': {'Value': 'Ada', 'Aliases': ['Ada', 'A']}}
              ]}).encode()},
              {'c.json': json.dumps([
                  {'utterance': 'who?', 'targetValue': '(list (description A))'}
              ]).encode()},
              {'d.json': json.dumps(_QUESTIONS).encode()},
              {'e.jsonl': _lines({
                  'question_text': 'who?', 'example_id': 1,
                  'document_text': 'Ada wrote notes',
                  'annotations': [{'short_answers': [
                      {'start_token': 0, 'end_token': 1}
                  ]}],
              })},
              {'f.tsv': b'trec1\twho?\tAda|Bo\ntrec2\twhere?\tYork\n'},
              {'g.csv': _separated(',', _QUESTIONS)},
              {'h.qa.csv': b"who?\t['Ada', 'Bo']\nwhere?\t['York']\n"},
              {'i.parquet': _parquet(_QUESTIONS)},
              {'j.json': json.dumps([{
                  'question': 'who?', 'answers': ['Ada'],
                  'positive_ctxs': [{'passage_id': '1', 'text': _TEXT}],
              }]).encode()},
              {'k.jsonl': _lines({
                  'id': 'q', 'input': 'who?', 'output': [{
                      'answer': 'Ada', 'provenance': [{'wikipedia_id': '1'}]
                  }],
              })},
          ],
      ),
      'tagged': Reader(
          lambda path: entities.read(str(path)),
          [
              {'a.jsonl': _lines(*_TAGGED)},
              {'a.json': json.dumps(_TAGGED).encode()},
              {'a.conll': _columns('\t')},
              {'b.conll': _columns(' ', '-DOCSTART- O O\n\n# a = b\n')},
              *_compressed({'a.conll': _columns('\t')}),
              {
                  'b.jsonl': _lines({'tokens': ['a', 'b'], 'ner_tags': [0, 1]}),
                  'dataset_info.json': json.dumps({'features': {
                      'ner_tags': {'feature': {'names': ['O', 'B-X']}}
                  }}).encode(),
              },
          ],
      ),
      'tokenizer': Reader(
          lambda path: tokenizer_lib.Tokenizer.from_source(
              str(path.parent)
          ).encode(_TEXT),
          [
              {'vocab.txt': vocab},
              {'tokenizer_config.json': settings, 'vocab.txt': vocab},
              {'tokenizer.json': _tokenizer_json()},
              {
                  'tokenizer.json': _tokenizer_json(),
                  'tokenizer_config.json': settings,
              },
          ],
      ),
      'weights': Reader(
          lambda path: [
              tensor.read()
              for tensor in weights.open_folder(path.parent).values()
          ],
          [
              {'model.safetensors': _safetensors()},
              {'pytorch_model.bin': _pytorch()},
              {
                  'model.safetensors.index.json': json.dumps({'weight_map': {
                      'bert.embeddings.word_embeddings.weight': 'a.safetensors',
                      'classifier.weight': 'a.safetensors',
                  }}).encode(),
                  'a.safetensors': _safetensors(),
              },
          ],
      ),
      'config.json': Reader(
          lambda path: importing.open_source(path.parent).components,
          [{
              'config.json': json.dumps(_CONFIG).encode(),
              'model.safetensors': _safetensors(),
          }],
      ),
      'config of a workdir': Reader(
          lambda path: config_lib.read(path.parent),
          [{'config.json': json.dumps(
              config_lib.to_dict(config_lib.Config(corpus='c'))
          ).encode()}],
      ),
      'generation': Reader(
          lambda path: generation.read_manifest(path.parent),
          [{'manifest.json': _manifest()}],
      ),
  }


# ------------------------------------------------------------------- damages


def _truncated(data: bytes, rng: Random) -> bytes:
  return data[: rng.integers(len(data))]


def _bits_flipped(data: bytes, rng: Random) -> bytes:
  changed = bytearray(data)
  for place in rng.integers(len(data), size=rng.integers(1, 5)):
    changed[place] ^= 1 << int(rng.integers(8))
  return bytes(changed)


def _random_bytes(data: bytes, rng: Random) -> bytes:
  if rng.random() < 0.1:
    return rng.bytes(int(rng.integers(1, 2000)))
  start = int(rng.integers(len(data)))
  length = int(rng.integers(1, 40))
  skipped = length if rng.random() < 0.5 else 0
  return data[:start] + rng.bytes(length) + data[start + skipped :]


def _parts_moved(data: bytes, rng: Random) -> bytes:
  """Removes, doubles or moves a part, or a line."""
  parts = data.splitlines(keepends=True)
  if rng.random() < 0.5 or not parts:
    parts = [data[i : i + 7] for i in range(0, len(data), 7)]
  for _ in range(rng.integers(1, 4)):
    i, j = (int(n) for n in rng.integers(len(parts), size=2))
    parts[i] = (b'', parts[j], parts[i] * 2)[rng.integers(3)]
  return b''.join(parts)


def _other_characters(data: bytes, rng: Random) -> bytes:
  """Exchanges the characters that separate lines, columns and values."""
  marks = [b'\t', b' ', b',', b'\n', b'\r\n', b'\r', b'"', b'\0', b'|', b'-',
           b':', b'\xc2\x85', b'\xe2\x80\xa8', b'{', b'[', b'<', b'#', b'']
  old, new = (marks[i] for i in rng.integers(len(marks), size=2))
  return data.replace(old or b'O', new, int(rng.choice([-1, 1, 3])))


def _encoded(data: bytes, rng: Random) -> bytes:
  text = data.decode('utf-8', 'replace')
  codecs = ['utf-16', 'utf-32-be', 'latin-1', 'utf-8-sig', 'cp037', 'utf-7']
  return text.encode(str(rng.choice(codecs)), 'replace')


def _long_line(data: bytes, rng: Random) -> bytes:
  fillers = (b'a', b'[', b'a ', b'"', b'O\t', b'\xe4', b'9', b'<')
  filler = fillers[rng.integers(len(fillers))]
  place = int(rng.integers(len(data)))
  count = _LINE // len(filler)
  return data[:place] + filler * count + data[place:]


def _deep_json(data: bytes, rng: Random) -> bytes:
  opening, closing = [(b'[', b']'), (b'{"a":', b'}')][rng.integers(2)]
  deep = opening * _DEPTH + b'1' + closing * _DEPTH
  places = [i for i, c in enumerate(data) if c in b'[{":0']
  if not places or rng.random() < 0.3:
    return deep
  place = int(rng.choice(places))
  return data[:place] + deep + data[place + 1 :]


def _other_values(data: bytes, rng: Random) -> bytes:
  """Replaces, removes or adds values of JSON, or of each of its lines."""
  try:
    values = [json.loads(data)]
  except ValueError:
    try:
      values = [json.loads(line) for line in data.splitlines()]
    except ValueError:
      return _other_characters(data, rng)
  for _ in range(rng.integers(1, 4)):
    at: Any = values
    while True:
      keys = list(at) if isinstance(at, dict) else list(range(len(at)))
      if not keys:
        break
      key = keys[rng.integers(len(keys))]
      if isinstance(at[key], dict | list) and rng.random() < 0.8:
        at = at[key]
        continue
      if rng.random() < 0.2:
        del at[key]
      else:
        at[key] = _VALUES[rng.integers(len(_VALUES))]
      break
  return '\n'.join(map(json.dumps, values)).encode()


# A long line and a deep value take time, so they are rarer.
DAMAGES: tuple[tuple[Callable[[bytes, Random], bytes], float], ...] = (
    (_truncated, 12),
    (_bits_flipped, 22),
    (_random_bytes, 16),
    (_parts_moved, 12),
    (_other_characters, 14),
    (_encoded, 5),
    (_long_line, 1),
    (_deep_json, 2),
    (_other_values, 16),
)


def damaged(
    all_readers: Mapping[str, Reader], seed: int, number: int
) -> tuple[str, str, dict[str, bytes]]:
  """Returns the reader, the kind of damage and the files of an input."""
  rng = np.random.default_rng([seed, number])
  names = list(all_readers)
  name = names[number % len(names)]
  folders = all_readers[name].folders
  folder = dict(folders[rng.integers(len(folders))])
  shares = np.array([share for _, share in DAMAGES])
  damage = DAMAGES[rng.choice(len(DAMAGES), p=shares / shares.sum())][0]
  first = next(iter(folder))
  folder[first] = damage(folder[first], rng)
  return name, damage.__name__.strip('_'), folder


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
  def stop(*_: object) -> None:
    raise TimeoutError(f'more than {seconds} s')

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def outcome(
    reader: Reader, folder: Folder, where: pathlib.Path, timeout: float
) -> str:
  """Returns 'read', 'refused', or what is wrong with the error."""
  for path in where.iterdir():
    path.unlink()
  for name, data in folder.items():
    (where / name).write_bytes(data)
  try:
    with _limit(timeout):
      reader.read(where / next(iter(folder)))
  except (KeyboardInterrupt, SystemExit):
    raise
  except _ALLOWED as error:
    if where.name in str(error):
      return 'refused'
    return f'no file in the message: {type(error).__name__}: {error}'[:400]
  except BaseException as error:  # Rust panics are no Exception.
    return f'{type(error).__name__}: {error}'[:400]
  return 'read'


def run(
    inputs: int, seed: int = 0, timeout: float = 60.0, only: int | None = None
) -> dict[str, Any]:
  """Reads damaged files; returns counts and failures."""
  all_readers = readers()
  counts: dict[str, collections.Counter[str]] = collections.defaultdict(
      collections.Counter
  )
  failures, seconds = [], []
  numbers = range(inputs) if only is None else [only]
  logging.disable(logging.WARNING)
  try:
    with tempfile.TemporaryDirectory(prefix='fuzzed_') as name:
      for number in numbers:
        reader, damage, folder = damaged(all_readers, seed, number)
        start = time.perf_counter()
        found = outcome(
            all_readers[reader], folder, pathlib.Path(name), timeout
        )
        seconds.append((
            time.perf_counter() - start, number, f'{reader}, {damage}'
        ))
        if found not in ('read', 'refused'):
          failures.append({
              'input': number, 'reader': reader, 'damage': damage,
              'file': next(iter(folder)), 'what': found,
          })
          found = 'failed'
        counts[reader][found] += 1
        counts[f'damage: {damage}'][found] += 1
  finally:
    logging.disable(logging.NOTSET)
  return {
      'inputs': len(numbers),
      'seed': seed,
      'counts': {key: dict(value) for key, value in counts.items()},
      'failures': failures,
      'slowest': [
          {'input': number, 'what': what, 'seconds': taken}
          for taken, number, what in sorted(seconds)[:-6:-1]
      ],
  }


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('--inputs', type=int, default=20_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--timeout', type=float, default=60.0, help='seconds')
  parser.add_argument('--only', type=int, help='number of one input')
  arguments: argparse.Namespace = parser.parse_args()
  inputs = 300 if arguments.small else arguments.inputs
  result = run(inputs, arguments.seed, arguments.timeout, arguments.only)
  harness.write(arguments.output, result, 'numpy', 'safetensors', 'tokenizers')
  for failure in result['failures']:
    print(json.dumps(failure))
  if result['failures']:
    raise SystemExit(1)


if __name__ == '__main__':
  main()
