"""NMMatMul against the contract in numpy, on every SIMD target of this CPU."""

import numpy as np
import ops_reference
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_session import Op, assert_same_bits, run, targets

TARGETS = targets()
pytestmark = pytest.mark.skipif(not TARGETS, reason="the custom op library is not built")

PATTERNS = [(2, 4), (8, 16), (4, 16), (16, 32), (1, 1), (5, 12), (31, 63), (1, 64)]
TYPES = [(np.float32, np.float32), (np.float16, np.float16), (np.float32, np.float16)]
TOKENS = (0, 1, 2, 3, 5, 6, 31)  # one on each side of every change of kernel

_sessions: dict[tuple, Op] = {}


def matmul(x, w, keep, group, simd="", bias=None, scale=None, shift=None, order=None):
    inputs = {"x": x, "w": w, "bias": bias, "scale": scale, "shift": shift, "order": order}
    key = (simd, keep, group, *(None if v is None else (v.dtype, v.ndim) for v in inputs.values()))
    if key not in _sessions:
        _sessions[key] = Op("NMMatMul", inputs, simd, keep=keep, group=group)
    return _sessions[key](**inputs)


def assert_close(got, x, w, keep, group, bias=None, **criterion):
    """Within the rounding of a float32 sum of this length, and of one float16 result."""
    expected = ops_reference.matmul(x, w, keep, group, bias, **criterion)
    assert got.dtype == x.dtype and got.shape == expected.shape
    pruned = np.abs(ops_reference.prune(x, keep, group, **criterion).astype(np.float64))
    size = pruned @ np.abs(w.astype(np.float64)) + np.abs(0 if bias is None else bias.astype(np.float64))
    limit = size * 2.0**-24 * (2 + w.shape[0]) + (np.abs(expected) * 2.0**-10 + 1e-7 if x.dtype == np.float16 else 0)
    assert (np.abs(got - expected) <= limit).all()


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("keep,group", PATTERNS, ids=lambda v: str(v))
@pytest.mark.parametrize("x_type,w_type", TYPES, ids=lambda t: np.dtype(t).name)
def test_every_kernel_multiplies_the_pruned_activation(simd, keep, group, x_type, w_type):
    rng = np.random.default_rng(group)
    for channels, columns in ((group * 3 + 1, 37), (200, 300)):
        w = draw(rng, (channels, columns), w_type)
        for tokens in TOKENS:
            x = draw(rng, (tokens, channels), x_type)
            assert_close(matmul(x, w, keep, group, simd), x, w, keep, group)


@pytest.mark.parametrize("simd", TARGETS)
def test_every_number_of_columns_around_a_vector_boundary_is_right(simd):
    rng = np.random.default_rng(0)
    for columns in [*range(1, 36), 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 257]:
        w = draw(rng, (32, columns), np.float32)
        for tokens in (1, 2, 6):
            x = draw(rng, (tokens, 32), np.float32)
            assert_close(matmul(x, w, 8, 16, simd), x, w, 8, 16)


