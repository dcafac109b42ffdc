"""Files of PyTorch and safetensors: read as they are, refused when damaged."""

import json
import os
import pathlib
import struct
import sys
import threading
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from realm_jax.interop import block_records
from realm_jax.interop import weights

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
_BIN = _FIXTURES / 'embedder' / 'pytorch_model.bin'
_LEGACY = _FIXTURES / 'bert' / 'pytorch_model.bin'
_SAFE = _FIXTURES / 'encoder' / 'model.safetensors'


def _storage(kind, key, size):
  """The persistent id of a PyTorch storage, as pickle instructions."""
  return (
      b'(X\x07\x00\x00\x00storage'
      + f'ctorch\n{kind}\n'.encode()
      + _text(key)
      + _text('cpu')
      + b'J'
      + struct.pack('<i', size)
      + b'tQ'
  )


def _text(text):
  data = text.encode()
  return b'X' + struct.pack('<I', len(data)) + data


def _ints(*numbers):
  return b'(' + b''.join(b'J' + struct.pack('<i', n) for n in numbers) + b't'


def _tensor(kind, key, size, offset, shape, strides):
  return (
      b'ctorch._utils\n_rebuild_tensor_v2\n('
      + _storage(kind, key, size)
      + b'J'
      + struct.pack('<i', offset)
      + _ints(*shape)
      + _ints(*strides)
      + b'\x89ccollections\nOrderedDict\n)RtR'
  )


def _archive(path, entries, storages, compression=zipfile.ZIP_STORED):
  """Writes a zip-format checkpoint by hand."""
  contents = b'\x80\x02ccollections\nOrderedDict\n)R('
  for name, tensor in entries.items():
    contents += _text(name) + tensor
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', contents + b'u.')
    for key, array in storages.items():
      archive.writestr(f'archive/data/{key}', array.tobytes())
  return path


@pytest.mark.parametrize('name', ['state_dict', 'model_dict'])  # Of DPR.
def test_a_state_dictionary_within_another(tmp_path, name):
  tensor = _tensor('FloatStorage', '0', 2, 0, (2,), (1,))
  entries = {'epoch': _ints(3), name: b'}(' + _text('w') + tensor + b'u'}
  path = _archive(tmp_path / 'x.bin', entries, {'0': np.zeros(2, np.float32)})
  assert [*weights.open_file(path)] == ['w']


def test_views_into_one_storage(tmp_path):
  numbers = np.arange(12, dtype=np.float32)
  path = _archive(
      tmp_path / 'x.bin',
      {
          'whole': _tensor('FloatStorage', '0', 12, 0, (3, 4), (4, 1)),
          'transposed': _tensor('FloatStorage', '0', 12, 0, (4, 3), (1, 4)),
          'row': _tensor('FloatStorage', '0', 12, 4, (4,), (1,)),
          'scalar': _tensor('FloatStorage', '0', 12, 11, (), ()),
          'empty': _tensor('FloatStorage', '1', 0, 0, (0, 4), (4, 1)),
      },
      {'0': numbers, '1': numbers[:0]},
  )
  tensors = weights.open_file(path)
  table = numbers.reshape(3, 4)
  np.testing.assert_array_equal(tensors['whole'].read(), table)
  np.testing.assert_array_equal(tensors['transposed'].read(), table.T)
  np.testing.assert_array_equal(tensors['row'].read(), table[1])
  np.testing.assert_array_equal(tensors['scalar'].read(), 11)
  assert tensors['empty'].read().shape == (0, 4)
  np.testing.assert_array_equal(tensors['whole'].mapped(), table)
  parts = list(tensors['whole'].chunks(max_bytes=32))
  assert [len(part) for part in parts] == [2, 1]
  np.testing.assert_array_equal(np.concatenate(parts), table)
  np.testing.assert_array_equal(tensors['transposed'].mapped(), table.T)
  np.testing.assert_array_equal(tensors['row'].mapped(), table[1])
  assert tensors['empty'].mapped().shape == (0, 4)


