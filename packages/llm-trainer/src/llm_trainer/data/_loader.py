"""Batches of rows, from any place in any epoch."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    default_collate,  # pyright: ignore[reportUnknownVariableType]
)

from llm_trainer._files import shown
from llm_trainer.exceptions import ConfigurationError, DataError, TrainingError


def create_dataloader(
    dataset: Dataset[dict[str, Tensor]],
    batch_size: int = 32,
    shuffle: bool = True,
    num_workers: int = 0,
    pin_memory: bool | None = None,
    drop_last: bool = False,
    seed: int | None = None,
) -> PositionedLoader:
    """Return a loader of batches without the columns at their end that are padding in every row.

    Args:
        dataset: Rows, such as `LanguageModelingDataset`, or any torch data set of dictionaries of tensors.
        batch_size: Rows in a batch.
        shuffle: Whether each epoch takes the rows in another order; an `IterableDataset` has its own.
        num_workers: Processes that prepare batches; rows that are in memory or in a token file need none.
            The batches are the same with any number of them.
        pin_memory: Whether batches are made ready for copying to a GPU; None where there is one.
        drop_last: Whether a last, smaller batch is left out.
        seed: Of the order; None draws one from torch's generator, once.

    Raises:
        ConfigurationError: `batch_size` or `num_workers` is impossible.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if not isinstance(cast("object", value), int) or value < least:
            raise ConfigurationError(f"{name} is {shown(value)}; it must be an integer of at least {least}.")
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return PositionedLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available()
        if pin_memory is None
        else pin_memory and torch.cuda.is_available(),
        drop_last=drop_last,
        seed=seed,
    )


