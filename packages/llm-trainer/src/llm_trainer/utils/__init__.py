"""Helpers around a trained model; see `llm_trainer.utils.metrics`."""