def test_other_types(tmp_path):
  bf16 = np.array([1.5, -2], ml_dtypes.bfloat16)
  path = _archive(
      tmp_path / 'x.bin',
      {
          'bf16': _tensor('BFloat16Storage', '0', 2, 0, (2,), (1,)),
          'int': _tensor('LongStorage', '1', 2, 0, (2,), (1,)),
      },
      {'0': bf16, '1': np.array([7, 8])},
  )
  tensors = {k: t.read() for k, t in weights.open_file(path).items()}
  assert tensors['bf16'].dtype == bf16.dtype
  np.testing.assert_array_equal(tensors['bf16'], bf16)
  np.testing.assert_array_equal(tensors['int'], [7, 8])
  out = tmp_path / 'x.safetensors'
  weights.write_safetensors(out, tensors)
  again = weights.open_file(out)
  assert again['bf16'].read().tobytes() == bf16.tobytes()


@pytest.mark.parametrize('path', [_BIN, _LEGACY], ids=['zip', 'legacy'])
def test_what_is_written_the_safetensors_library_reads(tmp_path, path):
  tensors = weights.open_file(path)
  out = tmp_path / 'model.safetensors'
  weights.write_safetensors(out, tensors)
  theirs = safetensors.numpy.load_file(out)
  assert set(theirs) == set(tensors)
  for name, tensor in weights.open_file(out).items():
    np.testing.assert_array_equal(theirs[name], tensor.read())
    np.testing.assert_array_equal(theirs[name], tensors[name].read())


@pytest.mark.parametrize(
    'module, name',
    [
        ('os', 'system'),
        ('builtins', 'eval'),
        ('torch', 'load'),
        ('torch._utils', '_rebuild_tensor'),
        ('numpy.core.multiarray', 'scalar'),
    ],
)
def test_a_foreign_global_is_refused_by_name(tmp_path, module, name):
  marker = tmp_path / 'executed'
  call = f'c{module}\n{name}\n'.encode() + _text(f'touch {marker}') + b'\x85R'
  path = _archive(tmp_path / 'x.bin', {'a': call}, {})
  with pytest.raises(ValueError, match=f'{module}.{name}, which is refused'):
    weights.open_file(path)
  # The same by protocol 4, where the name comes from the stack.
  call = _text(module) + _text(name) + b'\x93' + _text('x') + b'\x85R'
  path = _archive(tmp_path / 'y.bin', {'a': call}, {})
  with pytest.raises(ValueError, match=f'{module}.{name}, which is refused'):
    weights.open_file(path)
  assert not marker.exists()


