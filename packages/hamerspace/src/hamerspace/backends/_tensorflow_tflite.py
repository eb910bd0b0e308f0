"""TFLite from a SavedModel: float32, float16, and int8 with and without calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hamerspace.exceptions import BackendError
from hamerspace.models._tensorflow_graph import SIGNATURE, first_line
from hamerspace.models.info import Array, Feeds
from hamerspace.runtimes._tensorflow_library import quiet, tensorflow

_MIXED: Final = "some operations have no int8 form and stay in float32"


def convert(
    saved_model: Path, technique: str, calibration: Sequence[Feeds] = ()
) -> tuple[bytes, tuple[str, ...]]:
    """Convert a SavedModel with one signature.

    Inputs and outputs keep their dtypes: what is quantised begins and ends inside.

    Args:
        saved_model: its folder.
        technique: ``fp32``, ``fp16``, ``int8-dynamic`` or ``int8-static``.
        calibration: for ``int8-static``, batches by input name.

    Returns:
        The file's content, and what the user should know of it.

    Raises:
        BackendError: TFLite has no form of the model, or nothing in it was quantised.
    """
    tf = tensorflow()
    # Operations of TensorFlow itself (Flex) are left out: the interpreter of its wheels cannot run them.
    plain = tf.lite.OpsSet.TFLITE_BUILTINS
    attempts: list[tuple[list[Any], tuple[str, ...]]] = [([plain], ())]
    if technique == "int8-static":
        whole = tf.lite.OpsSet.TFLITE_BUILTINS_INT8
        attempts = [([whole], ()), ([whole, plain], (_MIXED,))]
    failures: list[str] = []
    for operations, notes in attempts:
        try:
            content = _convert(saved_model, technique, operations, calibration)
        except Exception as error:  # noqa: BLE001 - the converter raises what it likes
            failures.append(_reason(error))
            continue
        if technique.startswith("int8") and not _holds_int8(content):
            raise BackendError(
                f"TFLite quantised nothing: it leaves weights of fewer than 1,024 numbers alone ({technique})"
            )
        return content, notes
    raise BackendError(f"TFLite cannot convert the model: {'; '.join(dict.fromkeys(failures))}")


def _convert(saved_model: Path, technique: str, operations: list[Any], calibration: Sequence[Feeds]) -> bytes:
    lite = tensorflow().lite
    with quiet(native=True):
        converter = lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=[SIGNATURE])
        converter.target_spec.supported_ops = operations
        if technique != "fp32":
            converter.optimizations = [lite.Optimize.DEFAULT]
        if technique == "fp16":
            converter.target_spec.supported_types = [tensorflow().float16]
        if technique == "int8-static":
            converter.representative_dataset = lambda: _samples(calibration)
        return converter.convert()


def _reason(error: BaseException) -> str:
    """Name the operations that TFLite lacks, which the converter says behind much else."""
    mark = "TF Select ops: "
    lacking = [line.partition(mark)[2] for line in str(error).splitlines() if line.startswith(mark)]
    return f"it has no {lacking[0]}" if lacking else first_line(error)


def _samples(calibration: Sequence[Feeds]) -> Iterator[tuple[str, dict[str, Array]]]:
    for batch in calibration:
        yield SIGNATURE, dict(batch)


def _holds_int8(content: bytes) -> bool:
    """Whether any tensor of several numbers is int8."""
    with quiet(native=True):
        interpreter = tensorflow().lite.Interpreter(model_content=content)
    return any(
        detail["dtype"].__name__ == "int8" and len(detail["shape"]) > 0
        for detail in interpreter.get_tensor_details()
    )
