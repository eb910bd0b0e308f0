"""The same as `llm-trainer train`, to be run as `python scripts/train.py`."""

import sys

from llm_trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
