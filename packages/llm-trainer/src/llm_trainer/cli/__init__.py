"""The command `llm-trainer`. Importing it loads no torch; what a command needs is imported when it runs."""

from llm_trainer.cli._app import app, main

__all__ = ["app", "main"]
