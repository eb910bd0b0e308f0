"""What can be said on the command line; what is then done is in the modules that the commands import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_trainer.cli._options import ConfigFile, Device, Json, LogLevel, ModelPath, argument, option


def train(
    config: ConfigFile = None,
    output_dir: Annotated[
        Path | None,
        option(
            metavar="DIR",
            help="Folder of the run: model, tokenizer, checkpoints, curves and logs. By default what the "
            "configuration says, or ./output.",
        ),
    ] = None,
    resume_from_checkpoint: Annotated[
        str | None,
        option(
            metavar="PATH|latest",
            help="Go on from a checkpoint's folder, or from the newest whole one (and begin anew if there "
            "is none).",
        ),
    ] = None,
    force_retrain_tokenizer: Annotated[
        bool,
        option(
            "--force-retrain-tokenizer",
            help="Train the tokenizer again, even if the one in the output folder is of the same text and "
            "vocabulary size.",
        ),
    ] = False,
    preset: Annotated[
        str | None,
        option(
            metavar="NAME",
            help="Model instead of the file's: gpt2, llama or speedrun, with -mini, -small or -medium.",
        ),
    ] = None,
    train_file: Annotated[
        str | None,
        option(metavar="PATH", help="Text file or folder to train on, instead of the file's text."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field; several may follow."),
    ] = None,
    device: Device = None,
    dry_run: Annotated[
        bool,
        option(
            "--dry-run",
            help="Prepare tokenizer and tokens (the run takes them over), pass one batch forward and back, "
            "tell what the run will take, and stop.",
        ),
    ] = False,
    log_level: LogLevel = "info",
) -> None:
    """Train a tokenizer and a model on text.

    The tokenizer is kept in DIR/tokenizer and trained again only when the text or the vocabulary size
    changed. Checkpoints are in DIR/checkpoints, unless the configuration says otherwise; the finished model
    and its tokenizer are in DIR itself, for `generate` and `evaluate`. DIR/config.yaml holds all settings.

    Ctrl-C and SIGTERM save a checkpoint within a step and end with exit code 130 and 143; go on with
    --resume-from-checkpoint latest, to the same result as if nothing had happened.

    Examples:
      llm-trainer train --config configs/tiny.yaml --output-dir runs/tiny
      llm-trainer train --config configs/tiny.yaml --output-dir runs/tiny --resume-from-checkpoint latest
      llm-trainer train --config configs/tiny.yaml --set training.max_steps=500 training.learning_rate=1e-3
      llm-trainer train --preset llama-mini --train-file books/ --output-dir runs/books --dry-run
    """
    from llm_trainer.cli._settings import read_run

    run = read_run(
        config,
        output_dir=output_dir,
        resume=resume_from_checkpoint,
        preset=preset,
        train_file=train_file,
        changes=settings or (),
    )
    from llm_trainer.cli._train import train_run

    train_run(
        run, force_tokenizer=force_retrain_tokenizer, device=device, dry_run=dry_run, log_level=log_level
    )


def evaluate(
    model_path: ModelPath,
    dataset_config: Annotated[
        Path | None,
        option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="YAML or JSON file of a DataConfig, or of a run with its section data: its "
            "validation_file or validation_split is evaluated on.",
        ),
    ] = None,
    file: Annotated[
        str | None, option(metavar="PATH", help="Text file or folder to evaluate on instead.")
    ] = None,
    output_path: Annotated[
        Path | None, option(metavar="FILE", help="Write the results there as JSON.")
    ] = None,
    max_batches: Annotated[
        int | None,
        option(min=1, help="Evaluate on so many batches only: drawn from the whole text, always the same."),
    ] = None,
    batch_size: Annotated[int, option(min=1, help="Rows in a batch.")] = 16,
    generate: Annotated[
        int, option(metavar="N", min=0, help="Also continue N of the texts and measure the result.")
    ] = 0,
    seed: Annotated[int, option(min=0, help="Of the continuations.")] = 0,
    device: Device = None,
    json_output: Json = False,
    log_level: LogLevel = "info",
) -> None:
    """Measure how well a model predicts text.

    Tells the loss (nats a token, weighted by tokens), the perplexity, and the bits a byte, which compare
    models of different tokenizers. With --generate, the beginnings of N texts are continued and compared
    with how they really go on: variety, repetition, BLEU and chrF.

    Examples:
      llm-trainer evaluate --model-path runs/tiny --dataset-config configs/eval_config.json
      llm-trainer evaluate --model-path runs/tiny --file book.txt --output-path results.json
      llm-trainer evaluate --model-path runs/tiny --file book.txt --max-batches 100 --generate 20
    """
    from llm_trainer.cli._settings import read_evaluation_text

    data = read_evaluation_text(dataset_config, file)
    from llm_trainer.cli._evaluate import evaluate_model

    evaluate_model(
        model_path,
        data,
        output_path=output_path,
        max_batches=max_batches,
        batch_size=batch_size,
        continuations=generate,
        seed=seed,
        device=device,
        as_json=json_output,
        log_level=log_level,
    )


def generate(
    model_path: ModelPath,
    prompts: Annotated[
        list[str] | None, option(metavar="TEXT...", help="Texts to continue; several may follow.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        option(
            metavar="FILE", exists=True, dir_okay=False, help="File with a prompt on each line, after those."
        ),
    ] = None,
    max_length: Annotated[
        int, option(min=1, help="Most tokens of a text, those of the prompt included.")
    ] = 100,
    max_new_tokens: Annotated[
        int | None, option(min=1, help="Most tokens to add, instead of --max-length.")
    ] = None,
    temperature: Annotated[
        float, option(help="Below 1 is likelier, above 1 bolder text; 0 always takes the likeliest.")
    ] = 0.8,
    top_k: Annotated[int | None, option(help="Choose among the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, option(help="Choose among the fewest tokens that have this probability together.")
    ] = None,
    repetition_penalty: Annotated[
        float, option(help="Above 1, tokens that are there already are less likely.")
    ] = 1.0,
    seed: Annotated[int | None, option(min=0, help="The same number gives the same texts again.")] = None,
    interactive: Annotated[
        bool, option("--interactive", help="Then continue each line of standard input.")
    ] = False,
    output_path: Annotated[
        Path | None, option(metavar="FILE", help="Write prompts and texts there as JSON.")
    ] = None,
    device: Device = None,
    log_level: LogLevel = "info",
) -> None:
    """Let a model continue texts.

    Each text is printed with its prompt, up to --max-length tokens or to where the model ends it; two texts
    are separated by a line with ---. In interactive mode each line is a prompt; Ctrl-D (the end of the input)
    and Ctrl-C end it, with exit code 0.

    Examples:
      llm-trainer generate --model-path runs/tiny --prompts "The future of AI" "Once upon a time"
      llm-trainer generate --model-path runs/tiny --prompts "import " --temperature 0
      llm-trainer generate --model-path runs/tiny --interactive --top-p 0.9 --max-new-tokens 50
    """
    if not prompts and prompts_file is None and not interactive:
        raise typer.BadParameter("give --prompts, --prompts-file or --interactive", param_hint="prompts")
    from llm_trainer.cli._generate import Sampling, generate_texts

    generate_texts(
        model_path,
        prompts or [],
        Sampling(
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        ),
        prompts_file=prompts_file,
        seed=seed,
        interactive=interactive,
        output_path=output_path,
        device=device,
        log_level=log_level,
    )


def info(
    path: Annotated[
        Path | None, argument(metavar="[PATH]", help="Model, checkpoint, run folder or configuration.")
    ] = None,
    json_output: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Tell about a model, run or configuration, or this machine.

    PATH is a folder of a model, checkpoint or run, or a configuration file. A checkpoint's files are compared
    with their hashes; if one is damaged, that is told and the exit code is 1.

    Examples:
      llm-trainer info                            versions, devices, threads, memory
      llm-trainer info runs/tiny                  model, tokenizer, checkpoints, last losses
      llm-trainer info runs/tiny/checkpoints/checkpoint-200
      llm-trainer info configs/llama_mini.yaml    parameters and memory of what it describes
    """
    from llm_trainer.cli._info import show_info

    show_info(path, as_json=json_output, log_level=log_level)


