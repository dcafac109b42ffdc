"""The entry point of `realm-jax`; see `realm_jax/cli/`."""
from realm_jax.cli.main import run as run
