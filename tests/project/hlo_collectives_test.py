"""The collectives of a program, read from its HLO."""

import importlib
import pathlib

import pytest

_BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def hlo_collectives(monkeypatch):
  monkeypatch.syspath_prepend(_BENCHMARKS)
  return importlib.import_module('hlo_collectives')


_HLO = """
HloModule jit_step

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %psum = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (p: bf16[4,2]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%start), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %all = (bf16[16,2]{1,0}, pred[4]) all-gather(%p, %q), \
replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="jit(step)/all"}
  %named = s32[3]{0} reduce-scatter(%r), \
replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add
  %alone = f32[99]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}
}
"""


def test_collectives_are_read_from_the_program(hlo_collectives):
  found = hlo_collectives.read(_HLO, 4)
  assert [(c.op, c.result_bytes, c.group, c.times) for c in found] == [
      ('all-reduce', 32, 2, 5),
      ('all-gather', 68, 4, 1),
      ('reduce-scatter', 12, 2, 1),
  ]
  assert found[1].source == 'jit(step)/all'
  assert hlo_collectives.bytes_sent(found) == 5 * 32 + 68 * 3 / 4 + 12
  with pytest.raises(ValueError, match='known number of turns'):
    hlo_collectives.read(_HLO.replace('known_trip_count', 'unknown'), 4)
