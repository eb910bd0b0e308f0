"""`python -m llm_trainer`, the same as the command `llm-trainer`."""

from llm_trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
