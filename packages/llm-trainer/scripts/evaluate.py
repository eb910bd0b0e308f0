"""The same as `llm-trainer evaluate`, to be run as `python scripts/evaluate.py`."""

import sys

from llm_trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
