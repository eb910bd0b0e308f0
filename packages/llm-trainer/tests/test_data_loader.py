import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from llm_trainer.data import _loader, create_dataloader
from llm_trainer.exceptions import ConfigurationError, DataError, TrainingError
from torch.utils.data import Dataset, IterableDataset


class Numbered(Dataset):
    """Rows that say which one they are, and note which were read."""

    def __init__(self, length=23, fingerprint="a"):
        self.length = length
        self.read = []
        self._fingerprint = fingerprint

    def fingerprint(self):
        return self._fingerprint

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        return {"input_ids": torch.full((4,), index), "place": torch.tensor(index)}


@pytest.fixture
def own_workers():
    """Gives the worker processes that began during the test: others' may still be about, of earlier tests."""
    before = set(multiprocessing.active_children())
    return lambda: list(set(multiprocessing.active_children()) - before)


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(11):
            yield {"input_ids": torch.full((4,), index), "place": torch.tensor(index)}


def places(batches):
    return [batch["place"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_position_gives_the_rest_of_that_epoch(workers, drop_last):
    def build():
        return create_dataloader(Numbered(), batch_size=5, num_workers=workers, drop_last=drop_last, seed=3)

    plain = build()
    epochs = [places(plain) for _ in range(3)]
    assert len(plain) == len(epochs[0]) == (4 if drop_last else 5)
    for epoch in epochs:
        rows = sorted(row for batch in epoch for row in batch)
        assert len(set(rows)) == len(rows)
        assert drop_last or rows == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    loader = build()
    for epoch, batch in ((2, 3), (0, 0), (1, 1), (1, len(plain)), (0, 4)):
        loader.set_position(epoch, batch)
        assert places(loader) == epochs[epoch][batch:]
    assert places(loader) == epochs[1]


def test_batches_before_the_position_are_not_read():
    dataset = Numbered()
    loader = create_dataloader(dataset, batch_size=5, seed=3)
    loader.set_position(7, 3)
    assert dataset.read == []
    rest = places(loader)
    assert dataset.read == [row for batch in rest for row in batch]
    assert len(dataset.read) == 23 - 15


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", range(1, 6))
def test_a_saved_position_is_behind_the_batch_in_hand_whatever_was_fetched_ahead(workers, taken):
    loader = create_dataloader(Numbered(), batch_size=5, num_workers=workers, seed=3)
    expected = places(loader) + places(loader)
    loader.set_position(0, 0)
    list(islice(loader, taken))
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (0, taken) if taken < 5 else (1, 0)
    # Left in the middle, a pass is over: the next one is the next epoch.
    assert places(loader) == expected[5:]
    resumed = create_dataloader(Numbered(), batch_size=5, num_workers=2 - workers, seed=99)
    resumed.load_state_dict(state)
    assert places(resumed) + (places(resumed) if taken < 5 else []) == expected[taken:]


def test_what_a_position_does_not_fit_is_refused():
    loader = create_dataloader(Numbered(), batch_size=5, seed=3)
    next(iter(loader))
    state = loader.state_dict()
    for epoch, batch in ((-1, 0), (0, -1), (0, 6)):
        with pytest.raises(DataError, match=rf"no batch {batch} of epoch {epoch}.* 5 batches"):
            loader.set_position(epoch, batch)
    for other in (Numbered(fingerprint="b"), [{"input_ids": torch.ones(4)}] * 23):
        with pytest.raises(DataError, match="other data"):
            create_dataloader(other, batch_size=5).load_state_dict(state)
    with pytest.raises(DataError, match=r"batch_size=5, but batch_size is 4"):
        create_dataloader(Numbered(), batch_size=4).load_state_dict(state)
    with pytest.raises(DataError, match=r"shuffle=True, but shuffle is False"):
        create_dataloader(Numbered(), batch_size=5, shuffle=False).load_state_dict(state)
    create_dataloader(Numbered(), batch_size=4).load_state_dict(state | {"batch": 0})
    with pytest.raises(DataError, match="no whole epoch"):
        loader.load_state_dict(state | {"batch": None})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be an integer of at least 1"),
        ({"batch_size": "4"}, "batch_size is '4'"),
        ({"num_workers": None}, "num_workers is None; it must be an integer of at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        create_dataloader(Numbered(), **settings)


def test_without_shuffling_the_order_is_the_data_sets():
    loader = create_dataloader(Numbered(7), batch_size=3, shuffle=False)
    assert places(loader) == places(loader) == [[0, 1, 2], [3, 4, 5], [6]]
    loader.set_position(5, 2)
    assert places(loader) == [[6]]


def test_seeds_come_from_torch_once_and_passes_leave_its_generator_alone():
    def epochs(seed):
        torch.manual_seed(seed)
        loader = create_dataloader(Numbered(), batch_size=5)
        before = torch.get_rng_state()
        result = [places(loader) for _ in range(2)]
        assert torch.equal(before, torch.get_rng_state())
        return result

    assert epochs(1) == epochs(1)
    assert epochs(1)[0] != epochs(2)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_begin_behind_what_was_handed_out(workers):
    loader = create_dataloader(Stream(), batch_size=3, num_workers=workers)
    whole = places(loader)
    assert [row for batch in whole for row in batch] == list(range(11))
    list(islice(loader, 2))
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 2)
    loader.load_state_dict(state)
    assert places(loader) == whole[2:]
    assert loader.state_dict()["epoch"] == 2
    with pytest.raises(TypeError):
        len(loader)


def test_a_killed_worker_is_named_and_the_next_pass_has_new_ones(own_workers):
    loader = create_dataloader(Numbered(400), batch_size=2, num_workers=2, seed=1)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    assert signal.getsignal(signal.SIGCHLD) is before
    next(batches)
    victim = own_workers()[0]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match=rf"process {victim.pid} ended with exit code -9"):
        list(batches)
    loader.set_position(0, 199)
    assert len(places(loader)) == 1


def test_a_killed_worker_is_named_also_where_torchs_handler_was_left(monkeypatch, request, own_workers):
    """The handler raises once for each process that ends, wherever the main thread is."""
    waits = []

    def interrupted(*given, **named):
        waits.append(1)
        if len(waits) == 1:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return multiprocessing.connection.wait(*given, **named)

    # That a loader of torch's own may have left in an earlier test, and that would interrupt once more.
    request.addfinalizer(partial(signal.signal, signal.SIGCHLD, signal.getsignal(signal.SIGCHLD)))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(_loader, "wait", interrupted)
    batches = iter(create_dataloader(Numbered(400), batch_size=2, num_workers=2, seed=1))
    next(batches)
    victim = own_workers()[0]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match=rf"process {victim.pid} ended with exit code -9"):
        list(batches)
    assert len(waits) == 2


