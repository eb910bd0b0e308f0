"""The commands, mostly in this process; what only shows from outside is in test_cli_processes.py."""

import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from llm_trainer.config import ModelConfig, RunConfig
from llm_trainer.data import TokenStore
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import load_tokenizer
from safetensors.torch import load_file

# typer's import of click 8.5; the commands are therefore imported in the tests only.
pytestmark = pytest.mark.filterwarnings("ignore:'click\\.utils\\..*' is deprecated:DeprecationWarning")

Run = Callable[..., tuple[int, str, str]]
CONFIG = {
    "model": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "d_ff": 48,
        "max_seq_len": 48,
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "dropout": 0.1,
        "attention_dropout": 0.0,
    },
    "training": {
        "max_steps": 12,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "use_amp": False,
        "logging_steps": 4,
        "eval_steps": 6,
        "save_steps": 5,
        "report_to": ["csv"],
    },
    "data": {"vocab_size": 300, "max_length": 32, "min_length": 1, "dataloader_num_workers": 0},
}


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    logger = logging.getLogger("llm_trainer")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield
    level, logger.propagate, logger.handlers = before
    logger.setLevel(level)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; returns its exit code, standard output and standard error."""
    from llm_trainer.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A folder with texts, a configuration, and the output of a run."""
    from llm_trainer.cli import main

    folder = tmp_path_factory.mktemp("cli")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus[:56]))
    (folder / "held_out.txt").write_text("".join(corpus[56:]))
    content = {**CONFIG, "data": {**CONFIG["data"], "train_file": str(folder / "train.jsonl")}}
    content["data"]["validation_file"] = str(folder / "held_out.txt")
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    torch.set_num_threads(1)
    assert main(["train", "--config", str(folder / "run.yaml"), "--output_dir", str(folder / "out")]) == 0
    return folder


def test_several_values_after_one_option_and_nothing_else() -> None:
    from llm_trainer.cli._options import repeat_option

    names = {"--prompts", "--set"}
    assert repeat_option(["--prompts", "a", "b", "--seed", "-1", "c"], names) == [
        *("--prompts", "a", "--prompts", "b", "--seed", "-1", "c")
    ]
    assert repeat_option(["--prompts=-x", "--set", "a=1", "--", "--set", "x", "y"], names) == [
        *("--prompts=-x", "--set", "a=1", "--", "--set", "x", "y")
    ]


def test_train_leaves_a_model_its_tokenizer_and_all_settings(room: Path, run: Run) -> None:
    out = room / "out"
    config = RunConfig.load(out / "config.yaml")
    tokenizer = load_tokenizer(out)
    assert (
        config.model.vocab_size
        == tokenizer.vocab_size
        == TransformerLM.from_pretrained(out).config.vocab_size
    )
    assert tokenizer.fingerprint() == load_tokenizer(out / "tokenizer").fingerprint()
    assert sorted(path.name for path in (out / "checkpoints").glob("c*")) == [
        *("checkpoint-10", "checkpoint-12", "checkpoint-5")
    ]
    # The saved settings give the same model again.
    code, shown, _ = run("train", "--config", out / "config.yaml", "--output-dir", room / "again")
    assert code == 0
    assert _weights(room / "again") == _weights(out)
    assert (room / "again" / "checkpoints" / "checkpoint-12").exists()
    assert "perplexity" in shown
    assert "on held-out text" in shown


def _weights(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(folder / "model.safetensors").items()}


