"""The same as `llm-trainer generate`, to be run as `python scripts/generate.py`."""

import sys

from llm_trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["generate", *sys.argv[1:]]))
