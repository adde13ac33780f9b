"""Quantised spellings: the weight read is the one ONNX Runtime multiplies with, and codes are never pruned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from site_models import RNG, matrix, parse, run_layer, saved

from nmonnx.nbits import Quantised, blocks_of, pack
from nmonnx.onnx_file.graph import Model
from nmonnx.sites import Site, find_sites

HEAD = "g (float[T, {k}] x) => (float[T, N] y) {{ {nodes} }}"


def one(model: Model) -> Site:
    found = find_sites(model)
    assert len(found.sites) == 1 and found.total == 1, found
    return found.sites[0]


def assert_reads_what_runs(model: Model, tolerance: float = 1e-5) -> Site:
    site = one(model)
    weight = site.weight()
    assert weight.shape == (site.k, site.n) and site.fusable is None
    assert_fuses_exactly(site)
    np.testing.assert_allclose(run_layer(onnx.load(model.path), site), weight, atol=tolerance * np.abs(weight).max())
    return site


def assert_fuses_exactly(site: Site) -> None:
    """What NMMatMulNBits would read is worth what the weight is, bit for bit; or there is a reason."""
    codes = site.quantised
    assert (codes is None) is bool(site.not_fusable)
    if codes is not None:
        whole = codes.codes()
        data = pack(whole) if codes.bits == 4 else whole
        made = Quantised(codes.bits, codes.block_size, data, codes.scales(), codes.zeros())
        assert made.scales.shape == (blocks_of(site.k, codes.block_size), site.n)
        np.testing.assert_array_equal(made.values(), site.weight())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32]),
    k=st.integers(2, 70),
    n=st.integers(1, 9),
    zeros=st.sampled_from(["none", "packed", "float"]),
    legacy=st.booleans(),
)
def test_matmulnbits_of_any_shape(
    tmp_path: Path, bits: int, block: int, k: int, n: int, zeros: str, legacy: bool
) -> None:
    assume(bits == 4 or zeros != "float")  # which ONNX Runtime's CPU kernel refuses
    blocks = -(-k // block)
    weights = {
        "b": RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        "s": np.abs(matrix(n, blocks)) + 0.1,
    }
    if legacy:
        weights["s"] = weights["s"].reshape(-1)
    if zeros == "packed":
        weights["z"] = RNG.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8)
    if zeros == "float":
        weights["z"] = matrix(n, blocks) + 2 ** (bits - 1)
    third = ", z" if zeros != "none" else ""
    nodes = f"y = com.microsoft.MatMulNBits<K={k}, N={n}, bits={bits}, block_size={block}>(x, b, s{third})"
    site = assert_reads_what_runs(parse(tmp_path, HEAD.format(k=k, nodes=nodes), weights))
    assert (site.k, site.n, site.initializer) == (k, n, "b")


def test_matmulnbits_groups_rows_by_g_idx(tmp_path: Path) -> None:
    order = RNG.permutation(np.repeat(np.arange(2), 16)).astype(np.int32)
    weights = {"b": RNG.integers(0, 256, (5, 2, 8)).astype(np.uint8), "s": np.abs(matrix(5, 2)), "g": order}
    nodes = 'y = com.microsoft.MatMulNBits<K=32, N=5, bits=4, block_size=16>(x, b, s, "", g)'
    assert_reads_what_runs(parse(tmp_path, HEAD.format(k=32, nodes=nodes), weights))


def test_prepacked_matmulnbits_is_left_alone(tmp_path: Path) -> None:
    weights = {"b": np.zeros((5, 2, 8), np.uint8), "s": matrix(5, 2)}
    nodes = "y = com.microsoft.MatMulNBits<K=32, N=5, bits=4, block_size=16, weight_prepacked=1>(x, b, s)"
    (skipped,) = find_sites(parse(tmp_path, HEAD.format(k=32, nodes=nodes), weights)).skipped
    assert skipped.linear and (skipped.k, skipped.n) == (32, 5) and "prepacked" in skipped.reason


@pytest.mark.parametrize("kind", [0, 1], ids=["FP4", "NF4"])
def test_matmulbnb4_of_both_tables(tmp_path: Path, kind: int) -> None:
    weights = {"b": RNG.integers(0, 256, 32 * 6 // 2).astype(np.uint8), "s": np.abs(matrix(32 * 6 // 16))}
    nodes = f"y = com.microsoft.MatMulBnb4<K=32, N=6, block_size=16, quant_type={kind}>(x, b, s)"
    assert_reads_what_runs(parse(tmp_path, HEAD.format(k=32, nodes=nodes), weights))


DEQUANTISED = {
    "per tensor": ("w, s, z", (), "", False),
    "no zero point": ("w, s", (), "", False),
    "per column": ("w, s, z", (6,), "<axis = 1>", False),
    "per row": ("w, s, z", (32,), "<axis = 0>", False),
    "per column, counted from the end": ("w, s, z", (6,), "<axis = -1>", False),
    "blocks of 8 rows": ("w, s, z", (4, 6), "<axis = 0, block_size = 8>", False),
    "transposed": ("w, s, z", (32,), "<axis = 0>", True),
}


@pytest.mark.parametrize(("inputs", "shape", "attributes", "turned"), DEQUANTISED.values(), ids=DEQUANTISED)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_weight_behind_dequantizelinear(
    tmp_path: Path, inputs: str, shape: tuple[int, ...], attributes: str, turned: bool, dtype: type
) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    weights = {"w": RNG.integers(low, high, (32, 6)).astype(dtype), "s": np.asarray(np.abs(matrix(*shape)) + 0.1)}
    weights["z"] = np.asarray(RNG.integers(low, high, shape)).astype(dtype)
    nodes = f"v = DequantizeLinear{attributes}({inputs}) "
    nodes += "u = Transpose(v) y = Gemm<transB = 1>(x, u)" if turned else "y = MatMul(x, v)"
    assert_reads_what_runs(parse(tmp_path, HEAD.format(k=32, nodes=nodes), weights, opset=21))


def test_weight_quantised_and_dequantised_on_the_fly(tmp_path: Path) -> None:
    weights = {"w": matrix(32, 6), "s": np.float32(0.02), "z": np.int8(3)}
    nodes = "q = QuantizeLinear(w, s, z) v = DequantizeLinear(q, s, z) y = MatMul(x, v)"
    arrays = {k: np.asarray(v) for k, v in weights.items()}
    assert_reads_what_runs(parse(tmp_path, HEAD.format(k=32, nodes=nodes), arrays))


DYNAMIC = "q, sx, zx = DynamicQuantizeLinear(x) "
INTEGER = {
    "MatMulInteger": DYNAMIC + "i = MatMulInteger(q, w, zx, zw) f = Cast<to = 1>(i) s = Mul(sx, sw) y = Mul(f, s)",
    "MatMulIntegerToFloat": DYNAMIC + "y = com.microsoft.MatMulIntegerToFloat(q, w, sx, sw, zx, zw)",
    "DynamicQuantizeMatMul": "y = com.microsoft.DynamicQuantizeMatMul(x, w, sw, zw)",
    "QGemm": DYNAMIC + 'y = com.microsoft.QGemm(q, sx, zx, w, sw, zw, "")',
    "QGemm transB": DYNAMIC + 'y = com.microsoft.QGemm<transB = 1>(q, sx, zx, wt, sw, zw, "")',
}


@pytest.mark.parametrize("nodes", INTEGER.values(), ids=INTEGER)
@pytest.mark.parametrize("columns", [False, True])
def test_integer_weight_is_read_and_the_splice_is_in_front_of_the_quantiser(
    tmp_path: Path, nodes: str, columns: bool
) -> None:
    w = RNG.integers(-100, 100, (32, 6)).astype(np.int8)
    shape = (6,) if columns else ()
    weights = {"w": w, "wt": np.ascontiguousarray(w.T), "sw": np.asarray(np.abs(matrix(*shape)) + 0.1)}
    weights["zw"] = np.asarray(RNG.integers(-5, 5, shape)).astype(np.int8)
    model = parse(tmp_path, HEAD.format(k=32, nodes=nodes), weights)
    site = one(model)
    expected = (w.astype(np.float32) - weights["zw"]) * weights["sw"]
    np.testing.assert_allclose(site.weight(), expected, rtol=1e-6)
    assert_fuses_exactly(site)
    np.testing.assert_allclose(run_layer(onnx.load(model.path), site), expected, atol=1e-4 * np.abs(expected).max())
    assert site.activation.name == "x" and site.splice[0][1] == 0
    assert site.splice[0][0].op in ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")


STATIC = "q = QuantizeLinear(x, s, z) "


def test_qlinearmatmul_reads_the_weight_in_slot_3(tmp_path: Path) -> None:
    nodes = STATIC + "i = QLinearMatMul(q, s, z, w, sw, zw, s, z) y = DequantizeLinear(i, s, z)"
    weights = {"w": RNG.integers(0, 255, (32, 6)).astype(np.uint8), **_scales()}
    site = one(parse(tmp_path, HEAD.format(k=32, nodes=nodes), weights))
    expected = (weights["w"].astype(np.float32) - float(weights["zw"])) * float(weights["sw"])
    np.testing.assert_allclose(site.weight(), expected, rtol=1e-6)
    assert site.splice[0][0].op == "QuantizeLinear" and site.activation.name == "x"


SHARED = {
    "two layers": ("a = MatMulInteger(q, w, zx) b = MatMulInteger(q, w, zx) y = Add(a, b)", 2),
    "another reader": ("a = MatMulInteger(q, w, zx) b = Cast<to = 6>(q) y = Add(a, b)", 0),
    "a runtime product": ("a = MatMulInteger(q, w, zx) t = Transpose(q) y = MatMulInteger(q, t, zx)", 0),
}


@pytest.mark.parametrize(("nodes", "sites"), SHARED.values(), ids=SHARED)
def test_a_quantiser_is_pruned_before_only_when_all_its_readers_are_linear_layers(
    tmp_path: Path, nodes: str, sites: int
) -> None:
    text = "g (float[T, 32] x) => (int32[A, B] y) { " + DYNAMIC + nodes + " }"
    found = find_sites(parse(tmp_path, text, {"w": RNG.integers(-9, 9, (32, 32)).astype(np.int8)}))
    assert len(found.sites) == sites
    assert len({id(s.splice[0][0]) for s in found.sites}) <= 1
    assert all("feeds other nodes" in s.reason for s in found.skipped if s.linear)


def test_codes_that_come_from_elsewhere_are_left_alone(tmp_path: Path) -> None:
    text = "g (uint8[T, 32] q) => (int32[A, B] y) { y = MatMulInteger(q, w) }"
    (skipped,) = find_sites(parse(tmp_path, text, {"w": np.ones((32, 6), np.int8)})).skipped
    assert skipped.linear and "integer codes from the caller" in skipped.reason and (skipped.k, skipped.n) == (32, 6)


QDQ = {
    "alone": ("v = DequantizeLinear(q, s, z) y = MatMul(v, w)", "QuantizeLinear"),
    "two dequantisers": (
        "u = DequantizeLinear(q, s, z) v = DequantizeLinear(q, s, z) a = MatMul(u, w) b = MatMul(v, w) y = Add(a, b)",
        "QuantizeLinear",
    ),
    "residual reads it too": ("v = DequantizeLinear(q, s, z) a = MatMul(v, w) y = Add(a, v)", "MatMul"),
}


@pytest.mark.parametrize(("nodes", "spliced"), QDQ.values(), ids=QDQ)
def test_static_qdq_is_pruned_before_the_quantiser_when_it_can_be(tmp_path: Path, nodes: str, spliced: str) -> None:
    model = parse(tmp_path, HEAD.format(k=32, nodes=STATIC + nodes), {"w": matrix(32, 32), **_scales()})
    sites = find_sites(model).sites
    assert sites and {s.splice[0][0].op for s in sites} == {spliced}
    assert {s.activation.name for s in sites} == {"x" if spliced == "QuantizeLinear" else "v"}
    assert all((s.fusable is None) is (spliced == "QuantizeLinear") for s in sites)


def test_attention_with_the_weight_inside_is_pruned_at_its_input(tmp_path: Path) -> None:
    nodes = "y = com.microsoft.Attention<num_heads = 2>(x, w, b)"
    site = one(parse(tmp_path, HEAD.format(k=32, nodes=nodes), {"w": matrix(32, 96), "b": matrix(96)}))
    assert (site.k, site.n, site.role) == (32, 96, "qkv") and site.fusable is None


@pytest.mark.parametrize("old", [False, True], ids=["N by K", "K by N, before 1.23"])
def test_moe_is_pruned_at_its_input_and_its_down_projection_is_reported(tmp_path: Path, old: bool) -> None:
    up, down = matrix(4, 48, 32), matrix(4, 32, 24)
    nodes = 'y = com.microsoft.MoE<k = 2, swiglu_fusion = 1>(x, r, up, "", down)'
    text = f"g (float[T, 32] x, float[T, 4] r) => (float[T, 32] y) {{ {nodes} }}"
    weights = {"up": up.transpose(0, 2, 1), "down": down.transpose(0, 2, 1)} if old else {"up": up, "down": down}
    found = find_sites(parse(tmp_path, text, {k: np.ascontiguousarray(v) for k, v in weights.items()}))
    (site,), (inner,) = found.sites, found.skipped
    assert (site.k, site.n, site.role, found.total) == (32, 48, "experts", 2)
    assert (inner.k, inner.n, inner.role, inner.linear) == (
        24,
        32,
        "down",
        True,
    ) and "cannot be reached" in inner.reason
    np.testing.assert_array_equal(site.weight(), up.transpose(0, 2, 1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [0, 16])
def test_qmoe_weights_are_read_as_documented(tmp_path: Path, bits: int, block: int) -> None:
    codes = RNG.integers(0, 1 << bits, (2, 6, 32))
    packed = codes.astype(np.uint8) if bits == 8 else (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    scales = np.abs(matrix(2, 6, 2)) if block else np.abs(matrix(2, 6))
    attributes = f"expert_weight_bits = {bits}, k = 1" + (f", block_size = {block}" if block else "")
    nodes = f'y = com.microsoft.QMoE<{attributes}>(x, r, up, s, "", down, t)'
    text = f"g (float[T, 32] x, float[T, 2] r) => (float[T, 32] y) {{ {nodes} }}"
    weights = {"up": packed, "s": scales, "down": np.zeros((2, 32, 6 * bits // 8), np.uint8), "t": matrix(2, 32)}
    site = find_sites(parse(tmp_path, text, weights)).sites[0]
    spread = np.repeat(scales, 16, axis=2) if block else scales[..., None]
    expected = ((codes - (1 << (bits - 1))) * spread).transpose(0, 2, 1)
    assert (site.k, site.n, site.role) == (32, 6, "experts")
    np.testing.assert_allclose(site.weight(), expected, rtol=1e-6)


def test_operators_of_unknown_packing_are_counted_and_named(tmp_path: Path) -> None:
    graph = "g (float[T, 32] x) => (float y) { y = com.microsoft.MatMulFpQ4(x, w, s) }"
    (skipped,) = find_sites(parse(tmp_path, graph, {"w": np.zeros(64, np.uint8), "s": np.array([32, 6])})).skipped
    assert skipped.linear and "MatMulFpQ4" in skipped.reason


def test_a_quantised_weight_made_at_run_time_is_not_a_layer(tmp_path: Path) -> None:
    text = "g (float[T, 32] x, uint8[5, 2, 8] b) => (float y) {" + (
        " y = com.microsoft.MatMulNBits<K=32, N=5, bits=4, block_size=16>(x, b, s) }"
    )
    found = find_sites(parse(tmp_path, text, {"s": matrix(5, 2)}))
    assert not found.sites and found.total == 0 and len(found.skipped) == 1


def test_four_bit_codes_in_blocks_behind_dequantizelinear(tmp_path: Path) -> None:
    codes = RNG.integers(-8, 8, (32, 6))
    model = parse(
        tmp_path,
        HEAD.format(k=32, nodes="v = DequantizeLinear<axis = 0, block_size = 16>(w, s) y = MatMul(x, v)"),
        {"s": np.abs(matrix(2, 6)), "w": codes.astype(np.int8)},
        opset=21,
        ir=10,
    )
    proto = onnx.load(model.path)
    proto.graph.initializer[1].CopyFrom(helper.make_tensor("w", onnx.TensorProto.INT4, [32, 6], codes.reshape(-1)))
    site = one(saved(tmp_path, proto))
    scale = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    np.testing.assert_allclose(site.weight(), codes * np.repeat(scale, 16, axis=0), rtol=1e-6)


def _scales() -> dict[str, np.ndarray]:
    return {
        "s": np.asarray(np.float32(0.05)),
        "z": np.asarray(np.uint8(128)),
        "sw": np.asarray(np.float32(0.02)),
        "zw": np.asarray(np.uint8(120)),
    }
