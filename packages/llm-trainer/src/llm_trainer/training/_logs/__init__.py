"""The logs that a run can write, one module a kind; `llm_trainer.training.loggers` is the public door."""
