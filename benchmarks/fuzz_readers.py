"""Damaged files: every reader reads them or raises an error that names them.

  python benchmarks/fuzz_readers.py --inputs=20000 \
      --output=benchmarks/results/fuzz_readers.json

Small files of each format are made here and damaged (`DAMAGES`). A reader may
return, or raise a ValueError, FileNotFoundError or ImportError whose message
has the name of the file or of its folder. Anything else is a failure, and so is
an input that takes longer than --timeout. Input i depends on --seed and i
alone; --only=i repeats one.
"""

import collections
from collections.abc import Callable, Mapping
import json
import logging
import pathlib
import signal
import tempfile
from typing import Any

import fuzz_files
import harness
import numpy as np

_ALLOWED = (ValueError, FileNotFoundError, ImportError)
_DEPTH, _LINE = 100_000, 10_000_000
_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e400, 2**70, '', 'x', [], {}, [[]], ['x'], [None]),
    *({'x': {}}, '\ud800', '\0', 'é' * 9, float('nan')),
)

Random = np.random.Generator


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
    while keys := list(at) if isinstance(at, dict) else [*range(len(at))]:
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
DAMAGES: dict[Callable[[bytes, Random], bytes], int] = {
    _truncated: 12,
    _bits_flipped: 22,
    _random_bytes: 16,
    _parts_moved: 12,
    _other_characters: 14,
    _encoded: 5,
    _long_line: 1,
    _deep_json: 2,
    _other_values: 16,
}


def damaged(
    all_readers: Mapping[str, fuzz_files.Reader], seed: int, number: int
) -> tuple[str, str, dict[str, bytes]]:
  """Returns the reader, the kind of damage and the files of an input."""
  rng = np.random.default_rng([seed, number])
  names = list(all_readers)
  name = names[number % len(names)]
  folders = all_readers[name].folders
  folder = dict(folders[rng.integers(len(folders))])
  shares = np.array([*DAMAGES.values()])
  damage = [*DAMAGES][rng.choice(len(shares), p=shares / shares.sum())]
  first = next(iter(folder))
  folder[first] = damage(folder[first], rng)
  return name, damage.__name__.strip('_'), folder


def _stop(*_: object) -> None:
  raise TimeoutError('It took too long.')


def outcome(
    reader: fuzz_files.Reader,
    folder: fuzz_files.Folder,
    where: pathlib.Path,
    timeout: float,
) -> str:
  """Returns 'read', 'refused', or what is wrong with the error."""
  for path in where.iterdir():
    path.unlink()
  for name, data in folder.items():
    (where / name).write_bytes(data)
  before = signal.signal(signal.SIGALRM, _stop)
  signal.setitimer(signal.ITIMER_REAL, timeout)
  try:
    reader.read(where / next(iter(folder)))
  except (KeyboardInterrupt, SystemExit):
    raise
  except _ALLOWED as error:
    if where.name in str(error):
      return 'refused'
    return f'no file in the message: {type(error).__name__}: {error}'[:400]
  except BaseException as error:  # Rust panics are no Exception.
    return f'{type(error).__name__}: {error}'[:400]
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
  return 'read'


def run(
    inputs: int, seed: int = 0, timeout: float = 60.0, only: int | None = None
) -> dict[str, Any]:
  """Reads damaged files; returns counts and failures."""
  all_readers = fuzz_files.readers()
  counts: dict[str, Any] = collections.defaultdict(collections.Counter)
  failures, seconds = [], []
  numbers = range(inputs) if only is None else [only]
  logging.disable(logging.WARNING)
  try:
    with tempfile.TemporaryDirectory(prefix='fuzzed_') as name:
      for number in numbers:
        reader, damage, folder = damaged(all_readers, seed, number)
        taken, found = harness.timed(
            outcome, all_readers[reader], folder, pathlib.Path(name), timeout
        )
        seconds.append((taken, number, f'{reader}, {damage}'))
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
  arguments = parser.parse_args()
  inputs = 300 if arguments.small else arguments.inputs
  result = run(inputs, arguments.seed, arguments.timeout, arguments.only)
  harness.write(arguments.output, result, 'numpy', 'safetensors', 'tokenizers')
  for failure in result['failures']:
    print(json.dumps(failure))
  if result['failures']:
    raise SystemExit(1)


if __name__ == '__main__':
  main()
