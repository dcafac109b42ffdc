"""Which documents a workdir has, on disk: one version after the other.

Public: `Edition`, `PartOnDisk`, `read`, `write`, `DIRECTORY`, `MANIFEST`. The
manifest is replaced as a whole, after all that it names is there, so that a
reader sees the version before or the one after.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any

import numpy as np

from realm_jax.runtime import files

FORMAT_VERSION = 1
DIRECTORY = 'documents'  # In a workdir.
MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class PartOnDisk:
  """A corpus and the folder of its generations.

  corpus, index: paths, relative to the folder; None: those of the job itself.
  fingerprint: of the corpus.
  """

  corpus: str | None
  index: str | None
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Edition:
  """One version of the documents.

  version: counts the changes.
  origin: fingerprint of the corpus that the workdir was trained on.
  parts: in order of their rows.
  removed: rows that count no more, sorted int64.
  digest: SHA-256 of the manifest.
  """

  version: int
  origin: str
  parts: tuple[PartOnDisk, ...]
  removed: np.ndarray
  digest: str = ''


def read(folder: pathlib.Path) -> Edition | None:
  """Reads the version that holds; None if there never was a change.

  Raises:
    FileNotFoundError: if the removed rows are missing.
    ValueError: if something is damaged, or of a newer format.
  """
  path = folder / MANIFEST
  if not path.is_file():
    return None
  manifest = files.read_json(path)
  if not isinstance(manifest, dict):
    raise ValueError(f'{path} is damaged: it is not an object.')
  version = manifest.get('format_version')
  if isinstance(version, int) and version > FORMAT_VERSION:
    raise ValueError(
        f'{path} has format {version}, from a newer realm_jax; this one reads '
        f'format {FORMAT_VERSION}. Install the newer version.'
    )
  found, said = _digest(manifest), manifest.get('manifest_sha256')
  if found != said:
    raise ValueError(
        f'{path} is damaged: its SHA-256 is {found}, it says {said}.'
    )
  return Edition(
      manifest['version'],
      manifest['origin'],
      tuple(PartOnDisk(**part) for part in manifest['parts']),
      _read_removed(folder, manifest['removed']),
      found,
  )


def write(
    folder: pathlib.Path, edition: Edition, change: Mapping[str, Any]
) -> None:
  """Makes a version hold, from the rename of its manifest on.

  Args:
    folder: locked, and with all the parts.
    edition: of the next version; `digest` is ignored.
    change: what was done, for whoever reads the manifest.

  Raises:
    OSError: if the disk is full; then the version before still holds.
  """
  removed = None
  if len(edition.removed):
    name = f'removed-{edition.version}.npy'
    with open(folder / name, 'wb') as file:
      np.save(file, edition.removed.astype(np.int64), allow_pickle=False)
      file.flush()
      os.fsync(file.fileno())
    removed = {
        'file': name,
        'rows': len(edition.removed),
        'sha256': _sha256(folder / name),
    }
  manifest = {
      'format_version': FORMAT_VERSION,
      'version': edition.version,
      'origin': edition.origin,
      'parts': [dataclasses.asdict(part) for part in edition.parts],
      'removed': removed,
      'change': {**change, 'time': time.time()},
  }
  manifest['manifest_sha256'] = _digest(manifest)
  files.write_json(folder / MANIFEST, manifest)


def _read_removed(
    folder: pathlib.Path, about: dict[str, Any] | None
) -> np.ndarray:
  if about is None:
    return np.zeros(0, np.int64)
  path = folder / about['file']
  if not path.is_file():
    raise FileNotFoundError(f'{folder} lacks the file {about["file"]}.')
  found = _sha256(path)
  if found != about['sha256']:
    raise ValueError(
        f'{path} is damaged: its SHA-256 is {found}, {MANIFEST} says '
        f'{about["sha256"]}.'
    )
  return np.load(path, allow_pickle=False)


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
  rest = {k: v for k, v in manifest.items() if k != 'manifest_sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
