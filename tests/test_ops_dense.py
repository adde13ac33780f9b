"""The input `dense` of both ops: such a token is treated as with n = m, every other one as without the input."""

import numpy as np
import ops_reference
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_session import Op, assert_same_bits, run, targets

from nmonnx import reference

TARGETS = targets()
needs_library = pytest.mark.skipif(not TARGETS, reason="the custom op library is not built")

KINDS = (np.float32, np.float16, np.float64)
PATTERNS = [(2, 4), (8, 16), (1, 1), (5, 12), (16, 16), (1, 64)]
CHOICES = (None, "mean", "median")
SLOTS = {
    "NMPrune": ("x", "scale", "shift", "order", "dense"),
    "NMMatMul": ("x", "W", "bias", "scale", "shift", "order", "row_sum", "dense"),
}
_sessions: dict[tuple, Op] = {}


def op(name, given_, keep, group, simd="", variance=False, center=None):
    inputs = {slot: given_.get(slot) for slot in SLOTS[name]}
    attributes = {"keep": keep, "group": group, "variance": int(variance), "center": CHOICES.index(center)}
    key = (name, simd, *attributes.items(), *(None if v is None else (v.dtype, v.ndim) for v in inputs.values()))
    if key not in _sessions:
        _sessions[key] = Op(name, inputs, simd, **attributes)
    return _sessions[key](**inputs)


def criterion(rng, channels, names):
    made = {
        "scale": np.where(rng.random(channels) < 0.1, 0, rng.random(channels)).astype(np.float32),
        "shift": rng.standard_normal(channels).astype(np.float32),
        "order": rng.permutation(channels),
    }
    return {name: made[name] for name in names}


def mixed(dense, whole, sparse):
    """Rows of `whole` where dense, of `sparse` elsewhere."""
    return np.where(np.broadcast_to(dense, len(whole))[:, None], whole, sparse)


@st.composite
def cases(draw, kinds):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, channels = draw(st.sampled_from([0, 1, 2, 3, 5, 6, 31, 300])), draw(st.integers(1, 150))
    x = (rng.standard_normal((tokens, channels)) + draw(st.sampled_from([0, 1]))).astype(draw(st.sampled_from(kinds)))
    size = draw(st.sampled_from([1, tokens]))
    dense = rng.random(size) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    names = draw(st.sets(st.sampled_from(["scale", "shift", "order"])))
    return rng, x, dense, criterion(rng, channels, names), draw(st.sampled_from(PATTERNS))


@needs_library
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(KINDS), data=st.data())
def test_a_prune_keeps_dense_tokens_whole_and_the_others_as_without(case, data):
    _, x, dense, given_, (keep, group) = case
    got = op("NMPrune", {"x": x, **given_, "dense": dense}, keep, group, data.draw(st.sampled_from(TARGETS)))
    want = mixed(dense, *(ops_reference.prune(x, n, group, **given_) for n in (group, keep)))
    assert_same_bits(got, want)
    assert_same_bits(reference.prune(x, keep, group, **given_, dense=dense), want)


@needs_library
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(KINDS), variance=st.booleans(), center=st.sampled_from(CHOICES))
def test_a_corrected_prune_does_so_too(case, variance, center):
    _, x, dense, given_, (keep, group) = case
    feeds, asked = {"x": x, **given_}, {"variance": variance, "center": center}
    got = op("NMPrune", {**feeds, "dense": dense}, keep, group, **asked)
    whole, sparse = op("NMPrune", feeds, group, group, **asked), op("NMPrune", feeds, keep, group, **asked)
    assert_same_bits(got, mixed(dense, whole, sparse))
    want = reference.prune(x, keep, group, **given_, **asked, dense=dense)
    step = 2.0**-10 if x.dtype == np.float16 else 2.0**-23
    np.testing.assert_allclose(got, want, rtol=step, atol=1e-7 if x.dtype == np.float16 else 0)


