"""A run that was ended somewhere and resumed is, to the bit, the run that was not."""

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from llm_trainer.config import DataConfig, ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.exceptions import (
    CheckpointError,
    ConfigurationError,
    DataError,
    FormatError,
    ModelConfigurationError,
    TrainingError,
)
from llm_trainer.models import TransformerLM
from llm_trainer.models._blocks import Block
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import Callback, Trainer, _checkpoint_folder, _trainer
from llm_trainer.training._lock import locked
from torch.utils.data import Dataset, IterableDataset

STEPS = 14


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing takes longer than these runs do."""
    if request.function is not test_what_a_runs_folder_holds:
        monkeypatch.setattr(_trainer, "save_curves", lambda *_: None)


class At(Callback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.action()


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def rows(tokenizer, corpus):
    return LanguageModelingDataset(corpus[:16], tokenizer, max_length=24)


@pytest.fixture
def make(tokenizer, corpus, rows, tmp_path):
    held_out = LanguageModelingDataset(corpus[16:20], tokenizer, max_length=24)

    def make_trainer(
        folder="run", *, callbacks=None, train=rows, evaluation=held_out, model=None, seed=1, **settings
    ):
        torch.manual_seed(seed)
        defaults = {
            "vocab_size": tokenizer.vocab_size,
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "d_ff": 64,
            "max_seq_len": 32,
            "dropout": 0.2,
            "attention_dropout": 0.1,
        }
        config = TrainingConfig.from_dict(
            {
                "batch_size": 4,
                "learning_rate": 1e-2,
                "max_steps": STEPS,
                "warmup_steps": 3,
                "gradient_accumulation_steps": 2,
                "logging_steps": 2,
                "eval_steps": 4,
                "save_steps": 5,
                "amp_dtype": "bfloat16",
                "checkpoint_dir": tmp_path / folder,
                "report_to": ["csv"],
            }
            | settings
        )
        return Trainer(
            TransformerLM(ModelConfig(**(defaults | (model or {})))),
            tokenizer,
            config,
            train,
            evaluation,
            callbacks or [],
            device="cpu",
            show_progress=False,
        )

    return make_trainer


def curve(trainer):
    return [
        (r.step, r.tokens, r.train_loss, r.eval_loss, r.lr, r.grad_norm, r.skipped_steps, r.epoch)
        for r in trainer.history
    ]


def assert_equal_runs(one, other):
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert curve(one) == curve(other)
    assert one.step == other.step


SETTINGS = {
    "adamw": {},
    "muon, workers": {"optimizer": "muon", "dataloader_num_workers": 2},
    "sgd, epochs": {"optimizer": "sgd", "max_steps": None, "num_epochs": 5, "eval_strategy": "epoch"},
    "checkpointing, no accumulation": {"gradient_accumulation_steps": 1, "lr_scheduler": "linear"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_sigterm_and_resume_change_no_bit(make, settings):
    model = {"gradient_checkpointing": True} if "lr_scheduler" in settings else {}
    whole = make("whole", callbacks=[At(-1, terminate)], model=model, seed=0, **settings)
    whole.train()
    assert whole.step >= STEPS
    # Ended twice: in the first and in a later epoch, between two periodic checkpoints. What is resumed was
    # built with other weights.
    for seed, step in enumerate((3, 12)):
        part = make(callbacks=[At(step, terminate)], seed=seed, model=model, **settings)
        with pytest.raises(SystemExit) as stopped:
            part.train(None if seed == 0 else "latest")
        assert stopped.value.code == 143
        assert part.step == step
    resumed = make(callbacks=[At(-1, terminate)], seed=9, model=model, **settings)
    resumed.train("latest")
    assert_equal_runs(whole, resumed)


class Signalling(Dataset):
    """Rows, one of which sends a signal on its n-th visit."""

    def __init__(self, rows, visit, action=terminate):
        self.rows, self.visit, self.action, self.visits = rows, visit, action, 0
        self.max_length = rows.max_length

    def fingerprint(self):
        return self.rows.fingerprint()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.visits += 1
        if self.visits == self.visit:
            self.action()
        return self.rows[index]


@pytest.mark.parametrize("moment", ["loading", "evaluating", "recording", "saving", "first step"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_anywhere_saves_at_once(make, rows, tokenizer, corpus, moment, number, monkeypatch):
    def send():
        signal.raise_signal(number)

    held_out = LanguageModelingDataset(corpus[16:20], tokenizer, max_length=24)
    whole = make("whole")
    whole.train()
    part = make()
    expected = 8
    match moment:
        case "loading":
            part.train_dataset = Signalling(rows, 67, send)
            expected = None
        case "evaluating":
            # The evaluation after step 8, the second one, is cut short in its second row.
            part.eval_dataset = Signalling(held_out, len(held_out) + 2, send)
        case "recording":
            (logger,) = part._loggers
            log = logger.log
            monkeypatch.setattr(logger, "log", lambda step, values: (log(step, values), step == 8 and send()))
        case "saving":
            verify = _checkpoint_folder.verify_checkpoint

            def verify_and_send(path):
                if part.step == 10:
                    monkeypatch.setattr(_checkpoint_folder, "verify_checkpoint", verify)
                    send()
                return verify(path)

            monkeypatch.setattr(_checkpoint_folder, "verify_checkpoint", verify_and_send)
            expected = 10
        case _:
            part.train_dataset = Signalling(rows, 1, send)
            expected = 0
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as ended:
        part.train()
    if number == signal.SIGTERM:
        assert ended.value.code == 143
    assert expected in {None, part.step}
    newest, passed = _checkpoint_folder.newest_checkpoint(part.run_folder)
    assert (newest.step, passed) == (part.step, [])
    monkeypatch.undo()
    resumed = make(seed=5)
    resumed.train("latest")
    assert_equal_runs(whole, resumed)
    # The log of the run has each step once, as if nothing had been.
    logs = [(trainer.run_folder / "metrics.csv").read_text().splitlines() for trainer in (whole, resumed)]
    steps = [[line.split(",")[0] for line in log] for log in logs]
    assert steps[0] == steps[1]


class Within(Callback):
    """Sends SIGTERM in the midst of the seventh step."""

    def __init__(self, moment):
        self.moment = moment
        self.sent = False

    def on_train_begin(self, trainer):
        def send(*_):
            if trainer.step == 6 and trainer.model.training and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)

        match self.moment:
            case "forward":
                trainer.model.blocks[0].register_forward_hook(send)
            case "backward":
                trainer.model.blocks[1].attention.register_full_backward_hook(send)
            case "optimizer.step":
                # When Muon has changed its matrices, and AdamW has the rest yet to change.
                trainer._loop.optimizer.parts["adamw"].register_step_pre_hook(send)


@pytest.mark.parametrize("moment", ["forward", "backward", "optimizer.step"])
def test_a_signal_within_a_step_saves_when_it_is_done(make, moment):
    whole = make("whole", callbacks=[Within(None)], optimizer="muon")
    whole.train()
    part = make(callbacks=[Within(moment)], optimizer="muon")
    with pytest.raises(SystemExit) as ended:
        part.train()
    assert (ended.value.code, part.callbacks[0].sent, part.step) == (143, True, 7)
    newest, passed = _checkpoint_folder.newest_checkpoint(part.run_folder)
    assert (newest.step, passed) == (7, [])
    resumed = make(callbacks=[Within(None)], optimizer="muon", seed=5)
    resumed.train("latest")
    assert_equal_runs(whole, resumed)


class Slow(Dataset):
    """Rows of which one never comes, in a worker process."""

    max_length = 24

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 3:
            time.sleep(100)
        return self.rows[index]


def test_a_signal_while_a_worker_is_waited_for_ends_the_waiting(make, rows):
    trainer = make(train=Slow(rows), dataloader_num_workers=2, seed=0)
    started = time.monotonic()
    timer = threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit):
        trainer.train()
    timer.join()
    assert time.monotonic() - started < 80
    newest, _ = _checkpoint_folder.newest_checkpoint(trainer.run_folder)
    assert newest.step == trainer.step


def test_a_signal_while_blocks_are_compiled_ends_the_compiling(make, monkeypatch):
    whole = make("whole", seed=0)
    whole.train()

    def compile_for_long(model):
        def run_block(*arguments):
            terminate()
            time.sleep(100)
            return Block.forward(*arguments)

        model.run_block = run_block

    monkeypatch.setattr(_trainer, "compile_blocks_", compile_for_long)
    part = make(compile_model=True, seed=0)
    started = time.monotonic()
    with pytest.raises(SystemExit):
        part.train()
    assert time.monotonic() - started < 80
    newest, _ = _checkpoint_folder.newest_checkpoint(part.run_folder)
    assert (newest.step, part.step) == (0, 0)
    resumed = make(seed=4)
    resumed.train("latest")
    assert_equal_runs(whole, resumed)


def test_a_second_signal_ends_at_once_and_nothing_is_broken(make):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = make(callbacks=[At(7, twice)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    newest, _ = _checkpoint_folder.newest_checkpoint(trainer.run_folder)
    assert newest.step == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_latest_without_any_begins_anew_and_says_so(make, caplog):
    trainer = make(resume_from_checkpoint="latest")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "no whole checkpoint" in caplog.text
    assert trainer.step == STEPS


def test_a_damaged_newest_is_passed_over_and_named(make, caplog):
    whole = make()
    whole.train()
    newest = whole.run_folder / f"checkpoint-{STEPS}"
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(data)
    resumed = make(seed=4)
    with caplog.at_level(logging.INFO, logger="llm_trainer"):
        resumed.train("latest")
    assert f"{weights} was altered" in caplog.text
    assert "checkpoint-10" in caplog.text
    assert_equal_runs(whole, resumed)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was altered"):
        make().train(_damage(newest))


@pytest.mark.parametrize("damage", ["truncated", "one bit", "deleted"])
def test_damage_to_any_file_of_a_checkpoint_is_found_named_and_fallen_back_from(make, damage, tmp_path):
    trainer = make()
    trainer.train()
    whole = trainer.run_folder / f"checkpoint-{STEPS}"
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) >= 6
    for name in names:
        path = whole / name
        data = path.read_bytes()
        match damage:
            case "truncated":
                path.write_bytes(data[:-1])
            case "one bit":
                path.write_bytes(data[:100] + bytes([data[100] ^ 16]) + data[101:])
            case _:
                path.unlink()
        newest, passed = _checkpoint_folder.newest_checkpoint(trainer.run_folder)
        assert newest.step == 10
        assert len(passed) == 1
        assert str(path) in passed[0]
        path.write_bytes(data)
    assert _checkpoint_folder.newest_checkpoint(trainer.run_folder)[0].step == STEPS


def _damage(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-6] ^= 4
    path.write_bytes(data)
    return folder


def test_checkpoints_are_kept_up_to_the_limit_and_load_as_models(make, rows):
    trainer = make(save_steps=2, save_total_limit=3)
    trainer.train()
    folders = sorted(path.name for path in trainer.run_folder.glob("checkpoint-*"))
    assert folders == ["checkpoint-10", "checkpoint-12", "checkpoint-14"]
    loaded = Trainer.from_pretrained(trainer.run_folder / "checkpoint-14", device="cpu")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])


def test_a_finished_run_has_nothing_left(make, caplog):
    whole = make()
    whole.train()
    again = make(seed=3)
    with caplog.at_level(logging.WARNING):
        again.train("latest")
    assert "Nothing is left to train" in caplog.text
    assert_equal_runs(whole, again)


def test_more_steps_go_on_from_the_end(make):
    make().train()
    longer = make(max_steps=STEPS + 4, lr_scheduler="constant", seed=3)
    longer.train("latest")
    assert longer.step == STEPS + 4
    assert longer.history.records[-1].lr == pytest.approx(1e-2)


def test_a_second_run_in_the_same_folder_loses_nothing_of_the_first(make):
    first = make(save_total_limit=1)
    first.train()
    second = make(save_total_limit=1, seed=8)
    second.train()
    kept = list(first.run_folder.glob("checkpoint-*"))
    assert len(kept) == 2
    resumed = make(seed=2)
    resumed.train("latest")
    assert_equal_runs(second, resumed)


def test_early_stopping_goes_on_counting(make):
    settings = {"early_stopping_patience": 2, "early_stopping_threshold": 100.0, "eval_steps": 3}
    whole = make("whole", callbacks=[At(-1, terminate)], **settings)
    whole.train()
    # The first evaluation counts as lower than none, the two after it do not.
    assert whole.step == 9
    part = make(callbacks=[At(7, terminate)], **settings)
    with pytest.raises(SystemExit):
        part.train()
    resumed = make(callbacks=[At(-1, terminate)], seed=6, **settings)
    resumed.train("latest")
    assert_equal_runs(whole, resumed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": "muon"}, CheckpointError, "optimizer='adamw'"),
        ({"model": {"d_model": 16}}, CheckpointError, "d_model is 32, the model's 16"),
        ({"model": {"activation": "relu"}}, CheckpointError, "activation is 'gelu'"),
        ({"callbacks": [At(-1, terminate)]}, CheckpointError, "callbacks"),
        ({"batch_size": 3}, DataError, "batch_size=4"),
    ],
    ids=["optimizer", "width", "activation", "callbacks", "batch size"],
)
def test_a_checkpoint_of_something_else_is_refused(make, change, error, message):
    trainer = make(max_steps=1)
    trainer.train()
    with pytest.raises(error, match=message):
        make(**change).train("latest")


def test_a_checkpoint_of_other_data_or_another_tokenizer_is_refused(make, tokenizer, corpus):
    make(max_steps=3).train()
    other = LanguageModelingDataset(corpus[1:17], tokenizer, max_length=24)
    with pytest.raises(DataError, match="other data"):
        make(train=other).train("latest")


@pytest.mark.parametrize("what", ["missing", "model", "optimizer", "callbacks", "tokenizer", "run"])
def test_what_does_not_fit_is_found_before_the_text_is_read(make, corpus, tmp_path, what):
    (tmp_path / "text.txt").write_text("".join(corpus))
    data = DataConfig(train_file=str(tmp_path / "text.txt"), max_length=24, min_length=1)
    make(max_steps=1).train()
    settings = {"resume_from_checkpoint": "latest", "output_dir": tmp_path / "out", "max_steps": 2}
    error, message, lock = CheckpointError, f"checkpoint-1 was made with the {what}", contextlib.nullcontext()
    match what:
        case "missing":
            settings["resume_from_checkpoint"] = str(tmp_path / "run/checkpoint-7")
            message = r"checkpoint-7.*manifest\.json"
        case "model":
            settings["model"] = {"d_ff": 32}
            message = "d_ff is 64, the model's 32"
        case "optimizer":
            settings["optimizer"] = "muon"
            message = "made with optimizer='adamw'"
        case "callbacks":
            settings["callbacks"] = [StopOnRecord()]
        case "run":
            lock = locked(tmp_path / "run")
            error, message = TrainingError, "Another run is writing"
    trainer = make(train=None, evaluation=None, **settings)
    if what == "tokenizer":
        trainer.tokenizer = BPETokenizer()
        trainer.tokenizer.train([text[::-1] for text in corpus], trainer.model.config.vocab_size)
        error, message = FormatError, "belongs to another tokenizer"
    with lock, pytest.raises(error, match=message):
        trainer.train_from_config(trainer.model.config, data)
    assert not (tmp_path / "out").exists()
    if what == "callbacks":
        # The text is what was missing.
        with pytest.raises(DataError, match="other data"):
            make(train=None, evaluation=None, **(settings | {"callbacks": []})).train_from_config(
                trainer.model.config, data
            )
        assert (tmp_path / "out" / "data").exists()


def test_what_is_refused_changes_nothing(make):
    make(max_steps=3).train()
    trainer = make(optimizer="sgd", seed=3)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError):
        trainer.train("latest")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_no_checkpoint_has_a_number_that_is_not_finite(make):
    def poison():
        with torch.no_grad():
            trainer.model.final_norm.weight[0] = float("nan")

    trainer = make(callbacks=[At(6, poison)], max_skipped_steps=100)
    with pytest.raises(TrainingError, match=r"final_norm\.weight is not finite after step 10"):
        trainer.train()
    newest, _ = _checkpoint_folder.newest_checkpoint(trainer.run_folder)
    assert newest.step == 5


def test_a_full_disk_loses_no_checkpoint_and_is_raised_at_the_end(make, monkeypatch, caplog):
    fsync = os.fsync
    full = {10, STEPS}

    def fails(descriptor):
        if trainer.step in full and "checkpoint" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    trainer = make(save_total_limit=1)
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert trainer.step == STEPS
    assert "step 10 cannot be written" in caplog.text
    assert [path.name for path in trainer.run_folder.glob("*checkpoint*")] == ["checkpoint-5"]
    # A save that succeeds later makes up for one that did not.
    full.clear()
    full.add(10)
    again = trainer = make("again", save_total_limit=1)
    again.train()
    assert [path.name for path in again.run_folder.glob("*checkpoint*")] == [f"checkpoint-{STEPS}"]


def test_a_checkpoint_that_cannot_be_read_back_ends_no_training(make, monkeypatch, caplog):
    fsync = os.fsync
    lies = {10, STEPS}

    def lying_disk(descriptor):
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if trainer.step in lies and path.name == "training_state.safetensors":
            with path.open("r+b") as file:
                file.write(b"?")

    trainer = make(save_total_limit=1)
    monkeypatch.setattr(os, "fsync", lying_disk)
    with pytest.raises(CheckpointError, match=r"training_state\.safetensors was altered"):
        trainer.train()
    assert trainer.step == STEPS
    assert "step 10 cannot be written" in caplog.text
    assert [path.name for path in trainer.run_folder.glob("*checkpoint*")] == ["checkpoint-5"]
    lies.remove(STEPS)
    trainer = make("again", save_total_limit=1)
    trainer.train()
    assert [path.name for path in trainer.run_folder.glob("*checkpoint*")] == [f"checkpoint-{STEPS}"]


def test_a_disk_that_is_really_full_ends_no_training(make, small_disk, tmp_path, caplog):
    size = make("size", max_steps=1)
    size.train()
    needed = sum(path.stat().st_size for path in (size.run_folder / "checkpoint-1").iterdir())
    disk = small_disk(int(1.5 * needed / 1024))
    trainer = make("disk", output_dir=tmp_path / "out", save_total_limit=1)
    with pytest.raises(OSError, match=r"No space left|cannot be written"):
        trainer.train()
    assert trainer.step == STEPS
    assert "step 10 cannot be written" in caplog.text
    newest, passed = _checkpoint_folder.newest_checkpoint(disk)
    assert (newest.step, passed) == (5, [])
    assert {path.name for path in disk.iterdir()} == {"checkpoint-5", ".lock"}


def test_the_contracts_own_steps(make):
    whole = make("whole")
    whole.train()
    trainer = make()
    loss = trainer._train_epoch()
    epoch_steps = trainer.step
    assert 0 < epoch_steps < STEPS
    assert loss == pytest.approx(whole.history.records[0].train_loss, rel=0.2)
    saved = trainer._save_checkpoint()
    assert saved.name == f"checkpoint-{epoch_steps}"
    trainer._train_epoch()
    assert trainer._evaluate() == trainer.evaluate()
    fresh = make(seed=7)
    assert fresh._load_checkpoint(saved) == saved
    assert fresh.step == epoch_steps
    fresh.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, fresh.model.state_dict()[name]), name
    with pytest.raises(TrainingError, match="checkpoint_dir is None"):
        make(checkpoint_dir=None, report_to=())._save_checkpoint()
    assert make("empty")._load_checkpoint() is None


def test_what_a_runs_folder_holds(make):
    trainer = make(report_to=["csv", "jsonl", "tensorboard"])
    trainer.train()
    folder = trainer.run_folder
    run = json.loads((folder / "run.json").read_text())
    assert run["seed"] == trainer.config.seed
    assert run["model"] == trainer.model.config.to_dict()
    assert run["training"]["learning_rate"] == 1e-2
    assert run["versions"]["torch"] == importlib.metadata.version("torch")
    for name in ("history.jsonl", "loss.png", "report.html", "metrics.csv", "metrics.jsonl", "tensorboard"):
        assert (folder / name).exists(), name


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows[index] for index in range(len(self.rows)))


def test_a_stream_without_length_resumes_too(make, rows):
    with pytest.raises(ConfigurationError, match="max_steps"):
        make(train=Stream(rows), max_steps=None).train()
    whole = make("whole", train=Stream(rows))
    whole.train()
    part = make(train=Stream(rows), callbacks=[])
    part.callbacks.append(At(9, terminate))
    with pytest.raises(SystemExit):
        part.train()
    resumed = make(train=Stream(rows), seed=3, callbacks=[At(-1, terminate)])
    resumed.train("latest")
    assert_equal_runs(whole, resumed)


def test_rows_that_are_too_long_are_refused_first(make, tokenizer, corpus):
    long = LanguageModelingDataset(corpus, tokenizer, max_length=40)
    with pytest.raises(ModelConfigurationError, match="Rows of 40 tokens"):
        make(train=long).train()
    with pytest.raises(ModelConfigurationError, match="Rows of 40 tokens"):
        make(evaluation=long).train()


def test_saving_after_the_end_saves_the_end(make):
    trainer = make()
    trainer.train()
    history = curve(trainer)
    path = trainer._save_checkpoint()
    assert path.name == f"checkpoint-{STEPS}"
    assert curve(trainer) == history
    again = make(seed=3)
    again.train("latest")
    assert_equal_runs(trainer, again)


def test_saving_before_a_resumed_run_keeps_its_place(make):
    part = make(callbacks=[At(7, terminate)])
    with pytest.raises(SystemExit):
        part.train()
    resumed = make(callbacks=[At(-1, terminate)], resume_from_checkpoint="latest", seed=3)
    assert resumed._save_checkpoint().name == "checkpoint-7"
    resumed.train()
    assert resumed.resumed_after == [7]
    whole = make("whole", callbacks=[At(-1, terminate)])
    whole.train()
    assert_equal_runs(whole, resumed)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_checkpoints_that_cannot_be_written_to_is_found_first(make, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    trainer = make(output_dir=tmp_path / "out")
    with pytest.raises(PermissionError):
        trainer.train()
    assert trainer.step == 0


def test_a_file_in_the_place_of_the_checkpoints_is_found_first(make, tmp_path):
    (tmp_path / "run").write_text("")
    trainer = make(output_dir=tmp_path / "out")
    with pytest.raises(FileExistsError):
        trainer.train()
    assert trainer.step == 0


def test_a_second_run_at_the_same_time_is_refused_and_does_no_harm(make):
    other = make(seed=6)
    refused = []

    def begin_another():
        with pytest.raises(TrainingError, match="Another run is writing") as error:
            other.train("latest")
        refused.append(error)

    trainer = make(callbacks=[At(7, begin_another)])
    trainer.train()
    assert refused
    whole = make("whole", callbacks=[At(-1, terminate)])
    whole.train()
    assert_equal_runs(whole, trainer)
    # It is free again afterwards.
    make(callbacks=[At(-1, terminate)]).train("latest")


class StopOnRecord(Callback):
    def on_record(self, trainer, record):
        trainer.should_stop = record.step == 6


def test_a_run_that_a_callback_stopped_is_evaluated_and_stays_stopped(make):
    trainer = make(callbacks=[StopOnRecord()])
    trainer.train()
    assert trainer.step == 6
    assert [record.step for record in trainer.history if record.eval_loss is not None] == [4, 6]
    for _ in range(2):
        again = make(callbacks=[StopOnRecord()], seed=2)
        again.train("latest")
        assert_equal_runs(trainer, again)


def test_more_patience_goes_on(make):
    settings = {"early_stopping_threshold": 100.0, "eval_steps": 3}
    make(early_stopping_patience=2, **settings).train()
    longer = make(early_stopping_patience=3, **settings)
    longer.train("latest")
    assert longer.step == 12


@pytest.mark.parametrize(
    "change", [{"batch_size": 8}, {"batch_size": 2}, {"gradient_accumulation_steps": 1}], ids=str
)
def test_epochs_are_epochs_also_after_a_change_of_the_batch(make, change):
    epochs = {"max_steps": None, "num_epochs": 4, "eval_strategy": "epoch"}
    part = make(callbacks=[], **epochs)
    part._train_epoch()
    part._train_epoch()
    part._save_checkpoint()
    resumed = make(callbacks=[], **(epochs | change))
    resumed.train("latest")
    assert resumed.history.records[-1].epoch == 4.0
    found = [record.epoch for record in resumed.history if record.eval_loss is not None]
    assert found == [1.0, 2.0, 3.0, 4.0]


def test_the_optimizers_settings_are_those_of_the_configuration(make):
    make(max_steps=4).train()
    resumed = make(weight_decay=0.5, betas=(0.5, 0.6), max_steps=6)
    resumed._load_checkpoint()
    group = resumed._loop.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.6))
    assert resumed._loop.optimizer.param_groups[1]["weight_decay"] == 0.0


class SaveOnEvaluate(Callback):
    def on_evaluate(self, trainer, record):
        if record.step == 4:
            trainer._save_checkpoint()


def test_a_checkpoint_of_a_callback_holds_the_record(make):
    whole = make("whole", callbacks=[SaveOnEvaluate()], save_steps=100)
    whole.train()
    resumed = make("whole", callbacks=[SaveOnEvaluate()], seed=2)
    resumed._load_checkpoint(whole.run_folder / "checkpoint-4")
    resumed.train()
    assert_equal_runs(whole, resumed)


def test_a_stream_is_evaluated_after_each_epoch(make, rows):
    trainer = make(train=Stream(rows), eval_strategy="epoch", gradient_accumulation_steps=1)
    trainer.train()
    batches = -(-len(rows) // 4)
    found = [record.step for record in trainer.history if record.eval_loss is not None]
    assert found == [*range(batches + 1, STEPS, batches), STEPS]


def test_a_change_of_folder_under_way_moves_nothing(make, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    trainer = make(
        callbacks=[At(3, lambda: os.chdir(tmp_path))], checkpoint_dir="checkpoints", output_dir="out"
    )
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert (tmp_path / "a/out/history.jsonl").exists()
    assert (tmp_path / f"a/checkpoints/checkpoint-{STEPS}").exists()


def test_learned_positions_of_another_length_are_refused(make):
    make(model={"positions": "learned"}, max_steps=2).train()
    with pytest.raises(CheckpointError, match="max_seq_len is 32"):
        make(model={"positions": "learned", "max_seq_len": 40}, max_steps=3).train("latest")
    make(model={"positions": "learned"}, max_steps=3).train("latest")
