import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hamerspace.exceptions import WorkerError
from hamerspace.measure.jobs import Jobs
from hamerspace.measure.worker import JobError, Worker


def call(worker: Worker, function: object, **named: float) -> object:
    """Run a function in a worker, by the way that a backend's own code runs."""
    return worker.call("evaluate", function, "numpy", **named)


@pytest.fixture
def opened(tmp_path: Path) -> Worker:
    import torch
    from hamerspace.models.info import ModelInfo, TensorSpec
    from hamerspace.models.source import ModelSource
    from hamerspace.runtimes.base import RunOptions

    info = ModelInfo(
        framework="pytorch",
        name="m",
        inputs=(TensorSpec(name="input", dtype="float32", shape=(1, 2)),),
        outputs=(TensorSpec(name="output", dtype="float32", shape=(1, 1)),),
    )
    worker = Worker(tmp_path / "log.txt", time_limit_s=120, memory_limit_mb=3000)
    source = ModelSource(info=info, model=torch.nn.Linear(2, 1)).stage(tmp_path)
    worker.call("open_original", source, RunOptions(threads=1))
    yield worker
    worker.close()


def test_exceptions_come_back_and_the_worker_goes_on(opened: Worker) -> None:
    def fails(model: object) -> float:
        raise KeyError("no such layer")

    with pytest.raises(JobError, match="no such layer") as caught:
        call(opened, fails)
    assert caught.value.kind == "KeyError"
    assert "fails" in caught.value.trace
    assert call(opened, lambda model: 3) == 3.0


def test_a_crash_is_a_failure_with_its_signal(opened: Worker) -> None:
    def crash(model: object) -> float:
        print("about to fall", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
        return 0.0

    with pytest.raises(WorkerError, match=r"SIGSEGV.*about to fall"):
        call(opened, crash)


def test_a_hang_is_ended_with_its_children(opened: Worker, tmp_path: Path) -> None:
    told = tmp_path / "child"

    def hang(model: object) -> float:
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        Path(told).write_text(str(child.pid))
        time.sleep(600)
        return 0.0

    start = time.monotonic()
    with pytest.raises(WorkerError, match="longer than 4 s"):
        opened.call("evaluate", hang, "numpy", time_limit_s=4)
    assert time.monotonic() - start < 60
    assert not _alive(int(told.read_text()))


def test_too_much_memory_is_ended(opened: Worker) -> None:
    def eat(model: object) -> float:
        held = [b"x" * (64 << 20) for _ in range(100)]
        time.sleep(60)
        return float(len(held))

    with pytest.raises(WorkerError, match="more than the limit of 3000 MB"):
        call(opened, eat)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom hamerspace.measure.worker import Worker\n"
        f"worker = Worker(Path({str(tmp_path / 'log.txt')!r}))\n"
        "print(worker._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    time.sleep(3)  # the death signal is set once the worker has begun
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(pid)


def test_what_a_process_puts_aside_goes_with_it(opened: Worker) -> None:
    def put_aside(model: object) -> float:
        import tempfile

        Path(tempfile.mkdtemp()).joinpath("left").write_text("behind")
        return 0.0

    room = opened._room.path
    call(opened, put_aside)
    assert list(room.glob("*/left"))
    opened.close()
    assert not room.exists()


def test_a_job_that_is_none_is_told(opened: Worker) -> None:
    with pytest.raises(JobError, match="dance"):
        opened.call("dance")


def test_jobs_are_what_the_worker_offers() -> None:
    names = {
        "build",
        "describe",
        "evaluate",
        "open_artifact",
        "open_original",
        "peak_mb",
        "prepare",
        "run",
        "time_round",
    }
    assert {name for name in vars(Jobs) if not name.startswith("_")} == names


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
