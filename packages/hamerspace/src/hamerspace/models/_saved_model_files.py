"""SavedModels: graphs with weights in a folder, read without any Python of theirs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from hamerspace._imports import need
from hamerspace.exceptions import ModelError, UnsafeModelError
from hamerspace.models._tensorflow_graph import SIGNATURE, Endpoint, Traced, first_line
from hamerspace.runtimes._tensorflow_library import quiet, tensorflow

_REFUSED_OPS: Final = frozenset(
    {
        "EagerPyFunc", "PyFunc", "PyFuncStateless", "ReadFile", "WriteFile", "MatchingFiles", "LoadDataset",
        "SaveDataset", "SaveDatasetV2", "CreateSummaryFileWriter", "CreateSummaryDbWriter", "TextLineReader",
        "TextLineReaderV2", "TextLineDataset", "TFRecordReader", "TFRecordReaderV2", "TFRecordDataset",
        "TFRecordDatasetV2", "WholeFileReader", "WholeFileReaderV2", "FixedLengthRecordReader",
        "FixedLengthRecordReaderV2", "FixedLengthRecordDataset", "FixedLengthRecordDatasetV2",
        "CacheDataset", "CacheDatasetV2", "ImmutableConst",
        "DebugIdentity", "DebugIdentityV2", "DebugIdentityV3", "DebugNumericSummaryV2",
    }
)  # fmt: skip
"""What reaches out of the graph: into Python, or into files that are no part of the model."""
_CHECKPOINT_OPS: Final = frozenset(
    {"Save", "SaveV2", "SaveSlices", "MergeV2Checkpoints", "Restore", "RestoreV2", "RestoreSlice"}
)
"""What reads and writes checkpoints: the savers in every SavedModel do so, and the model itself does not."""


def open_saved_model(path: Path) -> Endpoint:
    """Load a SavedModel's folder.

    Raises:
        ModelError: it is damaged or has no signature.
        UnsafeModelError: its graph calls Python or opens files.
    """
    tf = tensorflow()
    _refuse_reaching_out(path)
    try:
        with quiet():
            loaded = tf.saved_model.load(str(path))
    except Exception as error:
        raise ModelError(f"{path} cannot be read by TensorFlow: {first_line(error)}") from error
    return endpoint_of(loaded, str(path))


def endpoint_of(loaded: Any, where: str) -> Endpoint:
    """Take the signature of what ``tf.saved_model.load`` gave; it has its inputs in the order of their names.

    Raises:
        ModelError: there is none, or more than one and none of them is the usual.
    """
    signatures = dict(loaded.signatures)
    key = SIGNATURE if SIGNATURE in signatures else next(iter(signatures), None)
    if key is None or (key != SIGNATURE and len(signatures) > 1):
        raise ModelError(
            f"{where} has the signatures {list(signatures)}, and {SIGNATURE!r} is wanted; save it with "
            "tf.saved_model.save(module, folder, signatures=function), or by Keras's model.export(folder)"
        )
    function = signatures[key]
    inputs = function.structured_input_signature[1]
    outputs = tuple(function.structured_outputs)
    return Endpoint(
        function=function,
        owner=loaded,
        inputs=tuple(sorted(inputs)),
        outputs=outputs,
        structure="tensor" if len(outputs) == 1 else "dict",
    )


def write_saved_model(traced: Traced, folder: Path) -> None:
    """Write a compiled function and its variables into a folder."""
    tf = tensorflow()
    module = tf.Module()
    module.owner = traced.owner
    with quiet():
        tf.saved_model.save(
            module,
            str(folder),
            signatures={SIGNATURE: traced.function},
            options=tf.saved_model.SaveOptions(save_debug_info=False),
        )


def _refuse_reaching_out(path: Path) -> None:
    message = need("tensorflow.core.protobuf.saved_model_pb2").SavedModel()
    try:
        message.ParseFromString((path / "saved_model.pb").read_bytes())
    except Exception as error:
        raise ModelError(f"{path} is no SavedModel, or is damaged: {first_line(error)}") from error
    used: set[str] = set()
    for meta in message.meta_graphs:
        graph = meta.graph_def
        nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
        used.update(node.op for node in nodes if node.op not in _CHECKPOINT_OPS)
        used.update(_checkpoint_ops_outside_savers(meta))
        for node in nodes:
            if node.op == "PrintV2" and node.attr["output_stream"].s.startswith(b"file:"):
                raise UnsafeModelError(
                    f"{path} has PrintV2 into a file in its graph; take it out of the model"
                )
    if refused := sorted(used & (_REFUSED_OPS | _CHECKPOINT_OPS)):
        raise UnsafeModelError(
            f"{path} has {', '.join(refused)} in its graph, which run Python or open files; take them out of "
            "the model before it is saved"
        )


def _checkpoint_ops_outside_savers(meta: Any) -> set[str]:
    """Names of operators on checkpoints in what a model runs: all but what its saver alone leads to."""
    functions = {one.signature.name: one.node_def for one in meta.graph_def.library.function}
    main = {node.name: node for node in meta.graph_def.node}

    def upstream(names: list[str]) -> set[str]:
        found: set[str] = set()
        left = [name for name in names if name]
        while left:
            name = left.pop().lstrip("^").partition(":")[0]
            if name in main and name not in found:
                found.add(name)
                left.extend(main[name].input)
        return found

    def called(nodes: Iterable[Any]) -> list[Any]:
        """Return nodes with those of all functions that they call."""
        found: list[Any] = []
        seen: set[str] = set()
        left = list(nodes)
        while left:
            node = left.pop()
            found.append(node)
            values = [one for value in node.attr.values() for one in (value.func, *value.list.func)]
            # A function can be called by its name as an operator, too.
            for name in (node.op, *(one.name for one in values)):
                if name in functions and name not in seen:
                    seen.add(name)
                    left.extend(functions[name])
        return found

    saver = meta.saver_def
    of_saver = upstream([saver.save_tensor_name, saver.restore_op_name, saver.filename_tensor_name])
    outputs = [
        tensor.name for signature in meta.signature_def.values() for tensor in signature.outputs.values()
    ]
    own = {name for name in main if name not in of_saver} | upstream(outputs)
    nodes = called(main[name] for name in own)
    objects = meta.object_graph_def.concrete_functions
    nodes += called(node for name in objects if name in functions for node in functions[name])
    # What is said to restore runs when a model of the older format is loaded.
    restoring = called(main[name] for name in upstream([saver.restore_op_name]))
    writes = {
        node.op for node in restoring if node.op in _CHECKPOINT_OPS and not node.op.startswith("Restore")
    }
    return {node.op for node in nodes if node.op in _CHECKPOINT_OPS} | writes
