"""The files and links that README and docs name exist."""

import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PAGES = sorted([*_ROOT.glob('*.md'), *_ROOT.glob('docs/*.md')])
_CODE = re.compile(r'`((?:[a-z_]+/)+[a-z_]+\.py)')
_LINK = re.compile(r'\]\((?!https?://|#)([^)#]+)')
# Folders that a path in the text may be relative to.
_BASES = (_ROOT, _ROOT / 'realm_jax', _ROOT / 'tests')


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
  text = page.read_text(encoding='utf-8')
  missing = {
      name
      for name in _CODE.findall(text)
      if not any((base / name).is_file() for base in _BASES)
  }
  assert not missing
  missing = {
      name
      for name in _LINK.findall(text)
      if not (page.parent / name.replace('\\', '')).exists()
  }
  assert not missing


def test_every_folder_has_a_line_in_the_architecture():
  text = (_ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
  folders = {path.parent.name for path in _ROOT.glob('realm_jax/*/__init__.py')}
  assert len(folders) > 10
  assert not {name for name in folders if f'`{name}/`' not in text}
