"""Conversions as text: each file of tests/golden holds a graph before and after, and both are run.

A file has a title, the recipe, the weights by shape, then "--- before" and "--- after" (without "after" the
conversion must refuse, with the words behind "refused:"). To write the "after" of a new file, or of all after a
change that was meant: python tests/test_golden.py
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import onnxruntime as ort
import pytest
from onnx import ModelProto, numpy_helper
from small_models import weights
from stock_reference import prune_with_stock_ops
from test_zoo import records, worst

from nmonnx.convert import convert
from nmonnx.errors import NmonnxError
from nmonnx.library import make_session
from nmonnx.pattern import Pattern
from nmonnx.pruning.recipe import Recipe

FILES = sorted((Path(__file__).parent / "golden").glob("*.txt"))


@dataclass(frozen=True)
class Golden:
    title: str
    recipe: Recipe
    refused: str
    before: ModelProto
    after: str


def read(path: Path) -> Golden:
    head, _, rest = path.read_text().partition("--- before\n")
    before, _, after = rest.partition("--- after\n")
    title, *lines = head.strip().splitlines()
    fields = dict(line.split(": ", 1) for line in lines)
    proto = onnx.parser.parse_model(before)
    for seed, (name, kind, shape) in enumerate(re.findall(r"(\w+) (\w+)\[([\d, ]+)\]", fields.pop("weights"))):
        values = weights(*(int(d) for d in shape.split(",")), seed=seed, dtype=np.dtype(kind).type)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    refused = fields.pop("refused", "")
    recipe = Recipe.from_dict({k: v == "true" if k == "lm_head" else v for k, v in fields.items()})
    return Golden(title, recipe, refused, proto, after)


def text_of(path: Path) -> str:
    """A model as text without weights, fallback bodies and metadata that names versions."""
    proto = onnx.load(path)
    stored = [f"# {t.name} {np.dtype(numpy_helper.to_array(t).dtype)}{list(t.dims)}" for t in proto.graph.initializer]
    del proto.graph.initializer[:]
    del proto.metadata_props[:]
    bodies = [f for f in proto.functions if f.domain != "ai.nmonnx"]
    del proto.functions[:]
    proto.functions.extend(bodies)
    return "\n".join([*stored, onnx.printer.to_text(proto)]) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path, tmp_path: Path) -> None:
    golden = read(path)
    source, out = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(golden.before, source)
    if golden.refused:
        with pytest.raises(NmonnxError, match=golden.refused):
            convert(source, out, golden.recipe)
        assert not out.exists()
        return
    convert(source, out, golden.recipe)
    assert text_of(out) == golden.after
    onnx.checker.check_model(str(out))
    with pytest.raises(NmonnxError, match="converted already"):
        convert(out, tmp_path / "again.onnx", golden.recipe)
    check_numbers(golden, source, out, tmp_path)


def check_numbers(golden: Golden, source: Path, out: Path, folder: Path) -> None:
    feeds = {
        i.name: weights(*(d.dim_value or 3 for d in i.type.tensor_type.shape.dim), seed=99) for i in inputs(source)
    }
    feeds |= {i.name: np.array(True) for i in inputs(source) if i.type.tensor_type.elem_type == onnx.TensorProto.BOOL}
    half = [i.name for i in inputs(source) if i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16]
    feeds |= {name: feeds[name].astype(np.float16) for name in half}
    pattern = golden.recipe.pattern
    stock = prune_with_stock_ops(golden.before, records(out), pattern.n, pattern.m)
    expected = ort.InferenceSession(stock.SerializeToString()).run(None, feeds)
    for library in (True, False):
        got = make_session(out, library=library).run(None, feeds)
        assert worst([got], [expected]) <= (2e-3 if half else 1e-5)
    dense = folder / "dense.onnx"
    convert(source, dense, Recipe(Pattern(8, 8), golden.recipe.include, lm_head=golden.recipe.lm_head))
    original = make_session(source, library=False).run(None, feeds)
    got = make_session(dense).run(None, feeds)
    assert [a.tobytes() for a in got] == [a.tobytes() for a in original]


def inputs(path: Path):  # type: ignore[no-untyped-def]
    return onnx.load(path).graph.input


def regenerate() -> None:
    for path in FILES:
        golden = read(path)
        if golden.refused:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
            onnx.save(golden.before, source)
            convert(source, out, golden.recipe)
            path.write_text(path.read_text().partition("--- after\n")[0] + "--- after\n" + text_of(out))


if __name__ == "__main__":
    regenerate()
