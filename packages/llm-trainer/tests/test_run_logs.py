import csv
import importlib
import json
import math
import resource
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.exceptions import ConfigurationError, FormatError
from llm_trainer.models import TransformerLM
from llm_trainer.training import HistoryRecord, Trainer
from llm_trainer.training._logs._tables import COLUMNS
from llm_trainer.training.loggers import (
    LOGGERS,
    MissingLoggerError,
    RunLogger,
    create_loggers,
    values_of,
)

RUN = {"model": {"d_model": 32}, "path": Path("a/b"), "odd": math.nan}


def make(name: str, folder: Path) -> RunLogger:
    (logger,) = create_loggers([name], folder)
    return logger


def figures(step: int) -> dict[str, float]:
    # 0.1 * step has no short decimal form, so a rounded number would show.
    return {"train/loss": 5 - 0.1 * step, "train/tokens": 10**9 + step}


def write_run(logger: RunLogger, steps: range, resumed_from_step: int | None = None) -> None:
    logger.start(RUN, resumed_from_step=resumed_from_step)
    for step in steps:
        logger.log(step, figures(step) | ({"eval/loss": 4.0} if step % 2 == 0 else {}))
    logger.close()


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(folder: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(name)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture
def read_events(monkeypatch):
    # TensorBoard's reader would load TensorFlow, where it is installed, to read a file.
    monkeypatch.setitem(
        sys.modules, "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf")
    )  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder: Path) -> EventAccumulator:
        accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        return accumulator.Reload()

    return read


