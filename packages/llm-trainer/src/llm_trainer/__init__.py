"""Train a language model from raw text on ordinary hardware.

The public names live in the rooms: `llm_trainer.config`, `.tokenizer`, `.data`, `.models`, `.training`,
`.utils.metrics` and `.exceptions`. Importing this package loads none of them, and therefore no torch.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