@needs_library
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(KINDS[:2]), data=st.data())
def test_a_product_multiplies_dense_tokens_whole(case, data):
    rng, x, dense, given_, (keep, group) = case
    columns = data.draw(st.integers(1, 100))
    w_kind = x.dtype if x.dtype == np.float16 else data.draw(st.sampled_from([np.float32, np.float16]))
    w = rng.standard_normal((x.shape[1], columns)).astype(w_kind)
    bias = rng.standard_normal(columns).astype(x.dtype) if data.draw(st.booleans()) else None
    asked = {"variance": data.draw(st.booleans()), "center": data.draw(st.sampled_from(CHOICES))}
    feeds = {"x": x, "W": w, "bias": bias, **given_}
    row_sum = w.astype(np.float32).sum(axis=0) if asked["center"] else None
    simd = data.draw(st.sampled_from(TARGETS))
    got = op("NMMatMul", {**feeds, "row_sum": row_sum, "dense": dense}, keep, group, simd, **asked)
    want = mixed(
        dense,
        *(reference.prune_matmul(x, w, n, group, bias, **given_, **asked, row_sum=row_sum) for n in (group, keep)),
    )
    together = reference.prune_matmul(x, w, keep, group, bias, **given_, **asked, row_sum=row_sum, dense=dense)
    np.testing.assert_array_equal(together, want)
    size = reference.prune_matmul(np.abs(x), np.abs(w), group, group).max(initial=1) * 8 + np.abs(want).max(initial=0)
    step = 2.0**-10 if x.dtype == np.float16 else 2.0**-23
    np.testing.assert_allclose(got, want, rtol=step, atol=float(size) * 2.0**-24 * (2 + w.shape[0]))


@needs_library
@pytest.mark.parametrize("tokens", [1, 4, 9, 300])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_dense_tokens_and_the_folded_bias_are_the_dense_layer(tokens, shifted):
    rng = np.random.default_rng(tokens)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((tokens, 96), (96, 40), (40,)))
    shift = rng.standard_normal(96).astype(np.float32) if shifted else None
    bias = (b + shift.astype(np.float64) @ w).astype(np.float32) if shifted else b
    feeds = {"x": x, "W": w, "bias": bias, "shift": shift, "dense": np.ones(1, bool)}
    for variance in (False, True):
        got = op("NMMatMul", feeds, 8, 16, variance=variance)
        np.testing.assert_allclose(got, x.astype(np.float64) @ w + b, rtol=1e-4, atol=1e-4)


@needs_library
def test_any_shape_with_the_right_number_of_elements_is_legal():
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    dense = np.array([True, False, False, False, True, False])
    want = reference.prune(x, 2, 4, dense=dense)
    for shape in ((6,), (2, 3), (2, 3, 1), (1, 6)):
        assert_same_bits(op("NMPrune", {"x": x, "dense": dense.reshape(shape)}, 2, 4), want)
    assert_same_bits(op("NMPrune", {"x": x, "dense": np.array(True)}, 2, 4), x)


@needs_library
@pytest.mark.parametrize("name", ["NMPrune", "NMMatMul"])
def test_another_number_of_tokens_ends_in_a_sentence(name):
    feeds = {"x": np.ones((2, 3, 8), np.float32), "dense": np.zeros(5, bool)}
    feeds |= {"W": np.ones((8, 4), np.float32)} if name == "NMMatMul" else {}
    with pytest.raises(Exception, match=r"dense has shape \[5\]; it must have one element for each of the 6 tokens"):
        op(name, feeds, 2, 4)


@needs_library
def test_another_type_is_refused_when_the_model_is_loaded():
    with pytest.raises(Exception, match=r"[Tt]ype"):
        op("NMPrune", {"x": np.ones((2, 8), np.float32), "dense": np.zeros(2, np.int64)}, 2, 4)


@needs_library
@pytest.mark.parametrize("tokens", [1, 3, 8, 300])
def test_the_result_does_not_depend_on_the_threads(tokens):
    rng = np.random.default_rng(tokens)
    x, w = rng.standard_normal((tokens, 512)).astype(np.float32), rng.standard_normal((512, 2048)).astype(np.float32)
    given_ = {"x": x, "W": w, "dense": rng.random(tokens) < 0.5}
    inputs = {slot: given_.get(slot) for slot in SLOTS["NMMatMul"]}
    one, two = (run("NMMatMul", inputs, threads=threads, keep=8, group=16) for threads in (1, 2))
    assert_same_bits(one, two)
