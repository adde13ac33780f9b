"""Products of quantised weights become NMMatMulNBits: the same numbers, with the library and without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from site_models import RNG, matrix, run_layer

from nmonnx.convert import convert
from nmonnx.library import make_session
from nmonnx.onnx_file.graph import load
from nmonnx.pruning.recipe import Recipe
from nmonnx.reference import prune_matmul
from nmonnx.sites import find_sites
from nmonnx.validate import validate

K, N = 64, 40
HEAD = "g (float[T, 64] x) => (float[T, 40] y) {{ {nodes} }}"
FUSED = Recipe.from_dict({"kernel": "fused"})
DYNAMIC = "q, sx, zx = DynamicQuantizeLinear(x) "


def codes(dtype: type = np.int8) -> np.ndarray:
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max + 1, (K, N)).astype(dtype)


def positive(*shape: int) -> np.ndarray:
    return (RNG.random(shape) * 0.1 + 0.01).astype(np.float32)


def nbits(bits: int, block: int, zeros: str = "") -> dict[str, np.ndarray]:
    blocks = -(-K // block)
    found = {
        "b": RNG.integers(0, 256, (N, blocks, block * bits // 8)).astype(np.uint8),
        "s": positive(N, blocks),
        "c": matrix(N),
    }
    if zeros == "packed":
        found["z"] = RNG.integers(0, 256, (N, -(-blocks * bits // 8))).astype(np.uint8)
    if zeros == "float":
        found["z"] = (RNG.random((N, blocks)) * 15).astype(np.float32)
    return found


def four(signed: bool) -> onnx.TensorProto:
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    values = RNG.integers(-8, 8, K * N) if signed else RNG.integers(0, 16, K * N)
    return onnx.helper.make_tensor("w", kind, (K, N), values.tolist())


MATMUL = "y = com.microsoft.MatMulNBits<K=64, N=40, bits={bits}, block_size={block}, accuracy_level=4>({inputs})"
SPELLINGS: dict[str, tuple[str, dict]] = {
    "MatMulNBits 4 bits": (MATMUL.format(bits=4, block=32, inputs="x, b, s"), nbits(4, 32)),
    "of 16 channels": (MATMUL.format(bits=4, block=16, inputs="x, b, s, z"), nbits(4, 16, "packed")),
    "of 128 channels": (MATMUL.format(bits=4, block=128, inputs="x, b, s"), nbits(4, 128)),
    "fractions": (MATMUL.format(bits=4, block=32, inputs="x, b, s, z"), nbits(4, 32, "float")),
    "with a bias": (MATMUL.format(bits=4, block=32, inputs='x, b, s, z, "", c'), nbits(4, 32, "packed")),
    "MatMulNBits 8 bits": (MATMUL.format(bits=8, block=32, inputs="x, b, s, z"), nbits(8, 32, "packed")),
    "DynamicQuantizeMatMul": (
        "y = com.microsoft.DynamicQuantizeMatMul(x, w, s, z, c)",
        {"w": codes(), "s": positive(N), "z": RNG.integers(-5, 5, N).astype(np.int8), "c": matrix(N)},
    ),
    "MatMulInteger": (
        DYNAMIC + "i = MatMulInteger(q, w, zx, z) f = Cast<to = 1>(i) m = Mul(sx, s) y = Mul(f, m)",
        {"w": codes(np.uint8), "s": positive(1), "z": np.uint8(131)},
    ),
    "MatMulIntegerToFloat": (
        DYNAMIC + "y = com.microsoft.MatMulIntegerToFloat(q, w, sx, s, zx, z, c)",
        {"w": codes(), "s": positive(N), "z": np.zeros(N, np.int8), "c": matrix(N)},
    ),
    "QDQ per column": ("v = DequantizeLinear<axis = 1>(w, s) y = MatMul(x, v)", {"w": codes(), "s": positive(N)}),
    "QDQ of blocks": (
        "v = DequantizeLinear<axis = 0, block_size = 32>(w, s, z) y = MatMul(x, v)",
        {"w": codes(np.uint8), "s": positive(2, N), "z": RNG.integers(0, 256, (2, N)).astype(np.uint8)},
    ),
    "QDQ turned": (
        "v = DequantizeLinear<axis = 0>(w, s) y = Gemm<transB = 1>(x, v, c)",
        {"w": np.ascontiguousarray(codes().T), "s": positive(N), "c": matrix(N)},
    ),
    "QDQ int4": ("v = DequantizeLinear<axis = 0, block_size = 16>(w, s) y = MatMul(x, v)", {"s": positive(4, N)}),
    "QDQ uint4": ("v = DequantizeLinear(w, s) y = MatMul(x, v)", {"s": positive()}),
}


@pytest.fixture(params=SPELLINGS, ids=list(SPELLINGS))
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    nodes, weights = SPELLINGS[request.param]
    more = [four(signed="uint4" not in request.param)] if "int4" in request.param else []
    return built(tmp_path, nodes, weights, more)


def built(tmp_path: Path, nodes: str, weights: dict, more: Sequence[onnx.TensorProto] = ()) -> Path:
    imports = '["" : 21, "com.microsoft" : 1]'
    proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: {imports}>\n{HEAD.format(nodes=nodes)}")
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items())
    proto.graph.initializer.extend(more)
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_every_spelling_becomes_the_same_product(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.onnx"
    done = convert(original, out, FUSED)
    (record,) = done.records
    assert (record["status"], record["kernel"]) == ("pruned", "NMMatMulNBits")
    assert [node.op_type for node in onnx.load(out).graph.node] == ["NMMatMulNBits"]
    (site,) = find_sites(load(original)).sites
    proto, x = onnx.load(original), matrix(7, K)
    weight = run_layer(proto, site) if site.op == "MatMul" else site.weight()
    bias = next(
        (numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "c" and _reads(proto, "c")), None
    )
    want = prune_matmul(x, weight, 8, 16, bias)
    size = np.abs(want).max()
    (kernel,) = make_session(out).run(None, {"x": x})
    (fallback,) = ort.InferenceSession(out.read_bytes()).run(None, {"x": x})
    assert np.abs(fallback - want).max() <= 1e-5 * size
    assert np.abs(kernel - want).max() <= (2e-2 if "accuracy_level" in str(proto) else 2e-4) * size


@pytest.mark.parametrize("exact", [True, False])
def test_scales_that_are_float16_are_stored_so(tmp_path: Path, exact: bool) -> None:
    nodes, weights = SPELLINGS["of 16 channels"]
    scales = weights["s"].astype(np.float16).astype(np.float32) if exact else weights["s"]
    out = tmp_path / "sparse.onnx"
    convert(built(tmp_path, nodes, {**weights, "s": scales}), out, FUSED)
    (stored,) = (numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer if t.name.endswith("_scales"))
    assert stored.dtype == (np.float16 if exact else np.float32)
    np.testing.assert_array_equal(stored.astype(np.float32), scales.T)


def _reads(proto: onnx.ModelProto, name: str) -> bool:
    return any(name in node.input for node in proto.graph.node)


def test_validation_holds_what_was_packed_against_the_original(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.onnx"
    convert(original, out, FUSED)
    report = validate(original, out)
    assert not [check for check in report.checks if not check.passed]
    assert "packed weights are worth what they were" in {check.name for check in report.checks}
    proto = onnx.load(out)
    packed = next(t for t in proto.graph.initializer if t.name.endswith("/KN"))
    values = numpy_helper.to_array(packed).copy()
    values[3, 5] ^= 1
    packed.CopyFrom(numpy_helper.from_array(values, packed.name))
    onnx.save(proto, out)
    failed = {check.name for check in validate(original, out).checks if not check.passed}
    assert "packed weights are worth what they were" in failed


LEFT = {
    "g_idx": (
        'y = com.microsoft.MatMulNBits<K=64, N=40, bits=4, block_size=32>(x, b, s, "", g)',
        {**nbits(4, 32), "g": (np.arange(K) % 2).astype(np.int32)},
        "g_idx",
    ),
    "2 bits": ("y = com.microsoft.MatMulNBits<K=64, N=40, bits=2, block_size=32>(x, b, s)", nbits(2, 32), "2 bits"),
    "another reader": (
        "t = com.microsoft.MatMulNBits<K=64, N=40, bits=4, block_size=32>(x, b, s) n = Cast<to = 1>(b) r = ReduceSum(n)"
        " y = Add(t, r)",
        nbits(4, 32),
        "other readers",
    ),
    "a fixed range": (
        "q = QuantizeLinear(x, sx, zx) y = com.microsoft.MatMulIntegerToFloat(q, w, sx, s, zx)",
        {"w": codes(), "s": positive(N), "sx": np.float32(0.02), "zx": np.uint8(128)},
        "fixed range",
    ),
    "a scale of each channel": (
        "v = DequantizeLinear<axis = 0>(w, s) y = MatMul(x, v)",
        {"w": codes(), "s": positive(K)},
        "every channel",
    ),
    "a result that others read": (
        DYNAMIC + "i = MatMulInteger(q, w, zx) f = Cast<to = 1>(i) m = Mul(sx, s) u = Mul(f, m) y = Add(u, f)",
        {"w": codes(), "s": positive(1)},
        "integer result",
    ),
}


@pytest.mark.parametrize(("nodes", "weights", "why"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_exact_is_pruned_alone_with_the_reason(
    tmp_path: Path, nodes: str, weights: dict, why: str
) -> None:
    done = convert(built(tmp_path, nodes, weights), tmp_path / "sparse.onnx", FUSED)
    assert [r["kernel"] for r in done.records] == ["NMPrune"]
    (reason,) = next(p for p in done.passes if p.name == "fuse-matmul").left.values()
    assert why in reason


def test_corrections_of_the_activation_are_made_up_for(tmp_path: Path) -> None:
    nodes, weights = SPELLINGS["with a bias"]
    original, out = built(tmp_path, nodes, weights), tmp_path / "sparse.onnx"
    convert(original, out, Recipe.from_dict({"kernel": "fused", "mitigations": ["d-pts-mean", "var"]}))
    assert not [check for check in validate(original, out).checks if not check.passed]
    x, weight = matrix(5, K) + 1, find_sites(load(original)).sites[0].weight()
    want = prune_matmul(x, weight, 8, 16, weights["c"], variance=True, center="mean", row_sum=weight.sum(0))
    (fallback,) = ort.InferenceSession(out.read_bytes()).run(None, {"x": x})
    np.testing.assert_allclose(fallback, want, atol=1e-4 * np.abs(want).max())
