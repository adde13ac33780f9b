"""NMMatMulNBits against the contract in numpy, on every SIMD target of this CPU, and against MatMulNBits of ORT."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import ops_reference
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from op_session import Op, assert_same_bits, run, targets

TARGETS = targets()
pytestmark = pytest.mark.skipif(not TARGETS, reason="the custom op library is not built")

TOKENS = (0, 1, 2, 3, 12, 50)  # on both sides of every change of kernel
ZEROS = ("none", "whole", "float")

_sessions: dict[tuple, Op] = {}


class Weight:
    """A random W [K, N] of 8 or 4 bits; `values` is what it stands for, in float64."""

    def __init__(self, rng, channels, columns, bits, block=32, zeros="none", scale_type=np.float32):
        blocks = -(-channels // block)
        low, high = (-128, 128) if bits == 8 else (0, 16)
        whole = rng.integers(low, high, (channels, columns))
        self.bits, self.block = bits, block
        self.scales = rng.uniform(0.01, 0.1, (blocks, columns)).astype(scale_type)
        self.zeros = None
        if zeros == "whole":
            self.zeros = rng.integers(low, high, (blocks, columns)).astype(np.int8 if bits == 8 else np.uint8)
        elif zeros == "float":
            self.zeros = rng.uniform(low, high, (blocks, columns)).astype(scale_type)
        self.data = whole.astype(np.int8) if bits == 8 else pack(whole)
        zero = 0 if bits == 8 else 8
        if self.zeros is not None:
            zero = np.repeat(self.zeros, block, 0)[:channels].astype(float)
        self.values = (whole - zero) * np.repeat(self.scales, block, 0)[:channels].astype(float)


def pack(whole):
    """[K, N] numbers of 0..15 -> [K, 16 * ceil(N / 32)] bytes, chunk by chunk of 32 columns."""
    channels, columns = whole.shape
    packed = np.zeros((channels, 16 * -(-columns // 32)), np.uint8)
    for n in range(columns):
        packed[:, n // 32 * 16 + n % 16] |= (whole[:, n] << (4 * (n % 32 // 16))).astype(np.uint8)
    return packed


def matmul(x, w, keep, group, simd="", **optional):
    order = ("bias", "scale", "shift", "order", "row_sum", "dense")
    inputs = {"x": x, "w": w.data, "scales": w.scales, "zeros": w.zeros, **{name: optional.get(name) for name in order}}
    attributes = {name: value for name, value in optional.items() if name not in order}
    key = (
        simd,
        keep,
        group,
        w.bits,
        w.block,
        tuple(attributes.items()),
        *(None if v is None else (v.dtype, v.ndim) for v in inputs.values()),
    )
    if key not in _sessions:
        _sessions[key] = Op(
            "NMMatMulNBits", inputs, simd, keep=keep, group=group, bits=w.bits, block_size=w.block, **attributes
        )
    return _sessions[key](**inputs)


def assert_close(got, x, w, keep, group, bias=None, rounding=2.0**-16, **criterion):
    """Within the rounding of a float32 sum and that of the values to 16 or 8 bits, in runs of at most 16 rows."""
    expected = ops_reference.matmul(x, w.values, keep, group, bias, **criterion)
    assert got.dtype == x.dtype and got.shape == expected.shape
    pruned = np.abs(ops_reference.prune(x, keep, group, **criterion).astype(np.float64))
    zero = (0 if w.bits == 8 else 8) if w.zeros is None else np.abs(w.zeros.astype(float)).max()
    largest = np.abs(w.values) + zero * np.repeat(w.scales, w.block, 0)[: len(w.values)].astype(float)
    size = pruned @ largest + np.abs(0 if bias is None else bias.astype(np.float64))
    limit = size * 2.0**-24 * (2 + len(w.values))
    limit = limit + np.max(pruned, -1, keepdims=True, initial=0) * rounding * largest.sum(0)
    if x.dtype == np.float16:
        limit = limit + np.abs(expected) * 2.0**-10 + 1e-7
    assert (np.abs(got - expected) <= limit + 1e-30).all()


def draw(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("keep,group", [(8, 16), (4, 16), (2, 4), (16, 32), (1, 1), (5, 12), (1, 64)], ids=str)
@pytest.mark.parametrize("zeros", ZEROS)
def test_every_kernel_multiplies_the_pruned_activation(simd, bits, keep, group, zeros):
    rng = np.random.default_rng(group)
    for channels, columns, block, scale_type in (
        (group * 3 + 1, 37, 16, np.float16),
        (200, 320, 32, np.float32),
        (96, 70, 128, np.float16),
    ):
        w = Weight(rng, channels, columns, bits, block, zeros, scale_type)
        for tokens in TOKENS:
            x = draw(rng, (tokens, channels))
            assert_close(matmul(x, w, keep, group, simd), x, w, keep, group)


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_of_columns_around_a_boundary_is_right(simd, bits):
    rng = np.random.default_rng(0)
    for columns in [*range(1, 36), 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 300]:
        w = Weight(rng, 32, columns, bits)
        for tokens in (1, 2, 50):
            x = draw(rng, (tokens, 32))
            assert_close(matmul(x, w, 8, 16, simd), x, w, 8, 16)


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_accuracy_level_4_rounds_the_activation_to_8_bits_in_each_run(simd, zeros, tokens):
    rng = np.random.default_rng(3)
    w = Weight(rng, 200, 330, 4, 32, zeros, np.float16)
    x = draw(rng, (tokens, 200))
    got = matmul(x, w, 8, 16, simd, accuracy_level=4)
    assert_close(got, x, w, 8, 16, rounding=2.0**-8)
    if simd != "scalar":
        with pytest.raises(AssertionError):
            assert_close(got, x, w, 8, 16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [4096, 8200])
def test_shapes_that_are_split_over_tasks_do_not_depend_on_the_threads(bits, columns):
    rng = np.random.default_rng(columns)
    w = Weight(rng, 512, columns, bits, zeros="whole", scale_type=np.float16)
    for tokens in (1, 2, 3, 13, 50):
        x, bias = draw(rng, (tokens, 512)), draw(rng, (columns,))
        inputs = {"x": x, "w": w.data, "scales": w.scales, "zeros": w.zeros, "bias": bias}
        attributes = {"keep": 8, "group": 16, "bits": bits, "block_size": 32}
        one = run("NMMatMulNBits", inputs, threads=1, **attributes)
        assert_close(one, x, w, 8, 16, bias)
        assert_same_bits(run("NMMatMulNBits", inputs, threads=2, **attributes), one)


@pytest.mark.parametrize("bits", [4, 8])
def test_float16_activations_and_the_whole_criterion(bits):
    rng = np.random.default_rng(4)
    w = Weight(rng, 96, 80, bits)
    for dtype in (np.float16, np.float32):
        x, bias = draw(rng, (2, 3, 96), dtype), draw(rng, (80,), dtype)
        scale, order = rng.uniform(0.5, 2, 96).astype(np.float32), rng.permutation(96)
        got = matmul(x, w, 8, 16, bias=bias, scale=scale, order=order)
        assert_close(got, x, w, 8, 16, bias, scale=scale, order=order)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_the_correction_of_the_variance_and_dense_tokens_are_those_of_nmmatmul(bits, tokens):
    rng = np.random.default_rng(5)
    w = Weight(rng, 128, 64, bits)
    wide = w.values.astype(np.float32)
    x, bias, dense = draw(rng, (tokens, 128)), draw(rng, (64,)), rng.integers(0, 2, (tokens,)).astype(bool)
    corrections = {"bias": bias, "row_sum": wide.sum(0), "dense": dense, "variance": 1, "center": 1}
    got = matmul(x, w, 8, 16, **corrections)
    inputs = {
        "x": x,
        "w": wide,
        "bias": bias,
        "scale": None,
        "shift": None,
        "order": None,
        "row_sum": wide.sum(0),
        "dense": dense,
    }
    expected = run("NMMatMul", inputs, keep=8, group=16, variance=1, center=1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3 * np.abs(wide).max())


@pytest.mark.parametrize("simd", TARGETS)
def test_values_that_are_not_finite_or_tiny_stay_what_they_are(simd):
    rng = np.random.default_rng(6)
    w = Weight(rng, 64, 70, 4)
    x = draw(rng, (3, 64))
    x[0, 5], x[1, 40] = np.inf, np.nan
    x[2] *= 1e-38
    for tokens in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3)):
        with np.errstate(all="ignore"):
            expected = ops_reference.matmul(x[tokens], w.values, 8, 16)
        got = matmul(x[tokens], w, 8, 16, simd)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
        finite = np.isfinite(expected)
        np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-3, atol=1e-3 * np.abs(x[2]).max())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_shape_pattern_and_block(data):
    group = data.draw(st.integers(1, 64))
    keep = data.draw(st.integers(1, group))
    bits = data.draw(st.sampled_from([4, 8]))
    channels, columns, tokens = (data.draw(st.integers(1, top)) for top in (150, 150, 20))
    block = data.draw(st.sampled_from([16, 32, 48, 128, 160]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    w = Weight(rng, channels, columns, bits, block, data.draw(st.sampled_from(ZEROS)))
    x = draw(rng, (tokens, channels))
    simd = data.draw(st.sampled_from(TARGETS))
    panel_tokens = data.draw(st.sampled_from([0, 2, 1000]))
    assert_close(matmul(x, w, keep, group, simd, panel_tokens=panel_tokens), x, w, keep, group)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_it_errs_less_than_matmulnbits_of_accuracy_level_4(bits, tokens):
    """The same weight in ONNX Runtime's own layout; dense, so that both compute the same product."""
    rng = np.random.default_rng(7)
    channels, columns, block = 512, 96, 32
    whole = rng.integers(0, 1 << bits, (channels, columns))
    w = Weight(rng, channels, columns, bits, block)
    w.data = (whole - 128).astype(np.int8) if bits == 8 else pack(whole)
    w.values = (whole - (1 << bits - 1)) * np.repeat(w.scales, block, 0).astype(float)
    x = draw(rng, (tokens, channels))
    exact = x.astype(np.float64) @ w.values
    theirs = _matmulnbits(whole, w.scales, bits, block, x)
    assert np.abs(theirs - exact).max() < 0.05 * np.abs(exact).max()  # the same weight
    for level in (0, 4):
        ours = matmul(x, w, 1, 1, accuracy_level=level)
        assert np.square(ours - exact).mean() < 1.001 * np.square(theirs - exact).mean(), level  # or rounds as they do


