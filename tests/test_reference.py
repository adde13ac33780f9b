"""The numpy meaning of the ops against a written-out loop and against stock operators in ONNX Runtime."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nmonnx.reference import keep_mask, prune, prune_matmul


def by_hand(x, keep, group, scale=None, shift=None, order=None):
    """One row at a time, one group at a time, by sorting (rank, index) tuples."""
    x = np.asarray(x)
    channels = x.shape[-1]
    scale = np.ones(channels) if scale is None else np.broadcast_to(scale, channels)
    shift = np.zeros(channels) if shift is None else np.broadcast_to(shift, channels)
    order = list(range(channels)) if order is None else list(order)
    out = np.zeros_like(x)
    rows = (math.prod(x.shape[:-1]), channels)
    for row_in, row_out in zip(x.reshape(rows), out.reshape(rows), strict=True):
        z = row_in.astype(np.float64) - shift
        for start in range(0, channels, group):
            members = order[start : start + group]

            def rank(position, members=members, z=z):
                channel = members[position]
                score = 0.0 if scale[channel] == 0 else np.float32(abs(z[channel])) * scale[channel]
                return (0, 0.0, position) if np.isnan(score) else (1, -score, position)

            for position in sorted(range(len(members)), key=rank)[:keep]:
                row_out[members[position]] = z[members[position]]
    return out


def f32(*values):
    return np.array(values, np.float32)


def same_bits(a, b):
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(kind), b.view(kind))


nasty = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, np.inf, -np.inf, np.nan, 2.0**-24, 65504.0])


@settings(max_examples=60, deadline=None)
@given(
    x=arrays(np.float32, array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=19), elements=nasty),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    group=st.sampled_from([1, 2, 3, 4, 8, 16]),
    data=st.data(),
)
def test_equals_the_written_out_loop_on_nasty_values_in_every_type(x, dtype, group, data):
    keep = data.draw(st.integers(1, group))
    x = x.astype(dtype)
    channels = x.shape[-1]
    scale = data.draw(st.none() | arrays(np.float32, channels, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])))
    order = data.draw(st.none() | st.permutations(range(channels)).map(lambda p: np.array(p, np.int64)))
    assert same_bits(prune(x, keep, group, scale, order=order), by_hand(x, keep, group, scale, order=order))


def test_ties_keep_the_lowest_index_and_a_group_of_zeros_keeps_its_first():
    assert keep_mask(f32(1, -1, 1, 1), 2, 4).tolist() == [True, True, False, False]
    assert keep_mask(np.zeros(4, np.float32), 1, 4).tolist() == [True, False, False, False]


def test_nan_ranks_above_inf_and_both_are_kept_as_they_are():
    kept = prune(f32(np.inf, np.nan, -np.inf, 5), 2, 4)
    assert kept[0] == np.inf and np.isnan(kept[1]) and kept[2:].tolist() == [0, 0]


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_scale_zero_scores_zero_whatever_the_channel_holds(value):
    kept = prune(f32(value, 1e-3), 1, 2, scale=f32(0, 1))
    assert kept.tolist() == [0, np.float32(1e-3)]


def test_scores_of_doubles_are_compared_in_float32():
    close = np.array([1.0, 1.0 + 1e-12])
    assert keep_mask(close, 1, 2).tolist() == [True, False]
    assert prune(close, 2, 2).tolist() == close.tolist()


def test_dropped_values_are_positive_zero_never_nan():
    kept = prune(f32(-1, -2, -np.inf, -3), 1, 4)
    assert not np.signbit(kept[[0, 1, 3]]).any() and not np.isnan(kept).any()


def test_tail_keeps_the_smaller_of_keep_and_its_own_length():
    mask = keep_mask(f32(9, 8, 7, 6, 1, 2, 3), 2, 4)
    assert mask.tolist() == [True, True, False, False, False, True, True]
    assert keep_mask(f32(9, 8, 7, 6, 1), 2, 4)[4]


def test_order_regroups_channels_but_leaves_values_in_their_places():
    x = f32(4, 3, 2, 1)
    assert prune(x, 1, 2).tolist() == [4, 0, 2, 0]
    assert prune(x, 1, 2, order=np.array([0, 2, 3, 1])).tolist() == [4, 3, 0, 0]


def test_shift_is_subtracted_before_ranking_and_stays_subtracted():
    x, shift = f32(1, 10, 2, 9), f32(0, 10, 0, 10)
    assert prune(x, 1, 2, shift=shift).tolist() == [1, 0, 2, 0]
    assert prune(f32(3, 1), 1, 2, shift=f32(2.5)).tolist() == [0, -1.5]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_keep_equal_to_group_changes_no_bit(dtype):
    x = np.random.default_rng(0).standard_normal((3, 37)).astype(dtype)
    assert same_bits(prune(x, 16, 16), x)


def test_zero_tokens_are_legal():
    assert prune(np.zeros((2, 0, 32), np.float32), 8, 16).shape == (2, 0, 32)
    assert prune_matmul(np.zeros((0, 8), np.float32), np.zeros((8, 3), np.float32), 2, 4).shape == (0, 3)


def test_matmul_is_the_sum_over_the_kept_channels_alone():
    rng = np.random.default_rng(1)
    x, w, bias = rng.standard_normal((5, 24)), rng.standard_normal((24, 7)), rng.standard_normal(7)
    kept = by_hand(x, 2, 4)
    want = [[sum(kept[t, k] * w[k, n] for k in range(24)) + bias[n] for n in range(7)] for t in range(5)]
    np.testing.assert_allclose(prune_matmul(x, w, 2, 4, bias), want, rtol=1e-12, atol=1e-12)


def test_agrees_with_stock_operators_in_onnxruntime():
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Constant", [], ["groups"], value_ints=[0, 3, 8]),
        helper.make_node("Constant", [], ["flat"], value_ints=[0, 24]),
        helper.make_node("Constant", [], ["k"], value_ints=[3]),
        helper.make_node("Reshape", ["x", "groups"], ["g"]),
        helper.make_node("Abs", ["g"], ["a"]),
        helper.make_node("TopK", ["a", "k"], ["v", "i"], axis=2),
        helper.make_node("GatherElements", ["g", "i"], ["kept"], axis=2),
        helper.make_node("Sub", ["g", "g"], ["zeros"]),
        helper.make_node("ScatterElements", ["zeros", "i", "kept"], ["s"], axis=2),
        helper.make_node("Reshape", ["s", "flat"], ["y"]),
    ]
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 24])
    y_info = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 24])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x_info], [y_info]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.round(np.random.default_rng(2).standard_normal((50, 24)), 1).astype(np.float32)  # rounding makes ties
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], prune(x, 3, 8))
