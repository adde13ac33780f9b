"""NMPrune against the contract in numpy, to the last bit, on every SIMD target of this CPU."""

import numpy as np
import ops_reference
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_session import Op, assert_same_bits, run, targets

TARGETS = targets()
pytestmark = pytest.mark.skipif(not TARGETS, reason="the custom op library is not built")

PATTERNS = [
    (1, 2),
    (2, 4),
    (1, 4),
    (4, 8),
    (8, 16),
    (4, 16),
    (15, 16),
    (16, 32),
    (3, 32),
    (32, 64),
    (5, 12),
    (1, 1),
    (7, 7),
    (31, 63),
]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-45, -1e-40, 3.4e38, 65504.0, 6e-8]

_sessions: dict[tuple, Op] = {}


def prune(x, keep, group, simd="", scale=None, shift=None, order=None):
    """NMPrune; sessions are kept, because making one takes longer than running it."""
    inputs = {"x": x, "scale": scale, "shift": shift, "order": order}
    key = (simd, keep, group, *(None if v is None else (v.dtype, v.ndim) for v in inputs.values()))
    if key not in _sessions:
        _sessions[key] = Op("NMPrune", inputs, simd, keep=keep, group=group)
    return _sessions[key](**inputs)


def nasty(rng, shape, dtype):
    """Values with many ties, zeros of both signs, Inf, NaN of several payloads, and denormals."""
    x = rng.standard_normal(shape)
    x = np.where(rng.random(shape) < 0.4, np.round(x), x)
    special = rng.choice(np.array(SPECIAL), shape)
    with np.errstate(over="ignore"):
        x = np.where(rng.random(shape) < 0.3, special, x).astype(dtype)
    if dtype == np.float32:
        x.view(np.uint32)[rng.random(shape) < 0.05] = 0xFFC12345
        x.view(np.uint32)[rng.random(shape) < 0.02] = 0x7F800001  # a signalling NaN
    return x


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("keep,group", PATTERNS, ids=lambda v: str(v))
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nasty_values_are_pruned_as_the_contract_says(simd, keep, group, dtype):
    rng = np.random.default_rng(keep * 100 + group)
    for channels in (group, 16 * group, 33 * group + group // 2 + 1):
        x = nasty(rng, (3, channels), dtype)
        assert_same_bits(prune(x, keep, group, simd), ops_reference.prune(x, keep, group))


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_length_around_a_vector_boundary_is_right(simd, dtype):
    rng = np.random.default_rng(0)
    for channels in [*range(1, 36), 63, 64, 65, 127, 128, 129, 255, 257, 511, 513]:
        x = nasty(rng, (2, channels), dtype)
        assert_same_bits(prune(x, 4, 8, simd), ops_reference.prune(x, 4, 8))
        assert_same_bits(prune(x, 8, 16, simd), ops_reference.prune(x, 8, 16))


@pytest.mark.parametrize("simd", TARGETS)
def test_every_float16_bit_pattern_keeps_its_bits_and_its_rank(simd):
    rng = np.random.default_rng(1)
    x = rng.permutation(np.arange(1 << 16, dtype=np.uint16)).view(np.float16).reshape(16, -1)
    assert_same_bits(prune(x, 8, 16, simd), ops_reference.prune(x, 8, 16))


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("given_inputs", ["scale", "shift", "order", "scale shift", "scale shift order"])
def test_scale_shift_and_order_follow_the_contract(simd, dtype, given_inputs):
    rng = np.random.default_rng(2)
    for keep, group, channels in ((8, 16, 250), (2, 4, 64), (3, 7, 100)):
        x = nasty(rng, (3, channels), dtype)
        scale = np.where(rng.random(channels) < 0.2, 0, rng.random(channels)).astype(np.float32)
        extra = {
            "scale": scale,
            "shift": rng.standard_normal(channels).astype(np.float32),
            "order": rng.permutation(channels),
        }
        extra = {name: value if name in given_inputs.split() else None for name, value in extra.items()}
        assert_same_bits(prune(x, keep, group, simd, **extra), ops_reference.prune(x, keep, group, **extra))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_exactly_n_are_kept_and_kept_values_are_bit_equal(data):
    keep, group = data.draw(st.sampled_from(PATTERNS))
    channels = data.draw(st.integers(1, 200))
    rows = data.draw(st.integers(0, 4))
    seed = data.draw(st.integers(0, 2**32 - 1))
    x = nasty(np.random.default_rng(seed), (rows, channels), np.float32)
    x[x == 0] = 1  # so that a zero in the result is a dropped value
    y = prune(x, keep, group, data.draw(st.sampled_from(TARGETS)))
    kept = y.view(np.uint32) != 0
    for start in range(0, channels, group):
        size = min(group, channels - start)
        assert (kept[:, start : start + size].sum(axis=1) == min(keep, size)).all()
    assert_same_bits(y[kept], x[kept])


def test_ties_go_to_the_lowest_index():
    x = np.array([[2, -2, 2, 2, 1, 2, 2, 2]], np.float32)
    assert prune(x, 2, 4).tolist() == [[2, -2, 0, 0, 0, 2, 2, 0]]


def test_nan_outranks_infinity_and_many_nan_tie():
    x = np.array([[np.inf, np.nan, 1, np.nan, np.nan, np.nan, np.nan, np.inf]], np.float32)
    y = prune(x, 2, 4)
    assert np.isnan(y).tolist() == [[False, True, False, True, True, True, False, False]]
    assert y[0, [0, 2, 6, 7]].tolist() == [0, 0, 0, 0]


def test_a_group_of_zeros_keeps_its_first_signs():
    y = prune(np.full((1, 4), -0.0, np.float32), 2, 4)
    assert np.signbit(y).tolist() == [[True, True, False, False]]


def test_scale_zero_beats_nothing_even_for_infinity():
    y = prune(np.array([[np.inf, 1, 2, 3]], np.float32), 2, 4, scale=np.array([0, 1, 1, 1], np.float32))
    assert y.tolist() == [[0, 0, 2, 3]]


def test_a_negative_scale_ranks_below_zero():
    y = prune(np.array([[5, 0, 7, 0]], np.float32), 2, 4, scale=np.array([-1, 1, -1, 1], np.float32))
    assert y.tolist() == [[0, 0, 0, 0]]


def test_order_changes_the_groups_but_not_the_places():
    x = np.array([[1, 2, 3, 4]], np.float32)
    assert prune(x, 1, 2, order=np.array([0, 2, 1, 3], np.int32)).tolist() == [[0, 0, 3, 4]]
    assert prune(x, 1, 2, order=np.array([0, 3, 1, 2], np.int64)).tolist() == [[0, 0, 3, 4]]
    assert prune(x, 1, 2).tolist() == [[0, 2, 0, 4]]


def test_factors_of_one_element_stand_for_every_channel():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 40)).astype(np.float32)
    one, half = np.ones(1, np.float32), np.full(1, 0.5, np.float32)
    assert_same_bits(prune(x, 4, 8, scale=one, shift=np.zeros(1, np.float32)), ops_reference.prune(x, 4, 8))
    assert_same_bits(prune(x, 4, 8, scale=half, shift=half), ops_reference.prune(x, 4, 8, half, half))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (16,), (2, 1, 3, 16), (1, 1), (2, 0)])
