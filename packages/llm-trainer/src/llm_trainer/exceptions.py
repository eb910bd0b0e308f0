"""What llm-trainer raises of its own; each is also the standard exception that callers expect."""

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "FormatError",
    "GenerationError",
    "LLMTrainerError",
    "MissingPackageError",
    "ModelConfigurationError",
    "ModelInputError",
    "TokenizerError",
    "TokenizerNotTrainedException",
    "TrainingError",
]


class LLMTrainerError(Exception):
    """Base of every exception of this package."""


class ConfigurationError(LLMTrainerError, ValueError, AssertionError):
    """A configuration holds an impossible value or an unknown key."""


class ModelConfigurationError(ConfigurationError):
    """A `ModelConfig` describes a model that cannot be built."""


class ModelInputError(LLMTrainerError, ValueError):
    """A model was given tokens that it does not take: too many, of another shape or vocabulary."""


class TokenizerError(LLMTrainerError, ValueError):
    """A tokenizer was asked for something it cannot do, such as a vocabulary of fewer tokens than there are
    bytes.
    """


class TokenizerNotTrainedException(LLMTrainerError, RuntimeError):
    """A tokenizer was used before `train` or `from_pretrained`."""


class DataError(LLMTrainerError, ValueError):
    """Training or evaluation text is missing, empty or not text."""


class FormatError(LLMTrainerError, ValueError):
    """A file of ours is missing, damaged, or written by a newer version."""


class CheckpointError(FormatError):
    """A checkpoint is missing, damaged, or of another model, data or optimizer."""


class MissingPackageError(LLMTrainerError, ImportError):
    """Something was asked for that takes a package which is not installed."""


class TrainingError(LLMTrainerError, RuntimeError):
    """Training cannot start or cannot go on."""


class GenerationError(LLMTrainerError, ValueError):
    """Text generation was asked for with impossible parameters."""
