"""From text files to batches of tokens."""

from llm_trainer.data._dataset import LanguageModelingDataset
from llm_trainer.data._loader import PositionedLoader, create_dataloader
from llm_trainer.data._sources import read_texts
from llm_trainer.data._splits import Splits, load_splits

__all__ = [
    "LanguageModelingDataset",
    "PositionedLoader",
    "Splits",
    "create_dataloader",
    "load_splits",
    "read_texts",
]
