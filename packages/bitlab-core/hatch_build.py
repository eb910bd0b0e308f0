"""Compiles the native kernels into the wheel, or makes a pure wheel where there is no C++ compiler.

`BITCORE_NATIVE=1` in the environment makes a missing or failing compiler an error; `BITCORE_NATIVE=0` leaves
the kernels out. `CXX` names the compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mf16c"]
_UNITS = {
    "dispatch": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "vnni": _AVX512,
    "amx": [*_AVX512, "-mamx-tile", "-mamx-int8"],
}
# No contraction: results are to be the same to the bit on every processor. No elimination of partial
# redundancies: GCC's keeps sums on the stack in the innermost loops, which then take a quarter longer.
_FLAGS = [
    "-O3",
    "-fno-tree-pre",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
]


class CustomBuildHook(BuildHookInterface):
    """Puts `libbitcore.so` beside the Python files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the files are collected."""
        library = Path(self.root, "src", "bitcore", "_native", "libbitcore.so")
        wanted = os.environ.get("BITCORE_NATIVE", "")
        reason = "BITCORE_NATIVE=0 asks for none" if wanted == "0" else self._compile(library)
        if reason is None:
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-linux_x86_64"
            build_data["force_include"][str(library)] = "bitcore/_native/libbitcore.so"
            return
        # One of an earlier build is of other sources, or is not wanted.
        library.unlink(missing_ok=True)
        if wanted == "1":
            raise RuntimeError(f"the native kernels of bitlab-core cannot be built: {reason}")
        self.app.display_warning(f"bitlab-core is built without its native kernels: {reason}")

    def _compile(self, library: Path) -> str | None:
        """Compile, and return why it could not be done, or None."""
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            return f"there are none for {platform.system()} on {platform.machine()}"
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if not compiler or shutil.which(compiler[0]) is None:
            return f"there is no C++ compiler {' '.join(compiler)}"
        sources = Path(self.root, "src", "bitcore", "csrc")
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            objects = [str(Path(folder, f"{unit}.o")) for unit in _UNITS]
            made = str(Path(folder, library.name))
            commands = [
                [*compiler, *_FLAGS, *flags, "-c", str(sources / f"{unit}.cpp"), "-o", target]
                for (unit, flags), target in zip(_UNITS.items(), objects, strict=True)
            ]
            # Nothing of the C++ library is used, so that what comes out needs no more than libc.
            commands.append([*compiler, "-shared", "-Wl,--as-needed", "-s", "-o", made, *objects])
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    return f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}"
            Path(made).replace(library)
        return None