@pytest.mark.parametrize("x_type,w_type", TYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("columns", [2048, 8200])
def test_shapes_that_are_split_over_tasks_are_right_and_do_not_depend_on_the_threads(x_type, w_type, columns):
    rng = np.random.default_rng(columns)
    w = draw(rng, (512, columns), w_type)
    for tokens in (1, 2, 3, 8):
        x = draw(rng, (tokens, 512), x_type)
        bias = draw(rng, (columns,), x_type)
        inputs = {"x": x, "w": w, "bias": bias}
        one = run("NMMatMul", inputs, threads=1, keep=8, group=16)
        assert_close(one, x, w, 8, 16, bias)
        assert_same_bits(run("NMMatMul", inputs, threads=2, keep=8, group=16), one)


def test_more_tokens_than_are_handled_at_once():
    rng = np.random.default_rng(1)
    x, w, bias = draw(rng, (2, 261, 64), np.float32), draw(rng, (64, 40), np.float32), draw(rng, (40,), np.float32)
    assert_close(matmul(x, w, 8, 16, bias=bias), x, w, 8, 16, bias)


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("x_type,w_type", TYPES, ids=lambda t: np.dtype(t).name)
def test_bias_scale_shift_and_order_follow_the_contract(simd, x_type, w_type):
    rng = np.random.default_rng(2)
    channels, columns = 150, 70
    w, bias = draw(rng, (channels, columns), w_type), draw(rng, (columns,), x_type)
    scale, shift = rng.random(channels).astype(np.float32), draw(rng, (channels,), np.float32)
    for tokens in (1, 2, 6):
        x = draw(rng, (tokens, channels), x_type)
        for criterion in (
            {"scale": scale},
            {"shift": shift},
            {"order": rng.permutation(channels)},
            {"scale": scale, "shift": shift, "order": rng.permutation(channels).astype(np.int32)},
        ):
            got = matmul(x, w, 8, 16, simd, bias=bias, **criterion)
            assert_close(got, x, w, 8, 16, bias, **criterion)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_shape_and_pattern(data):
    keep, group = data.draw(st.sampled_from(PATTERNS))
    tokens, channels, columns = (data.draw(st.integers(0, high)) for high in (9, 140, 140))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x_type, w_type = data.draw(st.sampled_from(TYPES))
    x, w = draw(rng, (tokens, channels), x_type), draw(rng, (channels, columns), w_type)
    bias = data.draw(st.sampled_from([None, draw(rng, (columns,), x_type), draw(rng, (1,), x_type)]))
    order = rng.permutation(channels) if data.draw(st.booleans()) else None
    got = matmul(x, w, keep, group, data.draw(st.sampled_from(TARGETS)), bias=bias, order=order)
    assert_close(got, x, w, keep, group, bias, order=order)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_rows_that_no_token_keeps_are_not_read(tokens):
    rng = np.random.default_rng(3)
    x = draw(rng, (1, 64), np.float32).repeat(tokens, axis=0)
    w = draw(rng, (64, 48), np.float32)
    w[~ops_reference.kept(x[0], 8, 16)] = np.nan
    assert np.isfinite(matmul(x, w, 8, 16)).all()


@pytest.mark.parametrize("simd", TARGETS)
def test_all_float16_weights_are_widened_exactly(simd):
    """One channel, x = 1: y is W itself; NaN payloads aside."""
    w = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(1, -1)
    for tokens in (1, 2, 6):
        y = matmul(np.ones((tokens, 1), np.float32), w, 1, 1, simd)
        np.testing.assert_array_equal(y, w.astype(np.float32).repeat(tokens, axis=0))


def test_keeping_all_is_the_dense_product():
    rng = np.random.default_rng(4)
    x, w = draw(rng, (5, 96), np.float32), draw(rng, (96, 33), np.float32)
    np.testing.assert_allclose(matmul(x, w, 16, 16), x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64), (1, 1, 1, 64)])
def test_any_rank_and_no_tokens_are_legal(shape):
    rng = np.random.default_rng(5)
    x, w = draw(rng, shape, np.float32), draw(rng, (64, 20), np.float32)
    assert_close(matmul(x, w, 8, 16), x, w, 8, 16)


@pytest.mark.parametrize("tokens", TOKENS)
def test_no_channels_leave_the_bias(tokens):
    x, w, bias = np.ones((tokens, 0), np.float32), np.ones((0, 20), np.float32), np.arange(20, dtype=np.float32)
    assert_same_bits(matmul(x, w, 8, 16, bias=bias), np.tile(bias, (tokens, 1)))


@pytest.mark.parametrize(
    "shapes,words",
    [
        (((2, 8), (9, 4)), ["[2, 8]", "[9, 4]"]),
        (((2, 8), (8,)), ["[2, 8]", "[8]"]),
        (((2, 8), (1, 8, 4)), ["[2, 8]", "[1, 8, 4]"]),
        (((), (1, 4)), ["[]", "[1, 4]"]),
    ],
)
def test_shapes_that_do_not_fit_end_in_a_sentence_that_names_them(shapes, words):
    with pytest.raises(Exception) as error:
        matmul(np.ones(shapes[0], np.float32), np.ones(shapes[1], np.float32), 2, 4)
    assert all(word in str(error.value) for word in words)


def test_a_bias_of_the_wrong_size_ends_in_a_sentence():
    x, w = np.ones((2, 8), np.float32), np.ones((8, 4), np.float32)
    with pytest.raises(Exception, match=r"bias has shape \[3\]; it must be \[4\]"):
        matmul(x, w, 2, 4, bias=np.ones(3, np.float32))


@pytest.mark.parametrize("shape", [(40,), (1, 40), (1,), (1, 1), ()], ids=str)
def test_a_bias_is_a_row_whatever_ones_stand_before_it(shape):
    rng = np.random.default_rng(5)
    x, w, bias = draw(rng, (3, 32), np.float32), draw(rng, (32, 40), np.float32), draw(rng, shape, np.float32)
    row = np.broadcast_to(bias.reshape(-1), (40,))
    assert_close(matmul(x, w, 8, 16, bias=bias), x, w, 8, 16, row)


def test_a_bias_that_is_a_column_ends_in_a_sentence():
    rng = np.random.default_rng(6)
    x, w, bias = draw(rng, (3, 32), np.float32), draw(rng, (32, 40), np.float32), draw(rng, (40, 1), np.float32)
    with pytest.raises(Exception, match=r"NMMatMul: bias has shape \[40, 1\]"):
        matmul(x, w, 8, 16, bias=bias)
