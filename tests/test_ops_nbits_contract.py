"""What custom_ops/README.md promises of NMMatMulNBits: every pattern, criterion, correction, boundary and refusal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_session import assert_same_bits, run
from test_ops_nbits import TARGETS, ZEROS, Weight, assert_close, draw, matmul

pytestmark = pytest.mark.skipif(not TARGETS, reason="the custom op library is not built")

MANY = 300  # tokens: more than are multiplied at a time


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_any_number_of_16_or_32_channels_may_be_kept(bits, group, tokens):
    rng = np.random.default_rng(group)
    w = Weight(rng, 80, 50, bits, 16)
    for keep in range(1, group + 1):
        x = draw(rng, (tokens, 80))
        assert_close(matmul(x, w, keep, group), x, w, keep, group)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_criterion_type_and_number_of_tokens(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    channels, columns = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100))
    bits, zeros, simd = (data.draw(st.sampled_from(some)) for some in ([4, 8], ZEROS, TARGETS))
    w = Weight(rng, channels, columns, bits, data.draw(st.sampled_from([16, channels, 1000])), zeros)
    x = draw(rng, (data.draw(st.integers(1, 9)), channels), data.draw(st.sampled_from([np.float16, np.float32])))
    candidates = {
        "bias": draw(rng, (columns,), x.dtype),
        "scale": rng.uniform(0.5, 2, channels).astype(np.float32),
        "shift": draw(rng, (channels,)),
        "order": rng.permutation(channels).astype(data.draw(st.sampled_from([np.int32, np.int64]))),
    }
    given = {name: value for name, value in candidates.items() if data.draw(st.booleans())}
    assert_close(matmul(x, w, 5, 12, simd, **given), x, w, 5, 12, **given)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("center", [1, 2])
def test_a_product_is_corrected_as_nmprune_corrects_its_activation(bits, dtype, tokens, center):
    """y = nu (pruned W) + eta row_sum + bias, where NMPrune gives nu * pruned and eta."""
    rng = np.random.default_rng(11)
    w = Weight(rng, 96, 40, bits)
    x, bias, shift = draw(rng, (tokens, 96), dtype), draw(rng, (40,), dtype), draw(rng, (96,))
    row_sum = w.values.sum(0).astype(np.float32)
    corrections = {"variance": 1, "center": center}
    y = matmul(x, w, 8, 16, bias=bias, shift=shift, row_sum=row_sum, **corrections)
    pruned = run("NMPrune", {"x": x, "scale": None, "shift": shift}, keep=8, group=16, **corrections)
    z = x.astype(np.float32) - shift
    eta = z.mean(-1, keepdims=True) if center == 1 else np.sort(z, -1)[:, 47:48]
    expected = pruned.astype(np.float64) @ w.values + eta * row_sum + bias
    size = np.abs(pruned.astype(np.float64)) @ np.abs(w.values) + np.abs(eta * row_sum) + 1
    assert (np.abs(y - expected) <= size * (2e-3 if dtype == np.float16 else 1e-4)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("panel_tokens", [2, 1000])
def test_a_dense_token_keeps_all_its_channels_and_the_others_are_pruned(bits, panel_tokens):
    rng = np.random.default_rng(12)
    w = Weight(rng, 64, 40, bits, zeros="whole")
    for tokens in (1, 2, MANY):
        x, dense = draw(rng, (tokens, 64)), rng.integers(0, 2, tokens).astype(bool)
        y = matmul(x, w, 4, 16, dense=dense, panel_tokens=panel_tokens)
        for keep, some in ((16, dense), (4, ~dense)):
            assert_close(y[some], x[some], w, keep, 16)
        y = matmul(x, w, 4, 16, dense=np.array([True]), panel_tokens=panel_tokens)
        assert_close(y, x, w, 16, 16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 5, MANY])
def test_the_whole_criterion_does_not_depend_on_the_threads(bits, tokens):
    rng = np.random.default_rng(13)
    w = Weight(rng, 256, 2000, bits, zeros="float")
    inputs = {
        "x": draw(rng, (tokens, 256)),
        "w": w.data,
        "scales": w.scales,
        "zeros": w.zeros,
        "bias": draw(rng, (2000,)),
        "scale": rng.uniform(0.5, 2, 256).astype(np.float32),
        "shift": draw(rng, (256,)),
        "order": rng.permutation(256),
        "row_sum": w.values.sum(0).astype(np.float32),
        "dense": rng.integers(0, 2, tokens).astype(bool),
    }
    attributes = {"keep": 8, "group": 16, "bits": bits, "block_size": 32, "variance": 1, "center": 2}
    one, three = (run("NMMatMulNBits", inputs, threads=threads, **attributes) for threads in (1, 3))
    assert_same_bits(three, one)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("simd", TARGETS)
def test_only_level_4_may_round_to_8_bits(bits, tokens, simd):
    rng = np.random.default_rng(14)
    w = Weight(rng, 100, 90, bits, zeros="whole", scale_type=np.float16)
    x = draw(rng, (tokens, 100))
    exact = matmul(x, w, 8, 16, simd)
    assert_close(exact, x, w, 8, 16)
    for level in (1, 2, 3):
        assert_same_bits(matmul(x, w, 8, 16, simd, accuracy_level=level), exact)
    assert_close(matmul(x, w, 8, 16, simd, accuracy_level=4), x, w, 8, 16, rounding=2.0**-7.9)


@pytest.mark.parametrize("tokens", [1, 70])
def test_what_fills_up_the_last_chunk_does_not_matter(tokens):
    rng = np.random.default_rng(15)
    for columns in (1, 15, 17, 33, 95):
        w = Weight(rng, 40, columns, 4)
        x = draw(rng, (tokens, 40))
        clean = matmul(x, w, 8, 16)
        rest = np.arange(columns, -(-columns // 32) * 32)
        for n in rest:
            w.data[:, n // 32 * 16 + n % 16] |= np.uint8(15 << (4 * (n % 32 // 16)))
        assert_same_bits(matmul(x, w, 8, 16), clean)


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_to_multiply_leaves_the_bias(bits):
    bias = draw(np.random.default_rng(16), (7,))
    for shape in ((0, 32), (2, 0), (3, 0, 32)):
        w = Weight(np.random.default_rng(17), shape[-1], 7, bits)
        y = matmul(np.ones(shape, np.float32), w, 8, 16, bias=bias)
        np.testing.assert_array_equal(y, np.broadcast_to(bias, (*shape[:-1], 7)))


F = np.float32


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"x": np.array(1, F)}, "x is a scalar"),
        ({"bits": 0}, "the attribute 'bits' is 0; it must be 4 or 8"),
        ({"block_size": 0}, "the attribute 'block_size' is 0; it must be a multiple of 16, or at least K"),
        ({"accuracy_level": 5}, "the attribute 'accuracy_level' is 5; it must be 0 to 4"),
        ({"panel_tokens": -1}, "the attribute 'panel_tokens' is -1"),
        ({"keep": 17}, "cannot keep 17 of every 16 channels"),
        ({"center": 1}, "the attribute 'center' needs the input row_sum"),
        ({"center": 1, "row_sum": np.ones(39, F)}, "row_sum has shape [39]; it must be [40]"),
        ({"scales": np.ones((3, 40), np.float64)}, "in float32 or float16"),
        ({"scales": np.ones(40, F)}, "scales has shape [40]"),
        ({"zeros": np.ones((3, 40), np.int8)}, "in uint8 or in the type of scales"),
        ({"zeros": np.ones((3, 40), np.float16)}, "in uint8 or in the type of scales"),
        ({"w": np.ones(96 * 32, np.uint8)}, "W has shape [3072]"),
        ({"bits": 8}, "it must be [96,40] in int8"),
        ({"bias": np.ones(39, F)}, "bias has shape [39]; it must be [40]"),
        ({"scale": np.ones(40, F)}, "scale has shape [40]; it must be [96]"),
        ({"order": np.zeros(96, np.int64)}, "order"),
        ({"dense": np.ones(3, bool)}, "dense has shape [3]"),
    ],
)
def test_each_breach_of_the_contract_ends_in_one_sentence(change, sentence):
    w = Weight(np.random.default_rng(8), 96, 40, 4)
    names = ("zeros", "bias", "scale", "shift", "order", "row_sum", "dense")
    inputs = {"x": np.ones((2, 96), F), "w": w.data, "scales": w.scales, **dict.fromkeys(names)}
    attributes = {"keep": 8, "group": 16, "bits": 4, "block_size": 32}
    inputs |= {name: value for name, value in change.items() if name in inputs}
    attributes |= {name: value for name, value in change.items() if name not in inputs}
    with pytest.raises(Exception) as error:
        run("NMMatMulNBits", inputs, **attributes)
    said = str(error.value).splitlines()
    assert len(said) == 1 and sentence.replace(" ", "") in said[0].replace(" ", ""), said
