"""The command `bitlab`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from bitcore.config import BitQuantConfig
from bitcore.exceptions import BitLabError, QuantizationError
from bitcore.kernels import KernelRegistry
from bitcore.packing.hf_bitnet import LinearClass
from bitlayers import BitLinear
from bitlayers.utils import median_times_ms
from rich.console import Console
from rich.table import Table

from bitmodels.auto import AutoBitModel
from bitmodels.base import BitModelBase
from bitmodels.exceptions import CheckpointError
from bitmodels.formats import gguf, huggingface
from bitmodels.formats._files import CONFIG, read_json
from bitmodels.transformer import BitTransformerLM
from bitmodels.utils import analyze_model

__all__ = ["main"]

_SHAPES = ("768x768", "2048x2048", "4096x4096", "4096x11008")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 for an error that it explains, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (BitLabError, ImportError, OSError) as error:
        print(f"bitlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bitlab: stopped; files that were there before are whole", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitlab",
        description="Look at ternary models, convert and export them, and measure their kernels.",
        epilog="MODEL is a folder that save_pretrained wrote, or a BitNet checkpoint from Hugging Face.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    analyze = commands.add_parser("analyze", help="what a model consists of, and what it takes")
    analyze.add_argument("model", type=Path, metavar="MODEL")
    analyze.add_argument("--json", action="store_true", help="print JSON in place of a table")
    analyze.set_defaults(run=_analyze)

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint in another layout, or packed",
        description="Read a checkpoint and write it in another layout, packed unless --keep-floats.",
    )
    convert.add_argument("model", type=Path, metavar="MODEL")
    convert.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    convert.add_argument("--to", choices=("bitmodels", "huggingface"), default="bitmodels", help="the layout")
    convert.add_argument(
        "--linear-class",
        choices=get_args(LinearClass),
        default="bitlinear",
        help="for --to huggingface: the layer of transformers that will compute (default: %(default)s)",
    )
    convert.add_argument(
        "--keep-floats", action="store_true", help="keep float weights, to train them further"
    )
    convert.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="write a GGUF file for llama.cpp or bitnet.cpp")
    export.add_argument("model", type=Path, metavar="MODEL")
    export.add_argument("out", type=Path, metavar="FILE.gguf")
    export.add_argument(
        "--type",
        choices=get_args(gguf.GGUFType),
        default="TQ2_0",
        help="of the ternary weights; I2_S is for bitnet.cpp alone (default: %(default)s)",
    )
    export.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json (default: the model's own, if it has one)",
    )
    export.add_argument("--force", action="store_true", help="replace FILE.gguf")
    export.set_defaults(run=_export)

    bench = commands.add_parser(
        "bench",
        help="time the kernels of this machine against torch",
        description="Time a deployed layer against torch's linear layers on this machine, in turns.",
    )
    bench.add_argument(
        "--shapes", nargs="+", default=_SHAPES, metavar="ROWSxCOLUMNS", help="(default: %(default)s)"
    )
    bench.add_argument(
        "--batch", nargs="+", type=int, default=[1], metavar="M", help="rows of inputs (default: 1)"
    )
    bench.add_argument("--threads", type=int, default=1, help="(default: 1)")
    bench.add_argument("--rounds", type=int, default=5, help="turns each (default: 5)")
    bench.add_argument("--json", action="store_true", help="print JSON in place of a table")
    bench.set_defaults(run=_bench)
    return parser


def _load(folder: Path) -> BitModelBase:
    if read_json(folder / CONFIG).get("format") == "bitmodels":
        return AutoBitModel.from_pretrained(folder)
    return huggingface.load(folder)


def _analyze(options: argparse.Namespace) -> None:
    found = analyze_model(_load(options.model))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    table = Table("layer", "type", "shape", "bytes deployed", "zeros", title=str(options.model))
    for layer in found["layers"]:
        shape = " x ".join(str(size) for size in layer["shape"])
        table.add_row(layer["name"], layer["type"], shape, f"{layer['bytes']:,}", f"{layer['zeros']:.1%}")
    console = Console()
    console.print(table)
    form = "deployed" if found["is_deployed"] else "with float weights"
    for line in (
        f"{found['total_params']:,} parameters, {found['quantized_share']:.1%} of them ternary, {form}",
        f"{found['total_bytes']:,} bytes now, {found['deployed_bytes']:,} deployed, "
        f"{found['float32_bytes']:,} in 32 bits: {found['memory_reduction']:.1%} less",
        f"{found['bits_per_ternary_weight']:.3f} stored bits for each ternary weight",
    ):
        console.print(line, highlight=False)


def _convert(options: argparse.Namespace) -> None:
    out: Path = options.out
    if out.resolve() == options.model.resolve():
        raise CheckpointError("OUT is the folder of MODEL; name another.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.force:
        raise CheckpointError(f"{out} is there already; name another, or add --force.")
    model = _load(options.model)
    if not options.keep_floats:
        model.deploy()
    elif model.is_deployed:
        raise CheckpointError(f"{options.model} holds packed weights alone, so there are no floats to keep.")
    if options.to == "bitmodels":
        model.save_pretrained(out)
    elif isinstance(model, BitTransformerLM):
        huggingface.save(model, out, linear_class=options.linear_class)
    else:
        raise CheckpointError(
            f"the Hugging Face layout is for language models, not for a {type(model).__name__}."
        )
    for name in _TOKENIZER_FILES:
        if (options.model / name).is_file():
            shutil.copyfile(options.model / name, out / name)
    taken = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{out}: {taken:,} bytes of weights")


def _export(options: argparse.Namespace) -> None:
    if options.out.exists() and not options.force:
        raise CheckpointError(f"{options.out} is there already; name another, or add --force.")
    model = _load(options.model)
    if not isinstance(model, BitTransformerLM):
        raise CheckpointError(f"GGUF is for language models, not for a {type(model).__name__}.")
    own = options.model / "tokenizer.json"
    tokenizer = options.tokenizer or (own if own.is_file() else None)
    gguf.export(model, options.out, kind=options.type, tokenizer=tokenizer, name=options.model.resolve().name)
    without = "" if tokenizer else ", without a vocabulary"
    print(f"{options.out}: {options.out.stat().st_size:,} bytes{without}")


def _bench(options: argparse.Namespace) -> None:
    shapes: list[tuple[int, int]] = []
    for text in options.shapes:
        rows, _, columns = str(text).partition("x")
        if not rows.isdecimal() or not columns.isdecimal():
            raise QuantizationError(f"--shapes takes ROWSxCOLUMNS, such as 4096x4096, not {text!r}.")
        shapes.append((int(rows), int(columns)))
    if options.threads < 1 or any(batch < 1 for batch in options.batch):
        raise QuantizationError("--threads and --batch take whole numbers above zero.")
    torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for rows, columns in shapes:
            layer = BitLinear(columns, rows, bias=False).deploy()
            weight = torch.randn(rows, columns)
            half = weight.bfloat16()
            for batch in options.batch:
                x = torch.randn(batch, columns)
                x_half = x.bfloat16()
                linear = torch.nn.functional.linear
                times = median_times_ms(
                    [lambda: layer(x), lambda: linear(x_half, half), lambda: linear(x, weight)],  # noqa: B023
                    rounds=options.rounds,
                    threads=options.threads,
                )
                kernel = KernelRegistry.get_kernel_for_config(BitQuantConfig(), "cpu", (rows, columns)).name
                results.append(
                    {
                        "rows": rows,
                        "columns": columns,
                        "batch": batch,
                        "kernel": kernel,
                        "ternary_us": times[0] * 1000,
                        "bf16_us": times[1] * 1000,
                        "fp32_us": times[2] * 1000,
                    }
                )
    if options.json:
        print(
            json.dumps({"torch": torch.__version__, "threads": options.threads, "results": results}, indent=2)
        )
        return
    table = Table("rows x columns", "batch", "kernel", "ternary us", "bf16 us", "fp32 us", "against bf16")
    for row in results:
        table.add_row(
            f"{row['rows']} x {row['columns']}",
            str(row["batch"]),
            row["kernel"],
            *(f"{row[name]:.1f}" for name in ("ternary_us", "bf16_us", "fp32_us")),
            f"{row['bf16_us'] / row['ternary_us']:.1f} x",
        )
    Console().print(table)
