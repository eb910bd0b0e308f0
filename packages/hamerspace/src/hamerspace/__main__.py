"""``python -m hamerspace``."""

from hamerspace.cli.main import main

main()