def _matmulnbits(whole, scales, bits, block, x):
    channels, columns = whole.shape
    blocks = whole.T.reshape(columns, channels // block, block).astype(np.uint8)
    packed = blocks if bits == 8 else blocks[..., 0::2] | blocks[..., 1::2] << 4
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=channels,
        N=columns,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    constants = [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(np.ascontiguousarray(scales.T), "s")]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    ends[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", channels])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], constants), opset_imports=opsets)
    model.ir_version = 8
    try:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as e:
        if "Only 4b quantization is supported" in str(e):
            pytest.skip(f"MatMulNBits of onnxruntime {ort.__version__} has 4 bits only")
        raise
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"bits": 3}, "the attribute 'bits' is 3; it must be 4 or 8"),
        ({"block_size": 24}, "'block_size' is 24; it must be a multiple of 16"),
        ({"scales": np.ones((2, 40), np.float32)}, "scales has shape [2,40]; it must be [3,N]"),
        ({"zeros": np.ones((3, 39), np.uint8)}, "zeros has shape [3,39]; it must be [3,40]"),
        ({"w": np.ones((96, 20), np.uint8)}, "W has shape [96,20]; with 4 bits, K = 96 and N = 40 it must be [96,32]"),
        ({"w": np.ones((96, 32), np.int8)}, "in uint8"),
    ],
)
def test_wrong_inputs_end_in_one_sentence(change, sentence):
    w = Weight(np.random.default_rng(8), 96, 40, 4)
    inputs = {"x": np.ones((1, 96), np.float32), "w": w.data, "scales": w.scales, "zeros": None}
    inputs |= {name: value for name, value in change.items() if name in inputs}
    attributes = {"bits": 4, "block_size": 32} | {n: v for n, v in change.items() if n not in inputs}
    with pytest.raises(Exception) as error:
        run("NMMatMulNBits", inputs, keep=8, group=16, **attributes)
    assert sentence.replace(" ", "") in str(error.value).replace(" ", "")
