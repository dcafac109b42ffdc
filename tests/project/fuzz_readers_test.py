"""Damaged files for all readers; benchmarks/fuzz_readers.py has more."""

import importlib
import pathlib
import sys

import pytest

_BENCHMARKS = str(pathlib.Path(__file__).parents[2] / 'benchmarks')


@pytest.fixture(scope='module')
def fuzz():
  sys.path.insert(0, _BENCHMARKS)
  try:
    yield importlib.import_module('fuzz_readers')
  finally:
    sys.path.remove(_BENCHMARKS)


@pytest.fixture(scope='module')
def fuzz_files(fuzz):
  return fuzz.fuzz_files


def test_undamaged_files_are_read(fuzz, fuzz_files, tmp_path):
  for name, reader in fuzz_files.readers().items():
    for folder in reader.folders:
      where = tmp_path / f'{name}_folder'
      where.mkdir(exist_ok=True)
      found = fuzz.outcome(reader, folder, where, 60.0)
      assert found == 'read', (name, [*folder], found)


def test_damaged_files_are_read_or_refused(fuzz, fuzz_files):
  result = fuzz.run(300, seed=5)
  assert result['failures'] == []
  counts = result['counts']
  for name in fuzz_files.readers():
    assert counts[name]['refused'] > 10, name
  assert sum(counts[name].get('read', 0) for name in fuzz_files.readers()) > 20


def test_an_input_depends_on_its_number_alone(fuzz, fuzz_files):
  readers = fuzz_files.readers()
  for number in (0, 5, 77):
    first = fuzz.damaged(readers, 3, number)
    assert fuzz.damaged(fuzz_files.readers(), 3, number) == first
    assert fuzz.damaged(readers, 4, number) != first


def test_other_errors_are_failures(fuzz, fuzz_files, tmp_path):
  def outcome(error):
    def read(path):
      raise error

    return fuzz.outcome(fuzz_files.Reader(read, []), {'a': b''}, tmp_path, 60.0)

  assert outcome(ValueError(f'{tmp_path}/a:1: no')) == 'refused'
  assert outcome(ValueError('no')) == 'no file in the message: ValueError: no'
  assert outcome(KeyError(str(tmp_path))).startswith('KeyError')
  assert outcome(RecursionError('deep')) == 'RecursionError: deep'
