"""`AutoRound`: from a float model to quantised weights on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from av_memory import tune_allocator
from torch import Tensor, nn

from auto_round._config_base import checked_path
from auto_round._files import shown
from auto_round.config_manager import AutoRoundConfig, LayerSettings, get_config
from auto_round.exceptions import CalibrationError, ConfigurationError, QuantizationError
from auto_round.export import check_export, check_folder, export_model
from auto_round.low_cpu_mem._empty import import_transformers
from auto_round.quantization._calibration_choice import calibration_sequences
from auto_round.quantization._capture import Call, Capture
from auto_round.quantization._compiled import missing_compiler
from auto_round.quantization._compute import choose_device, choose_dtype
from auto_round.quantization._plan import (
    Means,
    block_cost,
    end_to_end_cost,
    fits_on_gpu,
    make_plan,
    outside_bytes,
    spill_folder,
)
from auto_round.quantization._progress import RichProgress, SilentProgress
from auto_round.quantization._report import QuantizationReport
from auto_round.quantization._results import ResultStore
from auto_round.quantization._source import block_layers, open_model
from auto_round.quantization._tail import Tail
from auto_round.quantization._walk import Walk
from auto_round.report import save_html

_WORTH_COMPILING = 1e9
"""Steps of single weights that take as long as the compiler does; torch's own memory grows by it too."""
_REPORT_JSON, _REPORT_HTML = "quantization_report.json", "quantization_report.html"


