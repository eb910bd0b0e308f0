"""Magnitude pruning of Keras models: the smallest weights of each layer become zero."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hamerspace.artifact import replacing
from hamerspace.exceptions import ConstraintError, UnsupportedError
from hamerspace.models.info import Array
from hamerspace.runtimes._tensorflow_library import keras, quiet


def pruned_copy(model: Any, amount: float) -> tuple[Any, str]:
    """Return a copy of a Keras model in which a share of each kernel is zero, and a sentence about it.

    Kernels are the weights that inputs are multiplied by; biases, norms and embeddings stay whole.

    Args:
        model: of Keras's own layers; it is not changed.
        amount: the share, between 0 and 1.

    Raises:
        ConstraintError: the share is out of range.
        UnsupportedError: the model has no kernels.
    """
    if not 0 < amount < 1:
        raise ConstraintError(f"amount is {amount!r}; give the share of weights to zero, between 0 and 1")
    with quiet():
        copy = keras().models.clone_model(model)
        copy.set_weights(model.get_weights())
    kernels = [
        weight for weight in copy.trainable_weights if "kernel" in weight.name and len(weight.shape) >= 2
    ]
    if not kernels:
        raise UnsupportedError(
            "the model has no kernels to prune: no dense, convolutional or recurrent layers"
        )
    zeros = total = 0
    with quiet():
        for kernel in kernels:
            values = without_smallest(np.asarray(kernel.value.numpy()), amount)
            kernel.assign(values)
            zeros += values.size - int(np.count_nonzero(values))
            total += values.size
    return copy, (
        f"{zeros:,} of {total:,} weights in {len(kernels)} kernels are zero; the file is smaller because it "
        "is compressed, while the model takes as much memory and as long as before"
    )


def without_smallest(weights: Array, share: float) -> Array:
    """Return weights in which that share, those nearest to zero, is zero; the number is rounded down."""
    flat = weights.flatten()
    number = int(share * flat.size)
    if number:
        flat[np.argpartition(np.abs(flat), number - 1)[:number]] = 0
    return flat.reshape(weights.shape)


def save_compressed(model: Any, target: Path) -> None:
    """Save a model as .keras with its members deflated, which Keras reads as it reads its own files."""
    with replacing(target) as temporary:
        plain = temporary.with_name("plain.keras")
        with quiet():
            model.save(plain, include_optimizer=False)
        with (
            zipfile.ZipFile(plain) as source,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for member in source.infolist():
                with source.open(member) as data, packed.open(member.filename, "w", force_zip64=True) as file:
                    while block := data.read(1 << 20):
                        file.write(block)
