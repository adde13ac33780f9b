"""The attributes `variance` and `center` of both ops, against the reference and against the formulas in torch."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_session import Op, assert_same_bits, run, targets

from nmonnx import reference

TARGETS = targets()
pytestmark = pytest.mark.skipif(not TARGETS, reason="the custom op library is not built")

KINDS = (np.float32, np.float16, np.float64)
PATTERNS = [(2, 4), (8, 16), (1, 1), (5, 12), (16, 16), (1, 64)]
TOKENS = (0, 1, 2, 3, 5, 6, 31)
STEP = {np.float16: 2.0**-10, np.float32: 2.0**-23, np.float64: 2.0**-23}  # nu itself is float32
DEGENERATE = {
    "constant": [3.0] * 8,
    "zeros": [0.0] * 8,
    "one value": [0, 0, 5, 0, 0, 0, 0, 0],
    "signs": [1.0, -1.0] * 4,
    "nan": [np.nan, 1, 2, 3, 4, 5, 6, 7],
    "inf": [np.inf, 1, 2, 3, 4, 5, 6, 7],
    "both infinities": [np.inf, -np.inf, 2, 3, 4, 5, 6, 7],
    "all nan": [np.nan] * 8,
    "a large mean": [2048.0 + 2 * i for i in range(8)],
    "a large spread": [1e4] + [1.0] * 7,
    "capped": [1, -1, 1, -1, 1e-3, 1e-3, 1e-3, 1e-3],
}

_sessions: dict[tuple, Op] = {}


def op(name, inputs, simd="", **attributes):
    key = (name, simd, *attributes.items(), *(None if v is None else (v.dtype, v.ndim) for v in inputs.values()))
    if key not in _sessions:
        _sessions[key] = Op(name, inputs, simd, **attributes)
    return _sessions[key](**inputs)


CHOICES = (None, "mean", "median")


def prune(x, keep, group, simd="", scale=None, shift=None, order=None, variance=False, center=None):
    inputs = {"x": x, "scale": scale, "shift": shift, "order": order}
    attributes = {"variance": int(variance), "center": CHOICES.index(center)}
    return op("NMPrune", inputs, simd, keep=keep, group=group, **attributes)


def matmul(x, w, keep, group, simd="", bias=None, scale=None, shift=None, order=None, variance=False, center=None):
    row_sum = row_sum_of(w) if center else None
    inputs = {"x": x, "W": w, "bias": bias, "scale": scale, "shift": shift, "order": order, "row_sum": row_sum}
    attributes = {"variance": int(variance), "center": CHOICES.index(center)}
    return op("NMMatMul", inputs, simd, keep=keep, group=group, **attributes)


def row_sum_of(w):
    return w.astype(np.float32).sum(axis=0)


def assert_pruned(x, keep, group, simd="", **given_):
    got, want = prune(x, keep, group, simd, **given_), reference.prune(x, keep, group, **given_)
    assert got.dtype == x.dtype and got.shape == want.shape
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, rtol=STEP[x.dtype.type], atol=1e-7 if x.dtype == np.float16 else 0)


def assert_multiplied(x, w, keep, group, simd="", bias=None, **given_):
    got = matmul(x, w, keep, group, simd, bias, **given_)
    want = reference.prune_matmul(x, w, keep, group, bias, **given_, row_sum=row_sum_of(w))
    assert got.dtype == x.dtype and got.shape == want.shape
    size = reference.prune_matmul(np.abs(x), np.abs(w), group, group).max(initial=1) * 8 + np.abs(want).max(initial=0)
    np.testing.assert_allclose(got, want, rtol=STEP[x.dtype.type], atol=float(size) * 2.0**-24 * (2 + w.shape[0]))


def criterion(rng, channels, names):
    made = {
        "scale": np.where(rng.random(channels) < 0.1, 0, rng.random(channels)).astype(np.float32),
        "shift": rng.standard_normal(channels).astype(np.float32),
        "order": rng.permutation(channels),
    }
    return {name: made[name] for name in names}


CORRECTIONS = [
    {"variance": True},
    {"center": "mean"},
    {"center": "median"},
    {"variance": True, "center": "mean"},
    {"variance": True, "center": "median"},
]
criteria = st.sets(st.sampled_from(["scale", "shift", "order"]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names=criteria, data=st.data())
def test_any_prune_equals_the_reference(names, data):
    keep, group = data.draw(st.sampled_from(PATTERNS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = (data.draw(st.integers(0, 4)), data.draw(st.integers(1, 150)))
    mean = data.draw(st.sampled_from([0, 0, 1, 100]))
    x = (rng.standard_normal(shape) + mean).astype(data.draw(st.sampled_from(KINDS)))
    given_ = criterion(rng, shape[-1], names) | data.draw(st.sampled_from(CORRECTIONS))
    assert_pruned(x, keep, group, data.draw(st.sampled_from(TARGETS)), **given_)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names=criteria, data=st.data())
def test_any_product_equals_the_reference(names, data):
    keep, group = data.draw(st.sampled_from(PATTERNS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens, channels = data.draw(st.sampled_from(TOKENS)), data.draw(st.integers(1, 150))
    columns = data.draw(st.integers(1, 100))
    x_kind, w_kind = data.draw(
        st.sampled_from([(np.float32, np.float32), (np.float16, np.float16), (np.float32, np.float16)])
    )
    x = (rng.standard_normal((tokens, channels)) + data.draw(st.sampled_from([0, 1]))).astype(x_kind)
    w, bias = rng.standard_normal((channels, columns)).astype(w_kind), rng.standard_normal(columns).astype(x_kind)
    given_ = criterion(rng, channels, names) | data.draw(st.sampled_from(CORRECTIONS))
    bias = bias if data.draw(st.booleans()) else None
    assert_multiplied(x, w, keep, group, data.draw(st.sampled_from(TARGETS)), bias, **given_)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("row", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_tokens_equal_the_reference_and_touch_no_other(row, kind, correction):
    rng = np.random.default_rng(0)
    for first in (0, 1):
        x = rng.standard_normal((7, 8)).astype(kind)
        x[first] = np.array(row, kind)
        assert_pruned(x, 2, 4, **correction)
        if kind == np.float64:
            continue
        w, bias = rng.standard_normal((8, 5)).astype(kind), np.ones(5, kind)
        for tokens in (x, x[:2], x[first]):
            got = matmul(tokens, w, 2, 4, bias=bias, **correction)
            with np.errstate(all="ignore"):
                want = reference.prune_matmul(tokens, w, 2, 4, bias, **correction, row_sum=row_sum_of(w))
            limit = 2e-3 if kind == np.float16 else 1e-5
            with np.errstate(over="ignore"):
                np.testing.assert_allclose(got, want.astype(kind), rtol=limit, atol=limit * 100)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_one_channel_and_kept_channels_without_variance_are_left_as_they_are(kind):
    one = np.arange(1, 6, dtype=kind).reshape(5, 1)
    assert_same_bits(prune(one, 1, 1, variance=True), one)
    same = np.full((2, 16), 7, kind)
    assert_same_bits(prune(same, 4, 4, variance=True), same)
    if kind != np.float64:
        assert_same_bits(matmul(one, np.ones((1, 2), kind), 1, 1, variance=True), np.repeat(one, 2, 1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_keeping_every_channel_corrects_nothing(kind):
    x = np.random.default_rng(1).standard_normal((9, 77)).astype(kind)
    assert_same_bits(prune(x, 16, 16, variance=True), x)


def test_the_ratio_is_at_most_four():
    """Var[z] is much larger than what is left of it, because a scale of 0 drops the large channels."""
    x, scale = np.array([[100, -100, 1, 2]], np.float32), np.array([0, 0, 1, 1], np.float32)
    assert prune(x, 2, 4, scale=scale, variance=True).tolist() == [[0, 0, 4, 8]]


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (16,), (2, 1, 3, 16), (2, 0)], ids=str)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_any_rank_and_no_tokens_are_legal(shape, correction):
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal(shape).astype(np.float32), rng.standard_normal((shape[-1], 6)).astype(np.float32)
    assert_pruned(x, 2, 4, **correction)
    assert_multiplied(x, w, 2, 4, bias=np.ones(6, np.float32), **correction)


@pytest.mark.parametrize("tokens", [1, 3, 8, 300])
def test_the_result_does_not_depend_on_the_threads(tokens):
    rng = np.random.default_rng(tokens)
    x, w = rng.standard_normal((tokens, 512)).astype(np.float32), rng.standard_normal((512, 2048)).astype(np.float32)
    attributes = {"keep": 8, "group": 16, "variance": 1, "center": 2}
    product = {"x": x, "W": w, "bias": None, "scale": None, "shift": None, "order": None, "row_sum": row_sum_of(w)}
    for name, inputs in (("NMPrune", {"x": x}), ("NMMatMul", product)):
        one, two = (run(name, inputs, threads=threads, **attributes) for threads in (1, 2))
        assert_same_bits(one, two)


def test_an_attribute_of_zero_is_no_attribute():
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((7, 40)).astype(np.float32), rng.standard_normal((40, 9)).astype(np.float32)
    for name, inputs in (("NMPrune", {"x": x}), ("NMMatMul", {"x": x, "W": w})):
        without = run(name, inputs, keep=2, group=4)
        assert_same_bits(run(name, inputs, keep=2, group=4, variance=0, center=0), without)


@pytest.mark.parametrize("attributes", [{"variance": 2}, {"variance": -1}, {"center": 3}], ids=str)
def test_an_unknown_correction_ends_in_a_sentence(attributes):
    name = next(iter(attributes))
    with pytest.raises(Exception, match=f"NMPrune: the attribute '{name}' is .*; it must be 0 to"):
        run("NMPrune", {"x": np.ones((1, 8), np.float32)}, keep=2, group=4, **attributes)


def test_the_variance_is_that_of_equation_5_in_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(4)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((4, 7, 64), (64, 10), (10,)))
    z, mask = torch.from_numpy(x), torch.from_numpy(reference.keep_mask(x, 8, 16))
    nu = torch.sqrt(z.var(-1, keepdim=True) / (z * mask).var(-1, keepdim=True))
    want = nu * ((z * mask) @ torch.from_numpy(w)) + torch.from_numpy(b)
    np.testing.assert_allclose(prune(x, 8, 16, variance=True), nu * z * mask, rtol=1e-5)
    np.testing.assert_allclose(matmul(x, w, 8, 16, bias=b, variance=True), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("center", ["mean", "median"])
@pytest.mark.parametrize("shape", [(3, 5, 17), (17,), (0, 16), (2, 0)], ids=str)
def test_the_second_output_is_the_center(shape, center, kind):
    x = (np.random.default_rng(5).standard_normal(shape) + 1).astype(kind)
    attributes = {"keep": 2, "group": 4, "center": CHOICES.index(center)}
    y, got = Op("NMPrune", {"x": x}, outputs=2, **attributes).outputs(x=x)
    assert_same_bits(y, run("NMPrune", {"x": x}, **attributes))
    assert_same_bits(got, reference.center_of(x, center).astype(kind))


def test_without_a_center_the_second_output_is_zero():
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    for attributes in ({}, {"variance": 1}):
        y, center = Op("NMPrune", {"x": x}, outputs=2, keep=2, group=4, **attributes).outputs(x=x)
        assert center.tolist() == [[0]] * 3 and y.any()


@pytest.mark.parametrize("row_sum,words", [(None, "needs the input row_sum"), (np.ones(3, np.float32), r"\[3\]")])
def test_a_center_without_a_row_sum_that_fits_ends_in_a_sentence(row_sum, words):
    x, w = np.ones((1, 8), np.float32), np.ones((8, 4), np.float32)
    inputs = {"x": x, "W": w, "bias": None, "scale": None, "shift": None, "order": None, "row_sum": row_sum}
    with pytest.raises(Exception, match=f"NMMatMul: .*{words}"):
        run("NMMatMul", inputs, keep=2, group=4, center=1)


@pytest.mark.parametrize("center", ["mean", "median"])
def test_the_center_is_that_of_d_pts_in_torch(center):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(6)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((9, 64), (64, 10), (10,)))
    x += rng.standard_normal((9, 1)).astype(np.float32)
    t, weight = torch.from_numpy(x), torch.from_numpy(w)
    eta = t.mean(-1, keepdim=True) if center == "mean" else t.median(-1, keepdim=True).values
    z = t - eta
    best = z.abs().reshape(9, 4, 16).topk(8, dim=-1).indices
    mask = torch.zeros(9, 4, 16).scatter_(-1, best, 1).reshape(9, 64)
    nu = torch.sqrt(z.var(-1, keepdim=True) / (z * mask).var(-1, keepdim=True))
    for variance, factor in ((False, 1), (True, nu)):
        want = factor * ((z * mask) @ weight) + eta * weight.sum(0) + torch.from_numpy(b)
        got = matmul(x, w, 8, 16, bias=b, center=center, variance=variance)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(prune(x, 8, 16, center=center, variance=variance), factor * z * mask, atol=1e-5)


@pytest.mark.parametrize("center", ["mean", "median"])
def test_keeping_every_channel_with_a_center_is_the_dense_product(center):
    rng = np.random.default_rng(7)
    x, w = rng.standard_normal((7, 40)).astype(np.float32), rng.standard_normal((40, 9)).astype(np.float32)
    np.testing.assert_allclose(matmul(x + 1, w, 4, 4, center=center), (x + 1) @ w, rtol=1e-4, atol=1e-4)