def test_any_rank_and_no_tokens_are_legal(shape):
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    assert_same_bits(prune(x, 4, 8), ops_reference.prune(x, 4, 8))


@pytest.mark.parametrize("simd", TARGETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tensors_may_start_anywhere(simd, dtype):
    """ONNX Runtime hands numpy's memory over as it is, whatever its alignment."""
    rng = np.random.default_rng(5)
    buffer = nasty(rng, (5000,), dtype)
    for start in (1, 2, 3, 5, 7, 11):
        x = buffer[start : start + 16 * 40 + 3]
        assert_same_bits(prune(x, 8, 16, simd), ops_reference.prune(x, 8, 16))


def test_a_large_tensor_is_the_same_on_two_threads():
    x = nasty(np.random.default_rng(6), (64, 4096), np.float32)
    two = run("NMPrune", {"x": x}, threads=2, keep=8, group=16)
    assert_same_bits(two, ops_reference.prune(x, 8, 16))


@pytest.mark.parametrize(
    "inputs,words",
    [
        ({"scale": np.ones(3, np.float32)}, ["scale", "[3]", "[8]"]),
        ({"shift": np.ones((2, 4), np.float32)}, ["shift", "[2, 4]", "[8]"]),
        ({"order": np.arange(7)}, ["order", "[7]", "[8]"]),
        ({"order": np.array([0, 1, 2, 3, 4, 5, 6, 6])}, ["order", "permutation", "order[7] = 6"]),
        ({"order": np.array([0, 1, 2, 3, 4, 5, 6, -1])}, ["order", "permutation", "order[7] = -1"]),
        ({"order": np.arange(8, dtype=np.float32)}, ["order", "int32 or int64"]),
    ],
)
def test_wrong_inputs_end_in_a_sentence_with_the_shapes(inputs, words):
    with pytest.raises(Exception) as error:
        prune(np.ones((1, 8), np.float32), 2, 4, **inputs)
    assert all(word in str(error.value) for word in words)


def test_a_scalar_is_refused():
    with pytest.raises(Exception, match="scalar"):
        prune(np.array(1, np.float32), 1, 1)


@pytest.mark.parametrize(
    "attributes", [{"keep": 0, "group": 4}, {"keep": 5, "group": 4}, {"keep": 1, "group": 65}, {"keep": 1}]
)
def test_wrong_attributes_end_in_a_sentence(attributes):
    with pytest.raises(Exception, match=r"NMPrune: .*group"):
        run("NMPrune", {"x": np.ones((1, 8), np.float32)}, **attributes)
