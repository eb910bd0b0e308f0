"""Configuration of the model, the training and the data."""

from llm_trainer.config._data import DataConfig
from llm_trainer.config._model import ModelConfig
from llm_trainer.config._run import RunConfig
from llm_trainer.config._size import calculate_parameters, estimate_memory_usage
from llm_trainer.config._training import TrainingConfig

__all__ = [
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingConfig",
    "calculate_parameters",
    "estimate_memory_usage",
]