class PositionedLoader(DataLoader[dict[str, Tensor]]):
    """A `DataLoader` that can begin at any batch of any epoch, without loading those before it.

    The order of an epoch follows from the seed and the epoch's number alone. Each pass is the next epoch from
    its first batch, unless `set_position` or `load_state_dict` said otherwise. An `IterableDataset` can only
    be read from its start: there, the batches before the position are loaded and dropped.

    Worker processes leave Ctrl-C and SIGTERM to the main process (a second SIGTERM ends them) and end when it
    is gone, however it went, within seconds.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Tensor]],
        *,
        batch_size: int,
        shuffle: bool,
        num_workers: int,
        pin_memory: bool,
        drop_last: bool,
        seed: int,
    ) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self._rows = None if isinstance(dataset, IterableDataset) else _EpochSampler(dataset, shuffle)
        # Of its own, lest a pass over the data moves the random numbers of the model.
        self._worker_seeds = torch.Generator()
        # Where the next pass begins, and what the newest pass has handed out.
        self._next = (0, 0)
        self._position = (0, 0)
        self._pass = 0
        super().__init__(  # pyright: ignore[reportUnknownMemberType] - torch leaves a parameter untyped
            dataset,
            batch_size=batch_size,
            sampler=self._rows,
            num_workers=num_workers,
            pin_memory=pin_memory,
            drop_last=drop_last,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
            worker_init_fn=_begin_worker if num_workers else None,
            generator=self._worker_seeds,
        )

    def set_position(self, epoch: int, batch: int) -> None:
        """Let the next pass be `epoch` from `batch` on, both counted from 0.

        Raises:
            DataError: A number is negative, or the epoch has fewer batches.
        """
        batches = None if self._rows is None else len(self)
        if epoch < 0 or batch < 0 or (batches is not None and batch > batches):
            raise DataError(
                f"There is no batch {batch} of epoch {epoch}: both begin at 0"
                + ("." if batches is None else f" and an epoch has {batches} batches.")
            )
        self._next = self._position = (epoch, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the batch that was handed out last, and what it holds for."""
        epoch, batch = self._position
        return {
            "epoch": epoch,
            "batch": batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "batch_size": self.batch_size,
            "dataset_fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state_dict` and take over its seed.

        Raises:
            DataError: The state is of another data set, order or batch size, or is not one at all.
        """
        if state.get("dataset_fingerprint") != self._fingerprint():
            raise DataError(
                "The saved position belongs to other data (text, tokenizer, row length or packing changed); "
                "train on the same data, or begin anew."
            )
        epoch, batch, seed = state.get("epoch"), state.get("batch"), state.get("seed")
        if not (isinstance(epoch, int) and isinstance(batch, int) and isinstance(seed, int)):
            raise DataError(f"The saved position has no whole epoch, batch and seed: {state!r:.200}")
        # At the start of an epoch these may change: nothing has been handed out of it.
        for name, now in (("batch_size", self.batch_size), ("shuffle", self.shuffle)):
            if batch and state.get(name) != now:
                raise DataError(
                    f"The saved position is in the middle of an epoch with {name}={state.get(name)}, "
                    f"but {name} is {now}; use the same."
                )
        self.set_position(epoch, batch)
        self.seed = seed

    def _fingerprint(self) -> str | None:
        fingerprint = getattr(self.dataset, "fingerprint", None)
        return str(cast("Callable[[], object]", fingerprint)()) if callable(fingerprint) else None

    # The base class promises its own iterator class, of which nothing but the iteration is public.
    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        epoch, first = self._next
        self._next, self._position = (epoch + 1, 0), (epoch, first)
        self._pass += 1
        self._worker_seeds.manual_seed(_epoch_seed(self.seed, epoch))
        if self._rows is not None:
            self._rows.start(self.seed, epoch, first * (self.batch_size or 1))
        with _starting_workers() if self.num_workers else nullcontext():
            before, batches = self._iterator, super().__iter__()
        if self.num_workers and batches is not before:
            # Before the queues are taken down, which they are first where all goes at once.
            Finalize(self, _end_workers, (batches,), exitpriority=100)
        return self._hand_out(batches, epoch, first, self._pass)

    def _hand_out(
        self, batches: Iterator[Any], epoch: int, first: int, this_pass: int
    ) -> Iterator[dict[str, Tensor]]:
        last = len(self) if self._rows is not None else None
        number = first if self._rows is not None else 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except (RuntimeError, OSError, EOFError) as error:
                # The last two are of a batch whose memory went with the worker.
                dead = _dead_workers(batches)
                if not dead:
                    raise
                self._iterator = None
                raise TrainingError(
                    f"Data worker process {dead[0].pid} ended with exit code {dead[0].exitcode} (-9 is often "
                    "the system out of memory); use fewer dataloader_num_workers, or 0."
                ) from error
            number += 1
            if number <= first:
                continue
            # Said before the batch is handed out: whoever holds it and asks is told the place behind it.
            if this_pass == self._pass:
                self._position = (epoch + 1, 0) if number == last else (epoch, number)
            yield batch
        if this_pass == self._pass:
            self._position = (epoch + 1, 0)


class _EpochSampler(Sampler[int]):
    """Row numbers of one epoch from a place on."""

    def __init__(self, dataset: Dataset[Any], shuffle: bool) -> None:
        self._dataset: Any = dataset
        self._shuffle = shuffle
        self._start = (0, 0, 0)

    def start(self, seed: int, epoch: int, row: int) -> None:
        self._start = (seed, epoch, row)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        # Workers fetch ahead: the place is fixed here, whatever `start` is told while they do.
        return self._numbers(*self._start)

    def _numbers(self, seed: int, epoch: int, row: int) -> Iterator[int]:
        if not self._shuffle:
            yield from range(row, len(self))
            return
        generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        for start in range(row, len(order), 4096):
            yield from cast("Any", order[start : start + 4096]).tolist()


def _epoch_seed(seed: int, epoch: int) -> int:
    """Mix the two, so that neighbouring seeds do not share epochs."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7], "little")


def _begin_worker(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which a terminal or a job queue sends to all processes, to the main one.

    End at once if that is gone: torch's own watch only sees a parent that goes later.
    """
    parent = multiprocessing.parent_process()
    # A fork server is the parent of what it forks.
    direct = multiprocessing.get_start_method() != "forkserver"
    if parent is not None and direct and os.getppid() != parent.pid:
        os._exit(1)
    # What was inherited is the main process's to finalise, and looking through it would copy its memory.
    gc.freeze()

    def let_the_next_one_end_it(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, let_the_next_one_end_it)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


@contextmanager
def _starting_workers() -> Generator[None]:
    """Hold signals back until a new worker has its own handlers, and keep torch's off this process.

    Torch would raise a dead worker's error in the middle of whatever the main thread does; without its
    handler the next batch does.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _end_workers(batches: Any) -> None:
    """End the workers of a loader that is gone, or of a process that is about to end.

    At its end `multiprocessing` would send them one SIGTERM, which they leave to the main process, and wait
    for ever.
    """
    batches._shutdown_workers()
    # That does nothing any more while Python ends.
    for worker in batches._workers:
        worker.kill()


def _dead_workers(batches: Any) -> list[BaseProcess]:
    workers: dict[int, BaseProcess] = {worker.sentinel: worker for worker in getattr(batches, "_workers", ())}
    while True:
        try:
            ended = [workers[cast("int", sentinel)] for sentinel in wait(list(workers), timeout=0.5)]
            for worker in ended:
                worker.join(0.5)
        except RuntimeError:
            # A loader of torch's own, used before, leaves a handler that raises once wherever it finds us.
            continue
        return ended


_COLUMNS = 32


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Stack rows and cut off what is padding at the end of all of them, up to a multiple of 32 columns.

    For each length that occurs the libraries below generate and keep code; so there are not too many.
    """
    batch = default_collate(rows)
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    columns = mask.ne(0).any(dim=0)
    # Rows of padding alone have none.
    columns[0] = True
    used = int(columns.nonzero()[-1]) + 1
    used += -used % _COLUMNS
    return {
        name: value[:, :used] if getattr(value, "shape", ())[:2] == mask.shape else value
        for name, value in batch.items()
    }
