"""Data sets of the Hugging Face library `datasets`, by name or saved in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_trainer.data._formats import checked_text
from llm_trainer.exceptions import DataError, MissingPackageError

_LOCAL_FORMS = (
    "Local forms need no network: a text, .jsonl, .jsonl.gz or .parquet file, a folder of them, a folder "
    "written by save_to_disk, or python-stdlib."
)


def is_saved_dataset(folder: Path) -> bool:
    """Say whether `save_to_disk` of a `Dataset` or a `DatasetDict` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


class HubSource:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, name: str, config: str | None, split: str, text_column: str) -> None:
        """Open it; by name, that may download it.

        Raises:
            DataError: There is no such data set, configuration, split or column, or no network.
            MissingPackageError: `datasets` is not installed.
        """
        self.name = name
        self._column = text_column
        datasets = _datasets()
        saved = Path(name)
        try:
            if saved.is_dir():
                self._dataset = _split_of(datasets.load_from_disk(name), split, saved)
            else:
                self._dataset: Any = datasets.load_dataset(name, config, split=split)
        except DataError:
            raise
        # What the library raises: ConnectionError and FileNotFoundError, and for names that do not exist
        # ValueError, or RuntimeError where a data set would run code of its own.
        except (OSError, ValueError, RuntimeError) as error:
            of = f" (configuration {config!r}, split {split!r})" if not saved.is_dir() else ""
            raise DataError(f"The data set {name!r}{of} cannot be loaded: {error} {_LOCAL_FORMS}") from error
        if text_column not in self._dataset.column_names:
            raise DataError(
                f"The data set {name!r} has no column {text_column!r}; text_column can be one of "
                f"{self._dataset.column_names}."
            )

    def texts(self) -> Iterator[str]:
        """Yield the rows that have a text."""
        number = 0
        for batch in self._dataset.select_columns([self._column]).with_format(None).iter(1024):
            for value in batch[self._column]:
                number += 1
                text = checked_text(value, self._column, f"The data set {self.name!r}, row {number}")
                if text is not None:
                    yield text

    def describe(self) -> dict[str, Any]:
        """Return what tells it from other data; the fingerprint is the library's own."""
        return {
            "kind": "datasets",
            "name": self.name,
            "text_column": self._column,
            "num_rows": len(self._dataset),
            "fingerprint": str(self._dataset._fingerprint),
        }


def _split_of(loaded: Any, split: str, folder: Path) -> Any:
    splits = loaded if hasattr(loaded, "keys") else {"train": loaded}
    if split not in splits:
        raise DataError(f"{folder} has no split {split!r}; it has {sorted(splits)}.")
    return splits[split]


def _datasets() -> Any:
    try:
        # It starts threads of its own: not before it is needed.
        import datasets  # pyright: ignore[reportMissingTypeStubs] - it ships none
    except ImportError as error:
        raise MissingPackageError(
            f"Hugging Face data sets need two packages: pip install datasets pyarrow. {_LOCAL_FORMS}"
        ) from error
    return datasets