class AutoRound:
    """Quantises a model's weights block by block, and writes them in a format that others read.

    ::

        rounder = AutoRound("models/small", config={"quantization": {"bits": 4}}, calibration="text")
        rounder.quantize()
        rounder.save("models/small-w4")

    From a path, only the block that is being worked on is in memory. From a module, its layers hold the
    quantised values afterwards, in their own type.

    The work is checked before it starts as far as it can be: configuration, checkpoint, calibration, memory.
    Ctrl-C leaves nothing behind but what was there before.

    For small blocks, where no `memory.max_ram_mb` is set, av-memory has the C library keep what is freed for
    the rest of the process, which saves a million page faults a block; what is free is given back after each
    block.

    With `end_to_end_iters`, all scales are trained together once the blocks are done; a module's layers take
    those over at the end, one after another.

    Args:
        model: Folder of a checkpoint as transformers writes it, the name of one in the local cache of the
            Hugging Face hub, or a torch module; `config.model_path` if None.
        tokenizer: What turns calibration text into tokens, as transformers' tokenizers; that of the folder if
            None and text is given.
        config: A configuration, or a mapping of its fields; the one in force if None. It is copied.
        calibration: Text files or folders, texts, a data set of Hugging Face, or token ids, as
            `calibration_tokens` takes them. Needed unless `quality` is rtn, or `iters` 0, or the model writes
            its own (`calibration` self).
        model_class: Class of transformers that builds the model; by default what the checkpoint says.
        trust_remote_code: Run the model code that the checkpoint brings. Never without need: it can do
            whatever the user of the process may do.
        progress: Show how far the work is.

    Raises:
        ConfigurationError: The arguments make no sense together.
        CheckpointError: The checkpoint is incomplete or damaged.
        QuantizationError: The model has no repeated blocks, or a group size does not divide a layer.
    """

    def __init__(
        self,
        model: str | PathLike[str] | nn.Module | None = None,
        tokenizer: Any = None,
        config: AutoRoundConfig | Mapping[str, Any] | None = None,
        *,
        calibration: object = None,
        model_class: Any = None,
        trust_remote_code: bool = False,
        progress: bool = True,
    ) -> None:
        given = get_config() if config is None else config
        self.config = given.copy() if isinstance(given, AutoRoundConfig) else AutoRoundConfig.from_dict(given)
        """The configuration, a copy."""
        model = self.config.model_path if model is None else model
        if model is None:
            raise ConfigurationError("there is no model: give a path or a module, or set config.model_path.")
        self._tokenizer, self._calibration, self._progress = tokenizer, calibration, progress
        self._trust_remote_code = trust_remote_code
        self._name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
        # Parameters that are made in inference mode could not be trained outside it.
        with torch.inference_mode(False):
            self._source = open_model(model, model_class, trust_remote_code=trust_remote_code)
        self._workspace: tempfile.TemporaryDirectory[str] | None = None
        self._store: ResultStore | None = None
        self._report: QuantizationReport | None = None
        self._tail: Tail | None = None
        try:
            self._check()
        except BaseException:
            self._source.close()
            raise

    @property
    def report(self) -> QuantizationReport:
        """What `quantize` did.

        Raises:
            QuantizationError: It was not called yet, or did not end.
        """
        if self._report is None or self._store is None:
            raise QuantizationError("nothing is quantised yet; call quantize() first.")
        return self._report

    @property
    def layers(self) -> dict[str, LayerSettings]:
        """The layers that are quantised, and how, by their full names."""
        found: dict[str, LayerSettings] = {}
        for block, name in zip(self._source.blocks, self._source.block_names, strict=True):
            layers = block_layers(block, name, self.config.quantization)
            found.update({layer.name: settings for layer, settings in layers})
        outside = self._source.outside(self.config.quantization)
        return {**found, **{layer.name: settings for layer, settings in outside}}

    def quantize(self) -> QuantizationReport:
        """Quantise the model's layers; `save` writes them.

        Returns:
            What was done, block by block and layer by layer.

        Raises:
            CalibrationError: Calibration is needed and there is none, or it does not do.
            ConfigurationError: `memory.max_ram_mb` is too little; the message says what would do.
            QuantizationError: A weight, an activation or a loss is not finite; the message names the layer.
        """
        # Training takes gradients, whatever the caller does.
        with torch.inference_mode(False), torch.enable_grad():
            return self._quantize()

    def _quantize(self) -> QuantizationReport:
        quantization = self.config.quantization
        report = QuantizationReport(model=self._name, configuration=self.config.to_dict())
        if quantization.needs_calibration:
            # Else it would show after hours of work, as a block's outputs, of which no layer can be told.
            self._source.check_finite(quantization)
        # The configuration may have changed since the start.
        if not quantization.end_to_end_steps:
            self._tail = None
        elif self._tail is None:
            self._find_tail()
        tokens = self._draw_calibration()
        if tokens is not None and len(tokens) < quantization.nsamples:
            report.notes.append(
                f"Calibration has {len(tokens)} samples, not the {quantization.nsamples} of "
                "quantization.nsamples: the data holds no more."
            )
        with ExitStack() as undo:
            workspace = self._new_workspace()
            undo.callback(workspace.cleanup)
            folder = Path(workspace.name)
            store = ResultStore(folder)
            means = self._plan(tokens, folder, report)
            with RichProgress() if self._progress else SilentProgress() as progress:
                Walk(self._source, quantization, store, means, tokens, report, progress, self._tail).run()
            undo.pop_all()
        self._forget()
        self._workspace, self._store, self._report = workspace, store, report
        return report

    def save(self, path: str | PathLike[str] | None = None, export_format: str | None = None) -> list[Path]:
        """Write the quantised model, and the report beside it.

        Args:
            path: Folder; `config.export.export_path` if None. With several formats, each gets a folder of its
                name in it.
            export_format: One of the formats; those of `config.export` if None.

        Returns:
            The folders that were written.

        Raises:
            QuantizationError: Nothing is quantised yet.
            ConfigurationError: There is no path, or a format cannot hold what was quantised.
            OSError: It cannot be written; nothing is left under its name.
        """
        report = self.report
        config = self.config.copy()
        if export_format is not None:
            config.update(export={"export_format": export_format})
        check_export(config, self.layers, self._source)
        assert self._store is not None  # noqa: S101 - there is a report

        def write_report(folder: Path) -> None:
            report.save_json(folder / _REPORT_JSON)
            save_html(report, folder / _REPORT_HTML)

        folders = self._folders(config, path)
        for name, folder in folders:
            export_model(
                name, self._source, self._store, config, folder, self._tokenizer, beside=write_report
            )
        return [folder for _, folder in folders]

    def quantize_and_save(
        self, path: str | PathLike[str] | None = None, export_format: str | None = None
    ) -> list[Path]:
        """Quantise, and write the result: `quantize`, then `save`.

        What `save` would refuse is refused before the work.
        """
        if export_format is not None:
            self.config.update(export={"export_format": export_format})
        check_export(self.config, self.layers, self._source)
        for _, folder in self._folders(self.config, path):
            check_folder(folder)
        self.quantize()
        return self.save(path)

    def close(self) -> None:
        """Let go what `quantize` keeps for `save`, and the checkpoint's files."""
        self._forget()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def _folders(config: AutoRoundConfig, path: str | PathLike[str] | None) -> list[tuple[str, Path]]:
        """Return the formats and the folder of each."""
        given = config.export.export_path if path is None else checked_path(path, "path")
        if given is None:
            raise ConfigurationError(
                "there is no folder to write to: give a path, or set export.export_path."
            )
        formats = config.export.formats
        return [(name, Path(given) / name if len(formats) > 1 else Path(given)) for name in formats]

    def _forget(self) -> None:
        if self._workspace is not None:
            self._workspace.cleanup()
        self._workspace = self._store = self._report = None

    def _new_workspace(self) -> tempfile.TemporaryDirectory[str]:
        folder = self.config.memory.workspace_dir
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(prefix="auto-round-", dir=folder)
        except OSError as failure:
            raise ConfigurationError(
                f"{folder or tempfile.gettempdir()} cannot be written to ({failure.strerror}); set "
                "memory.workspace_dir to a folder that can."
            ) from failure

    def _check(self) -> None:
        """Refuse what can be known to fail."""
        quantization, layers = self.config.quantization, self.layers
        if not layers:
            raise QuantizationError(f"all layers of {self._name} are left out by quantization.ignore_layers.")
        every = [layer.name for layer in self._source.all_layers()]
        # The usual one to ignore stands for models of all kinds.
        ignored = [pattern for pattern in quantization.ignore_layers if pattern != "lm_head"]
        for field, patterns in (("ignore_layers", ignored), ("layer_config", quantization.layer_config)):
            for pattern in patterns:
                if not any(quantization.matches(pattern, name) for name in every):
                    raise ConfigurationError(
                        f"quantization.{field} names {shown(pattern)}, which is no layer of the model; its "
                        f"layers are named like {every[0]} and {every[-1]}."
                    )
        if getattr(getattr(self._source.model, "config", None), "is_encoder_decoder", False):
            raise QuantizationError(
                f"{self._name} is an encoder with a decoder, whose blocks lie in two lists; models with one "
                "list of repeated blocks are quantised, so give the encoder or the decoder as a module."
            )
        limit = self._source.max_tokens
        if quantization.needs_calibration and limit is not None and quantization.seqlen > limit:
            raise ConfigurationError(
                f"quantization.seqlen is {quantization.seqlen}, but the model takes sequences of at most "
                f"{limit} tokens; set it to that or less."
            )
        if (
            quantization.needs_calibration
            and self._calibration is None
            and quantization.calibration != "self"
        ):
            wants = f"quality {quantization.quality!r}"
            if quantization.end_to_end_iters:
                wants += f" with end_to_end_iters {quantization.end_to_end_iters}"
            raise CalibrationError(
                f"quantization.{wants} needs calibration, and there is none. Give "
                "calibration= text files, a folder, texts, a data set or token ids; or set "
                "quantization.calibration to 'self' for text that the model writes itself, or "
                "quantization.quality to 'rtn', which needs none"
                f"{' without end_to_end_iters' if quantization.end_to_end_iters else ''}."
            )
        if quantization.end_to_end_steps:
            self._find_tail()

    def _find_tail(self) -> None:
        """Find what follows the blocks, by which scales are trained together."""
        try:
            self._check_end_to_end()
        except ConfigurationError:
            # What is usual only, such as for a model that predicts no tokens, is left out.
            if self.config.quantization.end_to_end_iters is not None:
                raise

    def _check_end_to_end(self) -> None:
        blocks = zip(self._source.blocks, self._source.block_names, strict=True)
        inside = [one for pair in blocks for one in block_layers(*pair, self.config.quantization)]
        if not any(settings.weight_dtype == "int" for _, settings in inside):
            raise ConfigurationError(
                f"quantization.end_to_end_iters is {self.config.quantization.end_to_end_iters}, but no layer "
                "of the blocks becomes integers, whose scales are what it trains; set it to 0."
            )
        with torch.inference_mode(False):
            self._tail = Tail(self._source)

    def _draw_calibration(self) -> Tensor | None:
        quantization = self.config.quantization
        if not quantization.needs_calibration:
            return None
        with ExitStack() as stack:
            model = None
            if quantization.calibration != "user":
                model = stack.enter_context(self._source.whole_model(self.config.memory.max_ram_mb))
            return calibration_sequences(
                model,
                self._text_tokenizer(),
                self._calibration,
                quantization,
                vocab_size=self._source.vocab_size,
            )

    def _text_tokenizer(self) -> Any:
        if self._tokenizer is None and self._source.folder is not None:
            transformers = import_transformers()
            try:
                found = transformers.AutoTokenizer.from_pretrained(
                    self._source.folder, trust_remote_code=self._trust_remote_code
                )
            except (OSError, ValueError, KeyError, TypeError):
                # Token ids need none, and text is refused with the reason where it is read.
                return None
            # Without its files a tokenizer is made up that knows no text.
            names = {"tokenizer.json", *getattr(found, "vocab_files_names", {}).values()}
            if any((self._source.folder / name).is_file() for name in (*names, "tokenizer_config.json")):
                self._tokenizer = found
        return self._tokenizer

    def _plan(self, tokens: Tensor | None, workspace: Path, report: QuantizationReport) -> Means:
        quantization, limit = self.config.quantization, self.config.memory.max_ram_mb
        device = choose_device(self.config.device)
        dtype = choose_dtype(device)
        compiles = self._compiles(device)
        if limit is not None:
            report.notes.append(f"Allocator: {tune_allocator().reason}.")
        if device.type == "cuda":
            return Means(
                device=device,
                dtype=dtype,
                micro_batch=min(quantization.batch_size, self.config.memory.gpu_batch_size),
                spill_folder=None,
                resident=self._tail is not None and fits_on_gpu(self._source, device, dtype),
                compiles=compiles,
            )
        calls: list[Call] = []
        shape: tuple[int, ...] = ()
        if tokens is not None:
            with self._source.callable_head():
                hidden, calls = Capture(self._source.model, list(self._source.blocks)).run(tokens[:1])
            shape = tuple(hidden.shape[1:])
        costs = [
            block_cost(
                block,
                call,
                block_layers(block, name, quantization),
                quantization,
                samples=0 if tokens is None else len(tokens),
                sample_shape=shape,
                dtype=dtype,
                trains=quantization.trains,
                compiles=compiles,
                gives_rows=self._source.gives_rows,
            )
            for block, name, call in self._one_of_each(calls)
        ]
        cost = max(costs, key=lambda cost: cost.weights + cost.sample)
        cost = replace(cost, outside=outside_bytes(self._source.outside(quantization)))
        together = None
        if self._tail is not None and tokens is not None:
            together = end_to_end_cost(
                self._source,
                calls,
                self._tail,
                quantization,
                samples=len(tokens),
                sample_shape=shape,
                dtype=dtype,
            )
        try:
            plan = make_plan(cost, quantization, limit, together)
        except ConfigurationError:
            if together is None or quantization.end_to_end_iters is not None:
                raise
            plan = make_plan(cost, quantization, limit)
            self._tail = None
            report.notes.append(
                f"Scales are not trained together, which takes more than the {limit} MB of memory.max_ram_mb."
            )
        if plan.spills:
            report.notes.append(f"Activations between blocks are kept on disk, in {workspace}.")
        if plan.micro_batch < quantization.batch_size:
            report.notes.append(
                f"Batches of {quantization.batch_size} go through in parts of {plan.micro_batch}, to fit "
                f"into {limit} MB."
            )
        return Means(
            device=device,
            dtype=dtype,
            micro_batch=plan.micro_batch,
            spill_folder=spill_folder(workspace, plan),
            keeps_heap=plan.keeps_heap,
            resident=plan.resident,
            compiles=compiles,
        )

    def _compiles(self, device: torch.device) -> bool:
        """Return whether steps are compiled: as was asked for, or where it saves more than it costs."""
        quantization = self.config.quantization
        if not quantization.trains or quantization.compile is False:
            return False
        problem = missing_compiler(device)
        if quantization.compile:
            if problem is not None:
                raise ConfigurationError(f"quantization.compile is True, but {problem}; or set it to None.")
            return True
        weights = sum(
            layer.weight.numel()
            for block, name in zip(self._source.blocks, self._source.block_names, strict=True)
            for layer, _ in block_layers(block, name, quantization)
        )
        is_long = weights * quantization.iters >= _WORTH_COMPILING
        return is_long and problem is None and self.config.memory.max_ram_mb is None

    def _one_of_each(self, calls: list[Call]) -> Generator[tuple[nn.Module, str, Call | None]]:
        """Yield the blocks that differ in their layers' shapes or settings, with name and call, if any."""
        seen: set[object] = set()
        for block, name, call in zip_longest(self._source.blocks, self._source.block_names, calls):
            layers = block_layers(block, name, self.config.quantization)
            key = tuple((tuple(layer.weight.shape), settings) for layer, settings in layers)
            if key not in seen:
                seen.add(key)
                yield block, name, call
