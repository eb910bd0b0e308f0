"""A stream of documents as a stream of token ids, in bounded memory and on several threads."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from llm_trainer.data._progress import EncodingProgress
from llm_trainer.exceptions import DataError
from llm_trainer.tokenizer import Tokenizer

# Handing a text to a thread costs more than encoding a short one: they go in groups of this many characters.
GROUP_CHARS = 1 << 18
# A longer document goes in pieces of this many characters.
PIECE_CHARS = 1 << 20


@dataclass(frozen=True)
class Encoded:
    """Some documents, or a part of one, to stand behind those before them."""

    ids: npt.NDArray[Any]
    """Token ids, each document from its beginning-of-text to its end-of-text token."""
    ends: npt.NDArray[np.int64]
    """Where in `ids` documents end."""
    text_bytes: int
    """UTF-8 bytes of their text."""
    dropped: int
    """Documents that were too short and are not in `ids`."""


@dataclass(frozen=True)
class _Piece:
    """A part of a long document."""

    text: str
    is_first: bool
    is_last: bool


_Work = list[str] | _Piece


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smaller of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_documents(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    min_length: int = 1,
    num_threads: int = 1,
    show_progress: bool | None = None,
) -> Iterator[Encoded]:
    """Encode documents in order; about two million characters a thread are in memory at a time.

    A document of more than a million characters is encoded in pieces, cut between two lines, else before a
    space: where no token of the usual pre-tokenizers crosses, so that the ids are those of the whole. Only a
    million characters without either are cut anywhere.

    Args:
        texts: Documents, read once.
        tokenizer: A trained tokenizer.
        min_length: Documents of fewer tokens, special ones not counted, are dropped; empty ones always.
        num_threads: Threads that encode; the result is the same with any number.
        show_progress: None shows it on a terminal.

    Raises:
        DataError: `texts` is one string, or holds something else than strings.
    """
    if isinstance(texts, str):
        raise DataError("texts is one string; give an iterable of strings, such as [text].")
    encoder = _Encoder(tokenizer, max(min_length, 1))
    waiting: deque[tuple[_Work, Future[Encoded]]] = deque()
    long_document = _LongDocument(encoder)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")
    try:
        with EncodingProgress(show_progress) as progress:
            for work in _work(texts):
                waiting.append((work, pool.submit(encoder.encode, work)))
                if len(waiting) <= num_threads + 1:
                    continue
                yield from progress.count(long_document.pass_on(*_result(waiting)))
            while waiting:
                yield from progress.count(long_document.pass_on(*_result(waiting)))
    finally:
        pool.shutdown(cancel_futures=True)


def _result(waiting: deque[tuple[_Work, Future[Encoded]]]) -> tuple[_Work, Encoded]:
    work, future = waiting.popleft()
    return work, future.result()


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, least: int) -> None:
        self.least = least
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._begin = np.array([tokenizer.bos_token_id], dtype=self._dtype)
        self._end = np.array([tokenizer.eos_token_id], dtype=self._dtype)

    def encode(self, work: _Work) -> Encoded:
        parts: list[npt.NDArray[Any]] = []
        ends: list[int] = []
        length = text_bytes = 0
        if isinstance(work, _Piece):
            ids = self._ids(work.text)
            parts = [self._begin] * work.is_first + [ids] + [self._end] * work.is_last
            length = len(ids) + work.is_first + work.is_last
            ends = [length] * work.is_last
            return Encoded(np.concatenate(parts), _int64(ends), _utf8_bytes(work.text), 0)
        for text in work:
            ids = self._ids(text)
            if len(ids) >= self.least:
                parts += (self._begin, ids, self._end)
                length += len(ids) + 2
                ends.append(length)
                text_bytes += _utf8_bytes(text)
        joined = np.concatenate(parts) if parts else np.empty(0, self._dtype)
        return Encoded(joined, _int64(ends), text_bytes, len(work) - len(ends))

    def _ids(self, text: str) -> npt.NDArray[Any]:
        return self._tokenizer.encode_ordinary(text).astype(self._dtype)


class _LongDocument:
    """Holds the first pieces of a document back until it is known to be long enough."""

    def __init__(self, encoder: _Encoder) -> None:
        self._least = encoder.least
        self._held: list[Encoded] = []
        self._tokens = 0

    def pass_on(self, work: _Work, encoded: Encoded) -> Iterator[Encoded]:
        if not isinstance(work, _Piece):
            yield encoded
            return
        if work.is_first:
            self._held, self._tokens = [], 0
        self._held.append(encoded)
        self._tokens += len(encoded.ids) - work.is_first - work.is_last
        if self._tokens >= self._least:
            yield from self._held
            self._held = []
        elif work.is_last:
            yield Encoded(encoded.ids[:0], _int64([]), 0, dropped=1)
            self._held = []


def _work(texts: Iterable[str]) -> Iterator[_Work]:
    group: list[str] = []
    chars = 0
    for number, text in enumerate(texts):
        if not isinstance(cast("object", text), str):
            raise DataError(f"Text {number} is not a string but a {type(text).__name__}.")
        if len(text) > PIECE_CHARS:
            if group:
                yield group
                group, chars = [], 0
            yield from _pieces(text)
            continue
        group.append(text)
        chars += len(text) + 64
        if chars >= GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[_Piece]:
    start = 0
    while start < len(text):
        end = _cut(text, start, start + PIECE_CHARS) if len(text) - start > PIECE_CHARS else len(text)
        yield _Piece(text[start:end], start == 0, end == len(text))
        start = end


# A line break, or a space, that stands alone between what is not white space.
_BETWEEN_LINES = re.compile(r"(?<=\S)\n(?=\S)")
_BEFORE_SPACE = re.compile(r"(?<=\S)(?= \S)")


def _cut(text: str, start: int, end: int) -> int:
    """Return the last good place to cut in the last tenth before `end`, or `end`."""
    window = text[end - (end - start) // 10 : end + 1]
    for pattern in (_BETWEEN_LINES, _BEFORE_SPACE):
        places = [match.end() for match in pattern.finditer(window, 1, len(window) - 1)]
        if places:
            return end + 1 - len(window) + places[-1]
    return end


def _int64(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
