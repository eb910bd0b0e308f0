"""From raw text to written text: train a tokenizer and a small language model, and let it write.

Everything is done by llm-trainer, watched by av-memory, on this machine alone. Without ``--text`` it reads
the sources of Python's standard library, which are on every machine that runs this.
"""

from __future__ import annotations

import argparse
import html
import math
import os
import sys
import sysconfig
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Threads that spin while they wait take the cores from one another where the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import av_memory
from rich.console import Console
from rich.text import Text

ONE_IN = 20
"""The share of the text that is held out."""
LEAST_CHARACTERS = 200_000
ENDINGS = {".py", ".txt", ".md", ".rst"}
# What lies beside the library's own sources, and files that hold tables rather than code.
LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"),
    *("encodings", "pydoc_data", "entities.py"),
}
SAMPLE_TOKENS = 120
PROMPT_CHARACTERS = 40

console = Console(highlight=False)


class DemoError(Exception):
    """The demo cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Corpus:
    """Text to learn from, and text kept apart to see what was learnt."""

    source: str
    train: list[str]
    held_out: list[str]


def read_corpus(path: Path | None) -> Corpus:
    """Read the files, and keep some apart: every twentieth, or the end of the text if there are few."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            file for file in sorted(root.rglob("*.py")) if not LEFT_OUT & {*file.relative_to(root).parts}
        ]
        source = f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
        source = str(path)
    elif path.is_file():
        files, source = [path], str(path)
    else:
        raise DemoError(f"{path} is no file and no folder; TEXT is a text file or a folder of them")
    texts, unreadable = list[str](), 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            unreadable += 1
            continue
        if "\0" in text:
            unreadable += 1
        elif text.strip():
            texts.append(text)
    if unreadable:
        say(f"{unreadable} files are not UTF-8 text and are left out")
    size = sum(map(len, texts))
    if size < LEAST_CHARACTERS:
        raise DemoError(
            f"{source} holds {size:,} characters of text in {len(texts)} files "
            f"({', '.join(sorted(ENDINGS))}); the demo needs at least {LEAST_CHARACTERS:,} to learn anything"
        )
    if len(texts) >= ONE_IN:
        held_out = texts[ONE_IN - 1 :: ONE_IN]
        train = [text for number, text in enumerate(texts, 1) if number % ONE_IN]
    else:
        cuts = [len(text) - len(text) // ONE_IN for text in texts]
        train = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        held_out = [text[cut:] for text, cut in zip(texts, cuts, strict=True) if text[cut:].strip()]
    return Corpus(source, train, held_out)


def say(message: str, style: str | None = None) -> None:
    """Print a line of the demo as it is: paths and texts may look like markup."""
    console.print("  " + message, style=style, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def step(title: str) -> Generator[None]:
    """Announce a step, measure it, and say how long it took."""
    console.print(f"[bold]{title}[/bold]")
    start = time.perf_counter()
    with av_memory.MemoryTracker(title) as tracker:
        yield
    seconds = time.perf_counter() - start
    say(f"{seconds:.1f} s, peak {tracker.result.cpu.peak_mb:,.0f} MB", style="dim")


def printable(text: str) -> str:
    """The text without characters that a terminal obeys."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def prompts_for(corpus: Corpus) -> list[str]:
    """Beginnings for the model to go on from: code for code, else lines that it has not seen."""
    if corpus.source.startswith("the standard library"):
        return [
            "def read_file(path):\n",
            "class Stack:\n    def __init__(self",
            'if __name__ == "__main__":\n',
        ]
    lines = [line.strip() for text in corpus.held_out for line in text.splitlines()]
    long_enough = [line for line in lines if len(line) >= PROMPT_CHARACTERS] or lines
    return [line[:PROMPT_CHARACTERS] for line in long_enough[:: max(1, len(long_enough) // 3)][:3] if line]


def run(arguments: argparse.Namespace) -> Path:
    """Do all of it, and return the page."""
    from llm_trainer.config import ModelConfig, TrainingConfig
    from llm_trainer.data import LanguageModelingDataset
    from llm_trainer.models import TransformerLM
    from llm_trainer.tokenizer import BPETokenizer
    from llm_trainer.training import Trainer
    from llm_trainer.training.plots import loss_curve_svg
    from llm_trainer.utils.metrics import bits_per_byte

    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    facts: list[tuple[str, str]] = []

    with step("Read the text"):
        corpus = read_corpus(arguments.text)
        size_mb = sum(len(text.encode()) for text in corpus.train) / 1e6
        facts.append(("Text", f"{corpus.source}: {size_mb:.1f} million bytes in {len(corpus.train)} files"))
        say(f"{facts[-1][1]}, and {len(corpus.held_out)} held out")

    with step("Train the tokenizer"):
        tokenizer = BPETokenizer()
        tokenizer.train(corpus.train, vocab_size=arguments.vocab_size)

    with step("Encode"):
        train = LanguageModelingDataset(corpus.train, tokenizer, max_length=arguments.length)
        held_out = LanguageModelingDataset(corpus.held_out, tokenizer, max_length=arguments.length)
        stats = train.get_stats()
        per_token = stats["num_text_bytes"] / stats["num_tokens"]
        facts.append(
            ("Tokens", f"{stats['num_tokens']:,} of {tokenizer.vocab_size} kinds, {per_token:.2f} bytes each")
        )
        say(facts[-1][1])

    with step("Train the model"):
        model = TransformerLM(
            ModelConfig(
                vocab_size=tokenizer.vocab_size,
                d_model=arguments.width,
                n_heads=arguments.width // 64,
                n_layers=arguments.layers,
                d_ff=4 * arguments.width,
                max_seq_len=arguments.length,
                dropout=0.0,
                attention_dropout=0.0,
                activation="relu2",
                norm="rmsnorm",
                positions="rope",
                qk_norm=True,
                bias=False,
                zero_init_projections=True,
            )
        )
        facts.append(("Model", f"{model.get_num_params():,} parameters, {model.get_model_size_mb():.1f} MB"))
        say(f"{facts[-1][1]}; {arguments.steps} steps of {arguments.batch} x {arguments.length} tokens")
        config = TrainingConfig(
            batch_size=arguments.batch,
            learning_rate=arguments.learning_rate,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            max_steps=arguments.steps,
            warmup_steps=None,
            warmup_ratio=0.1,
            min_lr_ratio=0.0,
            amp_dtype="bfloat16",
            eval_steps=max(1, arguments.steps // 4),
            logging_steps=max(1, arguments.steps // 40),
            output_dir=str(output / "training"),
            checkpoint_dir=None,
            report_to=(),
        )
        trainer = Trainer(model, tokenizer, config, train_dataset=train, eval_dataset=held_out)
        history = trainer.train()

    with step("Save it, load it back"):
        trainer.save_model(output / "model")
        again = Trainer.from_pretrained(output / "model", config=config, eval_dataset=held_out)
        result = again.evaluate()
        last = history.eval_losses[-1][1]
        if not math.isclose(result["loss"], last, rel_tol=1e-4):
            raise DemoError(f"the loaded model has a loss of {result['loss']}, the trained one {last}")
        bits = bits_per_byte(result["loss"], held_out)
        facts.append(
            (
                "Loss on the held-out files",
                f"{result['loss']:.3f} nats a token, {bits:.2f} bits a byte "
                f"(knowing nothing: {math.log(tokenizer.vocab_size):.3f} nats)",
            )
        )
        say(f"by the loaded model, on the held-out files: {facts[-1][1]}")

    samples: list[tuple[str, str]] = []
    with step("Let it write"):
        for prompt in prompts_for(corpus):
            while len(tokenizer.encode(prompt)) > arguments.length // 2:
                prompt = prompt[: len(prompt) // 2]
            text = again.generate_text(
                prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.7, top_k=50
            )
            samples.append((prompt, text.removeprefix(prompt)))
            console.print(Text(printable(prompt), style="bold cyan"), Text(printable(samples[-1][1])), sep="")
            console.rule(style="dim")

    svg = loss_curve_svg(history)
    page = output / "report.html"
    av_memory.save_report(
        page,
        title="From raw text to written text",
        sections={
            "What was made": facts_list(facts),
            "Loss": svg[svg.index("<svg") :],
            "What it writes": "".join(
                f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in samples
            ),
        },
    )
    return page


def facts_list(facts: list[tuple[str, str]]) -> str:
    """The facts as an HTML list."""
    lines = (f"<li><b>{html.escape(name)}</b>: {html.escape(value)}</li>" for name, value in facts)
    return f"<ul>{''.join(lines)}</ul>"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options, of which TEXT and OUT can also come from the environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    text, output = os.environ.get("TEXT"), os.environ.get("OUT")
    parser.add_argument(
        "--text", type=Path, default=Path(text) if text else None, help="text file or folder to learn from"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(output or "runs/demo"), help="folder for model and page"
    )
    parser.add_argument("--steps", type=int, default=750, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--width", type=int, default=192, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--vocab-size", type=int, default=4096, help="kinds of tokens")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="highest learning rate")
    arguments = parser.parse_args(argv)
    if arguments.width < 64 or arguments.width % 64:
        parser.error(f"--width is {arguments.width}; it has to be a multiple of 64")
    for name in ("steps", "batch", "length", "layers"):
        if getattr(arguments, name) < (2 if name == "length" else 1):
            parser.error(f"--{name} is {getattr(arguments, name)}; it is too small")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when all is well, 1 with a message when it cannot go on, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    from llm_trainer.exceptions import LLMTrainerError

    start = time.perf_counter()
    try:
        page = run(arguments)
    except (DemoError, LLMTrainerError, OSError) as error:
        console.print(f"demo: {error}", style="red", markup=False, emoji=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        say(f"demo: interrupted; {arguments.output} holds only whole files, maybe of an earlier run")
        return 130
    say(f"Done in {time.perf_counter() - start:.0f} s. Open {page.resolve()}", style="bold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
