"""The weights of a model, in its own names and shapes, read from a checkpoint when they are asked for."""

from __future__ import annotations

import difflib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from auto_round._files import shown
from auto_round.exceptions import CheckpointError
from auto_round.low_cpu_mem._checkpoint import CheckpointReader, TensorInfo
from auto_round.low_cpu_mem._empty import persistent_buffers
from auto_round.low_cpu_mem._key_map import Piece, map_keys
from auto_round.low_cpu_mem._streamed import StreamedWeight

__all__ = ["ModelWeights", "Piece"]

_COMPARED_BYTES = 1 << 22
_QUANTISED_ENDINGS = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
)


class ModelWeights:
    """Maps each parameter and persistent buffer of a model to a checkpoint, and reads them one by one.

    Opening compares names and shapes; no value is read, except where the model ties two parameters and the
    checkpoint has both: they are compared then, and if they differ the model's are untied, as transformers
    5 does.

    Any number of threads may read at once, and load and unload different modules.

    Args:
        model: As `empty_model` returns it, or any module whose names are those of the checkpoint. What is on
            the meta device can be loaded; the rest is left alone.
        reader: The checkpoint; it stays the caller's to close.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or holds integers where the model has floats;
            the message names the first, with both shapes.
    """

    def __init__(self, model: nn.Module, reader: CheckpointReader) -> None:
        self.model = model
        """The model."""
        self.reader = reader
        """The checkpoint."""
        self._lock = threading.Lock()
        self._meta: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()
        tensors = _all_names(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        pieces, self.unused = map_keys(model, shapes, reader)
        """The checkpoint's tensors that no parameter needs."""
        self._aliases = _group_tied(model, tensors, pieces, reader)
        self._tied = {alias: name for name, aliases in self._aliases.items() for alias in aliases}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._specs: dict[str, tuple[torch.Size, torch.dtype]] = {}
        scales = [key for key in self.unused if key.endswith(_QUANTISED_ENDINGS)]
        for name, aliases in self._aliases.items():
            stored = next((pieces[alias] for alias in aliases if alias in pieces), None)
            if stored is None:
                raise CheckpointError(_missing(name, reader, self.unused))
            _check_floats(tensors[name], stored, reader, scales)
            self._pieces[name] = stored
            self._specs[name] = (tensors[name].shape, tensors[name].dtype)
        self.names = tuple(self._pieces)
        """The model's names of all parameters and persistent buffers; tied ones count once."""

    def tied_to(self, name: str) -> str:
        """Return the name under which a tied tensor counts; `name` itself where it is not tied.

        Raises:
            CheckpointError: The model has no such parameter or persistent buffer.
        """
        if name not in self._tied:
            near = difflib.get_close_matches(name, self._tied, n=3)
            raise CheckpointError(
                f"the model has no parameter or persistent buffer {shown(name)}"
                + (f"; did you mean {' or '.join(map(shown, near))}?" if near else ".")
            )
        return self._tied[name]

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return what makes up a tensor: mostly one whole piece; for fused experts one an expert and matrix.

        Raises:
            CheckpointError: As for `tied_to`.
        """
        return self._pieces[self.tied_to(name)]

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's shape in the model, and type, file (of the first piece) and bytes as stored.

        Raises:
            CheckpointError: As for `tied_to`.
        """
        canonical = self.tied_to(name)
        infos = [self.reader.info(piece.source) for piece in self._pieces[canonical]]
        shape = tuple(self._specs[canonical][0])
        return replace(infos[0], shape=shape, bytes=sum(info.bytes for info in infos))

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor as the model wants it, on the CPU.

        Takes one piece beside the result where there are several, or where one is stored transposed.

        Args:
            name: The model's name of it.
            dtype: By default the type that it had in the model when this was opened.

        Raises:
            CheckpointError: As for `tied_to`; or the file cannot be read.
        """
        canonical = self.tied_to(name)
        shape, own = self._specs[canonical]
        dtype = dtype or own
        pieces = self._pieces[canonical]
        if len(pieces) == 1 and not pieces[0].transposed and not pieces[0].place:
            return self.reader.read(pieces[0].source, dtype=dtype)
        result = torch.empty(shape, dtype=dtype, device="cpu")
        for piece in pieces:
            result[piece.place].copy_(self._piece(piece, dtype))
        return result

    def read_rows(self, name: str, rows: slice | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return some rows (indices of the first dimension) of a tensor as the model wants it, on the CPU.

        Reads no others, except of a tensor that is stored transposed or joined along its rows.

        Args:
            name: The model's name of it.
            rows: A slice whose bounds lie within the tensor, or a tensor of integers with one dimension, none
                of them negative.
            dtype: As for `read`.

        Raises:
            CheckpointError: There is no such row; or as for `read`.
        """
        canonical = self.tied_to(name)
        shape, own = self._specs[canonical]
        dtype = dtype or own
        pieces = self._pieces[canonical]
        if len(pieces) == 1 and not pieces[0].transposed and not pieces[0].place:
            return self.reader.read_rows(pieces[0].source, rows, dtype=dtype)
        numbers = _row_numbers(rows, shape[0], name)
        by_row: dict[int, list[Piece]] = {}
        for piece in pieces:
            row = piece.place[0] if piece.place else None
            if not isinstance(row, int):
                return self.read(name, dtype=dtype)[numbers]
            by_row.setdefault(row, []).append(piece)
        result = torch.empty((len(numbers), *shape[1:]), dtype=dtype, device="cpu")
        for place, row in enumerate(numbers):
            for piece in by_row[row]:
                result[(place, *piece.place[1:])].copy_(self._piece(piece, dtype))
        return result

    def reads_rows(self, name: str) -> bool:
        """Return whether `read_rows` reads no more than the rows: the tensor is stored as a whole, in order.

        Raises:
            CheckpointError: As for `tied_to`.
        """
        pieces = self.pieces(name)
        return len(pieces) == 1 and not pieces[0].transposed and not pieces[0].place

    def load_module(
        self,
        module: nn.Module,
        prefix: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        recurse: bool = True,
    ) -> None:
        """Put real parameters and persistent buffers into a module in place of those on the meta device.

        What is real already stays as it is. Tied parameters become one, within the call and with those that
        are loaded in this model already. Fails as a whole: after an error nothing new is loaded.

        Args:
            module: A module of the model, or another of the same structure.
            prefix: The name in the model of the module; empty for the model itself.
            dtype: Type of floating-point tensors; by default what they had in the model.
            device: Where to.
            recurse: Also the modules within.

        Raises:
            CheckpointError: As for `read`.
        """
        loaded: dict[str, Tensor] = {}
        done: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for owner, name, full, tensor in _walk(module, prefix, recurse):
                if isinstance(tensor, StreamedWeight) or not tensor.is_meta:
                    continue
                canonical = self.tied_to(full)
                if canonical not in loaded:
                    wanted = dtype if dtype and tensor.is_floating_point() else None
                    known = self._loaded_elsewhere(canonical, wanted or tensor.dtype, torch.device(device))
                    loaded[canonical] = (
                        known if known is not None else self._load(full, tensor, wanted, device)
                    )
                done.append((owner, name, tensor))
                setattr(owner, name, loaded[canonical])
        except BaseException:
            for owner, name, tensor in done:
                setattr(owner, name, tensor)
            raise
        with self._lock:
            for owner, name, tensor in done:
                self._meta.setdefault(owner, {})[name] = tensor

    def unload_module(self, module: nn.Module, *, recurse: bool = True) -> None:
        """Put parameters and persistent buffers of a module back on the meta device, which frees them.

        What `load_module` had replaced comes back: the very same objects, of the model's own type.
        """
        for owner, name, _, tensor in _walk(module, "", recurse):
            if tensor.is_meta:
                continue
            with self._lock:
                meta = self._meta.get(owner, {}).get(name)
            if meta is None or meta.shape != tensor.shape:
                meta = tensor.detach().to("meta")
                if isinstance(tensor, nn.Parameter):
                    meta = nn.Parameter(meta, requires_grad=tensor.requires_grad)
            setattr(owner, name, meta)

    def _piece(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        stored = self.reader.read(piece.source, dtype=dtype)
        return stored.mT if piece.transposed else stored

    def _load(self, name: str, meta: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
        value = self.read(name, dtype=dtype or meta.dtype).to(device, non_blocking=True)
        if isinstance(meta, nn.Parameter):
            return nn.Parameter(value, requires_grad=meta.requires_grad)
        return value

    def _loaded_elsewhere(self, canonical: str, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        aliases = self._aliases[canonical]
        for alias in aliases if len(aliases) > 1 else ():
            owner, _, name = alias.rpartition(".")
            tensor = cast("Tensor", getattr(self.model.get_submodule(owner), name))
            held = not isinstance(tensor, StreamedWeight)
            if held and tensor.device == device and tensor.dtype == dtype:
                return tensor
        return None


def named_modules(
    module: nn.Module, prefix: str = "", *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Give the names and modules of a model, as its own method does, which has no types."""
    return cast(
        "Iterator[tuple[str, nn.Module]]",
        module.named_modules(prefix=prefix, remove_duplicate=remove_duplicate),
    )


def _walk(module: nn.Module, prefix: str, recurse: bool) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Give module, name in it, full name and value of each parameter and persistent buffer."""
    for path, owner in named_modules(module, prefix) if recurse else ((prefix, module),):
        own = chain(owner.named_parameters(recurse=False), persistent_buffers(owner).items())
        for name, tensor in list(own):
            yield owner, name, f"{path}.{name}" if path else name, tensor


def _all_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict, tied ones under each of their names."""
    found: dict[str, Tensor] = {}
    for path, owner in named_modules(model, remove_duplicate=False):
        found.update({full: tensor for _, _, full, tensor in _walk(owner, path, recurse=False)})
    return found


def _group_tied(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    pieces: Mapping[str, tuple[Piece, ...]],
    reader: CheckpointReader,
) -> dict[str, tuple[str, ...]]:
    """Return all names of each tensor by the first one, having untied those that are stored as two."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    result: dict[str, tuple[str, ...]] = {}
    for names in groups.values():
        stored = [name for name in names if name in pieces]
        apart = [
            name
            for name in stored[1:]
            if not _same_values(pieces[stored[0]], pieces[name], tensors[name], reader)
        ]
        together = tuple(name for name in names if name not in apart)
        result[together[0]] = together
        for name in apart:
            owner, _, last = name.rpartition(".")
            tensor = tensors[name]
            own = nn.Parameter(torch.empty_like(tensor), requires_grad=tensor.requires_grad)
            setattr(model.get_submodule(owner), last, own)
            result[name] = (name,)
    return result


def _same_values(
    one: tuple[Piece, ...], other: tuple[Piece, ...], tensor: Tensor, reader: CheckpointReader
) -> bool:
    if one == other or not tensor.dim() or any(piece.place or piece.transposed for piece in one + other):
        return True
    first, second = one[0].source, other[0].source
    if (reader.shares(first) or first) == (reader.shares(second) or second):
        return True
    step = max(1, _COMPARED_BYTES // max(1, tensor[0].numel() * tensor.element_size()))
    for start in range(0, len(tensor), step):
        rows = slice(start, min(start + step, len(tensor)))
        values = [reader.read_rows(source, rows, dtype=tensor.dtype) for source in (first, second)]
        if not torch.equal(*values):
            return False
    return True


def _row_numbers(rows: slice | Tensor, count: int, name: str) -> list[int]:
    if isinstance(rows, slice):
        for bound in (rows.start, rows.stop):
            if bound is not None and not -count <= bound <= count:
                raise CheckpointError(f"tensor {shown(name)}: {rows} reaches outside its {count} rows.")
        return list(range(*rows.indices(count)))
    numbers = cast("list[int]", rows.tolist())  # pyright: ignore[reportUnknownMemberType]
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise CheckpointError(f"tensor {shown(name)} has no row {wrong[0]}; its rows are 0 to {count - 1}.")
    return numbers


def _missing(name: str, reader: CheckpointReader, unused: tuple[str, ...]) -> str:
    text = f"{reader.path} has no tensor for {shown(name)} of the model"
    if any(key.endswith(_QUANTISED_ENDINGS) for key in unused):
        return (
            f"{text}, but the integers and scales of quantised weights; give the floating-point checkpoint."
        )
    near = difflib.get_close_matches(name, unused, n=3)
    if near:
        return f"{text}; it has {' and '.join(map(shown, near))}, for which the model has no place."
    shards = reader.unnamed_shards()
    if shards:
        return f"{text}, and its index places no tensor in {shown(shards[0])}, which may be where it is."
    return f"{text}; another model_class may be what was saved."


def _check_floats(
    tensor: Tensor, pieces: tuple[Piece, ...], reader: CheckpointReader, scales: list[str]
) -> None:
    """Refuse integers, or 8-bit floats that have scales, where the model wants floating-point numbers."""
    if not tensor.is_floating_point():
        return
    for piece in pieces:
        stored = reader.info(piece.source)
        if not stored.dtype.is_floating_point or (stored.dtype.itemsize == 1 and scales):
            raise CheckpointError(
                f"{stored.file}: tensor {shown(piece.source)} holds {stored.dtype}, where the model has "
                "floating-point weights; give the floating-point checkpoint that it was made from."
            )
