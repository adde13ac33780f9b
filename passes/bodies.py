"""The custom ops in ONNX text: what each means, in stock operators of a given opset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.pruning.emulated import OPS
from nmonnx.reference import Center

OLDEST_OPSET = 9
SLICE_OPSET = 10
ELEMENTS_OPSET = 11
ATTRIBUTE_OPSET = 13
ALLOW_ZERO_OPSET = 14
CAST_LIKE_OPSET = 15

CRITERION = ("scale", "shift", "order")
"""Optional inputs of both ops, in their order."""

_FUSED_INPUTS = ("bias", *CRITERION, "row_sum", "dense")
INPUTS = {
    "NMPrune": ("x", *CRITERION, "dense"),
    "NMMatMul": ("x", "W", *_FUSED_INPUTS),
    "NMMatMulNBits": ("x", "W", "scales", "zeros", *_FUSED_INPUTS),
}
INPUTS |= {name: (*op.inputs, "shift") for name, op in OPS.items()}
"""Inputs of each op, by position."""

NEEDED = ("x", "W", "scales")
"""Inputs that are no options."""

FUSED = ("NMMatMul", "NMMatMulNBits")
"""The ops that prune and multiply in one."""

CENTER_VALUES: Mapping[Center | None, int] = {None: 0, "mean": 1, "median": 2}
"""The attribute `center` of both ops."""


@dataclass(frozen=True)
class Body:
    """What a function must be able to do; each step that no node needs is left out.

    opset      operator set of the body
    pattern    (keep, group), written into the body below opset 13, whose Constant cannot read an attribute
    tail       rows that do not divide into groups
    criterion  which of scale, shift and order the nodes bring
    bias       whether the `NMMatMul` nodes bring a bias
    variance   whether a node asks for the variance; then every node must have the attribute
    center     whether a node asks for a center; then every node must have the attribute, every `NMMatMul` a row_sum
    dense      whether a node is told which tokens stay dense; then every node must have that input
    ends       outputs of `NMPrune`; where it is 2, every node must have both
    packed     whether there are `NMMatMulNBits`, of activations of the type `elem`, 0 for several types
    zeros      whether one of them brings zero points; then every one must
    """

    opset: int
    pattern: tuple[int, int]
    tail: bool = False
    criterion: frozenset[str] = frozenset()
    bias: bool = False
    variance: bool = False
    center: bool = False
    dense: bool = False
    ends: int = 1
    packed: bool = False
    elem: int = 0
    zeros: bool = False

    @property
    def choices(self) -> list[str]:
        """Attributes that say 0 or not at all where a node does not need them."""
        return [name for name, asked in (("variance", self.variance), ("center", self.center)) if asked]

    def refusal(self, patterns: int) -> str:
        """Why the opset cannot express this with so many patterns; "" when it can."""
        if self.opset < OLDEST_OPSET:
            return f"opset {self.opset} is too old for the fallback functions, which need {OLDEST_OPSET}"
        if self.opset < ATTRIBUTE_OPSET and patterns > 1:
            return f"opset {self.opset} cannot express several patterns in one fallback function; {ATTRIBUTE_OPSET} can"
        if self.opset < ATTRIBUTE_OPSET and self.packed:
            return f"opset {self.opset} cannot express NMMatMulNBits in a fallback function; {ATTRIBUTE_OPSET} can"
        if self.opset < CAST_LIKE_OPSET and self.packed and not self.elem:
            return f"opset {self.opset} cannot express NMMatMulNBits of two types in a function; {CAST_LIKE_OPSET} can"
        if self.opset < SLICE_OPSET and self.tail:
            return f"opset {self.opset} cannot express a tail group in a fallback function; {SLICE_OPSET} can"
        if self.opset < CAST_LIKE_OPSET and self.criterion:
            words = " and ".join(sorted(self.criterion))
            return f"opset {self.opset} cannot express {words} in a fallback function; {CAST_LIKE_OPSET} can"
        if self.opset < CAST_LIKE_OPSET and self.choices:
            words = " and ".join(self.choices)
            return f"opset {self.opset} cannot correct the {words} in a fallback function; {CAST_LIKE_OPSET} can"
        if self.opset < CAST_LIKE_OPSET and self.dense:
            return f"opset {self.opset} cannot keep tokens dense in a fallback function; {CAST_LIKE_OPSET} can"
        return ""


def prune_function(body: Body) -> str:
    """`NMPrune` in ONNX text."""
    lines = _prune(body, "selection" if body.variance else "y")
    if body.variance:
        lines += [*ratio(), "nu = " + per_token("nu_rows", body.opset), *corrected("selection", "y", True, [])]
    if body.ends == 2:
        lines += ["center_x = CastLike(center_rows, x)", "center = " + per_token("center_x", body.opset)]
    last = ["dense"] if body.dense else []
    return _function(
        "NMPrune", ["x", *_criterion_inputs(body, body.dense), *last], lines, body, ["y", "center"][: body.ends]
    )


def matmul_function(body: Body, op: str = "NMMatMul") -> str:
    """A fused op in ONNX text: the prune, a MatMul, the corrections and, if there is a bias, an Add."""
    lines = _prune(body, "pruned")
    weight, packed = "W", op == "NMMatMulNBits"
    if packed:
        lines += dequantised(body.zeros)
        lines.append(f"weight = Cast <to = {body.elem}> (w)" if body.elem else "weight = CastLike(w, x)")
        weight = "weight"
    elif body.opset >= CAST_LIKE_OPSET:
        lines.append("weight = CastLike(W, x)")
        weight = "weight"
    lines.append(f"{'product' if body.bias or body.choices else 'y'} = MatMul(pruned, {weight})")
    added = []
    if body.variance:
        lines += [*ratio(), "nu = " + per_token("nu_rows", body.opset)]
    if body.center:
        lines += ["eta_rows = Cast <to = 11> (center_rows)", "eta = " + per_token("eta_rows", body.opset)]
        lines += ["row_sums = Cast <to = 11> (row_sum)", "centered = Mul(eta, row_sums)"]
        added.append("centered")
    if body.choices:
        lines += corrected("product", "corrected" if body.bias else "y", body.variance, added)
    if body.bias:
        lines.append(f"y = Add({'corrected' if body.choices else 'product'}, bias)")
    every = body.center or body.dense
    middle = ["bias"] if body.bias or body.criterion or every else []
    last = [*(["row_sum"] if every else []), *(["dense"] if body.dense else [])]
    last_zeros = ["zero_points"] if body.zeros or middle or body.criterion else []
    first = ["x", "W", *(["scales", *last_zeros] if packed else [])]
    more = ("bits", "block_size") if packed else ()
    return _function(op, [*first, *middle, *_criterion_inputs(body, every), *last], lines, body, more=more)


def dequantised(zeros: bool) -> list[str]:
    """`w` [K, N] in float32, what `NMMatMulNBits` reads its weight as. Bytes are taken apart into as many codes as they
    hold, in chunks of 16 bytes where that is two; see `nmonnx.nbits`."""
    zero = ["w_zero_rows = Gather <axis = 0> (zero_points, w_block)", "w_zero = Cast <to = 1> (w_zero_rows)"]
    if not zeros:
        zero = [
            "w_eight_or_0 = Mul(w_eight, w_more)",
            "w_zero = Cast <to = 1> (w_eight_or_0)",
        ]
    return [
        "w_bits_0 = Constant <value_int: int = @bits> ()",
        "w_block_0 = Constant <value_int: int = @block_size> ()",
        "w_two = Constant <value = int64[1] {2}> ()",
        "w_eight = Constant <value = int64[1] {8}> ()",
        "w_15 = Constant <value = int64[1] {15}> ()",
        "w_128 = Constant <value = int64[1] {128}> ()",
        "w_256 = Constant <value = int64[1] {256}> ()",
        "w_parts = Div(w_eight, w_bits_0)",
        "w_more = Sub(w_parts, one)",
        "w_chunk_15 = Mul(w_more, w_15)",
        "w_chunk = Add(w_chunk_15, one)",
        "w_base = Div(w_256, w_chunk)",
        "w_less = Sub(w_two, w_parts)",
        "w_offset = Mul(w_less, w_128)",  # codes of 8 bits are signed
        "w_whole = Cast <to = 7> (W)",
        "w_bytes = Add(w_whole, w_offset)",
        "w_low = Mod(w_bytes, w_base)",
        "w_high = Div(w_bytes, w_base)",
        "w_form = Concat <axis = 0> (channels, rest, one, w_chunk)",
        "w_low_4 = Reshape(w_low, w_form)",
        "w_high_4 = Reshape(w_high, w_form)",
        "w_both = Concat <axis = 2> (w_low_4, w_high_4)",
        "w_some = Slice(w_both, nought, w_parts, w_two)",
        "w_flat_form = Concat <axis = 0> (channels, rest)",
        "w_flat = Reshape(w_some, w_flat_form)",
        "w_scale_form = Shape(scales)",
        "w_columns = Gather <axis = 0> (w_scale_form, one)",
        "w_columns_only = Slice(w_flat, nought, w_columns, one)",
        "w_signed = Sub(w_columns_only, w_offset)",
        "w_codes = Cast <to = 1> (w_signed)",
        "w_count = Squeeze(channels, nought)",
        "w_from = Constant <value = int64 {0}> ()",
        "w_step = Constant <value = int64 {1}> ()",
        "w_channel = Range(w_from, w_count, w_step)",
        "w_block = Div(w_channel, w_block_0)",
        "w_scale_rows = Gather <axis = 0> (scales, w_block)",
        "w_scale = Cast <to = 1> (w_scale_rows)",
        *zero,
        "w_moved = Sub(w_codes, w_zero)",
        "w = Mul(w_moved, w_scale)",
    ]


def _criterion_inputs(body: Body, every: bool = False) -> list[str]:
    if every:
        return list(CRITERION)
    last = max((CRITERION.index(c) for c in body.criterion), default=-1)
    return list(CRITERION[: last + 1])


def _prune(body: Body, y: str) -> list[str]:
    opset, (keep, group) = body.opset, body.pattern
    named = opset >= ATTRIBUTE_OPSET
    top_k = "TopK <axis = 1> (never_empty, keep_n)" if opset >= 10 else f"TopK <axis = 1, k = {keep}> (never_empty)"
    zero_ok = "<allowzero = 1> " if opset >= ALLOW_ZERO_OPSET else ""
    form = "padded" if body.tail else "cut"
    chosen = "sparse_y" if body.dense else "rows_y"
    return [
        "one = Constant <value = int64[1] {1}> ()",
        "nought = Constant <value = int64[1] {0}> ()",
        "rest = Constant <value = int64[1] {-1}> ()",
        *_option("keep", keep, named),
        *_option("group", group, named),
        "shape = Shape(x)",
        "rank = Shape(shape)",
        "last = Sub(rank, one)",
        "channels = Gather <axis = 0> (shape, last)",
        "row_shape = Concat <axis = 0> (rest, channels)",
        "rows = Reshape(x, row_shape)",
        *shifted("shift" in body.criterion, body.center),
        *(token_shape() if body.choices else []),
        *_scored("scale" in body.criterion),
        # a zero of x's own type, whatever x holds
        "sign = Sign(rows)",
        "rows_zero = Shrink <lambd = 2.0> (sign)",
        *_ordered("order" in body.criterion),
        *(_pad_rows() if body.tail else []),
        "group_shape = Concat <axis = 0> (rest, group_n)",
        f"ranked = Reshape({form}_score, group_shape)",
        f"values = Reshape({form}_x, group_shape)",
        f"zeros = Reshape({form}_zero, group_shape)",
        # one row more, because ONNX Runtime's TopK divides by the number of rows before 1.24
        "row_form = Concat <axis = 0> (one, group_n)",
        "row_more = ConstantOfShape <value = double[1] {-1}> (row_form)",
        "never_empty = Concat <axis = 0> (ranked, row_more)",
        f"best, index_more = {top_k}",
        _first_rows(opset),
        *(_select() if opset >= ELEMENTS_OPSET else _select_by_mask()),
        *(_cut_rows() if body.tail else ["cut_y = Reshape(selected, row_shape)"]),
        f"{chosen} = Gather <axis = 1> (cut_y, back)" if "order" in body.criterion else f"{chosen} = Identity(cut_y)",
        *(_whole_rows(chosen) if body.dense else []),
        f"{y} = Reshape {zero_ok}(rows_y, shape)",
    ]


def _option(name: str, value: int, named: bool) -> list[str]:
    if named:
        return [f"{name}_0 = Constant <value_int: int = @{name}> ()", f"{name}_n = Reshape({name}_0, one)"]
    return [f"{name}_n = Constant <value = int64[1] {{{value}}}> ()"]


def shifted(shift: bool, center: bool) -> list[str]:
    """`wide`, `rows` without shift and center in float32, and `rows_x`, the same in the type of x."""
    if center:
        start = ["single = Cast <to = 1> (rows)", "shifted = Sub(single, shift)", "before = Cast <to = 11> (shifted)"]
        if not shift:  # in double, so that an x in double loses nothing
            start = ["shifted = Cast <to = 1> (rows)", "before = Cast <to = 11> (rows)"]
        return [
            *start,
            *_center(),
            "center_exact = Cast <to = 11> (center_rows)",
            "moved = Sub(before, center_exact)",
            "wide = Cast <to = 1> (moved)",
            "rows_x = CastLike(moved, x)",
        ]
    if not shift:
        return ["wide = Cast <to = 1> (rows)", "rows_x = Identity(rows)"]
    return ["single = Cast <to = 1> (rows)", "wide = Sub(single, shift)", "rows_x = CastLike(wide, x)"]


def _center() -> list[str]:
    """`center_rows`: the mean or the lower median of each row, 0 where @center is 0."""
    return [
        "center_0 = Constant <value_int: int = @center> ()",
        "choice_mean = Constant <value = int64 {1}> ()",
        "choice_median = Constant <value = int64 {2}> ()",
        "is_mean = Equal(center_0, choice_mean)",
        "is_median = Equal(center_0, choice_median)",
        "centred_exact = Cast <to = 11> (shifted)",
        "centred_total = ReduceSum(centred_exact, one)",
        "centred_n = Cast <to = 11> (channels)",
        "mean_exact = Div(centred_total, centred_n)",
        "mean = Cast <to = 1> (mean_exact)",
        # one row more, as for the TopK of the groups
        "centre_form = Concat <axis = 0> (one, channels)",
        "centre_more = ConstantOfShape <value = float[1] {0}> (centre_form)",
        "never_none = Concat <axis = 0> (shifted, centre_more)",
        "two = Constant <value = int64[1] {2}> ()",
        "before_last = Sub(channels, one)",
        "middle = Div(before_last, two)",
        "lower_n = Add(middle, one)",
        "lower, lower_index = TopK <axis = 1, largest = 0> (never_none, lower_n)",
        "median_more = Gather <axis = 1> (lower, middle)",
        "median_sorted = Slice(median_more, nought, rest, nought)",
        # TopK puts NaN anywhere; the mean of such a row is NaN
        "missing_x = IsNaN(shifted)",
        "missing_f = Cast <to = 1> (missing_x)",
        "missing_n = ReduceSum(missing_f, one)",
        "has_missing = Cast <to = 9> (missing_n)",
        "median = Where(has_missing, mean, median_sorted)",
        "no_center = Constant <value = float[1] {0}> ()",
        "mean_or_none = Where(is_mean, mean, no_center)",
        "center_rows = Where(is_median, median, mean_or_none)",
    ]


def token_shape() -> list[str]:
    """That of `per_token`."""
    return ["leading = Slice(shape, nought, last, nought)", "token_shape = Concat <axis = 0> (leading, one)"]


def per_token(rows: str, opset: int) -> str:
    """One value for each row, for multiplication with a tensor of as many axes as x."""
    zero_ok = "<allowzero = 1> " if opset >= ALLOW_ZERO_OPSET else ""
    return f"Reshape {zero_ok}({rows}, token_shape)"


def _scored(scale: bool) -> list[str]:
    weighted = [
        "product_score = Mul(size, scale)",
        "no_scale = Constant <value = float[1] {0}> ()",
        "unscored = Equal(scale, no_scale)",
        "weighted = Where(unscored, no_scale, product_score)",  # a scale of 0 scores 0 even for infinity and NaN
    ]
    return [
        "size = Abs(wide)",
        *(weighted if scale else ["weighted = Identity(size)"]),
        # doubles, so that infinity can give way to NaN and still beat every finite number
        "exact = Cast <to = 11> (weighted)",
        "huge = Constant <value = double[1] {1e300}> ()",
        "nan_score = Constant <value = double[1] {1.5e308}> ()",
        "finite = Min(exact, huge)",
        "is_nan = IsNaN(weighted)",
        "rows_score = Where(is_nan, nan_score, finite)",
    ]


def _ordered(order: bool) -> list[str]:
    if not order:
        return [f"cut_{name} = Identity(rows_{name})" for name in ("score", "x", "zero")]
    return [
        "places = Cast <to = 7> (order)",
        *(f"cut_{name} = Gather <axis = 1> (rows_{name}, places)" for name in ("score", "x", "zero")),
        # where each channel stands in the order
        "count_0 = Squeeze(channels, nought)",
        "from_0 = Constant <value = int64 {0}> ()",
        "step_0 = Constant <value = int64 {1}> ()",
        "ranks = Range(from_0, count_0, step_0)",
        "back = ScatterElements <axis = 0> (ranks, places, ranks)",
    ]


def _pad_rows() -> list[str]:
    return [
        "less = Sub(group_n, one)",
        "more = Add(channels, less)",
        "groups = Div(more, group_n)",
        "padded = Mul(groups, group_n)",
        "missing = Sub(padded, channels)",
        "score_shape = Shape(cut_score)",
        "count = Gather <axis = 0> (score_shape, nought)",
        "pad_shape = Concat <axis = 0> (count, missing)",
        "pad_score = ConstantOfShape <value = double[1] {-1}> (pad_shape)",
        "padded_score = Concat <axis = 1> (cut_score, pad_score)",
        "column = Gather <axis = 1> (cut_zero, nought)",
        "pad_zero = Expand(column, pad_shape)",
        "padded_x = Concat <axis = 1> (cut_x, pad_zero)",
        "padded_zero = Concat <axis = 1> (cut_zero, pad_zero)",
    ]


def _first_rows(opset: int) -> str:
    if opset < SLICE_OPSET:
        return "index = Slice <axes = [0], starts = [0], ends = [-1]> (index_more)"
    return "index = Slice(index_more, nought, rest, nought)"


def _select() -> list[str]:
    return [
        "kept = GatherElements <axis = 1> (values, index)",
        "selected = ScatterElements <axis = 1> (zeros, index, kept)",
    ]


def _select_by_mask() -> list[str]:
    # ONNX Runtime's Where turns a kept -0 into +0: only for opsets that have nothing better
    return [
        "ranked_shape = Shape(ranked)",
        "index_shape = Shape(index)",
        "none = ConstantOfShape <value = float[1] {0}> (ranked_shape)",
        "hits = ConstantOfShape <value = float[1] {1}> (index_shape)",
        "hit = Scatter <axis = 1> (none, index, hits)",
        "mask = Cast <to = 9> (hit)",
        "selected = Where(mask, values, zeros)",
    ]


def _cut_rows() -> list[str]:
    return [
        "padded_shape = Concat <axis = 0> (rest, padded)",
        "padded_y = Reshape(selected, padded_shape)",
        "cut_y = Slice(padded_y, nought, channels, one)",
    ]


def _whole_rows(pruned: str) -> list[str]:
    """`rows_y`: each row of `pruned`, or of `rows_x` where its token is dense, bit for bit."""
    return [
        "tokens_shape = Shape(rows)",
        "tokens = Gather <axis = 0> (tokens_shape, nought)",
        "dense_flat = Reshape(dense, rest)",
        "dense_int = Cast <to = 7> (dense_flat)",
        "dense_rows = Expand(dense_int, tokens)",
        "down = Mul(dense_rows, tokens)",
        "tokens_0 = Squeeze(tokens, nought)",
        "first_row = Constant <value = int64 {0}> ()",
        "next_row = Constant <value = int64 {1}> ()",
        "places_y = Range(first_row, tokens_0, next_row)",
        "picked = Add(places_y, down)",
        f"either = Concat <axis = 0> ({pruned}, rows_x)",
        "rows_y = Gather <axis = 0> (either, picked)",
    ]


def ratio() -> list[str]:
    """`nu_rows`, the ratio of each row; 1 where @variance is 0."""
    return [
        "asked_0 = Constant <value_int: int = @variance> ()",
        "asked = Cast <to = 9> (asked_0)",
        "channels_f = Cast <to = 11> (channels)",
        *_squared_deviation("all", "rows_x"),
        *_squared_deviation("some", "rows_y"),
        "ratio_2 = Div(all_sum, some_sum)",
        "ratio = Sqrt(ratio_2)",
        # NaN and infinity are not below the bound
        "infinite = Constant <value = double[1] {1.7e308}> ()",
        "is_number = Less(ratio, infinite)",
        "corrects = And(is_number, asked)",
        "highest = Constant <value = double[1] {4}> ()",
        "neutral = Constant <value = double[1] {1}> ()",
        "capped = Min(ratio, highest)",
        "nu_exact = Where(corrects, capped, neutral)",
        "nu_float = Cast <to = 1> (nu_exact)",
        "nu_rows = Cast <to = 11> (nu_float)",
    ]


def _squared_deviation(name: str, rows: str) -> list[str]:
    """In two passes and in double, so that a large mean does no harm."""
    return [
        f"{name}_rows = Cast <to = 11> ({rows})",
        f"{name}_total = ReduceSum({name}_rows, one)",
        f"{name}_mean = Div({name}_total, channels_f)",
        f"{name}_off = Sub({name}_rows, {name}_mean)",
        f"{name}_off_2 = Mul({name}_off, {name}_off)",
        f"{name}_sum = ReduceSum({name}_off_2, one)",
    ]


def corrected(name: str, y: str, variance: bool, added: list[str]) -> list[str]:
    """Times nu where `variance`, plus what is `added`, in double and rounded once."""
    lines, at = [f"{name}_exact = Cast <to = 11> ({name})"], f"{name}_exact"
    if variance:
        lines.append(f"{name}_nu = Mul({at}, nu)")
        at = f"{name}_nu"
    for other in added:
        lines.append(f"{name}_{other} = Add({at}, {other})")
        at = f"{name}_{other}"
    return [*lines, f"{y} = CastLike({at}, x)"]


def _function(
    op: str, inputs: list[str], lines: list[str], body: Body, outputs: Sequence[str] = ("y",), more: Sequence[str] = ()
) -> str:
    options, ends = ", ".join(["keep", "group", *body.choices, *more]), ", ".join(outputs)
    head = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {body.opset}]>\n{op} <{options}> ({", ".join(inputs)}) => ({ends})'
    )
    return head + "\n{\n" + "\n".join(f"  {line}" for line in lines) + "\n}"