def _open_pickle(path, data):
  """Opens an archive with this table of contents."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', data)
  return weights.open_file(path)


@pytest.mark.parametrize(
    'instruction', [b'i', b'o', b'\x81', b'\x92', b'\x82\x01', b'P', b'\x97']
)
def test_instructions_that_make_objects_are_unknown(tmp_path, instruction):
  data = b'\x80\x02}' + instruction + b'os\nsystem\n.'
  with pytest.raises(ValueError, match='x.bin.*not allowed'):
    _open_pickle(tmp_path / 'x.bin', data)


@pytest.mark.parametrize(
    'data, message',
    [
        (b'', 'exhausted'),
        (b'\x80\x02', 'exhausted'),
        (b'\x80\x02X\xff\xff\xff\x7fabc', 'only 3 remain'),
        (b'\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc', 'truncated'),
        (b'\x80\x02t.', 'could not find MARK'),
        (b'\x80\x02)u.', 'could not find MARK'),
        (b'\x80\x02h\x05.', 'Memo value not found at index 5'),
        (b'\x80\x02K\x01r\xff\xff\xff\x7f.', 'memo of the pickle has gaps'),
        (b'\x80\x02K\x01)R.', "'int' object is not callable"),
        (b'\x80\x02}]K\x01s.', "unhashable type: 'list'"),
        (b'\x80\x02]a.', 'underflow'),
        (b'\x80\x02)K\x01b.', 'state is not a dictionary|__dict__'),
        (b'\x80\x09.', 'protocol: 9'),
        (b'\x80\x02]K\x01a.', 'no state dictionary'),
        (b'\x80\x02}K\x01K\x02s.', 'no state dictionary'),
    ],
)
def test_a_damaged_pickle_is_an_error_that_says_so(tmp_path, data, message):
  with pytest.raises(ValueError, match=f'x.bin.*({message})'):
    _open_pickle(tmp_path / 'x.bin', data)


def test_keys_that_python_cannot_hash(tmp_path):
  """Hashing the first overflows the C stack, the second one takes years."""
  deep = b'\x80\x02})' + b'\x85' * 300_000 + b'K\x01s.'
  with pytest.raises(ValueError, match='x.bin.*too many tuples'):
    _open_pickle(tmp_path / 'x.bin', deep)
  wide = b'\x80\x04})' + b'\x94h%c\x86' * 60 % (*range(60),) + b'K\x01s.'
  with pytest.raises(ValueError, match='y.bin.*too many tuples'):
    _open_pickle(tmp_path / 'y.bin', wide)


def test_a_pickle_cannot_alter_what_the_next_one_gets(tmp_path):
  state = b'N}' + _text('altered') + b'K\x01s\x86b'
  for name in ('collections\nOrderedDict', 'torch._utils\n_rebuild_tensor_v2'):
    with pytest.raises(ValueError, match='no state dictionary'):
      _open_pickle(
          tmp_path / 'x.bin',
          b'\x80\x02c' + name.encode() + b'\n' + state + b'.',
      )
  for found in weights._GLOBALS.values():
    assert not hasattr(found, 'altered')


def test_a_parameter_is_its_tensor(tmp_path):
  tensor = _tensor('FloatStorage', '0', 2, 0, (2,), (1,))
  function = b'ctorch._utils\n_rebuild_parameter\n('
  hooks = b'\x88ccollections\nOrderedDict\n)RtR'
  path = _archive(
      tmp_path / 'x.bin',
      {'a': function + tensor + hooks},
      {'0': np.array([1, 2], np.float32)},
  )
  np.testing.assert_array_equal(weights.open_file(path)['a'].read(), [1, 2])


@pytest.mark.parametrize('path', [_BIN, _LEGACY], ids=['zip', 'legacy'])
@pytest.mark.parametrize('share', [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, path, share):
  data = path.read_bytes()
  cut = tmp_path / 'pytorch_model.bin'
  cut.write_bytes(data[: int(len(data) * share)])
  with pytest.raises(ValueError, match='pytorch_model.bin'):
    for tensor in weights.open_file(cut).values():
      tensor.read()


def test_a_corrupted_zip_file(tmp_path):
  """A changed byte within the numbers is found by its checksum."""
  data = bytearray(_BIN.read_bytes())
  tensors = weights.open_file(_BIN)
  offset = tensors['cls.dense.weight'].offset
  data[offset + 100] ^= 1
  path = tmp_path / 'pytorch_model.bin'
  path.write_bytes(data)
  found = weights.open_file(path)
  found['cls.dense.bias'].read()
  with pytest.raises(ValueError, match='cls.dense.weight: checksum'):
    found['cls.dense.weight'].read()


def test_a_tensor_may_not_reach_past_its_storage(tmp_path):
  entry = _tensor('FloatStorage', '0', 4, 2, (3,), (1,))
  path = _archive(tmp_path / 'x.bin', {'a': entry}, {'0': np.zeros(4, 'f4')})
  with pytest.raises(ValueError, match='x.bin.* a is larger than its storage'):
    weights.open_file(path)
  entry = _tensor('FloatStorage', '0', 400, 0, (400,), (1,))
  path = _archive(tmp_path / 'y.bin', {'a': entry}, {'0': np.zeros(4, 'f4')})
  with pytest.raises(ValueError, match='storage 0 of 1600 bytes'):
    weights.open_file(path)
  entry = _tensor('FloatStorage', '0', 4, 0, (4,), (1,))
  path = _archive(
      tmp_path / 'z.bin',
      {'a': entry},
      {'0': np.zeros(4, 'f4')},
      zipfile.ZIP_DEFLATED,
  )
  with pytest.raises(ValueError, match='compressed'):
    weights.open_file(path)


def test_damaged_safetensors(tmp_path):
  path = tmp_path / 'model.safetensors'
  weights.write_safetensors(path, {'a': np.ones((2, 3), np.float32)})
  data = path.read_bytes()
  for cut in (4, 20, len(data) - 1):
    path.write_bytes(data[:cut])
    with pytest.raises(ValueError, match='truncated|neither'):
      weights.open_file(path)
  for old, new in (
      (b'[2,3]', b'[2,4]'),
      (b'F32', b'F99'),
      (b'"dtype"', b'"dtypo"'),
      (b'{', b'['),
  ):
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match='model.safetensors'):
      weights.open_file(path)
  path.write_bytes(b'hello, world')
  with pytest.raises(ValueError, match='neither'):
    weights.open_file(path)


def test_shards_and_their_index(tmp_path):
  folder = _FIXTURES / 'scorer'
  assert len(weights.open_folder(folder)) == 100
  index = json.loads((folder / 'model.safetensors.index.json').read_bytes())
  first = 'model-00001-of-00002.safetensors'
  (tmp_path / first).write_bytes((folder / first).read_bytes())
  target = tmp_path / 'model.safetensors.index.json'
  target.write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match='model-00002-of-00002'):
    weights.open_folder(tmp_path)
  index['weight_map'] = {
      name: file for name, file in index['weight_map'].items() if file == first
  } | {'more': first}
  target.write_text(json.dumps(index))
  with pytest.raises(ValueError, match='only in one of them: more'):
    weights.open_folder(tmp_path)
  target.write_text('{}')
  with pytest.raises(ValueError, match='weight_map'):
    weights.open_folder(tmp_path)
  target.write_text(json.dumps({'weight_map': {'a': '../../etc/passwd'}}))
  with pytest.raises(FileNotFoundError, match='passwd'):
    weights.open_folder(tmp_path)
  target.unlink()
  with pytest.raises(FileNotFoundError, match='pytorch_model.bin'):
    weights.open_folder(tmp_path)


def _records():
  start = [b'', b'a' * 300, 'caf\u00e9'.encode(), b'', b'x', b'b']
  return start + [b'y'] * 2500


def test_block_records(tmp_path):
  number, records = block_records.byte_records(
      _FIXTURES / 'open_qa' / 'block_records.npy'
  )
  records = list(records)
  assert number == len(records) == 7
  assert records[4] == 'caf\u00e9 of the cat'.encode()


def test_block_records_of_any_numpy(tmp_path):
  """Also the pickle protocol of this numpy, with its memo of equal bytes."""
  wanted = _records()
  array = np.empty(len(wanted), object)
  array[:] = wanted
  np.save(tmp_path / 'theirs.npy', array, allow_pickle=True)
  number, found = block_records.byte_records(tmp_path / 'theirs.npy')
  assert (number, list(found)) == (len(wanted), wanted)
  block_records.byte_records_writer(tmp_path / 'ours.npy', len(wanted), wanted)
  number, found = block_records.byte_records(tmp_path / 'ours.npy')
  assert (number, list(found)) == (len(wanted), wanted)
  theirs = np.load(tmp_path / 'ours.npy', allow_pickle=True)
  assert theirs.dtype == object
  assert theirs.tolist() == wanted


def test_wrong_block_records(tmp_path):
  path = tmp_path / 'block_records.npy'
  with pytest.raises(FileNotFoundError):
    block_records.byte_records(path)
  path.write_bytes(b'no npy')
  with pytest.raises(ValueError, match='block_records.npy.* magic string'):
    block_records.byte_records(path)
  np.save(path, np.zeros(3))
  with pytest.raises(ValueError, match='float64'):
    block_records.byte_records(path)
  block_records.byte_records_writer(path, 3, [b'a', b'b', b'c'])
  data = path.read_bytes()
  path.write_bytes(data[:-8])
  with pytest.raises(ValueError, match='truncated'):
    list(block_records.byte_records(path)[1])
  path.write_bytes(data.replace(b'(3,)', b'(4,)'))
  with pytest.raises(ValueError, match='holds 3 records, its header says 4'):
    list(block_records.byte_records(path)[1])
  path.write_bytes(data.replace(b'numpy\nndarray', b'posix\nsystem\x20'))
  with pytest.raises(ValueError, match='refused'):
    list(block_records.byte_records(path)[1])
  np.save(path, np.array([b'a', 'b'], object), allow_pickle=True)
  with pytest.raises(ValueError, match='type str'):
    list(block_records.byte_records(path)[1])
  with pytest.raises(ValueError, match='got 2 records, expected 3'):
    block_records.byte_records_writer(path, 3, [b'a', b'b'])


def test_nothing_unfinished_is_left(tmp_path):
  class Breaks:
    shape, dtype, nbytes = (2,), np.dtype(np.float32), 8

    def chunks(self):
      yield np.zeros(1, np.float32)
      raise OSError('disk full')

  with pytest.raises(OSError, match='disk full'):
    weights.write_safetensors(tmp_path / 'x.safetensors', {'a': Breaks()})
  assert os.listdir(tmp_path) == []


_EVENTS = []  # While a test listens: its thread, and the audit events.
_WATCHED = ('exec', 'import', 'os.system', 'pickle.find_class', 'open')


def _audit(event, arguments):
  if event in _WATCHED and _EVENTS[:1] == [threading.get_ident()]:
    _EVENTS.append((event, *arguments))


def _mutations(data, seed, number):
  """Yields damaged copies: bytes changed, removed or repeated."""
  random = np.random.default_rng(seed)
  for _ in range(number):
    copy = bytearray(data)
    for _ in range(random.integers(1, 4)):
      at, size = random.integers(len(copy)), random.integers(1, 9)
      match random.integers(4):
        case 0:
          copy[at] = random.integers(256)
        case 1:
          copy[at] ^= 1 << random.integers(8)
        case 2:
          del copy[at : at + size]
        case 3:
          copy[at:at] = copy[at : at + size]
    yield bytes(copy)


def _read_all(path):
  for tensor in weights.open_file(path).values():
    tensor.read()


def _read_records(path):
  for _ in block_records.byte_records(path)[1]:
    pass


def _fuzz_zip(tmp_path):
  with zipfile.ZipFile(_BIN) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  table = next(name for name in members if name.endswith('data.pkl'))
  for data in _mutations(members[table], 0, 400):
    path = tmp_path / 'x.bin'
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in (members | {table: data}).items():
        archive.writestr(name, content)
    yield path


def _fuzz_bytes(source, size, number):
  def files(tmp_path):
    data = source.read_bytes()
    start, rest = data[:size], data[size:] if size else b''
    for damaged in _mutations(start, 1, number):
      (tmp_path / 'x.bin').write_bytes(damaged + rest)
      yield tmp_path / 'x.bin'

  return files


@pytest.mark.filterwarnings('ignore:invalid escape')
@pytest.mark.parametrize(
    'files, read',
    [
        (_fuzz_zip, _read_all),
        (_fuzz_bytes(_BIN, None, 400), _read_all),
        (_fuzz_bytes(_LEGACY, 6000, 400), _read_all),
        (_fuzz_bytes(_SAFE, 9000, 400), _read_all),
        (_fuzz_bytes(_FIXTURES / 'open_qa/block_records.npy', None, 800),
         _read_records),
    ],
    ids=['pickle', 'zip', 'legacy', 'safetensors', 'records'],
)
def test_damaged_files_execute_nothing(tmp_path, files, read):
  """Also, each is read, or refused by an error that names the file."""
  ''.encode('raw_unicode_escape')  # A module that `pickletools` loads late.
  refused = 0
  for path in files(tmp_path):
    _EVENTS[:] = [threading.get_ident()]
    try:
      read(path)
    except ValueError as error:
      refused += 1
      assert 'x.bin' in str(error)
    finally:
      events, _EVENTS[:] = _EVENTS[1:], []
    assert {(event[0], event[1]) for event in events} <= {
        ('open', path),
        ('open', str(path)),
    }
  assert refused > 100


sys.addaudithook(_audit)
