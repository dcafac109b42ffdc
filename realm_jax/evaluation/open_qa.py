"""Aliases of the answer matcher in `qa/answers.py`."""

from realm_jax.qa.answers import exact_match  # noqa: F401
from realm_jax.qa.answers import f1  # noqa: F401
from realm_jax.qa.answers import normalize_answer  # noqa: F401
