"""Documents as token ids in files: written once, read through the page cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from llm_trainer._files import check_version, json_sha256, read_json_object, shown, write_json
from llm_trainer.data._encode import encode_documents, token_dtype
from llm_trainer.data._folder import make_folder
from llm_trainer.data._tokens import TokenArray, nothing_long_enough, tokens_fingerprint
from llm_trainer.exceptions import FormatError
from llm_trainer.tokenizer import Tokenizer

FORMAT = "llm-trainer tokens"
VERSION = 1
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_OFFSET = np.dtype("<i8")


class TokenStore:
    """A folder with the tokens of a corpus.

    - `tokens.bin`: the ids of all documents behind one another, each from its beginning-of-text to its
      end-of-text token, little-endian uint16 where the vocabulary allows and uint32 where not;
    - `offsets.bin`: where each document begins, and the end, in little-endian int64;
    - `meta.json`: version, counts, tokenizer, source and settings, and the sizes and SHA-256 of the files.

    The files are mapped when first used, in each process by itself, so a store can be pickled and sent to
    workers. Its memory is the page cache's.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.meta = meta
        """What `meta.json` says."""
        self._mapped: dict[str, npt.NDArray[Any]] = {}

    @classmethod
    def create(
        cls,
        path: str | Path,
        texts: Iterable[str],
        tokenizer: Tokenizer,
        *,
        min_length: int = 1,
        num_threads: int = 1,
        source: Mapping[str, Any] | None = None,
        show_progress: bool | None = None,
    ) -> Self:
        """Encode texts into a folder, in memory that does not grow with them.

        Args:
            path: Folder to write; one that is there is replaced once the new one is whole.
            texts: Documents, read once. One longer than a million characters is encoded in pieces.
            tokenizer: A trained tokenizer.
            min_length: Documents of fewer tokens, special ones not counted, are dropped; empty ones always.
            num_threads: Threads that encode.
            source: What the texts are, from `describe_source`, to be found in `meta.json`.
            show_progress: None shows it on a terminal.

        Raises:
            DataError: No document is long enough, or a text is not a string.
            OSError: The folder cannot be written, by a full disk for instance; nothing is left of it then.
        """
        target = Path(path)

        def write(folder: Path) -> None:
            write_store(
                folder,
                texts,
                tokenizer,
                min_length=min_length,
                num_threads=num_threads,
                source=source,
                show_progress=show_progress,
            )

        make_folder(target, write)
        return cls.open(target, verify=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Self:
        """Open a folder that `create` wrote.

        Args:
            path: The folder.
            verify: Whether to read the files whole and compare their hashes, at about 1 GB (500M tokens) a
                second. Their sizes are always compared.

        Raises:
            FormatError: A file is missing, damaged, or newer than this release.
        """
        folder = Path(path)
        meta = _read_meta(folder)
        store = cls(folder, meta)
        for name, entry in cast("dict[str, dict[str, Any]]", meta["files"]).items():
            _check_file(folder / name, entry, verify)
        return store

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All ids, mapped read-only."""
        return self._map("tokens.bin", _DTYPES[self.meta["dtype"]])

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each document begins, and the end, mapped read-only."""
        return self._map("offsets.bin", _OFFSET)

    @property
    def num_documents(self) -> int:
        """Documents kept."""
        return int(self.meta["num_documents"])

    @property
    def dropped(self) -> int:
        """Documents that were too short."""
        return int(self.meta["num_dropped_documents"])

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents kept."""
        return int(self.meta["num_text_bytes"])

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's id that fills rows."""
        return int(self.meta["pad_token_id"])

    def fingerprint(self) -> str:
        """Return a hash of the tokens and the documents' places; a `TokenArray` of the same has the same."""
        files = self.meta["files"]
        return tokens_fingerprint(files["tokens.bin"]["sha256"], files["offsets.bin"]["sha256"])

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if name not in self._mapped:
            # A plain view: every slice of np.memmap itself costs microseconds more.
            self._mapped[name] = np.asarray(np.memmap(self.path / name, dtype=dtype, mode="r"))
        return self._mapped[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "meta": self.meta, "_mapped": {}}


def write_store(
    folder: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    min_length: int,
    num_threads: int,
    source: Mapping[str, Any] | None,
    show_progress: bool | None = None,
) -> None:
    """Write the three files into an empty folder."""
    dtype = token_dtype(tokenizer.vocab_size)
    dropped = text_bytes = 0
    with _HashedFile(folder / "tokens.bin") as tokens, _HashedFile(folder / "offsets.bin") as offsets:
        offsets.write(np.zeros(1, _OFFSET))
        for part in encode_documents(texts, tokenizer, min_length, num_threads, show_progress):
            offsets.write((part.ends + tokens.size // dtype.itemsize).astype(_OFFSET))
            tokens.write(part.ids)
            dropped += part.dropped
            text_bytes += part.text_bytes
    num_documents = offsets.size // _OFFSET.itemsize - 1
    if not num_documents:
        raise nothing_long_enough(min_length, dropped)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        "num_tokens": tokens.size // dtype.itemsize,
        "num_documents": num_documents,
        "num_dropped_documents": dropped,
        "num_text_bytes": text_bytes,
        "min_length": min_length,
        "pad_token_id": tokenizer.pad_token_id,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "source": None if source is None else dict(source),
        "files": {"tokens.bin": tokens.entry(), "offsets.bin": offsets.entry()},
    }
    write_json(folder / "meta.json", meta | {"checksum": json_sha256(meta)})


class _HashedFile:
    """A file whose size and SHA-256 are known once it is written."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=1 << 20)

    def write(self, array: npt.NDArray[Any]) -> None:
        data = array.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    meta = read_json_object(path)
    if meta.get("format") != FORMAT:
        raise FormatError(f"{path} is not of a token store (format {shown(meta.get('format'))}).")
    check_version(path, meta.get("version"), VERSION)
    checksum = meta.pop("checksum", None)
    if checksum != json_sha256(meta):
        raise FormatError(f"{path} is damaged: it does not match its own checksum. {_remedy(folder)}")
    try:
        sizes = {
            "tokens.bin": meta["num_tokens"] * _DTYPES[meta["dtype"]].itemsize,
            "offsets.bin": (meta["num_documents"] + 1) * _OFFSET.itemsize,
        }
        consistent = {name: entry["bytes"] for name, entry in meta["files"].items()} == sizes
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} lacks what a token store has ({error!r}). {_remedy(folder)}") from error
    if not consistent or meta["num_documents"] < 1:
        raise FormatError(f"{path} contradicts itself about the files' sizes. {_remedy(folder)}")
    return meta


def _check_file(path: Path, entry: dict[str, Any], verify: bool) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise FormatError(
                f"{path} has {size} bytes where {entry['bytes']} were written. {_remedy(path.parent)}"
            )
        if verify:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise FormatError(
                    f"{path} is damaged: its bytes are not those that were written. {_remedy(path.parent)}"
                )
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}). {_remedy(path.parent)}") from error


def _remedy(folder: Path) -> str:
    return f"Delete {folder} and prepare it again."


Tokens = TokenArray | TokenStore
