"""The commands from outside: signals, scripts, ready configurations, and what is imported when."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from llm_trainer.config import DataConfig, RunConfig, calculate_parameters
from llm_trainer.models import TransformerLM
from safetensors.torch import load_file

PACKAGE = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs"
COMMAND = [sys.executable, "-m", "llm_trainer"]
# As from a terminal, also where the tests were started in the background, with Ctrl-C ignored.
HEEDING_CTRL_C = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from llm_trainer.cli import main; raise SystemExit(main())"
)
SETTINGS = {
    "model": {"d_model": 32, "n_heads": 4, "n_layers": 2, "d_ff": 64, "max_seq_len": 64, "dropout": 0.1},
    "training": {
        "max_steps": 240,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 10,
        "eval_strategy": "no",
        "report_to": "none",
    },
    "data": {"vocab_size": 300, "max_length": 64, "min_length": 1, "dataloader_num_workers": 0},
}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _run(*arguments: object, cwd: Path | None = None, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        input=given,
        env=_environment(),
        timeout=350,
    )


def _train_and_send(number: signal.Signals, config: Path, output: Path) -> tuple[int, str]:
    """Train until the second record, send the signal, and return the exit code and standard error."""
    command = [sys.executable, "-c", HEEDING_CTRL_C]
    arguments = [*command, "train", "--config", str(config), "--output-dir", str(output)]
    errors: list[str] = []
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            errors.append(line)
            if line.startswith("step 20/"):
                process.send_signal(number)
        code = process.wait(60)
    return code, "".join(errors)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text("".join(corpus))
    content = {**SETTINGS, "data": {**SETTINGS["data"], "train_file": str(folder / "text.txt")}}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def resumed(config: Path) -> Path:
    """The output of a run that SIGTERM ended and `latest` went on with."""
    output = config.parent / "resumed"
    code, errors = _train_and_send(signal.SIGTERM, config, output)
    assert code == 143, errors
    assert "Traceback" not in errors
    assert f"train --config {output}/config.yaml --resume-from-checkpoint latest" in errors
    (saved,) = (output / "checkpoints").glob("checkpoint-*")
    assert 20 <= int(saved.name.removeprefix("checkpoint-")) < 240
    assert not (output / "model.safetensors").exists()
    # What the message says, word for word.
    again = _run(*COMMAND, "train", "--config", output / "config.yaml", "--resume-from-checkpoint", "latest")
    assert again.returncode == 0, again.stderr
    return output


def test_sigterm_and_resuming_give_what_an_uninterrupted_run_does(resumed: Path, config: Path) -> None:
    whole = config.parent / "whole"
    script = PACKAGE / "scripts" / "train.py"
    done = _run(sys.executable, script, "--config", config, "--output_dir", whole, "--log_level", "error")
    assert done.returncode == 0, done.stderr
    weights, expected = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)


def test_ctrl_c_saves_and_ends_with_130(config: Path) -> None:
    output = config.parent / "interrupted"
    code, errors = _train_and_send(signal.SIGINT, config, output)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert errors.endswith("llm-trainer: ended by Ctrl-C\n")
    assert len(list((output / "checkpoints").glob("checkpoint-*"))) == 1


def test_the_scripts_take_the_documented_flags(resumed: Path, config: Path, tmp_path: Path) -> None:
    # From a folder that is not the package's, with several prompts after one flag, then lines on input.
    generated = _run(
        *(sys.executable, PACKAGE / "scripts" / "generate.py", "--model_path", resumed),
        *("--prompts", "def function_1(", "return", "--max_length", "12"),
        *("--temperature", "0.8", "--top_k", "20", "--top_p", "0.9", "--interactive"),
        cwd=tmp_path,
        given="value\n\n" + "x" * 400 + "\n# the\n",
    )
    assert generated.returncode == 0, generated.stderr
    texts = generated.stdout
    assert texts.startswith("def function_1(")
    assert "\n---\nreturn" in texts
    assert texts.index("\nvalue") < texts.index("\n# the")
    assert "64" in generated.stderr  # the prompt that is too long for the model

    (tmp_path / "eval.json").write_text(json.dumps({"validation_file": str(config.parent / "text.txt")}))
    evaluated = _run(
        *(sys.executable, PACKAGE / "scripts" / "evaluate.py", "--model_path", resumed),
        *("--dataset_config", "eval.json", "--output_path", "results.json", "--max_batches", "3"),
        cwd=tmp_path,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    # A uniform guess among 300 tokens costs 5.7 nats.
    assert 0 < results["loss"] < 4


def test_help_and_mistakes_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from llm_trainer.cli import main\n"
        "for line in ('--help', 'train --help', 'generate --help', 'tokenize --help',\n"
        "    'train --config none.yaml', 'train --preset llama-mini --set data.trian_file=x'):\n"
        "    main(line.split())\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = _run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage: llm-trainer generate [OPTIONS]" in done.stdout
    assert "did you mean" in done.stderr


READY = {
    "tiny": 0.64e6,
    "model_config": 3.0e6,
    "speedrun_mini": 21e6,
    "gpt2_mini": 21e6,
    "llama_mini": 21e6,
    "gpt2_small_wikitext": 124e6,
}


@pytest.mark.parametrize(("name", "parameters"), READY.items(), ids=READY)
def test_a_ready_configuration(name: str, parameters: float) -> None:
    config = RunConfig.load(CONFIGS / f"{name}.yaml")
    config.model.vocab_size = config.data.vocab_size
    assert calculate_parameters(config.model) == pytest.approx(parameters, rel=0.05)
    assert config.data.max_length <= config.model.max_seq_len
    assert (config.data.dataset_name == "python-stdlib") == (name != "gpt2_small_wikitext")


def test_all_configurations_are_tested() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {*READY, "eval_config"}
    assert DataConfig.load(CONFIGS / "eval_config.json").dataset_name == "python-stdlib"


def test_the_tiny_configuration_trains_and_is_evaluated(tmp_path: Path) -> None:
    done = _run(
        *(*COMMAND, "train", "--config", CONFIGS / "tiny.yaml", "--output-dir", tmp_path),
        *("--set", "training.max_steps=3", "training.eval_strategy=no"),
    )
    assert done.returncode == 0, done.stderr
    assert TransformerLM.from_pretrained(tmp_path).config.vocab_size == 2048
    evaluated = _run(
        *(*COMMAND, "evaluate", "--model-path", tmp_path, "--json"),
        *("--dataset-config", CONFIGS / "eval_config.json", "--max-batches", "1"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["text"] == "python-stdlib"
