"""`python -m resode_cli`."""

from .app import run

run()
