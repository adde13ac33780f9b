"""The ops of `nmonnx.pruning.emulated` in ONNX text, as stock operators."""

from __future__ import annotations

from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.passes.bodies import corrected, per_token, ratio, shifted, token_shape
from nmonnx.pruning.emulated import OPS, Emulated

OLDEST_OPSET = 15
"""CastLike."""


def emulated_function(op: str, opset: int, shift: bool = False, variance: bool = False, center: bool = False) -> str:
    """The function of an op of `OPS`, for a model of that operator set: with the input `shift`, with the attribute
    `variance`, and with the attribute `center`, then also with the center of each token as its second output."""
    rule = OPS[op]
    ranked = {"group": _groups, "token": _tokens, "call": _call, "threshold": _threshold}
    lines = [*_rows(), *shifted(shift, center), *_scores(rule), *ranked[rule.scope]()]
    lines.append(f"{'selection' if variance else 'y'} = Reshape <allowzero = 1> (rows_y, shape)")
    if variance or center:
        lines += token_shape()
    if variance:
        lines += [*ratio(), "nu = " + per_token("nu_rows", opset), *corrected("selection", "y", True, [])]
    if center:
        lines += ["center_x = CastLike(center_rows, x)", "center = " + per_token("center_x", opset)]
    options = ["keep", "group", *(["variance"] if variance else []), *(["center"] if center else [])]
    inputs, ends = [*rule.inputs, *(["shift"] if shift else [])], ["y", *(["center"] if center else [])]
    head = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{op} <{', '.join(options)}> ({', '.join(inputs)}) => ({', '.join(ends)})"
    )
    return head + "\n{\n" + "\n".join(f"  {line}" for line in lines) + "\n}"


def _rows() -> list[str]:
    return [
        "one = Constant <value = int64[1] {1}> ()",
        "nought = Constant <value = int64[1] {0}> ()",
        "rest = Constant <value = int64[1] {-1}> ()",
        "keep_0 = Constant <value_int: int = @keep> ()",
        "keep_n = Reshape(keep_0, one)",
        "group_0 = Constant <value_int: int = @group> ()",
        "group_n = Reshape(group_0, one)",
        "shape = Shape(x)",
        "rank = Shape(shape)",
        "last = Sub(rank, one)",
        "channels = Gather <axis = 0> (shape, last)",
        "row_shape = Concat <axis = 0> (rest, channels)",
        "rows = Reshape(x, row_shape)",
        "rows_shape = Shape(rows)",
        "tokens = Gather <axis = 0> (rows_shape, nought)",
        "zero_f = Constant <value = float[1] {0}> ()",
        "zero = CastLike(zero_f, x)",
        "pad = Constant <value = double[1] {-1.7e308}> ()",
    ]


def _scores(rule: Emulated) -> list[str]:
    """`score` [T, K], double, finite; NaN above all."""
    scale = [
        "unscaled = Mul(size, scale)",
        "unscored = Equal(scale, zero_f)",
        "weighted = Where(unscored, zero_f, unscaled)",
    ]
    clact = [
        "square = Mul(size_d, size_d)",
        "column_2 = ReduceSum(square, nought)",
        "column = Sqrt(column_2)",
        "row_2 = ReduceSum(square, one)",
        "row_norm = Sqrt(row_2)",
        "tiny = Constant <value = double[1] {1e-8}> ()",
        "row_safe = Add(row_norm, tiny)",
        "columned = Mul(size_d, column)",
        "normed = Div(columned, row_safe)",
        "zero_d = Constant <value = double[1] {0}> ()",
        "is_zero = Equal(size_d, zero_d)",
        "clact = Where(is_zero, zero_d, normed)",
        "alone = Equal(tokens, one)",
        "exact = Where(alone, size_d, clact)",
    ]
    return [
        "size = Abs(wide)",
        *(scale if rule.score == "scale" else ["weighted = Identity(size)"]),
        "size_d = Cast <to = 11> (weighted)",
        *(clact if rule.score == "clact" else ["exact = Identity(size_d)"]),
        "huge = Constant <value = double[1] {1e300}> ()",
        "nan_score = Constant <value = double[1] {1.5e308}> ()",
        "finite = Min(exact, huge)",
        "signed = Neg(finite)" if rule.score == "anti" else "signed = Identity(finite)",
        "missing_number = IsNaN(exact)",
        "score = Where(missing_number, nan_score, signed)",
    ]


def _groups() -> list[str]:
    return [
        "less = Sub(group_n, one)",
        "more = Add(channels, less)",
        "groups = Div(more, group_n)",
        "padded = Mul(groups, group_n)",
        "absent = Sub(padded, channels)",
        "pad_shape = Concat <axis = 0> (tokens, absent)",
        "pad_score = Expand(pad, pad_shape)",
        "pad_x = Expand(zero, pad_shape)",
        "wide_score = Concat <axis = 1> (score, pad_score)",
        "wide_x = Concat <axis = 1> (rows_x, pad_x)",
        "group_shape = Concat <axis = 0> (rest, group_n)",
        "ranked = Reshape(wide_score, group_shape)",
        "values = Reshape(wide_x, group_shape)",
        "count = Identity(keep_n)",
        *_kept(),
        "padded_shape = Concat <axis = 0> (rest, padded)",
        "padded_y = Reshape(selected, padded_shape)",
        "rows_y = Slice(padded_y, nought, channels, one)",
    ]


def _tokens() -> list[str]:
    return [
        "ranked = Identity(score)",
        "values = Identity(rows_x)",
        "share = Mul(channels, keep_n)",
        "count = Div(share, group_n)",
        *_kept(),
        "rows_y = Identity(selected)",
    ]


def _call() -> list[str]:
    return [
        # one column more, so that a call without tokens has something to rank
        "elements = Mul(tokens, channels)",
        "flat_shape = Concat <axis = 0> (one, elements)",
        "flat_score = Reshape <allowzero = 1> (score, flat_shape)",
        "flat_x = Reshape <allowzero = 1> (rows_x, flat_shape)",
        "corner = Concat <axis = 0> (one, one)",
        "pad_score = Expand(pad, corner)",
        "pad_x = Expand(zero, corner)",
        "ranked = Concat <axis = 1> (flat_score, pad_score)",
        "values = Concat <axis = 1> (flat_x, pad_x)",
        "share = Mul(elements, keep_n)",
        "count = Div(share, group_n)",
        *_kept(),
        "flat_y = Slice(selected, nought, elements, one)",
        "rows_y = Reshape <allowzero = 1> (flat_y, rows_shape)",
    ]


def _threshold() -> list[str]:
    return [
        "bound = Cast <to = 11> (threshold)",
        "kept = Greater(score, bound)",
        "rows_y = Where(kept, rows_x, zero)",
    ]


def _kept() -> list[str]:
    """`selected`: `values` where `ranked` has its `count` best of a row, else +0; kept values pass bit for bit."""
    return [
        # one row more, because ONNX Runtime's TopK divides by the number of rows before 1.24
        "ranked_shape = Shape(ranked)",
        "width = Gather <axis = 0> (ranked_shape, one)",
        "row_form = Concat <axis = 0> (one, width)",
        "row_more = Expand(pad, row_form)",
        "never_empty = Concat <axis = 0> (ranked, row_more)",
        "best, index_more = TopK <axis = 1> (never_empty, count)",
        "index = Slice(index_more, nought, rest, nought)",
        "taken = GatherElements <axis = 1> (values, index)",
        "zeros = Expand(zero, ranked_shape)",
        "selected = ScatterElements <axis = 1> (zeros, index, taken)",
    ]
