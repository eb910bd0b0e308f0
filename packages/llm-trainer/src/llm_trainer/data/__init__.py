"""From text files to batches of tokens."""

from llm_trainer.data._dataset import LanguageModelingDataset
from llm_trainer.data._loader import PositionedLoader, create_dataloader
from llm_trainer.data._sources import describe_source, read_dataset, read_texts
from llm_trainer.data._splits import Splits, load_splits
from llm_trainer.data._store import TokenStore

__all__ = [
    "LanguageModelingDataset",
    "PositionedLoader",
    "Splits",
    "TokenStore",
    "create_dataloader",
    "describe_source",
    "load_splits",
    "read_dataset",
    "read_texts",
]
