"""Compile a model's blocks with torch.compile.

Each block is compiled, not the whole model: all layers share one graph, so it takes seconds where the whole
takes minutes, and on a CPU is as fast. Batch and length are left open in the graph, so a batch of another
shape is no new compilation, and the code that runs is the same whatever shape came first: a run that is
resumed computes what it would have without the interruption, to the bit.
"""

from __future__ import annotations

import importlib
import itertools
import types
from typing import Any

import torch
from torch import Tensor

from llm_trainer.exceptions import TrainingError
from llm_trainer.models._blocks import Block
from llm_trainer.models._transformer import TransformerLM

_MOST_GRAPHS = 64
_numbers = itertools.count()


def _run_block(
    block: Block,
    x_BTD: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    return block(x_BTD, rope, mask, documents)


def _increment(x: Tensor) -> Tensor:
    return x + 1


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        TrainingError: Nothing can be compiled here; most often a C++ compiler is missing.
    """
    try:
        torch.compile(_increment, fullgraph=True)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"compile_model=True cannot be met, because torch.compile fails here ({reason}). On a CPU it "
            "needs a C++ compiler: install g++ (Debian: apt install g++), or name one in the environment "
            "variable CXX; or train with compile_model=False."
        ) from error


def compile_blocks_(model: TransformerLM) -> None:
    """Let the model run its blocks compiled, but for generation with a cache.

    Compiling happens at the first batches. State dictionaries keep their names. Dropout's random numbers come
    from torch's generator, though not the same ones as without compiling.

    Raises:
        TrainingError: See `check_compiler`.
    """
    check_compiler(model.embedding.weight.device)
    # The compiler counts the graphs of a function's code, and refuses more than a few: so each model has code
    # of its own, and the limit leaves room for every kind of batch.
    code = _run_block.__code__.replace(co_name=f"{_run_block.__name__}_{next(_numbers)}")
    function = types.FunctionType(code, _run_block.__globals__)
    # It takes a second to load, so it is loaded when it is needed.
    limits: Any = importlib.import_module("torch._dynamo.config")
    limits.recompile_limit = max(limits.recompile_limit, _MOST_GRAPHS)
    model.run_block = torch.compile(function, fullgraph=True, dynamic=True)
