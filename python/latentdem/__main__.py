"""``python -m latentdem``."""

from latentdem.cli import main

main()
