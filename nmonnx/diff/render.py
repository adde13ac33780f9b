"""A diff as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nmonnx.diff.edits import Edit
from nmonnx.diff.fold import Fold, fold

_SIGNS = {"added": "+", "removed": "-", "changed": "~"}
_LONGEST = 160


def to_text(edits: Sequence[Edit], places: int = 3) -> str:
    """One line for each fold, at most `places` places in it: sign, layers x edits in each, the change, where.

    "~ 30 layers x 7: node MatMul -> NMMatMul 8:16 (/model/layers.{0..29}/attn/{q,k,v,o}_proj/MatMul, ...)"
    """
    if not edits:
        return "no difference"
    return "\n".join(_line(f, places) for f in fold(edits))


def to_data(edits: Sequence[Edit]) -> dict[str, Any]:
    """The edits and their folds as JSON values."""
    return {
        "identical": not edits,
        "folds": [
            {"kind": f.kind, "change": f.change, "what": f.what, "where": f.where, "layers": f.layers, "count": f.count}
            for f in fold(edits)
        ],
        "edits": [{"kind": e.kind, "change": e.change, **asdict(e)} for e in edits],
    }


def to_json(edits: Sequence[Edit], path_a: str | Path, path_b: str | Path) -> str:
    """`to_data` with schema version, versions of the tools and SHA-256 of the two .onnx files."""
    from nmonnx import report

    inputs = (Path(path_a), Path(path_b))
    return report.to_json(report.Report(f"{path_a} against {path_b}", data=to_data(edits), inputs=inputs))


def _line(group: Fold, places: int) -> str:
    where = ", ".join(group.where[:places])
    more = len(group.where) - places
    if more > 0:
        where += f", ... and {more} more"
    return f"{_SIGNS[group.change]} {_count(group)}: {_shortened(group.what)} ({where})"


def _count(group: Fold) -> str:
    each, rest = divmod(group.count, group.layers)
    if group.layers > 1 and not rest:
        return f"{group.layers} layers x {each}"
    return str(group.count)


def _shortened(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
