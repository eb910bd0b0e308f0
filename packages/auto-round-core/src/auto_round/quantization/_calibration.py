"""Calibration: sequences of one length, drawn at random from whatever text or token ids there are."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from auto_round._files import shown
from auto_round.exceptions import CalibrationError, ConfigurationError
from auto_round.quantization._calibration_files import PART, Element
from auto_round.quantization._calibration_sources import Source, open_source
from auto_round.quantization._token_rows import rows_of

_POOL = 8
"""Windows that are looked at for each one that is drawn."""


class _Window(NamedTuple):
    place: tuple[int, ...]
    ids: Tensor


@dataclass(kw_only=True)
class _Seen:
    """What went by, for the messages."""

    documents: int = 0
    tokens: int = 0
    short: int = 0
    first_short: str = ""


def calibration_tokens(
    data: object, tokenizer: Any, *, nsamples: int, seqlen: int, seed: int, vocab_size: int | None = None
) -> Tensor:
    """Draw sequences of token ids for calibration.

    Text is cut into tokens document by document, without special tokens, and joined to one stream with the
    tokenizer's end-of-text token between documents (with nothing where it has none); the stream is cut into
    windows that do not overlap, and the tokens left at its end are dropped. A row of token ids is never
    joined to another: each is cut into windows of its own.

    Of the first 8 * `nsamples` windows, `nsamples` are drawn, each as likely as any other. What has a length
    (files, lists, a `Dataset`) is gone through in random order; what has none (an `IterableDataset`,
    any other iterable) in its own, and no further than needed. A file of more than 128 KiB and a string of
    more than 128 Ki characters count as several documents. So memory holds the windows drawn and one such
    document, whatever the size of the data; only `.json` (at most 64 MiB) is read whole. Rows come out in
    the order in which they lie in the data, if the data are token ids; exactly `nsamples` rows of `seqlen`
    ids come out as they are.

    The result depends on the data, the numbers and the seed, not on the global random state, the hash seed or
    the order in which the system lists a folder.

    Args:
        data: One of

            - a path, or a list of paths, of files: `.jsonl` and `.json` with a field "text", `.parquet` with
              such a column (needs pyarrow), anything else as text in UTF-8; a folder means all files in it;
            - a list, or any iterable, of strings; a list of strings of which all name files is one of paths;
            - a `Dataset`, `IterableDataset` or a dictionary of them with a split "train" of the library
              datasets, or the folder that `save_to_disk` wrote;
            - token ids: a tensor or array [length] or [rows, length] of integers, lists of them, or
              mappings with `input_ids` and perhaps `attention_mask`, whose zeros mark padding to be cut away.

            The text of a record is its field "text", else "content", else its only string.
        tokenizer: A tokenizer of transformers or tokenizers, or any object that is called, or has `encode`,
            with a string and gives ids; `eos_token_id` is joined between documents. None with token ids.
        nsamples: Sequences to draw.
        seqlen: Tokens in each.
        seed: Of everything drawn; an integer of at least 0.
        vocab_size: Ids the model knows, all below it. None takes the tokenizer's length for ids that were
            given, and checks no upper bound where there is no tokenizer.

    Returns:
        int64 [nsamples, seqlen] on the CPU; fewer rows, with a warning that says how many, where the data has
        no more.

    Raises:
        CalibrationError: There are no data, not one sequence of text, or fewer than `nsamples` sequences of
            ids because rows are too short; a file cannot be read; ids are no integers or outside the
            vocabulary. The message names the file or row. Nothing is ever made up in its place.
        ConfigurationError: `nsamples`, `seqlen` or `seed` is no such number.
        MissingPackageError: The data need pyarrow or datasets, which is not installed.

    Warns:
        UserWarning: There are fewer rows than asked for, or rows were too short and were left out.
    """
    check_count("nsamples", nsamples, least=1)
    check_count("seqlen", seqlen, least=1)
    check_count("seed", seed, least=0)
    # Drawing calibration is no secret; what counts is that a seed repeats it.
    rng = random.Random(seed)  # noqa: S311
    source, seen = open_source(data, rng), _Seen()
    windows = _windows(source, tokenizer, seqlen, vocab_size, seen)
    drawn: list[_Window] = []
    for count, window in enumerate(windows):
        if count < nsamples:
            drawn.append(window)
        elif (place := rng.randrange(count + 1)) < nsamples:
            drawn[place] = window
        if count + 1 == _POOL * nsamples:
            break
    _report(source, seen, len(drawn), nsamples, seqlen)
    return torch.stack([window.ids for window in sorted(drawn, key=lambda window: window.place)])


def check_count(name: str, value: object, *, least: int) -> None:
    """Refuse what is no integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name} is {shown(value)}; it must be an integer of at least {least}.")


def _report(source: Source, seen: _Seen, found: int, nsamples: int, seqlen: int) -> None:
    if seen.short and found < nsamples:
        raise CalibrationError(
            f"{seen.first_short}, fewer than one sequence of {seqlen}, and without such rows there are "
            f"{found} sequences where {nsamples} are needed. Give longer rows, or set quantization.seqlen or "
            "quantization.nsamples lower."
        )
    if not found:
        if not seen.tokens:
            raise CalibrationError(f"{source.name} holds no text and no token ids to calibrate with.")
        raise CalibrationError(
            f"{source.name} holds {seen.tokens} tokens, fewer than one sequence of {seqlen}. Give more "
            f"text, or set quantization.seqlen to at most {seen.tokens}."
        )
    if seen.short:
        warnings.warn(
            f"{seen.short} rows were left out for being shorter than {seqlen} tokens; the first of them: "
            f"{seen.first_short}.",
            stacklevel=3,
        )
    if found < nsamples:
        warnings.warn(
            f"{source.name} holds {found} sequences of {seqlen} tokens, not the {nsamples} that were asked "
            f"for; calibration goes on with {found}.",
            stacklevel=3,
        )


