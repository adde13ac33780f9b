"""What changed between two models, as a list of edits; and the same list folded and put into words."""

from __future__ import annotations

from pathlib import Path

from nmonnx.diff.compare import Comparison
from nmonnx.diff.edits import (
    AttributeEdit,
    Edit,
    FieldEdit,
    FunctionEdit,
    MetadataEdit,
    NodeEdit,
    OpsetEdit,
    OrderEdit,
    RewireEdit,
    TensorEdit,
    ValueEdit,
)
from nmonnx.diff.fold import Fold, fold
from nmonnx.diff.render import to_data, to_json, to_text
from nmonnx.onnx_file.graph import read_skeleton
from nmonnx.onnx_file.tensors import TensorReader

__all__ = [
    "AttributeEdit",
    "Edit",
    "FieldEdit",
    "Fold",
    "FunctionEdit",
    "MetadataEdit",
    "NodeEdit",
    "OpsetEdit",
    "OrderEdit",
    "RewireEdit",
    "TensorEdit",
    "ValueEdit",
    "diff",
    "fold",
    "to_data",
    "to_json",
    "to_text",
]


def diff(path_a: str | Path, path_b: str | Path) -> list[Edit]:
    """Everything that differs between the model at `path_a` and the one at `path_b`, in the order of the files; empty
    when they are the same. Weights are compared byte for byte, a piece at a time. Raises InputError when a file is
    not a model or external data is missing."""
    path_a, path_b = Path(path_a), Path(path_b)
    comparison = Comparison(TensorReader(path_a), TensorReader(path_b))
    return list(comparison.models(read_skeleton(path_a), read_skeleton(path_b)))
