"""Programs of torch.export, TorchScript, and packages of AOTInductor, with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from hamerspace._arrays import as_array, flatten_outputs
from hamerspace._imports import need
from hamerspace._trust import NATIVE, check_native
from hamerspace.artifact import Manifest
from hamerspace.exceptions import ArtifactError, BackendError, ModelError, UnsafeModelError, first_line
from hamerspace.models.exported import load_exported
from hamerspace.models.info import Array, Feeds, TensorSpec
from hamerspace.models.pytorch import open_torchscript
from hamerspace.runtimes.base import Runner, RunOptions

OPERATORS: Final = ("bitsandbytes", "torchao")
"""Libraries whose operators a saved program may use: all that a manifest can have imported."""


class PositionalRunner(Runner):
    """Runs what takes tensors by position, and gives tensors in the order of the outputs."""

    def __init__(
        self,
        run: Callable[..., Any],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: str = "cpu",
    ) -> None:
        self._run = run
        self.inputs, self.outputs = inputs, outputs
        self._device = device

    def prepare(self, feeds: Feeds) -> list[Any]:
        """Return tensors on the device, in the order of the inputs."""
        torch = need("torch")
        return [
            torch.from_numpy(np.require(feeds[spec.name], requirements=["C", "W"])).to(self._device)
            for spec in self.inputs
        ]

    def run_prepared(self, prepared: Any) -> Any:
        """Run once without gradients."""
        torch = need("torch")
        with torch.inference_mode():
            given = self._run(*prepared)
            if self._device != "cpu":
                torch.cuda.synchronize()
            return given

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name."""
        given = self.run_prepared(self.prepare(feeds))
        tensors = list(flatten_outputs(given)[1].values())
        names = [spec.name for spec in self.outputs] or [f"output_{n}" for n in range(len(tensors))]
        if len(names) != len(tensors):
            raise BackendError(f"the model gave {len(tensors)} outputs, and {len(names)} were expected")
        return {name: as_array(tensor) for name, tensor in zip(names, tensors, strict=True)}


def open_runner(manifest: Manifest, folder: Path, options: RunOptions) -> Runner:
    """Open an artifact of this runtime.

    A package of AOTInductor holds native code, which runs when it is opened.

    Raises:
        UnsafeModelError: it is native code that somebody else built, and that was not allowed.
        ArtifactError: it cannot be read, or asks for a library that is not one of `OPERATORS`.
        BackendError: it was compiled for another device.
    """
    torch = need("torch")
    opener = _OPENERS.get(manifest.runtime)
    if opener is None:
        raise ArtifactError(f"runtime {manifest.runtime!r} is none of torch: {', '.join(_OPENERS)}")
    if manifest.runtime in NATIVE:
        check_native(manifest, folder, options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name in manifest.options.get("operators", ()):
        if name not in OPERATORS:
            raise ArtifactError(f"the manifest asks for {name!r}, and only {', '.join(OPERATORS)} are loaded")
        need(name)
    made_for = str(manifest.options.get("device", options.device))
    if made_for != options.device:
        raise BackendError(f"the artifact was made for {made_for} and cannot run on {options.device}")
    path = folder / manifest.main
    run = opener(path, options.device)
    return PositionalRunner(run, manifest.inputs, manifest.outputs, options.device)


def _open_exported(path: Path, device: str) -> Any:
    try:
        program = load_exported(path)
    except ModelError as error:
        raise ArtifactError(str(error)) from error
    if device != "cpu":
        program = need("torch.export.passes").move_to_device_pass(program, device)
    return program.module()


def _open_torchscript(path: Path, device: str) -> Any:
    try:
        return open_torchscript(path, device).eval()
    except UnsafeModelError:
        raise
    except (RuntimeError, ModelError) as error:
        raise ArtifactError(f"{path} cannot be read as TorchScript: {first_line(error)}") from error


def open_compiled(path: Path, device: str) -> Any:
    """Open a package of AOTInductor, whose native code runs then, as a function of tensors."""
    del device  # it was chosen when the package was compiled
    try:
        package = need("torch._inductor").aoti_load_package(str(path))
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be opened by AOTInductor: {first_line(error)}") from error
    # A call of the package itself reads the structure of inputs and outputs from JSON each time.
    pytree, loader = need("torch.utils._pytree"), package.loader
    structure = pytree.treespec_loads(loader.get_call_spec()[1])

    def run(*tensors: Any) -> Any:
        return pytree.tree_unflatten(loader.boxed_run(list(tensors)), structure)

    return run


_OPENERS: Final[dict[str, Callable[[Path, str], Any]]] = {
    "torch_export": _open_exported,
    "torchscript": _open_torchscript,
    "aot_inductor": open_compiled,
}
