"""Undamaged files of every format for benchmarks/fuzz_readers.py."""

import bz2
from collections.abc import Callable, Mapping
import csv
import gzip
import io
import json
import lzma
import pathlib
from typing import Any, NamedTuple
import zipfile

import numpy as np
import pyarrow
from pyarrow import parquet
import safetensors.numpy
import tokenizers

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

Folder = Mapping[str, bytes]


class Reader(NamedTuple):
  """A reader and undamaged inputs for it."""

  read: Callable[[pathlib.Path], object]  # Called with the damaged file.
  folders: list[Folder]  # The first file is damaged, the others are not.


def _json(value: Any) -> bytes:
  return json.dumps(value).encode()


def _lines(*values: Any) -> bytes:
  return b''.join(_json(value) + b'\n' for value in values)


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
  writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
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
  return _json(manifest)


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
  trivia = {
      'Question': 'who?', 'QuestionId': 'a',
      'Answer': {'Value': 'Ada', 'Aliases': ['Ada', 'A']},
  }
  web = {'utterance': 'who?', 'targetValue': '(list (description A))'}
  natural = {
      'question_text': 'who?', 'example_id': 1,
      'document_text': 'Ada wrote notes',
      'annotations': [{'short_answers': [{'start_token': 0, 'end_token': 1}]}],
  }
  dpr = {
      'question': 'who?', 'answers': ['Ada'],
      'positive_ctxs': [{'passage_id': '1', 'text': _TEXT}],
  }
  kilt = {
      'id': 'q', 'input': 'who?',
      'output': [{'answer': 'Ada', 'provenance': [{'wikipedia_id': '1'}]}],
  }
  names = {'features': {'ner_tags': {'feature': {'names': ['O', 'B-X']}}}}
  settings = _json({'do_lower_case': True, 'unk_token': '[UNK]'})
  vocab = '\n'.join(_VOCAB).encode()
  ids = {piece: i for i, piece in enumerate(_VOCAB)}
  tokenizer = tokenizers.BertWordPieceTokenizer(ids).to_str().encode()
  tensors = {
      name: np.arange(8, dtype=np.float32).reshape(4, 2)
      for name in (
          'bert.embeddings.word_embeddings.weight', 'classifier.weight'
      )
  }
  safe = safetensors.numpy.save(tensors)
  index = {'weight_map': dict.fromkeys(tensors, 'a.safetensors')}
  workdir = config_lib.to_dict(config_lib.Config(corpus='c'))
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
              {'a.json': _json({'data': squad})},
              {'b.json': _json({'Data': [trivia]})},
              {'c.json': _json([web])},
              {'d.json': _json(_QUESTIONS)},
              {'e.jsonl': _lines(natural)},
              {'f.tsv': b'trec1\twho?\tAda|Bo\ntrec2\twhere?\tYork\n'},
              {'g.csv': _separated(',', _QUESTIONS)},
              {'h.qa.csv': b"who?\t['Ada', 'Bo']\nwhere?\t['York']\n"},
              {'i.parquet': _parquet(_QUESTIONS)},
              {'j.json': _json([dpr])},
              {'k.jsonl': _lines(kilt)},
          ],
      ),
      'tagged': Reader(
          lambda path: entities.read(str(path)),
          [
              {'a.jsonl': _lines(*_TAGGED)},
              {'a.json': _json(_TAGGED)},
              {'a.conll': _columns('\t')},
              {'b.conll': _columns(' ', '-DOCSTART- O O\n\n# a = b\n')},
              *_compressed({'a.conll': _columns('\t')}),
              {
                  'b.jsonl': _lines({'tokens': ['a', 'b'], 'ner_tags': [0, 1]}),
                  'dataset_info.json': _json(names),
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
              {'tokenizer.json': tokenizer},
              {'tokenizer.json': tokenizer, 'tokenizer_config.json': settings},
          ],
      ),
      'weights': Reader(
          lambda path: [
              tensor.read()
              for tensor in weights.open_folder(path.parent).values()
          ],
          [
              {'model.safetensors': safe},
              {'pytorch_model.bin': _pytorch()},
              {
                  'model.safetensors.index.json': _json(index),
                  'a.safetensors': safe,
              },
          ],
      ),
      'config.json': Reader(
          lambda path: importing.open_source(path.parent).components,
          [{'config.json': _json(_CONFIG), 'model.safetensors': safe}],
      ),
      'config of a workdir': Reader(
          lambda path: config_lib.read(path.parent),
          [{'config.json': _json(workdir)}],
      ),
      'generation': Reader(
          lambda path: generation.read_manifest(path.parent),
          [{'manifest.json': _manifest()}],
      ),
  }