def export_model(
    model_dir: Annotated[Path, argument(help="Model, checkpoint or run folder.")],
    out: Annotated[Path, argument(help="Folder to write.")],
    format_name: Annotated[str, option("--format", help="Only hf: Hugging Face transformers.")] = "hf",
    log_level: LogLevel = "info",
) -> None:
    """Write a model, with its tokenizer, for use by other software.

    Models with rope, rmsnorm and swiglu become a Llama, those with learned positions, layernorm, gelu and
    biases a GPT-2; transformers gives the same logits. Others are refused, with the fields in the way.

    Example:
      llm-trainer export runs/llama_mini llama-mini-hf
      python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('llama-mini-hf')"
    """
    if format_name != "hf":
        raise typer.BadParameter(f"{format_name!r} is not known; there is hf", param_hint="--format")
    from llm_trainer.cli._convert import export_folder

    export_folder(model_dir, out, log_level=log_level)


def import_model(
    hf_dir: Annotated[
        Path,
        argument(exists=True, file_okay=False, help="Folder of a Llama or GPT-2 checkpoint of transformers."),
    ],
    out: Annotated[Path, argument(help="Folder to write.")],
    log_level: LogLevel = "info",
) -> None:
    """Read a Hugging Face checkpoint as a model of this package.

    It is read from a local folder, with weights in safetensors. If the folder has a tokenizer.json, it comes
    along, and `generate` and `evaluate` work on the result.

    Example:
      llm-trainer import ~/models/SmolLM-135M smollm
      llm-trainer generate --model-path smollm --prompts "Once upon a time"
    """
    from llm_trainer.cli._convert import import_folder

    import_folder(hf_dir, out, log_level=log_level)