def test_errors_of_a_data_set_pass_unchanged():
    class Broken(Numbered):
        def __getitem__(self, index):
            raise RuntimeError("row is broken")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="row is broken") as caught:
            next(iter(create_dataloader(Broken(), num_workers=workers)))
        assert not isinstance(caught.value, TrainingError)


def test_workers_leave_signals_to_the_main_process(own_workers):
    loader = create_dataloader(Numbered(400), batch_size=2, num_workers=2, seed=1)
    expected = places(loader)
    loader.set_position(0, 0)
    batches = iter(loader)
    got = [next(batches)]
    for worker in own_workers():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert places([*got, *batches]) == expected


class Finalised(torch.utils.data.Dataset):
    """Rows that say in which process inherited garbage was finalised."""

    def __init__(self):
        self.processes = multiprocessing.Array("q", 2)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        gc.collect()
        return {"input_ids": torch.zeros(2)}


def test_a_worker_leaves_inherited_garbage_alone():
    rows = Finalised()

    class Garbage:
        def __del__(self):
            rows.processes[int(multiprocessing.parent_process() is not None)] += 1

    gc.collect()
    gc.disable()
    try:
        cycle = [Garbage()]
        cycle.append(cycle)
        del cycle
        next(iter(create_dataloader(rows, batch_size=1, num_workers=1)))
        gc.collect()
    finally:
        gc.enable()
    assert list(rows.processes) == [1, 0]


def test_workers_end_with_a_loader_that_the_collector_finds(own_workers):
    loader = create_dataloader(Numbered(400), batch_size=2, num_workers=2, seed=1)
    next(iter(loader))
    loader.itself = loader
    assert len(own_workers()) == 2
    del loader
    start = time.monotonic()
    gc.collect()
    assert own_workers() == []
    # Torch would wait for 5 s for each, whose queue is gone before it is told to end.
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("place", ["main", "child"])
@pytest.mark.parametrize("torchs_handler", [False, True])
def test_a_process_ends_whose_loader_still_has_workers(place, torchs_handler):
    program = f"""
        import multiprocessing, torch
        from llm_trainer.data import create_dataloader

        def work():
            global batches, others
            rows = [{{"input_ids": torch.ones(4)}}] * 1000
            if {torchs_handler}:
                others = iter(torch.utils.data.DataLoader(rows, num_workers=1))
                next(others)
            batches = iter(create_dataloader(rows, batch_size=1, num_workers=2))
            next(batches)
            print("done", flush=True)

        if {place == "main"}:
            work()
        else:
            child = multiprocessing.get_context("fork").Process(target=work)
            child.start()
            child.join()
            assert child.exitcode == 0
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_workers_end_after_their_parent_was_killed():
    program = """
        import multiprocessing, torch
        from llm_trainer.data import create_dataloader
        rows = [{"input_ids": torch.ones(4)}] * 1000
        batches = iter(create_dataloader(rows, batch_size=1, num_workers=2))
        next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        while True:
            next(batches, None)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as parent:
        workers = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    end = time.monotonic() + 30
    while alive := [pid for pid in workers if running(pid)]:
        assert time.monotonic() < end, f"{alive} outlived their parent"
        time.sleep(0.2)


def test_a_worker_that_begins_after_its_parent_was_killed_ends(tmp_path):
    program = f"""
        import multiprocessing, os, pathlib, signal, time
        from llm_trainer.data import _loader

        def work():
            while os.getppid() == parent:
                time.sleep(0.01)
            _loader._begin_worker(0)
            pathlib.Path({str(tmp_path / "went on")!r}).touch()

        parent = os.getpid()
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        print(worker.pid, flush=True)
        os.kill(parent, signal.SIGKILL)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, check=False
    )
    worker = int(ended.stdout)
    end = time.monotonic() + 30
    while running(worker):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not (tmp_path / "went on").exists()


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
