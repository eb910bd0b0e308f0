"""AOTInductor: an exported program compiled into native code of one device."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hamerspace._imports import need
from hamerspace.backends._pytorch_export import quiet
from hamerspace.exceptions import BackendError, first_line


def why_no_compiler() -> str | None:
    """Say what is missing for AOTInductor on the CPU, or None."""
    wanted = os.environ.get("CXX", "g++")
    if shutil.which(wanted) is None:
        return f"AOTInductor compiles C++, and there is no {wanted}; install g++ or name a compiler in CXX"
    return None


def compile_package(program: Any, path: Path, *, threads: int, work: Path, autotune: bool = True) -> None:
    """Compile an exported program and write it as a package.

    Args:
        program: what torch.export gave.
        path: ends in ``.pt2``.
        threads: of the code; inductor writes their number into it.
        work: a folder for the compiler's own files, such as precompiled headers, which later calls use again.
        autotune: choose kernels of matrix products by timing them. It saves oneDNN's 20 us a call, but makes
            wrong code of weights that are packed for int8, or crashes (torch 2.15).

    Raises:
        BackendError: there is no compiler, or it failed.
    """
    torch = need("torch")
    if missing := why_no_compiler():
        raise BackendError(missing)
    # Weights become part of the code, so that they are packed when it is compiled.
    options: dict[str, Any] = {"freezing": True, "cpp.threads": threads}
    if autotune:
        options |= {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
    if hasattr(need("torch._inductor.config").aot_inductor, "enable_line_tables"):
        # For profilers, and often more bytes than the code itself.
        options["aot_inductor.enable_line_tables"] = False
    try:
        with _cache_in(work), quiet(), _no_choices_shown(), torch.no_grad():
            need("torch._inductor").aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        raise BackendError(f"AOTInductor failed: {first_line(error)}") from error


@contextmanager
def _no_choices_shown() -> Generator[None, None, None]:
    """Keep the times of kernels that were tried off the screen."""
    config, chooser = need("torch._inductor.config"), need("torch._inductor.select_algorithm")
    shown = getattr(chooser, "PRINT_AUTOTUNE", None)
    chooser.PRINT_AUTOTUNE = False
    try:
        known = hasattr(config, "max_autotune_report_choices_stats")
        with config.patch(max_autotune_report_choices_stats=False) if known else nullcontext():
            yield
    finally:
        chooser.PRINT_AUTOTUNE = shown


@contextmanager
def _cache_in(folder: Path) -> Generator[None, None, None]:
    key = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(key)
    os.environ[key] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
