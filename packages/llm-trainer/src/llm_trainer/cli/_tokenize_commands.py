"""What can be said to `llm-trainer tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_trainer.cli._options import Command, ConfigFile, LogLevel, argument, option

app = typer.Typer(
    name="tokenize",
    help="Train and use tokenizers, and prepare token files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TokenizerDir = Annotated[
    Path,
    option(
        "--tokenizer",
        metavar="DIR",
        help="Folder with a tokenizer.json: of `tokenize train`, of a trained model, or somebody else's.",
    ),
]


@app.command(cls=Command)
def train(
    output_dir: Annotated[Path, option(metavar="DIR", help="Folder to write the tokenizer to.")],
    files: Annotated[
        list[str] | None,
        option(metavar="PATH...", help="Text files and folders to learn from; several may follow."),
    ] = None,
    config: ConfigFile = None,
    vocab_size: Annotated[
        int | None,
        option(help="Tokens, special ones included. By default what the configuration says, or 50000."),
    ] = None,
    kind: Annotated[str, option(help="bpe (byte pairs, any text) or char (one token a character).")] = "bpe",
    log_level: LogLevel = "info",
) -> None:
    """Train a tokenizer on the text of files, or on that of a run's configuration.

    Examples:
      llm-trainer tokenize train --files books/ notes.txt --vocab-size 8192 --output-dir tokenizers/books
      llm-trainer tokenize train --config configs/tiny.yaml --output-dir tokenizers/tiny
    """
    from llm_trainer.cli._tokenize import train_tokenizer

    train_tokenizer(
        output_dir, files=files, config=config, vocab_size=vocab_size, kind=kind, log_level=log_level
    )


@app.command(cls=Command)
def encode(
    tokenizer: TokenizerDir,
    texts: Annotated[
        list[str] | None, argument(metavar="[TEXT]...", help="Without any, all of standard input.")
    ] = None,
    special_tokens: Annotated[bool, option(help="Whether to put what begins a text before it.")] = False,
    pieces: Annotated[bool, option("--pieces", help="Show the tokens instead of their ids.")] = False,
    log_level: LogLevel = "info",
) -> None:
    """Print the ids of texts, one text a line.

    Examples:
      llm-trainer tokenize encode --tokenizer runs/tiny "def main():"
      llm-trainer tokenize encode --tokenizer runs/tiny --pieces < book.txt
    """
    from llm_trainer.cli._tokenize import encode_texts

    encode_texts(tokenizer, texts, special_tokens=special_tokens, pieces=pieces, log_level=log_level)


@app.command(cls=Command)
def decode(
    tokenizer: TokenizerDir,
    ids: Annotated[
        list[int] | None, argument(metavar="[ID]...", help="Without any, those on standard input.")
    ] = None,
    special_tokens: Annotated[bool, option(help="Whether to show special tokens.")] = False,
    log_level: LogLevel = "info",
) -> None:
    """Print the text of ids; those of standard input line by line.

    Examples:
      llm-trainer tokenize decode --tokenizer runs/tiny 311 270 40
      llm-trainer tokenize decode --tokenizer runs/tiny < ids.txt
    """
    from llm_trainer.cli._tokenize import decode_ids

    decode_ids(tokenizer, ids, special_tokens=special_tokens, log_level=log_level)


@app.command(cls=Command)
def data(
    config: Annotated[
        Path,
        option(
            metavar="FILE", exists=True, dir_okay=False, help="Configuration of a run, or of its data alone."
        ),
    ],
    output_dir: Annotated[
        Path, option(metavar="DIR", help="Folder of the token files: DataConfig.cache_dir of the run.")
    ],
    tokenizer: Annotated[
        Path | None,
        option(
            metavar="DIR",
            help="Use this tokenizer; by default the configuration's, which may be one to train.",
        ),
    ] = None,
    log_level: LogLevel = "info",
) -> None:
    """Turn the text of a configuration into token files ahead of training.

    A run with the same text, tokenizer and DIR as data.cache_dir then begins at once.

    Example:
      llm-trainer tokenize data --config run.yaml --output-dir tokens --tokenizer tokenizers/books
      llm-trainer train --config run.yaml --set data.cache_dir=tokens data.tokenizer=tokenizers/books
    """
    from llm_trainer.cli._tokenize import prepare_data

    prepare_data(config, output_dir, tokenizer=tokenizer, log_level=log_level)
