"""Models of PyTorch: modules, TorchScript, torch.export archives, and folders of transformers."""

from __future__ import annotations

import inspect
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from hamerspace._arrays import as_array, flatten_outputs
from hamerspace._imports import need
from hamerspace.artifact import cut_archive
from hamerspace.exceptions import ConstraintError, ModelError, UnsafeModelError, first_line
from hamerspace.models.exported import load_exported
from hamerspace.models.info import Array, Feeds, ModelInfo, TensorSpec, fitted, shapes_of, spec_of
from hamerspace.models.reading import check_exists, example_length
from hamerspace.models.source import ModelSource
from hamerspace.runtimes.base import Runner, RunOptions

_FILES_IN_SCRIPT: Final = re.compile(rb"\b(save|load|from_file|read_file|write_file)\b")
"""Names of what opens files, wherever they stand: code has many ways to call something by its name."""

_INTEGER_NAMES: Final = frozenset(("id", "ids", "mask", "token", "tokens", "index", "indices", "idx"))
"""Words in the name of an input that takes integers."""


def read(
    model: Any,
    *,
    input_shape: Any = None,
    example_inputs: Any = None,
    into: Any = None,
    allow_pickle: bool = False,
    name: str | None = None,
) -> ModelSource:
    """Read a model and find out its signature.

    Args:
        model: a module, TorchScript or exported program, a file of one, a state dict (or a file of one)
            together with ``into``, or a folder of transformers.
        input_shape: one shape, a list of shapes, or shapes by name; None is an axis of any length.
        example_inputs: a tensor, a tuple of tensors, or tensors by name; they fix dtypes too.
        into: the module that a state dict is for; it is copied, not changed.
        allow_pickle: read a file that holds a pickled module, which can execute anything.
        name: for reports.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelError: it is no model of torch, or what it takes cannot be found out.
        UnsafeModelError: the file holds a pickled object.
    """
    torch = need("torch")
    path: Path | None = None
    needs_module = False
    if isinstance(model, (str, Path)):
        # As another process may be in another folder.
        path = Path(model).absolute()
        check_exists(path)
        model = _open(path, allow_pickle)
        if needs_module := isinstance(model, Mapping):
            model = _fill(into, _state_of(cast("Mapping[str, Any]", model)), str(path))
    elif isinstance(model, Mapping):
        model = _fill(into, cast("Mapping[str, Any]", model), "the state dict")
    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        raise ModelError(
            f"{path or 'the model'} is {type(model).__name__}; a module, TorchScript, an exported program or "
            "a state dict with model= is wanted"
        )
    form = form_of(model, path)
    examples = _example_feeds(model, form, input_shape, example_inputs)
    info = describe(model, form, examples, input_shape, name or (path.stem if path else type(model).__name__))
    kept = path if form != "module" else None
    info = replace(info, path=str(path) if path else None, needs_module=needs_module)
    return ModelSource(info=info, model=model, path=kept)


def form_of(model: Any, path: Path | None = None) -> str:
    """Say whether it is a module, torchscript, an exported program, or a model of transformers."""
    torch = need("torch")
    if isinstance(model, torch.jit.ScriptModule):
        return "torchscript"
    if isinstance(model, torch.export.ExportedProgram):
        return "exported"
    return "transformers" if path is not None and path.is_dir() else "module"


def _open(path: Path, allow_pickle: bool) -> Any:
    if path.is_dir():
        return open_transformers(path)
    kind = _kind_of_file(path)
    try:
        if kind == "torchscript":
            return open_torchscript(path)
        if kind == "exported":
            return load_exported(path)
    except ModelError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path} cannot be read as {kind}: {first_line(error)}") from error
    if kind == "aoti":
        raise ModelError(
            f"{path} is a package of AOTInductor, which is compiled already; give its source model"
        )
    return _unpickle(path, allow_pickle)


