"""`--weights`: small and sparse in one step, as exact as it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from site_models import matrix
from test_fuse_nbits import built

from nmonnx.convert import convert
from nmonnx.errors import UsageError
from nmonnx.library import make_session
from nmonnx.nbits import in_form
from nmonnx.pruning.recipe import Recipe
from nmonnx.reference import prune_matmul
from nmonnx.validate import validate

K, N = 64, 40
NODES = {
    "as [K, N]": ("y = MatMul(x, w)", {"w": matrix(K, N)}),
    "as [N, K], with a bias": ("y = Gemm<transB = 1>(x, w, c)", {"w": matrix(N, K), "c": matrix(N)}),
    "fp16 behind a Cast": ("v = Cast<to = 1>(w) y = MatMul(x, v)", {"w": matrix(K, N, dtype=np.float16)}),
}


def recipe(**more: object) -> Recipe:
    return Recipe.from_dict({"kernel": "fused", **more})


@pytest.mark.parametrize("form", ["fp16", "int8", "int4"])
@pytest.mark.parametrize(("nodes", "weights"), NODES.values(), ids=NODES)
def test_the_new_weight_is_what_the_op_reads(tmp_path: Path, nodes: str, weights: dict, form: str) -> None:
    original, out = built(tmp_path, nodes, weights), tmp_path / "sparse.onnx"
    done = convert(original, out, recipe(weights=form))
    (record,) = done.records
    weight = weights["w"].T if "transB" in nodes else weights["w"]
    if form == "fp16" and weight.dtype == np.float16:
        assert "weights" not in record
        return
    new = in_form(weight.astype(np.float32), form).values()
    assert record["weights"] == form and record["kernel"] == ("NMMatMul" if form == "fp16" else "NMMatMulNBits")
    error = np.linalg.norm(new - weight.astype(np.float32)) / np.linalg.norm(weight.astype(np.float32))
    assert record["weight_error"] == pytest.approx(error, abs=1e-7)
    x = matrix(6, K)
    want = prune_matmul(x, new, 8, 16, weights.get("c"))
    (fallback,) = ort.InferenceSession(out.read_bytes()).run(None, {"x": x})
    (kernel,) = make_session(out).run(None, {"x": x})
    assert np.abs(fallback - want).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(kernel - want).max() <= 2e-2 * np.abs(want).max()
    stored = {t.name: t for t in onnx.load(out).graph.initializer}
    assert "w" not in stored
    held = sum(numpy_helper.to_array(t).nbytes for t in stored.values())
    assert held <= K * N * {"fp16": 2, "int8": 1.1, "int4": 0.9}[form] + 4 * N  # N = 40 takes two chunks of 32
    assert not [check for check in validate(original, out).checks if not check.passed]


def test_validation_sees_a_weight_that_is_not_as_close_as_recorded(tmp_path: Path) -> None:
    original, out = built(tmp_path, *NODES["as [K, N]"]), tmp_path / "sparse.onnx"
    convert(original, out, recipe(weights="int8"))
    proto = onnx.load(out)
    stored = next(t for t in proto.graph.initializer if t.data_type == TensorProto.INT8)
    values = numpy_helper.to_array(stored).copy()
    values[:8] = -values[:8]
    stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    onnx.save(proto, out)
    failed = {check.name for check in validate(original, out).checks if not check.passed}
    assert "rounded weights are as close as recorded" in failed


@pytest.mark.parametrize("mitigation", ["d-pts-mean", "s-pts"])
def test_what_is_made_up_for_is_of_the_new_weight(tmp_path: Path, mitigation: str) -> None:
    """n = m drops nothing: what a shift or a center takes must come back, of the weight as it is stored."""
    from nmonnx.calibration.calibrate import calibrate

    weights = NODES["as [K, N]"][1]
    original, out = built(tmp_path, *NODES["as [K, N]"]), tmp_path / "sparse.onnx"
    asked = recipe(weights="int4", mitigations=[mitigation], pattern="16:16")
    stats = calibrate(original, feeds=[{"x": matrix(9, K) + 3}]) if asked.needs else None
    convert(original, out, asked, stats=stats)
    x = matrix(6, K) + 3
    want = x.astype(np.float64) @ in_form(weights["w"], "int4").values()
    (fallback,) = ort.InferenceSession(out.read_bytes()).run(None, {"x": x})
    assert np.abs(fallback - want).max() <= 1e-5 * np.abs(want).max()


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    weights = {"w": matrix(K, K), "v": matrix(K, N)}
    nodes = "a = MatMul(x, w) b = Tanh(a) c = MatMul(b, w) y = MatMul(c, v)"
    out = tmp_path / "sparse.onnx"
    done = convert(built(tmp_path, nodes, weights), out, recipe(weights="int8"))
    assert [r["weights"] for r in done.records] == ["int8"] * 3
    kinds = [t.data_type for t in onnx.load(out).graph.initializer]
    assert kinds.count(TensorProto.INT8) == 2 and kinds.count(TensorProto.FLOAT16) == 2


def test_a_weight_with_another_reader_is_left_with_the_reason(tmp_path: Path) -> None:
    nodes = "a = MatMul(x, w) r = ReduceSum<keepdims = 0>(w) y = Add(a, r)"
    done = convert(built(tmp_path, nodes, {"w": matrix(K, N)}), tmp_path / "sparse.onnx", recipe(weights="int4"))
    (reason,) = next(p for p in done.passes if p.name == "quantise-weights").left.values()
    assert "stored twice" in reason and "weights" not in done.records[0]


@pytest.mark.parametrize("form", ["int8", "fp16"])
def test_a_weight_that_has_no_such_form_stays(tmp_path: Path, form: str) -> None:
    weight, out = matrix(K, N) * 1e6, tmp_path / "sparse.onnx"
    weight[3, 3] = np.inf
    done = convert(built(tmp_path, "y = MatMul(x, w)", {"w": weight}), out, recipe(weights=form))
    (reason,) = next(p for p in done.passes if p.name == "quantise-weights").left.values()
    assert "not finite" in reason
    (stored,) = onnx.load(out).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(stored), weight)


@pytest.mark.parametrize("more", [{"kernel": "prune"}, {"prune": "weights"}, {"pattern": "50%", "kernel": "auto"}])
def test_without_a_fused_op_there_is_no_form(more: dict) -> None:
    with pytest.raises(UsageError, match="prune and multiply in one"):
        recipe(weights="int4", **more)


def test_the_file_says_what_was_asked(tmp_path: Path) -> None:
    out = tmp_path / "sparse.onnx"
    convert(built(tmp_path, *NODES["as [K, N]"]), out, recipe(weights="int4"))
    meta = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert json.loads(meta["nmonnx.recipe"])["weights"] == "int4"
