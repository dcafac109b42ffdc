"""`python -m realm_jax COMMAND ...`, the same as `realm-jax COMMAND ...`."""

from realm_jax import main

if __name__ == '__main__':
  main.run()