def _state_of(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict of a checkpoint, which may be it or hold it."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held := loaded.get(key), Mapping):
            return cast("Mapping[str, Any]", held)
    return loaded


def _kind_of_file(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(4)
        if (damage := cut_archive(path)) is not None:
            raise ModelError(damage)
        if not start.startswith(b"\x80"):
            raise ModelError(f"{path} is no model of torch: it is neither an archive nor a pickle")
        return "pickle"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if any("/aotinductor/" in name for name in names):
        return "aoti"
    if any(name.endswith("/constants.pkl") for name in names):
        return "torchscript"
    if any(
        "serialized_exported_program" in name or name.partition("/")[2].startswith("models/")
        for name in names
    ):
        return "exported"
    return "pickle"


def _unpickle(path: Path, allow_pickle: bool) -> Any:
    torch = need("torch")
    try:
        with warnings.catch_warnings():
            # Of pickles in a newer protocol, which it then reads, or refuses.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        AttributeError,
        IndexError,
        TypeError,
    ) as error:
        if not _holds_pickle(path) or ("weights_only" not in str(error) and "Unsupported" not in str(error)):
            raise ModelError(f"{path} is no model of torch, or is damaged: {first_line(error)}") from error
        if not allow_pickle:
            raise UnsafeModelError(
                f"{path} holds a pickled object, which would execute code when it is read. If you trust it, "
                "say allow_pickle=True; better, save it by torch.export.save, or save its state dict and "
                "give model="
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ModelError(f"{path} cannot be unpickled: {error}") from error


def _holds_pickle(path: Path) -> bool:
    """Whether the first pickle in a file of torch.save is whole; nothing in it is executed."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(one for one in archive.namelist() if one.endswith("data.pkl"))
                parts = list(pickletools.genops(archive.read(name)))
        else:
            with path.open("rb") as file:
                parts = list(pickletools.genops(file))
    except Exception:  # noqa: BLE001 - whatever bytes that are none lead to
        return False
    return parts[-1][0].name == "STOP"


def _fill(into: Any, state: Mapping[str, Any], where: str) -> Any:
    import copy

    torch = need("torch")
    if not isinstance(into, torch.nn.Module):
        raise ModelError(
            f"{where} holds weights without a model; give the module that they are for as model="
        )
    filled = copy.deepcopy(into)
    try:
        filled.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ModelError(f"{where} does not fit the model: {error}") from error
    return filled


def open_torchscript(path: Path, device: str = "cpu") -> Any:
    """Load TorchScript, without what torch says of its future.

    Raises:
        UnsafeModelError: its code opens files, which it could do as soon as it is loaded.
    """
    torch = need("torch")
    # By torch's own reader, which sees what torch.jit.load will see.
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        names: list[str] = reader.get_all_records()
        code = {name: bytes(reader.get_record(name)) for name in names if name.endswith(".py")}
    except RuntimeError as error:
        raise ModelError(f"{path} cannot be read as TorchScript: {first_line(error)}") from error
    if "model.json" in names:
        raise UnsafeModelError(
            f"{path} is TorchScript of a time before torch 1.2, whose code can lie anywhere in it"
        )
    for content in code.values():
        if found := _FILES_IN_SCRIPT.search(content):
            raise UnsafeModelError(
                f"{path} holds TorchScript that names {found[0].decode()!r}, which opens files; take it out "
                "of the model before it is saved, or give it another name if it is something else"
            )
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        return torch.jit.load(str(path), map_location=device)


def open_transformers(path: Path) -> Any:
    """Load a folder of transformers with the class that its configuration names; no remote code."""
    transformers: Any = need("transformers")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture = (config.get("architectures") or ["AutoModel"])[0]
        known: Any = getattr(transformers, str(architecture), None)
        owner: Any = known if hasattr(known, "from_pretrained") else transformers.AutoModel
        model, loaded = owner.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{path} cannot be read by transformers: {first_line(error)}") from error
    # Which would be drawn at random, with no more than a warning.
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(f"{path} lacks weights of {architecture}: {', '.join(missing[:3])}")
    return model.eval()


def load(source: ModelSource) -> Any:
    """Load what `stage` or `read` have on disk."""
    if source.path is None:
        raise ModelError("the model is neither there nor on disk")
    if source.info.form == "torchscript":
        return open_torchscript(source.path).eval()
    if source.info.form == "exported":
        return load_exported(source.path)
    if source.info.form == "transformers" and source.path.is_dir():
        return open_transformers(source.path)
    if not source.staged:
        raise ModelError(f"{source.path} is not a file of this process")
    with source.path.open("rb") as file:
        return need("cloudpickle").load(file).eval()


def stage(source: ModelSource, folder: Path) -> Path:
    """Write a live model where a worker process can read it."""
    torch = need("torch")
    if source.info.form == "torchscript":
        target = folder / "model.pt"
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            torch.jit.save(source.model, str(target))
    elif source.info.form == "exported":
        target = folder / "model.pt2"
        torch.export.save(source.model, str(target))
    else:
        from hamerspace._pickling import dumps

        target = folder / "module.pkl"
        try:
            target.write_bytes(dumps(source.model, {type(one) for one in source.model.modules()}))
        except Exception as error:
            raise ModelError(
                f"the model cannot be sent to another process ({error}); give a torch.export archive of it"
            ) from error
    return target


def call(model: Any, form: str, names: Sequence[str], feeds: Mapping[str, Any]) -> Any:
    """Call a model with tensors by name, by position where its signature has other names."""
    if form == "exported":
        return model.module()(*[feeds[name] for name in names])
    known = forward_names(model)
    if known is not None and all(name in known for name in names):
        return model(**feeds)
    return model(*[feeds[name] for name in names])


def forward_names(model: Any) -> list[str] | None:
    """Names of what ``forward`` takes by position or by name; None where it takes anything."""
    torch = need("torch")
    if isinstance(model, torch.jit.ScriptModule):
        return [argument.name for argument in model.forward.schema.arguments[1:]]
    kinds = inspect.Parameter
    found = list(inspect.signature(model.forward).parameters.values())
    if any(one.kind is kinds.VAR_POSITIONAL for one in found):
        return None
    return [one.name for one in found if one.kind is not kinds.VAR_KEYWORD]


def _required_names(model: Any) -> list[str] | None:
    torch = need("torch")
    if isinstance(model, torch.jit.ScriptModule):
        return [one.name for one in model.forward.schema.arguments[1:] if not one.has_default_value()]
    found = list(inspect.signature(model.forward).parameters.values())
    if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in found):
        return None
    return [
        one.name
        for one in found
        if one.default is inspect.Parameter.empty and one.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def _example_feeds(model: Any, form: str, input_shape: Any, example_inputs: Any) -> dict[str, Any]:
    torch = need("torch")
    if form == "exported":
        return _exported_feeds(model)
    names = forward_names(model)
    if example_inputs is not None:
        return _given_feeds(names, example_inputs)
    required = _required_names(model)
    named = list(cast("Mapping[str, Any]", input_shape)) if isinstance(input_shape, Mapping) else []
    shapes = shapes_of(input_shape, named)
    if shapes is None:
        return _own_feeds(model, names)
    if named:
        wanted = [str(name) for name in named]
    elif names is None:
        wanted = [f"input_{place}" if place else "input" for place in range(len(shapes))]
    else:
        wanted = names[: len(shapes)]
        if len(wanted) < len(shapes) or len(required or []) > len(shapes):
            raise ConstraintError(
                f"input_shape has {len(shapes)} shapes, and the model takes {required or names}; give a list "
                "of shapes, or shapes by name"
            )
    concrete = [tuple(example_length(n, axis) for axis, n in enumerate(shape)) for shape in shapes]
    embeds = any(isinstance(one, torch.nn.Embedding) for one in model.modules())
    attempts: list[dict[str, Any]] = [
        {
            name: torch.ones(shape, dtype=torch.int64)
            if all_integer or (by_name and not _INTEGER_NAMES.isdisjoint(re.split(r"[\W\d_]+", name.lower())))
            else torch.randn(shape)
            for name, shape in zip(wanted, concrete, strict=True)
        }
        for by_name, all_integer in ((True, False), (False, False), *(((True, True),) if embeds else ()))
    ]
    failure: Exception | None = None
    for feeds in attempts:
        try:
            with evaluating(model), torch.no_grad():
                call(model, form, wanted, feeds)
        except Exception as error:  # noqa: BLE001 - whatever a model raises when its input does not fit
            failure = failure or error
        else:
            return feeds
    raise ModelError(
        f"the model does not take inputs of the shape {input_shape}: {first_line(failure)}; give "
        "shapes that fit, or example_inputs for other dtypes"
    ) from failure


def _given_feeds(names: list[str] | None, example_inputs: Any) -> dict[str, Any]:
    torch = need("torch")
    if isinstance(example_inputs, Mapping):
        pairs: Iterable[tuple[str, Any]] = cast("Mapping[str, Any]", example_inputs).items()
    else:
        several = isinstance(example_inputs, (tuple, list))
        values = list(cast("Sequence[Any]", example_inputs if several else (example_inputs,)))
        known = names or [f"input_{place}" if place else "input" for place in range(len(values))]
        if len(values) > len(known):
            raise ConstraintError(f"example_inputs has {len(values)} tensors, and the model takes {known}")
        pairs = zip(known, values, strict=False)
    return {
        str(name): value if isinstance(value, torch.Tensor) else torch.as_tensor(as_array(value))
        for name, value in pairs
    }


def _own_feeds(model: Any, names: list[str] | None) -> dict[str, Any]:
    torch = need("torch")
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "input_ids" and hasattr(config, "vocab_size"):
        ids = torch.ones((1, 64), dtype=torch.int64)
        feeds = {"input_ids": ids}
        return (
            {**feeds, "attention_mask": torch.ones_like(ids)} if "attention_mask" in (names or []) else feeds
        )
    if getattr(model, "main_input_name", None) == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), size, size)}
    first: Any = next(
        (one for one in model.modules() if not list(one.children()) and list(one.parameters())), None
    )
    required = _required_names(model)
    if isinstance(first, torch.nn.Linear) and required is not None and len(required) == 1:
        return {required[0]: torch.randn(1, first.in_features)}
    raise ModelError(
        "what the model takes cannot be told from the model; give input_shape, such as [1, 3, 224, 224], or "
        "example_inputs"
    )


def _exported_feeds(program: Any) -> dict[str, Any]:
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        names = list(program.graph_signature.user_inputs)
        values = [*args, *kwargs.values()]
        if len(values) == len(names):
            return {name: value.detach() for name, value in zip(names, values, strict=True)}
    torch = need("torch")
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    feeds: dict[str, Any] = {}
    for name in program.graph_signature.user_inputs:
        fake = placeholders[name]
        shape = [n if isinstance(n, int) else 2 for n in fake.shape]
        feeds[name] = torch.ones(shape, dtype=fake.dtype)
    return feeds


def describe(model: Any, form: str, feeds: Mapping[str, Any], input_shape: Any, name: str) -> ModelInfo:
    """Run the model once and write down what it takes and gives.

    Raises:
        ModelError: it fails on the inputs, or gives no tensors or NaN.
    """
    torch = need("torch")
    names = list(feeds)
    if half := [key for key, value in feeds.items() if value.dtype is torch.bfloat16]:
        raise ModelError(
            f"the model takes {', '.join(half)} in bfloat16, which numpy does not know; give model.float(), "
            "and name a backend that computes in bfloat16"
        )
    with evaluating(model), torch.no_grad(), _embeddings_seen(model, feeds) as seen:
        try:
            given = call(model, form, names, feeds)
            structure, outputs = flatten_outputs(given)
        except Exception as error:
            raise ModelError(
                f"the model fails on its example inputs: {type(error).__name__}: {first_line(error)}"
            ) from error
    arrays = {key: as_array(value) for key, value in outputs.items()}
    for key, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ModelError(f"the model gives NaN in {key!r}; look for weights that are NaN")
    specs: list[TensorSpec] = []
    for key, value in feeds.items():
        spec = spec_of(key, as_array(value))
        high = seen.get(key)
        if high is None and spec.is_integer and spec.dtype != "bool" and "mask" not in key:
            high = _vocabulary(model)
        specs.append(replace(spec, high=high))
    if form == "exported":
        specs = list(fitted(_exported_specs(model, specs), input_shape))
    else:
        specs = _freed(specs, input_shape)
    batch = specs[0].shape[0] if specs and specs[0].shape else 1
    results = _outputs(model, form, feeds, arrays, batch if isinstance(batch, str) else None)
    tensors = [*model.parameters(), *model.buffers()]
    sizes = {id(one): one.numel() * one.element_size() for one in tensors}
    return ModelInfo(
        framework="pytorch",
        name=name,
        inputs=tuple(specs),
        outputs=results,
        structure=structure,  # pyright: ignore[reportArgumentType]
        parameters=sum({id(one): one.numel() for one in model.parameters()}.values()),
        size_bytes=sum(sizes.values()),
        form=form,
    )


def _freed(specs: list[TensorSpec], input_shape: Any) -> list[TensorSpec]:
    """Free axes of examples that ``input_shape`` leaves open.

    Raises:
        ConstraintError: it is of other inputs or lengths than the examples.
    """
    shapes = shapes_of(input_shape, [spec.name for spec in specs] if isinstance(input_shape, Mapping) else [])
    if shapes is None:
        return specs
    agree = len(shapes) == len(specs) and all(
        len(shape) == len(spec.shape)
        and all(isinstance(n, str) or n == own for n, own in zip(shape, spec.shape, strict=True))
        for shape, spec in zip(shapes, specs, strict=True)
    )
    if not agree:
        given = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
        raise ConstraintError(
            f"input_shape is {input_shape!r}, and example_inputs are {given}; they have to agree"
        )
    return [replace(spec, shape=shape) for spec, shape in zip(specs, shapes, strict=True)]


def _outputs(
    model: Any, form: str, feeds: Mapping[str, Any], arrays: Mapping[str, Array], free: str | None
) -> tuple[TensorSpec, ...]:
    """Describe outputs; ``free`` is the name of the batch axis, where any number of samples goes."""
    first = next(iter(feeds.values()))
    samples = len(first) if first.ndim else 0
    axes = {
        key: [axis for axis, length in enumerate(array.shape) if length == samples]
        for key, array in arrays.items()
    }
    grown: Mapping[str, Array] = {}
    if any(len(found) > 1 for found in axes.values()):
        grown = _with_one_more(model, form, feeds, samples)
    results: list[TensorSpec] = []
    for key, array in arrays.items():
        if (more := grown.get(key)) is not None and more.ndim == array.ndim:
            axes[key] = [axis for axis in axes[key] if more.shape[axis] == samples + 1] or axes[key]
        axis = axes[key][0] if axes[key] else 0
        spec = replace(spec_of(key, array), batch_axis=axis)
        if free is not None and axes[key]:
            spec = replace(spec, shape=(*spec.shape[:axis], free, *spec.shape[axis + 1 :]))
        results.append(spec)
    return tuple(results)


def _with_one_more(model: Any, form: str, feeds: Mapping[str, Any], samples: int) -> dict[str, Array]:
    """Run a model on one more sample, which shows along which axis outputs grow; nothing if it cannot."""
    torch = need("torch")
    more = {
        name: torch.cat([value, value[:1]]) if value.ndim and len(value) == samples else value
        for name, value in feeds.items()
    }
    try:
        with evaluating(model), torch.no_grad():
            outputs = flatten_outputs(call(model, form, list(feeds), more))[1]
    except Exception:  # noqa: BLE001 - whatever a model raises that holds for one number of samples
        return {}
    return {name: as_array(value) for name, value in outputs.items()}


def _exported_specs(program: Any, specs: list[TensorSpec]) -> list[TensorSpec]:
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [
        TensorSpec(
            name=spec.name,
            dtype=spec.dtype,
            high=spec.high,
            shape=tuple(
                n if isinstance(n, int) else "batch" if axis == 0 else f"axis_{axis}"
                for axis, n in enumerate(placeholders[spec.name].shape)
            ),
        )
        for spec in specs
    ]


def _vocabulary(model: Any) -> int | None:
    torch = need("torch")
    if not isinstance(model, torch.nn.Module):
        return None
    sizes = [one.num_embeddings for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    return min(sizes, default=None)


@contextmanager
def evaluating(model: Any) -> Any:
    """Put a module into evaluation mode and back."""
    torch = need("torch")
    modes = [(one, one.training) for one in model.modules()] if isinstance(model, torch.nn.Module) else []
    try:
        if modes:
            model.eval()
        yield
    finally:
        for one, training in modes:
            one.training = training


@contextmanager
def _embeddings_seen(model: Any, feeds: Mapping[str, Any]) -> Any:
    """Yield the sizes of embeddings that inputs go into as they are, by input, once the model has run."""
    torch = need("torch")
    seen: dict[str, int] = {}
    handles: list[Any] = []

    def look(module: Any, args: tuple[Any, ...]) -> None:
        for name, value in feeds.items():
            if args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() == value.data_ptr():
                seen[name] = min(seen.get(name, module.num_embeddings), module.num_embeddings)

    if isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        handles = [
            one.register_forward_pre_hook(look)
            for one in model.modules()
            if isinstance(one, torch.nn.Embedding)
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class TorchRunner(Runner):
    """A module, TorchScript or exported program, run as it is."""

    def __init__(self, model: Any, form: str, info: ModelInfo, options: RunOptions) -> None:
        torch = need("torch")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.inputs, self.outputs = info.inputs, info.outputs
        self._device = options.device
        self._form = form
        self._model = model.module() if form == "exported" else model
        if form != "exported":
            self._model.eval()
        if self._device != "cpu":
            self._model = self._model.to(self._device)
        self._names = [spec.name for spec in self.inputs]
        self._by_name = form != "exported" and all(
            name in (forward_names(model) or []) for name in self._names
        )

    def prepare(self, feeds: Feeds) -> dict[str, Any]:
        """Return tensors on the device."""
        torch = need("torch")
        return {
            name: torch.from_numpy(np.require(feeds[name], requirements=["C", "W"])).to(self._device)
            for name in self._names
        }

    def run_prepared(self, prepared: Any) -> Any:
        """Run once without gradients."""
        torch = need("torch")
        with torch.inference_mode():
            given = self._model(**prepared) if self._by_name else self._model(*prepared.values())
            if self._device != "cpu":
                torch.cuda.synchronize()
            return given

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by name."""
        outputs = flatten_outputs(self.run_prepared(self.prepare(feeds)))[1]
        return {name: as_array(value) for name, value in outputs.items()}


def original(source: ModelSource, options: RunOptions) -> Runner:
    """Return the model as it came in: torch eager in float32."""
    return TorchRunner(source.load(), source.info.form, source.info, options)