def _loss_by_hand(folder: Path, text: str, length: int) -> tuple[float, int, int]:
    """The mean loss of one document cut into rows, from the model's logits; its tokens and their bytes."""
    tokenizer, model = load_tokenizer(folder), TransformerLM.from_pretrained(folder)
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    total = tokens = size = 0
    for start in range(0, len(ids), length):
        row = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            logits = model(row).logits
        total += float(F.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum"))
        tokens += row.size(1) - 1
        size += sum(len(tokenizer.decode([int(i)]).encode()) for i in row[0, 1:])
    return total / tokens, tokens, size


def test_evaluate_agrees_with_a_loss_by_hand_and_with_training(room: Path, run: Run) -> None:
    out, results = room / "out", room / "results.json"
    code, shown, _ = run(
        *("evaluate", "--model_path", out, "--dataset_config", room / "run.yaml", "--output_path", results)
    )
    assert code == 0
    found = json.loads(results.read_text())
    loss, tokens, size = _loss_by_hand(out, (room / "held_out.txt").read_text(), 32)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / size, rel=1e-5)
    assert f"{found['perplexity']:,.4g}" in shown
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()[1:]]
    assert history[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_evaluate_a_file_in_part_and_continue_its_texts(room: Path, run: Run) -> None:
    arguments = ("evaluate", "--model-path", room / "out", "--file", room / "train.jsonl", "--json")
    code, shown, _ = run(*arguments, "--max-batches", "2", "--batch-size", "3", "--generate", "2")
    assert code == 0
    found = json.loads(shown)
    assert found["batches"] == 2
    # Without a configuration the rows are as long as the model reads.
    assert 0 < found["tokens"] <= 2 * 3 * 47
    assert found["generation"]["num_texts"] == 2
    assert {"distinct_1", "bleu", "chrf"} <= found["generation"].keys()
    assert json.loads(run(*arguments)[1])["tokens"] > found["tokens"]


def test_a_part_of_a_text_is_drawn_from_all_of_it(
    room: Path, run: Run, tmp_path: Path, corpus: list[str]
) -> None:
    # Packing begins with the rows of the longest document; this one is unlike the others.
    odd = "".join(chr(300 + 7 * n % 1000) for n in range(470))

    def loss(documents: list[str], *more: object) -> float:
        (tmp_path / "texts.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in documents)
        )
        arguments = ("evaluate", "--model-path", room / "out", "--file", tmp_path / "texts.jsonl", "--json")
        return json.loads(run(*arguments, *more)[1])["loss"]

    whole = loss([odd, *corpus])
    part = loss([odd, *corpus], "--batch-size", "1", "--max-batches", "24")
    assert loss([odd]) > whole
    assert abs(part - whole) < (loss([odd]) - whole) / 2


def test_generate_is_greedy_at_temperature_0(room: Path, run: Run) -> None:
    model, tokenizer = TransformerLM.from_pretrained(room / "out"), load_tokenizer(room / "out")
    ids = tokenizer.encode("def function")
    while len(ids) < 20 and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    arguments = ("generate", "--model_path", room / "out", "--prompts", "def function")
    code, shown, _ = run(*arguments, "--temperature", "0", "--max_length", "20")
    assert (code, shown) == (0, tokenizer.decode(ids) + "\n")


def test_generate_several_prompts_and_write_them(room: Path, run: Run) -> None:
    (room / "prompts.txt").write_text("third\n\nfourth\n")
    arguments = (
        "generate",
        "--model-path",
        room / "out",
        "--max-new-tokens",
        "4",
        "--seed",
        "7",
        "--top-k",
        "9",
    )
    given = ("--prompts", "first", "second", "--prompts_file", room / "prompts.txt")
    code, shown, _ = run(*arguments, *given, "--output-path", room / "texts.json")
    assert code == 0
    assert run(*arguments, *given)[1] == shown
    found = json.loads((room / "texts.json").read_text())
    assert [text["prompt"] for text in found["texts"]] == ["first", "second", "third", "fourth"]
    assert "\n---\n".join(text["text"] for text in found["texts"]) + "\n" == shown
    assert all(text["text"].startswith(text["prompt"]) for text in found["texts"])
    assert found["sampling"]["top_k"] == 9


def test_resume_and_dry_run(room: Path, run: Run, tmp_path: Path) -> None:
    arguments = ("train", "--config", room / "run.yaml", "--output-dir", tmp_path / "out")
    code, shown, _ = run(*arguments, "--dry-run", "--set", "training.max_steps=null", "training.num_epochs=3")
    assert code == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()
    tokens = TokenStore.open(next((tmp_path / "out" / "data").glob("train.jsonl-train-tokens-*")))
    rows = -(-len(tokens.tokens) // 32)
    assert f"56 documents, {len(tokens.tokens):,} tokens" in shown
    steps = int(next(line for line in shown.splitlines() if line.startswith("  steps")).split()[1])
    assert steps >= 3 * -(-rows // 4)
    # The same number is trained.
    assert run(*arguments, "--set", "training.max_steps=null", "training.num_epochs=3")[0] == 0
    info = json.loads(run("info", tmp_path / "out", "--json")[1])
    assert info["training"]["step"] == steps

    shutil.copytree(room / "out" / "checkpoints", tmp_path / "half" / "checkpoints")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "checkpoint-12")
    code, _, errors = run(
        *("train", "--config", room / "run.yaml", "--output-dir", tmp_path / "half"),
        *("--resume_from_checkpoint", "latest", "--force_retrain_tokenizer", "--log_level", "warning"),
    )
    assert code == 0, errors
    assert "keeps the one in its checkpoint" in " ".join(errors.split())
    assert _weights(tmp_path / "half") == _weights(room / "out")


def test_the_tokenizer_is_trained_again_only_for_a_reason(room: Path, run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((room / "held_out.txt").read_text())
    file = tmp_path / "out" / "tokenizer" / "trained.json"

    def trained(*more: object) -> bool:
        before = file.stat().st_ino if file.exists() else None
        command = ("train", "--config", room / "run.yaml", "--output-dir", tmp_path / "out", "--dry-run")
        code, _, errors = run(*command, "--train-file", text, *more)
        assert code == 0, errors
        return file.stat().st_ino != before

    assert trained()
    assert not trained()
    assert trained("--force_retrain_tokenizer")
    assert trained("--set", "data.vocab_size=290")
    text.write_text(text.read_text() * 2)
    assert trained("--set", "data.vocab_size=290")
    assert not trained("--set", "data.vocab_size=290")
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert trained("--set", "data.vocab_size=290")


def test_info_of_a_run_a_checkpoint_a_configuration_and_the_machine(room: Path, run: Run) -> None:
    model = TransformerLM.from_pretrained(room / "out")
    for path in (room / "out", room / "out" / "checkpoints" / "checkpoint-10"):
        code, shown, _ = run("info", path, "--json")
        assert code == 0
        found = json.loads(shown)
        assert found["model"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert found["tokenizer"]["vocab_size"] == model.config.vocab_size
        assert found["checkpoints"]["checkpoint-10"] == "whole, step 10"
        assert found["training"]["eval_loss"] > 0
    assert found["training"]["step"] == 8
    code, shown, _ = run("info", room / "run.yaml")
    assert code == 0
    lines = [line.split() for line in shown.splitlines()]
    assert ["tokens", "a", "step", "128"] in lines
    assert ["parameters", f"{sum(p.numel() for p in model.parameters()):,}"] in lines
    code, shown, _ = run("info", "--json")
    assert code == 0
    machine = json.loads(shown)["machine"]
    assert (machine["threads"], machine["python"]) == (1, platform.python_version())
    assert 0 < machine["available_gb"] < machine["memory_gb"]


def test_info_tells_of_a_damaged_checkpoint(room: Path, run: Run, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(room / "out" / "checkpoints" / "checkpoint-10", tmp_path / "checkpoint-10")
    state = checkpoint / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    code, shown, _ = run("info", checkpoint)
    assert code == 1
    assert f"damaged: {state} was altered" in shown


def test_a_run_that_has_not_ended_is_used_through_its_checkpoint(
    room: Path, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(room / "out" / "checkpoints", tmp_path / "checkpoints")
    arguments = ("generate", "--prompts", "def", "--temperature", "0", "--model-path")
    code, shown, errors = run(*arguments, tmp_path)
    assert code == 0
    assert "checkpoint-12" in errors
    assert shown == run(*arguments, room / "out")[1]


def test_export_and_import_give_the_model_back(room: Path, run: Run, tmp_path: Path) -> None:
    assert run("export", room / "out", tmp_path / "hf", "--format", "hf")[0] == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
    code, shown, _ = run("import", tmp_path / "hf", tmp_path / "back")
    assert code == 0
    assert "bpe, 300 tokens" in shown
    arguments = ("generate", "--prompts", "def function", "--temperature", "0", "--model-path")
    assert run(*arguments, tmp_path / "back")[1] == run(*arguments, room / "out")[1]


def test_tokenize(room: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("--files", room / "train.jsonl", room / "held_out.txt")
    code, shown, _ = run("tokenize", "train", *files, "--vocab-size", "310", "--output-dir", tmp_path / "tok")
    assert code == 0
    assert "310" in shown
    text = "def größe(): # 語"
    ids = run("tokenize", "encode", "--tokenizer", tmp_path / "tok", text)[1].split()
    assert [int(i) for i in ids] == load_tokenizer(tmp_path / "tok").encode(text, add_special_tokens=False)
    assert run("tokenize", "decode", "--tokenizer", tmp_path / "tok", *ids)[1] == text + "\n"
    pieces = run("tokenize", "encode", "--tokenizer", tmp_path / "tok", "--pieces", "def f")[1]
    assert "'" in pieces
    code, shown, _ = run(
        *("tokenize", "data", "--config", room / "run.yaml", "--tokenizer", tmp_path / "tok"),
        *("--output-dir", tmp_path / "data"),
    )
    assert code == 0
    stores = [TokenStore.open(path) for path in (tmp_path / "data").glob("*-tokens-*")]
    assert sorted(store.num_documents for store in stores) == [1, 56]


class _Interrupting(io.StringIO):
    """Standard input with one line, after which a signal comes."""

    def __init__(self, line: str, number: signal.Signals) -> None:
        super().__init__(line)
        self._number = number

    def readline(self, size: int = -1) -> str:
        return super().readline(size) or self._interrupt()

    def __next__(self) -> str:
        return self.readline()

    def _interrupt(self) -> str:
        os.kill(os.getpid(), self._number)
        return "never read"


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("generate --interactive --max-new-tokens 3 --model-path", signal.SIGINT, 0),
        ("generate --interactive --max-new-tokens 3 --model-path", signal.SIGTERM, 143),
        ("tokenize decode --tokenizer", signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_a_command_cleanly(
    room: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str, number: signal.Signals, code: int
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "stdin", _Interrupting("100 101\n", number))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        found, shown, errors = run(*command.split(), room / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found, bool(shown)) == (code, True)
    assert "Traceback" not in errors
    assert "never read" not in shown
    assert signal.getsignal(signal.SIGTERM) is handler


SETTINGS = {
    "data.max_length=100": "data.max_length=48",
    "data.vocab_size=100": "at least 259",
    "data.validation_file=missing.txt": "missing.txt does not exist",
    "data.train_file=missing.txt": "missing.txt does not exist",
    "data.tokenizer=missing": "is no folder",
    "model.d_model=30": "28 and 32",
    "model.d_model=wide": "an integer of at least 1",
    "model.d_modle=64": "did you mean 'd_model'",
    "modle.d_model=64": "did you mean 'model'",
    "training.max_steps": "SECTION.FIELD=VALUE",
    "training.max_steps=[": "not valid YAML",
    "training.report_to=[carrier-pigeon]": "tensorboard",
    "model={d_model: 64, n_layers: 1}": "SECTION.FIELD=VALUE",
}


@pytest.mark.parametrize(("setting", "remedy"), SETTINGS.items(), ids=SETTINGS)
def test_a_wrong_setting(room: Path, run: Run, tmp_path: Path, setting: str, remedy: str) -> None:
    arguments = ("train", "--config", room / "run.yaml", "--output-dir", tmp_path / "out", "--set", setting)
    _refused(run(*arguments), 2, remedy)
    assert not (tmp_path / "out" / "tokenizer").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["training.report_to=[wandb]"], "pip install wandb"),
        (["training.early_stopping_patience=2", "training.eval_strategy=no"], 'eval_strategy is "no"'),
        (["training.eval_strategy=epoch", "data.validation_file=null"], "nothing to evaluate on"),
    ],
    ids=["wandb", "patience", "epoch"],
)
def test_what_the_trainer_would_refuse_is_refused_before_the_tokenizer(
    room: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    remedy: str,
    more: list[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ("train", "--config", room / "run.yaml", "--output-dir", tmp_path / "out", *more)
    _refused(run(*arguments, "--set", *settings), 2, remedy)
    assert not (tmp_path / "out").exists()


# In a process of its own: after a failure torch leaves its own evaluator of frames in place.
def test_a_missing_compiler_is_found_before_the_tokenizer(room: Path, tmp_path: Path) -> None:
    missing = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "llm_trainer", "train", "--config", str(room / "run.yaml")]
    more = ["--output-dir", str(tmp_path / "out"), "--set", "training.compile_model=true"]
    done = subprocess.run([*command, *more], env={**os.environ, **missing}, capture_output=True, text=True)
    # Lines of torch's own, which begin with the level, may come before.
    own = [line for line in done.stderr.splitlines(keepends=True) if not re.match(r"[IW]\d{4} ", line)]
    _refused((done.returncode, done.stdout, "".join(own)), 1, "apt install g++")
    assert not (tmp_path / "out").exists()


def _refused(result: tuple[int, str, str], code: int, remedy: str) -> None:
    found, shown, errors = result
    assert (found, shown) == (code, ""), errors
    assert errors.count("\n") == 1, errors
    assert errors.startswith("llm-trainer: ")
    assert remedy in errors
    assert "Traceback" not in errors


WRONG: dict[str, tuple[str, int, str]] = {
    "no file": ("train --config {tmp}/none.yaml", 2, "does not exist"),
    "no ending": ("train --config {tmp}/text", 2, "must end in .json, .yaml or .yml"),
    "no yaml": ("train --config {tmp}/broken.yaml", 2, "not valid YAML"),
    "no json": ("train --config {tmp}/broken.json", 2, "not valid JSON"),
    "a list": ("train --config {tmp}/list.yaml", 2, "must hold a mapping"),
    "a section of the wrong type": (
        "train --config {tmp}/flat.yaml",
        2,
        "'model' must hold fields, not a str",
    ),
    "nothing": ("train", 2, "--config FILE"),
    "an option": ("train --confg x", 2, "--config"),
    "a command": ("trian", 2, "train"),
    "a level": ("train --config {room}/run.yaml --log-level loud", 2, "debug, info"),
    "a preset": ("train --preset llama-mega", 2, "llama-medium"),
    "a device": ("train --config {room}/run.yaml --output-dir {tmp}/o --device abacus", 2, "--device abacus"),
    "an empty text": (
        "train --config {room}/run.yaml --output-dir {tmp}/o --train-file {tmp}/text",
        2,
        "empty",
    ),
    "no checkpoint": (
        "train --config {room}/run.yaml --output-dir {tmp}/o --resume-from-checkpoint {tmp}/none",
        2,
        "give its folder, or latest",
    ),
    "a checkpoint of another model": (
        "train --config {room}/run.yaml --output-dir {tmp}/o --set model.d_ff=64 "
        "--resume-from-checkpoint {room}/out/checkpoints/checkpoint-5",
        2,
        "d_ff is 48, the model's 64",
    ),
    "a checkpoint of another optimizer": (
        "train --config {room}/run.yaml --output-dir {tmp}/o --set training.optimizer=muon "
        "--resume-from-checkpoint {room}/out/checkpoints/checkpoint-5",
        2,
        "made with optimizer='adamw', and TrainingConfig has 'muon'",
    ),
    "a model that fits nowhere": (
        "train --config {room}/run.yaml --output-dir {tmp}/o --set model.d_model=65536 model.n_layers=1000",
        2,
        "choose a smaller one",
    ),
    "an output that is a file": (
        "train --config {room}/run.yaml --output-dir {tmp}/text",
        2,
        "text is a file; --output-dir takes a folder",
    ),
    "no text to evaluate on": ("evaluate --model-path {room}/out", 2, "--dataset-config FILE or --file PATH"),
    "rows too long": (
        "evaluate --model-path {room}/out --dataset-config {tmp}/long.yaml",
        2,
        "max_length=48",
    ),
    "no model": ("evaluate --model-path {tmp} --file {room}/held_out.txt", 2, "holds no model"),
    "no folder": ("generate --model-path {tmp}/none --prompts x", 2, "is no folder"),
    "a damaged model": ("generate --model-path {tmp}/damaged --prompts x", 1, "model.safetensors"),
    "no prompt": ("generate --model-path {room}/out", 2, "--interactive"),
    "a temperature": (
        "generate --model-path {room}/out --prompts x --temperature=-1",
        2,
        "temperature is -1",
    ),
    "a long prompt": ("generate --model-path {room}/out --prompts {long}", 2, "48"),
    "an id": ("tokenize decode --tokenizer {room}/out 100000", 2, "not in the vocabulary of 300"),
    "no tokenizer": ("tokenize encode --tokenizer {tmp}/none x", 2, "does not exist"),
    "a small vocabulary": (
        "tokenize train --files {room}/held_out.txt --vocab-size 9 --output-dir {tmp}/t",
        2,
        "at least 259",
    ),
    "a format": ("export {room}/out {tmp}/hf --format onnx", 2, "there is hf"),
    "an export in place": ("export {room}/out {room}/out", 2, "choose another folder"),
    "no path": ("info {tmp}/none", 2, "does not exist"),
}


@pytest.mark.parametrize(("command", "code", "remedy"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_said_in_a_line(
    room: Path, run: Run, tmp_path: Path, command: str, code: int, remedy: str
) -> None:
    (tmp_path / "text").touch()
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "flat.yaml").write_text("model: large")
    (tmp_path / "long.yaml").write_text(f"validation_file: {room}/held_out.txt\nmax_length: 49\n")
    if "damaged" in command:
        shutil.copytree(room / "out", tmp_path / "damaged")
        with (tmp_path / "damaged" / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    places = {"room": room, "tmp": tmp_path, "long": "x" * 400}
    _refused(run(*(word.format(**places) for word in command.split())), code, remedy)


def test_debug_adds_the_traceback(room: Path, run: Run, tmp_path: Path) -> None:
    code, _, errors = run(
        "evaluate", "--model-path", tmp_path, "--file", tmp_path / "x", "--log-level", "debug"
    )
    assert code == 2
    assert "Traceback" in errors


def test_a_preset_trains_on_a_file_without_a_configuration(room: Path, run: Run, tmp_path: Path) -> None:
    from llm_trainer.cli._settings import read_run

    found = read_run(None, output_dir=tmp_path, preset="llama-mini", train_file="a.txt")
    preset = ModelConfig.preset("llama-mini")
    assert found.model == preset
    assert (found.data.max_length, found.data.vocab_size) == (preset.max_seq_len, preset.vocab_size)
    assert found.training.checkpoint_dir == str(tmp_path / "checkpoints")
    assert read_run(room / "run.yaml").training.output_dir == "output"
