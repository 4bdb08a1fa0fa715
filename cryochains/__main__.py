"""``python -m cryochains``: the command line."""

from .cli import main

main()
