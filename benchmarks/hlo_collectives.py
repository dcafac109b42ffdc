"""The operations of a compiled program, read from its HLO."""

from collections.abc import Iterator
import dataclasses
import math
import re

_OPS = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
)
# Operations whose computations run as operations of their own.
_CALLING = ('call', 'while', 'conditional', 'async-start')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\((.*)$')
_ARRAY = re.compile(r'\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
_CALLED = re.compile(
    r'\b(?:to_apply|calls|body|true_computation|false_computation)'
    r'=%?([\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program."""

  op: str  # HLO's name, such as 'all-reduce'.
  result_bytes: int  # On one device.
  group: int  # Number of devices that take part together.
  times: int  # Number of runs in one run of the program.
  source: str  # JAX's name of the operation.

  @property
  def bytes_sent(self) -> float:
    """Bytes that one device sends in a ring, the minimum.

    An all-reduce is a reduce-scatter and an all-gather; each sends all but
    1/group of the whole array.
    """
    others = (self.group - 1) / self.group
    match self.op:
      case 'all-reduce':
        sent = 2 * others * self.result_bytes
      case 'all-gather' | 'all-to-all':
        sent = others * self.result_bytes
      case 'reduce-scatter':
        sent = others * self.result_bytes * self.group
      case _:
        sent = self.result_bytes
    return sent * self.times


def instructions(hlo: str) -> Iterator[tuple[str, str, str, int]]:
  """Yields the operations that a program runs.

  An operation is (name, result, operands and attributes, number of runs); the
  number is negative in a loop whose number of turns is not known.
  """
  bodies: dict[str, list[str]] = {}
  name = entry = ''
  for line in hlo.splitlines():
    header = re.match(r'^(ENTRY )?%?([\w.\-]+) .*\{\s*$', line)
    if header and ' = ' not in line:
      name = header[2]
      bodies[name] = []
      entry = name if header[1] else entry
    elif name:
      bodies[name].append(line)
  if not entry:
    raise ValueError('This is not the text of an HLO program: no ENTRY.')

  def visit(name: str, times: int) -> Iterator[tuple[str, str, str, int]]:
    for line in bodies.get(name, ()):
      if not (match := _INSTRUCTION.match(line)):
        continue
      result, op, rest = match.groups()
      if op not in _CALLING:
        yield op, result, rest, times
        continue
      turns = 1
      if op == 'while':
        known = re.search(r'known_trip_count[^\d}]*(\d+)', rest)
        turns = int(known[1]) if known else -1
      called = _CALLED.findall(rest)
      if branches := re.search(r'branch_computations=\{([^}]*)\}', rest):
        called += re.findall(r'[\w.\-]+', branches[1])
      for inner in called:
        yield from visit(inner, -1 if min(times, turns) < 0 else times * turns)

  yield from visit(entry, 1)


def read(hlo: str, num_devices: int) -> list[Collective]:
  """Returns the collectives of a program between two or more devices.

  A collective in a loop counts once for each turn.

  Args:
    hlo: text of the compiled program, `compiled.as_text()`.
    num_devices: number of devices that it runs on.

  Raises:
    ValueError: a collective is in a loop without a known number of turns, or
      its text is not understood.
  """
  found: list[Collective] = []
  for op, result, rest, times in instructions(hlo):
    base = op.removesuffix('-start')
    if base not in _OPS:
      continue
    one = Collective(
        base,
        _bytes(result, started=op != base),
        _group_size(rest, num_devices) if base != _OPS[-1] else 2,
        times,
        _source(rest),
    )
    if times < 0:
      raise ValueError(
          f'A collective is in a loop without a known number of turns: {one}'
      )
    if one.group > 1:
      found.append(one)
  return found


def bytes_sent(collectives: list[Collective]) -> float:
  """Returns the bytes that each device sends in one run of the program."""
  return math.fsum(c.bytes_sent for c in collectives)


def _bytes(result: str, started: bool) -> int:
  sizes = []
  for bits, shape in _ARRAY.findall(result):
    elements = math.prod(int(n) for n in shape.split(',') if n)
    sizes.append(elements * int(bits or 8) // 8)  # pred has 8.
  if started and len(sizes) > 1:
    # An asynchronous start has operands and results.
    sizes = sizes[len(sizes) // 2 :]
  return sum(sizes)


def _group_size(rest: str, num_devices: int) -> int:
  named = re.search(r'replica_groups=mesh\[(.*?)\].*?\{(.*?)\}', rest)
  if named:  # mesh['x'=4,'y'=2] {'x','y':(1)2}: axes, or parts of them.
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    over = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in over)
  tiled = re.search(r'replica_groups=\[(\d+),(\d+)\]', rest)
  if tiled:
    return int(tiled[2])
  listed = re.search(r'replica_groups=\{(\{[\d,]*\})?', rest)
  if not listed:
    raise ValueError(f'Unknown replica_groups: {rest[:200]}')
  return len(listed[1].split(',')) if listed[1] else num_devices


def _source(rest: str) -> str:
  named = re.search(r'op_name="([^"]*)"', rest)
  return named[1] if named else ''
