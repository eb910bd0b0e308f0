"""The three areas of the configuration: memory, quantization, export."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

from auto_round._config_base import MOST, Area, known_keys, nearest
from auto_round._files import shown
from auto_round.exceptions import ConfigurationError


@dataclass(kw_only=True)
class MemoryConfig(Area):
    """How much memory may be used, and where what does not fit goes."""

    area: ClassVar[str] = "memory"

    workspace_dir: str | None = None
    """Folder for what must spill to disk; None means a temporary one."""
    clean_weights_after_use: bool = True
    """Let weights go once the layer that needed them is done, and read them again when it is called again."""
    use_cpu_offload: bool = True
    """With a model on a GPU: keep weights and activations that are not in use in the computer's memory."""
    gpu_batch_size: int = 8
    """Samples that go through the model on a GPU at once."""
    max_ram_mb: int | None = None
    """The most that this process may hold, in MB of 2**20 bytes, its libraries included; None is no limit."""

    def validate(self) -> None:
        """Check every field."""
        self._check_paths("workspace_dir")
        self._check_flags("clean_weights_after_use", "use_cpu_offload")
        self._check_int("gpu_batch_size", least=1)
        self._check_int("max_ram_mb", least=1, optional=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSettings:
    """How one layer's weights are quantised."""

    bits: int
    group_size: int
    symmetric: bool
    weight_dtype: str


_USUAL = {
    "int": {"bits": 4, "group_size": 128, "symmetric": True},
    "mxfp4": {"bits": 4, "group_size": 32, "symmetric": True},
    "nvfp4": {"bits": 4, "group_size": 16, "symmetric": True},
    "fp8": {"bits": 8, "group_size": -1, "symmetric": True},
}
"""What each kind of weight has unless something else is asked for."""
_FIXED = {
    "int": (),
    "mxfp4": ("bits", "group_size", "symmetric"),
    "nvfp4": ("bits", "group_size", "symmetric"),
    "fp8": ("bits", "symmetric"),
}
"""What of that is part of the kind and cannot be anything else."""
_PER_LAYER = ("bits", "group_size", "symmetric", "weight_dtype")
_UNSET = cast("Any", None)


@dataclass(kw_only=True)
class QuantizationConfig(Area):
    r"""What the weights become, and how that is searched for.

    `bits`, `group_size` and `symmetric` follow `weight_dtype` where they are not given (or None): at
    construction, and when a change names another `weight_dtype` without them.

    Layers are named by regular expressions, of which a plain name is the simplest. An expression must match a
    layer's whole name or all of it after one of its dots: `down_proj`, `mlp.down_proj` and
    `layers\.[01]\..*` all match `model.layers.0.mlp.down_proj`, and `layers.1` does not. A `^` pins an
    expression to the beginning.
    """

    area: ClassVar[str] = "quantization"

    bits: int = _UNSET
    """Of a weight, 2 to 8; 4 unless `weight_dtype` is fp8, which has 8."""
    group_size: int = _UNSET
    """Weights along a row that share a scale: a multiple of 8, so that a group fills whole bytes at all
    bits, or -1 for the whole row; 128, or what `weight_dtype` has."""
    symmetric: bool = _UNSET
    """Zero is in the middle of the range; False gives each group a zero point, with integers only."""
    weight_dtype: str = "int"
    """int; mxfp4 (groups of 32); nvfp4 (groups of 16); or fp8 (E4M3)."""
    act_bits: int = 16
    """Of an activation: 16 leaves them as they are, 8 quantises them. There are kernels for no others."""
    act_dynamic: bool = True
    """With 8 bits: a scale for each token as it comes, not one found in calibration."""
    scale_dtype: str = "float16"
    """In which scales are kept: float16, bfloat16 or float32."""
    quality: str = "signround"
    """rtn rounds to nearest and reads no calibration; optimized_rtn searches scales weighted by importance;
    signround learns rounding and clipping; best trains weights and scales block by block."""
    iters: int = 200
    """Steps of training for each block; 0 rounds to nearest."""
    lr: float | None = None
    """Learning rate; None means what the method and `iters` call for."""
    minmax_lr: float | None = None
    """Learning rate of the clipping; None means `lr`, or without that what the method calls for."""
    enable_quanted_input: bool = True
    """Give each block what the quantised blocks before it put out, as it will be in use."""
    nsamples: int = 128
    """Sequences for calibration."""
    seqlen: int = 2048
    """Tokens in each."""
    batch_size: int = 8
    """Sequences for each forward pass of the training."""
    gradient_accumulate_steps: int = 1
    """Forward passes for each step."""
    end_to_end_iters: int | None = None
    """Steps of training of all scales together, against the float model's predictions of the next token, once
    all blocks are done; 0 for none. With integers only. None means a third of `iters` with best, if the model
    predicts tokens and `memory.max_ram_mb` leaves room for it, and else none."""
    end_to_end_lr: float | None = None
    """Learning rate of that, relative to the scale; None means what is usual."""
    compile: bool | None = None
    """Have torch.compile make the steps of training faster. That needs a C++ compiler and some 350 MB; None
    means where there is one, the work is long enough to gain by it and `memory.max_ram_mb` is not set."""
    calibration: str = "user"
    """Whose text: the user's, self (written by the float model), or mixed (half and half)."""
    layer_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Layers' own `bits`, `group_size`, `symmetric` and `weight_dtype`. Of several keys that match a layer,
    its full name counts, else the last. Read only; a change replaces it whole."""
    ignore_layers: tuple[str, ...] = ("lm_head",)
    """Layers that stay as they are."""
    seed: int = 42
    """Of everything that is drawn at random."""

    def __post_init__(self) -> None:
        self._check_choice("weight_dtype", tuple(_USUAL))
        for name, value in _USUAL[self.weight_dtype].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def validate(self) -> None:
        """Check every field, and the fields against each other."""
        self._check_int("bits", least=2, most=8)
        self._check_group_size()
        self._check_flags("symmetric", "act_dynamic", "enable_quanted_input")
        self._check_fixed()
        self._check_choice("act_bits", (8, 16))
        self._check_choice("scale_dtype", ("float16", "bfloat16", "float32"))
        self._check_choice("quality", ("rtn", "optimized_rtn", "signround", "best"))
        self._check_choice("calibration", ("user", "self", "mixed"))
        self._check_int("iters", least=0)
        if self.compile is not None and not isinstance(self.compile, bool):
            self._refuse("compile", "True, False or None")
        if self.end_to_end_iters is not None:
            self._check_int("end_to_end_iters", least=0)
        self._check_int("nsamples", "seqlen", "batch_size", "gradient_accumulate_steps", least=1)
        self._check_int("seed", least=0, most=2**32 - 1)
        self._check_rate("lr", "minmax_lr", "end_to_end_lr")
        if self.quality == "best" and self.iters == 0:
            raise ConfigurationError(
                "quantization.quality is 'best', which trains, but quantization.iters is 0; set iters to at "
                "least 1, or quality to 'rtn'."
            )
        if self.end_to_end_iters and self.weight_dtype != "int":
            raise ConfigurationError(
                f"quantization.end_to_end_iters is {self.end_to_end_iters}, but only scales of integers are "
                f"trained end to end, and quantization.weight_dtype is {self.weight_dtype!r}; set "
                "end_to_end_iters to 0, or weight_dtype to 'int'."
            )
        self._check_ignore_layers()
        self._check_layer_config()

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return an area with some fields changed, and what follows `weight_dtype` if that changes."""
        changes = self._known(changes)
        return super().changed({**self._following(changes), **changes})

    def for_layer(self, name: str) -> LayerSettings | None:
        """Return how the layer of this full name is quantised; None if it stays as it is."""
        if any(_matches(pattern, name) for pattern in self.ignore_layers):
            return None
        own: Mapping[str, Any] = {}
        for pattern, settings in self.layer_config.items():
            own = settings if _matches(pattern, name) else own
        return self._settings(self.layer_config.get(name, own))

    @property
    def trains(self) -> bool:
        """Whether weights are trained, not only rounded."""
        return self.quality in ("signround", "best") and self.iters > 0

    @property
    def has_static_activations(self) -> bool:
        """Whether the ranges of activations are found in calibration."""
        return self.act_bits == 8 and not self.act_dynamic

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is run on calibration."""
        return (
            self.trains
            or self.has_static_activations
            or self.quality == "optimized_rtn"
            or self.end_to_end_steps > 0
        )

    @property
    def end_to_end_steps(self) -> int:
        """Steps of training of all scales together, where that can be done."""
        if self.end_to_end_iters is not None:
            return self.end_to_end_iters
        return self.iters // 3 if self.quality == "best" and self.weight_dtype == "int" else 0

    def names(self, name: str) -> bool:
        """Return whether `layer_config` has a key for the layer of this full name."""
        return any(_matches(pattern, name) for pattern in self.layer_config)

    @staticmethod
    def matches(pattern: str, name: str) -> bool:
        """Return whether a key of `layer_config` or an entry of `ignore_layers` means this layer."""
        return _matches(pattern, name)

    def _settings(self, own: Mapping[str, Any]) -> LayerSettings:
        base = {name: getattr(self, name) for name in _PER_LAYER}
        checked = QuantizationConfig(**{**base, **self._following(own), **own})
        return LayerSettings(**{name: getattr(checked, name) for name in _PER_LAYER})

    def _following(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        if changes.get("weight_dtype", self.weight_dtype) == self.weight_dtype:
            return {}
        return dict.fromkeys(_USUAL["int"])

    def _check_group_size(self) -> None:
        size = self.group_size
        is_size = isinstance(size, int) and not isinstance(size, bool) and 8 <= size <= MOST and size % 8 == 0
        if size != -1 and not is_size:
            self._refuse("group_size", "a multiple of 8, such as 32, 64 or 128, or -1 for whole rows")

    def _check_fixed(self) -> None:
        usual = _USUAL[self.weight_dtype]
        wrong = [name for name in _FIXED[self.weight_dtype] if getattr(self, name) != usual[name]]
        if wrong:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            allowed = ", ".join(f"{name}={usual[name]}" for name in wrong)
            raise ConfigurationError(
                f"quantization.weight_dtype {self.weight_dtype!r} cannot have {given}; it has {allowed}. "
                "Change them in one update together with weight_dtype, or leave them out."
            )

    def _check_ignore_layers(self) -> None:
        given: object = self.ignore_layers
        if not isinstance(given, list | tuple):
            self._refuse("ignore_layers", 'a list of layers, such as ["lm_head"], or an empty one')
        patterns = tuple(cast("list[object] | tuple[object, ...]", given))
        for pattern in patterns:
            _check_pattern(pattern, "quantization.ignore_layers")
        object.__setattr__(self, "ignore_layers", patterns)

    def _check_layer_config(self) -> None:
        given: object = self.layer_config
        if not isinstance(given, Mapping):
            self._refuse("layer_config", 'a mapping such as {"down_proj": {"bits": 8}}')
        checked: dict[str, Mapping[str, Any]] = {}
        for pattern, own in cast("Mapping[object, object]", given).items():
            name = _check_pattern(pattern, "quantization.layer_config")
            where = f"quantization.layer_config[{shown(name)}]"
            if name in self.ignore_layers:
                raise ConfigurationError(
                    f"{where} says how to quantise what quantization.ignore_layers leaves out; take it out "
                    "of one of the two."
                )
            settings = known_keys(own, _PER_LAYER, where)
            try:
                self._settings(settings)
            except ConfigurationError as failure:
                raise ConfigurationError(f"{where}: {failure}") from None
            checked[name] = MappingProxyType(dict(settings))
        object.__setattr__(self, "layer_config", MappingProxyType(checked))


@functools.lru_cache(1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _matches(pattern: str, name: str) -> bool:
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    return pattern == name or any(_compiled(pattern).fullmatch(name, start) for start in starts)


def _check_pattern(pattern: object, where: str) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigurationError(f"{where} names a layer {shown(pattern)}; a name is text that is not empty.")
    try:
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError) as failure:
        raise ConfigurationError(
            f"{where} names layers {shown(pattern)}, which is no regular expression: {failure}. Write a "
            "backslash before characters that stand for themselves."
        ) from None
    return pattern


EXPORT_FORMATS = ("auto_round", "gptq", "awq", "compressed-tensors", "gguf", "onnx", "openvino", "fake")
"""The names of layouts; fake is the quantised weights in their float dtype."""
_SIZE = re.compile(r"(\d{1,9})\s?([KMGT]?)(I?)B", re.IGNORECASE)


@dataclass(kw_only=True)
class ExportConfig(Area):
    """What is written, and where."""

    area: ClassVar[str] = "export"

    export_format: str | tuple[str, ...] = "auto_round"
    """One of `EXPORT_FORMATS`, or several of them."""
    export_path: str | None = None
    """Folder to write to."""
    mixed_precision: bool = True
    """Layers may differ in bits and groups; False refuses to write a model in which they do."""
    max_shard_size: int | str = "5GB"
    """The most that one file of weights holds: bytes, or text such as 500MB (10**6) or 2GiB (2**30)."""

    def validate(self) -> None:
        """Check every field."""
        given: object = self.export_format
        several = isinstance(given, list | tuple)
        names = tuple(cast("list[object] | tuple[object, ...]", given)) if several else (given,)
        for name in names:
            if not isinstance(name, str) or name not in EXPORT_FORMATS:
                raise ConfigurationError(
                    f"export.export_format names {shown(name)}; it must be one of "
                    f"{', '.join(EXPORT_FORMATS)}, or a list of them{nearest(name, EXPORT_FORMATS)}."
                )
        if not names or len(set(names)) < len(names):
            self._refuse("export_format", "a format, or a list that names at least one and each of them once")
        object.__setattr__(self, "export_format", names if several else given)
        self._check_paths("export_path")
        self._check_flags("mixed_precision")
        if isinstance(self.max_shard_size, str):
            if not _SIZE.fullmatch(self.max_shard_size.strip()) or self.max_shard_bytes < 1:
                self._refuse("max_shard_size", "a number of bytes above 0, or text such as '500MB' or '2GiB'")
        else:
            self._check_int("max_shard_size", least=1, most=2**63 - 1)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats as a tuple, be it one or several."""
        return (self.export_format,) if isinstance(self.export_format, str) else self.export_format

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        found = _SIZE.fullmatch(self.max_shard_size.strip()) if isinstance(self.max_shard_size, str) else None
        if found is None:
            return int(self.max_shard_size)
        step = 1024 if found[2] and found[3] else 1000
        return int(found[1]) * step ** " KMGT".index(found[2].upper() or " ")