def _windows(
    source: Source, tokenizer: Any, seqlen: int, vocab_size: int | None, seen: _Seen
) -> Iterator[_Window]:
    """Yield the windows of text or of rows of ids, whichever the first element is."""
    first = next(source.elements, None)
    if first is None:
        return
    is_text = _is_text(first)
    elements = _all_alike(first, source, is_text)
    if not is_text:
        yield from _windows_of_rows(elements, tokenizer, seqlen, vocab_size, seen)
        return
    if tokenizer is None:
        raise CalibrationError(
            f"{first.label} is text, and there is no tokenizer to cut it into tokens. Give the model's "
            "tokenizer, or token ids instead of text."
        )
    yield from _windows_of_text(elements, tokenizer, seqlen, vocab_size, seen)


def _all_alike(first: Element, source: Source, is_text: bool) -> Iterator[Element]:
    yield first
    for element in source.elements:
        if _is_text(element) is not is_text:
            kinds = ("token ids", "text") if is_text else ("text", "token ids")
            raise CalibrationError(
                f"{element.label} is {kinds[0]}, but {first.label} is {kinds[1]}; give one kind alone."
            )
        yield element


def _is_text(element: Element) -> bool:
    value = element.value
    return isinstance(value, str) or (
        isinstance(value, Mapping) and "input_ids" not in cast("Mapping[str, object]", value)
    )


def _windows_of_rows(
    elements: Iterator[Element], tokenizer: Any, seqlen: int, vocab_size: int | None, seen: _Seen
) -> Iterator[_Window]:
    if vocab_size is None and hasattr(tokenizer, "__len__"):
        vocab_size = len(tokenizer)
    for place, label, value in elements:
        rows = rows_of(value, label, vocab_size=vocab_size)
        for number, row in enumerate(rows):
            seen.tokens += len(row)
            if len(row) < seqlen:
                seen.short += 1
                name = f"{label}, row {number}," if len(rows) > 1 else label
                seen.first_short = seen.first_short or f"{name} holds {len(row)} tokens"
            for start in range(0, len(row) - seqlen + 1, seqlen):
                # A view would keep the whole row in memory.
                yield _Window((place, number, start), row[start : start + seqlen].clone())


def _windows_of_text(
    elements: Iterator[Element], tokenizer: Any, seqlen: int, vocab_size: int | None, seen: _Seen
) -> Iterator[_Window]:
    encode = _encoder(tokenizer)
    eos: object = getattr(tokenizer, "eos_token_id", None)
    stream: list[int] = []
    place = 0
    for element in elements:
        text = _text_of(element)
        for start in range(0, len(text), PART):
            (ids,) = rows_of([encode(text[start : start + PART])], element.label, vocab_size=vocab_size)
            if not len(ids):
                continue
            if seen.documents and isinstance(eos, int):
                stream.append(eos)
            seen.documents += 1
            seen.tokens += len(ids)
            stream += cast("list[int]", ids.tolist())  # pyright: ignore[reportUnknownMemberType]
            whole = len(stream) - len(stream) % seqlen
            for window in torch.tensor(stream[:whole], dtype=torch.int64).reshape(-1, seqlen):
                yield _Window((place,), window.clone())
                place += 1
            del stream[:whole]


def _text_of(element: Element) -> str:
    value = element.value
    if isinstance(value, str):
        return value
    record = cast("Mapping[str, object]", value)
    for name in ("text", "content"):
        if name in record:
            found = record[name]
            if not isinstance(found, str):
                raise CalibrationError(
                    f"{element.label} has a {type(found).__name__} in the field {name!r}; it must be text."
                )
            return found
    strings = [found for found in record.values() if isinstance(found, str)]
    if len(strings) != 1:
        raise CalibrationError(
            f"{element.label} has no field 'text' and no single string; its fields are {shown(list(record))}."
        )
    return strings[0]


def _encoder(tokenizer: Any) -> Callable[[str], object]:
    call: Any = tokenizer if callable(tokenizer) else getattr(tokenizer, "encode", None)
    # Text has an `encode` as well, of another kind.
    if call is None or isinstance(tokenizer, str):
        raise CalibrationError(
            f"The tokenizer is a {type(tokenizer).__name__}, which can neither be called with text nor has "
            "an encode that makes tokens; give the model's tokenizer, such as "
            "AutoTokenizer.from_pretrained(folder)."
        )
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        # Some that are written in other languages tell nothing of their parameters.
        parameters = {}
    # A document is longer than any model's input, of which transformers would warn.
    options = {name: False for name in ("add_special_tokens", "verbose") if name in parameters}

    def encode(text: str) -> object:
        encoded = call(text, **options)
        if isinstance(encoded, Mapping):
            return cast("Mapping[str, object]", encoded)["input_ids"]
        return getattr(encoded, "ids", encoded)

    return encode