def scalars(accumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_csv_has_one_header_and_the_exact_numbers(tmp_path):
    write_run(make("csv", tmp_path), range(1, 4))
    rows = read_csv(tmp_path)
    assert list(rows[0]) == ["step", *COLUMNS]
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert [float(row["train/loss"]) for row in rows] == [5 - 0.1 * step for step in (1, 2, 3)]
    assert [row["eval/loss"] for row in rows] == ["", "4.0", ""]


def test_csv_gets_a_column_for_a_new_name(tmp_path):
    logger = make("csv", tmp_path)
    logger.start(RUN)
    logger.log(1, figures(1))
    logger.log(2, {"my, own": 7.5})
    logger.log(3, figures(3))
    logger.close()
    rows = read_csv(tmp_path)
    assert list(rows[0]) == ["step", *COLUMNS, "my, own"]
    assert [row["my, own"] for row in rows] == ["", "7.5", ""]
    assert [row["train/loss"] for row in rows] == ["4.9", "", "4.7"]


def test_jsonl_says_its_version_and_run(tmp_path):
    write_run(make("jsonl", tmp_path), range(1, 4))
    header, *records = read_jsonl(tmp_path)
    assert header == {
        "format": "llm-trainer-metrics",
        "version": 1,
        "run": {"model": {"d_model": 32}, "path": "a/b", "odd": None},
    }
    assert records[1] == {"step": 2, "train/loss": 5 - 0.1 * 2, "train/tokens": 10**9 + 2, "eval/loss": 4.0}


def test_tensorboard_reads_what_was_written(tmp_path, read_events):
    write_run(make("tensorboard", tmp_path), range(1, 4))
    events = read_events(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/loss", "train/tokens"]
    assert scalars(events, "train/loss") == [
        (step, pytest.approx(5 - 0.1 * step, rel=1e-6)) for step in (1, 2, 3)
    ]
    assert scalars(events, "eval/loss") == [(2, 4.0)]
    (text,) = events.Tensors("run")
    assert '"d_model": 32' in text.tensor_proto.string_val[0].decode()


def test_tensorboard_does_not_load_tensorflow(tmp_path):
    code = """
        import sys
        from llm_trainer.training.loggers import create_loggers
        (logger,) = create_loggers(["tensorboard"], sys.argv[1])
        logger.start({})
        logger.log(1, {"a": 1.0})
        logger.close()
        print("tensorflow" in sys.modules)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_not_a_number_in_each_log(tmp_path, read_events):
    odd = {"a": math.nan, "b": math.inf, "c": -math.inf}
    loggers = create_loggers(["csv", "jsonl", "tensorboard"], tmp_path)
    for logger in loggers:
        logger.start({})
        logger.log(1, odd)
        logger.close()
    row = read_csv(tmp_path)[0]
    assert math.isnan(float(row["a"]))
    assert (float(row["b"]), float(row["c"])) == (math.inf, -math.inf)
    assert read_jsonl(tmp_path)[1] == {"step": 1, "a": None, "b": None, "c": None}
    events = read_events(tmp_path)
    assert math.isnan(events.Scalars("a")[0].value)
    assert events.Scalars("b")[0].value == math.inf


@pytest.mark.parametrize("name", ["csv", "jsonl"])
def test_a_resumed_table_equals_an_uninterrupted_one(tmp_path, name):
    file = f"metrics.{name}"
    write_run(make(name, tmp_path / "whole"), range(1, 9))
    # Killed after step 6, the last checkpoint being of step 4.
    write_run(make(name, tmp_path / "cut"), range(1, 7))
    write_run(make(name, tmp_path / "cut"), range(5, 9), resumed_from_step=4)
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    # A new beginning keeps nothing.
    write_run(make(name, tmp_path / "cut"), range(1, 9))
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [file]


@pytest.mark.parametrize("name", ["csv", "jsonl"])
def test_a_table_cut_anywhere_resumes(tmp_path, name):
    path = tmp_path / f"metrics.{name}"
    write_run(make(name, tmp_path), range(1, 4))
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        present = max(0, sum(end <= cut for end in ends) - 1)
        write_run(make(name, tmp_path), range(present + 1, 4), resumed_from_step=3)
        assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("csv", lambda text: text.replace("\n2,", "\nx,")),
        ("csv", lambda text: text.replace("\n2,", '\n"2,')),
        ("jsonl", lambda text: text.replace('"step": 2', '"step": "2')),
        ("jsonl", lambda text: text.replace('"step": 2', '"stop": 2')),
        ("jsonl", lambda text: text.replace('{"step": 2', "[" * 100_000)),
        ("jsonl", lambda text: text.replace('"eval/loss": 4.0', '"eval/loss": "\ufffd"')),
    ],
)
def test_what_cannot_be_read_is_kept_aside(tmp_path, name, damage, caplog):
    path = tmp_path / f"metrics.{name}"
    write_run(make(name, tmp_path), range(1, 4))
    damaged = damage(path.read_text())
    path.write_text(damaged)
    write_run(make(name, tmp_path), range(4, 6), resumed_from_step=3)
    steps = (
        [int(row["step"]) for row in read_csv(tmp_path)]
        if name == "csv"
        else [record["step"] for record in read_jsonl(tmp_path)[1:]]
    )
    assert steps[0] == 1
    assert steps[-2:] == [4, 5]
    assert 2 not in steps
    assert path.with_name(path.name + ".damaged").read_text() == damaged
    assert "cannot be read" in caplog.text


def test_a_newer_format_is_refused(tmp_path):
    write_run(make("jsonl", tmp_path), range(1, 2))
    path = tmp_path / "metrics.jsonl"
    newer = path.read_text().replace('"version": 1', '"version": 2')
    path.write_text(newer)
    with pytest.raises(FormatError, match="upgrade"):
        make("jsonl", tmp_path).start({}, resumed_from_step=1)
    assert path.read_text() == newer


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path, read_events):
    write_run(make("tensorboard", tmp_path), range(1, 7))
    logger = make("tensorboard", tmp_path)
    logger.start(RUN, resumed_from_step=4)
    # It ends at step 5, so step 6 of the first start must be gone.
    logger.log(5, {"train/loss": -1.0})
    logger.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found = scalars(read_events(tmp_path), "train/loss")
    assert [step for step, _ in found] == [1, 2, 3, 4, 5]
    assert found[-1][1] == -1.0
    write_run(make("tensorboard", tmp_path), range(1, 3))
    assert [step for step, _ in scalars(read_events(tmp_path), "train/loss")] == [1, 2]


def test_a_torn_event_does_not_hide_the_resumed_ones(tmp_path, read_events):
    write_run(make("tensorboard", tmp_path), range(1, 4))
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    write_run(make("tensorboard", tmp_path), range(3, 5), resumed_from_step=2)
    assert [step for step, _ in scalars(read_events(tmp_path), "train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["csv", "jsonl", "tensorboard"])
def test_a_full_disk_is_said_once_and_leaves_whole_records(tmp_path, name, caplog, read_events):
    logger = make(name, tmp_path)
    logger.start(RUN)
    logger.log(1, figures(1))
    (file,) = (path for path in tmp_path.rglob("*metrics*" if name != "tensorboard" else "*tfevents*"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The limit lets a few bytes of the next record through, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 7, before[1]))
    try:
        logger.log(2, figures(2))
        logger.log(3, figures(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    logger.log(4, figures(4))
    logger.close()
    assert caplog.text.count(f"The {name} log cannot be written at step 2") == 1
    assert "at step 3" not in caplog.text
    assert f"The {name} log lacks 2 records" in caplog.text
    steps = {
        "csv": lambda: [int(row["step"]) for row in read_csv(tmp_path)],
        "jsonl": lambda: [record["step"] for record in read_jsonl(tmp_path)[1:]],
        "tensorboard": lambda: [step for step, _ in scalars(read_events(tmp_path), "train/loss")],
    }[name]()
    assert steps == [1, 4]


def test_a_logger_of_ones_own_cannot_stop_training(caplog):
    class Broken(RunLogger):
        name = "broken"

        def _start(self, run_info, resumed_from_step):
            pass

        def _log(self, step, values):
            raise RuntimeError("no")

        def _close(self):
            raise RuntimeError("never")

    logger = Broken()
    logger.start({})
    for step in range(3):
        logger.log(step, {})
    logger.close()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "The broken log cannot be written at step 0",
        "The broken log could not be closed",
        "The broken log lacks 3 records.",
    ]


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "checks")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    ids = []
    for resumed, steps in ((None, range(1, 4)), (2, range(3, 5)), (None, range(1, 2))):
        if resumed is not None:
            # A run's file is named by the second, which no real resume shares with its run.
            time.sleep(1)
        (logger,) = create_loggers(["wandb"], tmp_path, run_name="a name")
        write_run(logger, steps, resumed)
        ids.append(json.loads((tmp_path / "wandb_run.json").read_text())["id"])
    assert ids[0] == ids[1] != ids[2]
    # Its service writes the end of a file shortly after the run is finished.
    until = time.monotonic() + 30
    lengths: list[int] = []
    while lengths != [1, 2, 3] and time.monotonic() < until:
        time.sleep(0.05)
        records = [read_wandb(path) for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
        lengths = sorted(len(history) for _, history in records)
    assert lengths == [1, 2, 3]
    first = next(entry for entry in records if len(entry[1]) == 3)
    assert (first[0].run_id, first[0].project, first[0].display_name) == (ids[0], "checks", "a name")
    assert [entry["step"] for entry in first[1]] == [1, 2, 3]
    assert [entry["train/loss"] for entry in first[1]] == [5 - 0.1 * step for step in (1, 2, 3)]
    assert {entry[0].run_id for entry in records} == set(ids)


def read_wandb(path: Path):
    """The run and the history of an offline run's file: messages in the record format of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, position, message = path.read_bytes(), 7, b""
    run, history = None, []
    while position < len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, part = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part not in (1, 4):  # whole, or the last part
            continue
        record = wandb_internal_pb2.Record.FromString(message)
        message = b""
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return run, history


def test_names(tmp_path):
    assert create_loggers([], tmp_path) == create_loggers(["none"], tmp_path) == []
    assert create_loggers("none", tmp_path) == []
    assert [logger.name for logger in create_loggers(["jsonl", "csv", "jsonl"], tmp_path)] == ["jsonl", "csv"]
    with pytest.raises(ConfigurationError, match="'mlflow'") as caught:
        create_loggers(["csv", "mlflow"], tmp_path)
    assert all(f'"{name}"' in str(caught.value) for name in LOGGERS)
    with pytest.raises(ConfigurationError, match="alone"):
        create_loggers(["csv", "none"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_said_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLoggerError, match=f"pip install {name}") as caught:
        create_loggers(["csv", name], tmp_path)
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, ConfigurationError)


@pytest.fixture
def make_trainer(tokenizer):
    model = TransformerLM(ModelConfig(vocab_size=320, d_model=8, n_heads=1, n_layers=1, d_ff=8))

    def make(**settings):
        config = TrainingConfig(**({"checkpoint_dir": None, "use_amp": False} | settings))
        return Trainer(model, tokenizer, config, device="cpu", show_progress=False)

    return make


@pytest.mark.parametrize("folder", [True, False])
def test_a_trainer_misses_a_library_when_it_is_made(make_trainer, tmp_path, monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = {"output_dir": str(tmp_path)} if folder else {}
    with pytest.raises(MissingLoggerError, match="pip install wandb"):
        make_trainer(report_to=["wandb"], **settings)


def test_a_log_without_a_folder(make_trainer, monkeypatch):
    for names in (["csv"], ["tensorboard", "jsonl"]):
        with pytest.raises(ConfigurationError, match="output_dir or checkpoint_dir"):
            make_trainer(report_to=names)
    # The default is not missed, whether its library is there or not.
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert make_trainer()._loggers == []


def test_wandb_needs_no_folder(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    # Its service keeps the folder in which a process began to use it.
    importlib.import_module("wandb").teardown()
    (logger,) = make_trainer(report_to=["wandb"])._loggers
    write_run(logger, range(1, 3))
    write_run(logger, range(3, 4), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["wandb"]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


@pytest.mark.parametrize("name", ["csv", "jsonl", "tensorboard", "wandb"])
def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path, name):
    (tmp_path / "file").touch()
    logger = make(name, tmp_path / "file" / "run")
    with pytest.raises(OSError, match="file"):
        logger.start({})
    logger.close()


def test_names_of_the_figures():
    record = HistoryRecord(
        step=7,
        tokens=100,
        wall_s=2.0,
        tokens_per_s=50.0,
        train_loss=2.5,
        eval_loss=math.log(3),
        lr=0.1,
        grad_norm=None,
        skipped_steps=1,
    )
    expected = {
        "train/tokens": 100,
        "train/wall_s": 2.0,
        "train/tokens_per_s": 50.0,
        "train/loss": 2.5,
        "eval/loss": math.log(3),
        "eval/perplexity": pytest.approx(3),
        "train/lr": 0.1,
        "train/skipped_steps": 1,
    }
    found = values_of(record)
    assert {name: found[name] for name in expected} == expected
    assert "train/grad_norm" not in found
    more = {"step": 7, "rss_mb": 512, "mfu": 0.4, "eval_loss": 800.0, "note": "text", "done": True}
    assert values_of(more) == {
        "memory/rss_mb": 512.0,
        "train/mfu": 0.4,
        "eval/loss": 800.0,
        "eval/perplexity": math.inf,
    }


def test_each_record_is_on_disk_at_once(tmp_path):
    """What a killed process had logged is there."""
    code = (
        "import os, sys; from llm_trainer.training.loggers import create_loggers\n"
        "loggers = create_loggers(['csv', 'jsonl', 'tensorboard'], sys.argv[1])\n"
        "for logger in loggers: logger.start({}); logger.log(1, {'train/loss': 2.5})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert read_csv(tmp_path)[0]["train/loss"] == "2.5"
    assert read_jsonl(tmp_path)[1] == {"step": 1, "train/loss": 2.5}
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
