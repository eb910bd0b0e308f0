"""Files of Keras: looked at before they are read, and read without executing what they hold."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

from hamerspace._imports import need
from hamerspace.exceptions import ModelError, UnsafeModelError
from hamerspace.models._tensorflow_graph import first_line
from hamerspace.runtimes._tensorflow_library import keras, quiet

_CONFIG_LIMIT: Final = 64 << 20
_CODE: Final = ("Lambda", "__lambda__")


def open_keras(path: Path) -> Any:
    """Load a .keras or .h5 file, without its optimizer.

    Raises:
        ModelError: it is damaged, holds weights alone, or needs classes that are not registered.
        UnsafeModelError: it holds Python code.
    """
    config = _config_of(path)
    _refuse_code(config, path)
    library = keras()
    unknown = sorted(set(_custom_names(config)) - set(library.saving.get_custom_objects()))
    if unknown:
        raise ModelError(
            f"{path} uses {', '.join(unknown)}, which Keras does not have; import what defines them with "
            "@keras.saving.register_keras_serializable() first, or give a SavedModel: model.export(folder)"
        )
    try:
        with quiet():
            return library.models.load_model(str(path), compile=False, safe_mode=True)
    except Exception as error:
        remedy = (
            "; HDF5 cannot describe a graph with operators such as h + x: save the model as .keras"
            if path.suffix.lower() != ".keras"
            else ""
        )
        raise ModelError(f"{path} cannot be read by Keras: {first_line(error)}{remedy}") from error


def _config_of(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo("config.json").file_size > _CONFIG_LIMIT:
                    raise ModelError(f"{path} is damaged: its configuration is too large")
                text: Any = archive.read("config.json")
        except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
            raise ModelError(f"{path} is no model of Keras, or is damaged: {error}") from error
    else:
        text = _hdf5_config(path)
    try:
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, TypeError) as error:
        raise ModelError(f"{path} is damaged: its configuration is no JSON ({error})") from error


def _hdf5_config(path: Path) -> Any:
    h5py = need("h5py")
    if not h5py.is_hdf5(path):
        raise ModelError(f"{path} is neither a .keras archive nor HDF5, or is cut short")
    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
    except OSError as error:
        raise ModelError(f"{path} is damaged: {first_line(error)}") from error
    if text is None:
        raise ModelError(f"{path} holds weights without a model; save the whole of it: model.save('x.keras')")
    return text


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    waiting: list[Any] = [config]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            table = cast("dict[str, Any]", one)
            if "class_name" in table:
                yield table
            # What was compiled for training is not read.
            waiting.extend(value for key, value in table.items() if key != "compile_config")
        elif isinstance(one, list):
            waiting.extend(one)  # pyright: ignore[reportUnknownArgumentType]


def _refuse_code(config: Any, path: Path) -> None:
    if any(one["class_name"] in _CODE for one in _objects(config)):
        raise UnsafeModelError(
            f"{path} has a Lambda layer, which is Python code that would be executed; it is never read here. "
            "If you trust it: keras.models.load_model(path, safe_mode=False), then give the live model, or "
            "what its export(folder) writes"
        )


def _custom_names(config: Any) -> Iterator[str]:
    for one in _objects(config):
        module = one.get("module")
        own = module is None or module == "builtins" or str(module).partition(".")[0] == "keras"
        if not own:
            yield str(one.get("registered_name") or one["class_name"])


def is_standard(model: Any) -> bool:
    """Whether a file of the model can be read anywhere: it is made of Keras's own parts, and of no code."""
    library = keras()
    if type(model) not in (library.Sequential, library.src.models.functional.Functional):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Keras writes a lambda that is an activation so that it cannot read it, and only warns.
            warnings.filterwarnings("error", "The object being serialized includes a `lambda`")
            config = json.loads(model.to_json())
    except (TypeError, ValueError, NotImplementedError, OSError, UserWarning):
        # A part that cannot be described, or whose source is not to be found.
        return False
    foreign = any(one["class_name"] in (*_CODE, "function") for one in _objects(config))
    return not foreign and not any(_custom_names(config))
