"""Linear layers in model-local functions: of which body or of which call they are, with which weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from site_models import matrix, parse, saved

from nmonnx.errors import InputError
from nmonnx.onnx_file.graph import Model, load
from nmonnx.sites import find_sites, select

HEAD = '\n<domain: "local", opset_import: ["" : 20, "local" : 1]> '
F = HEAD + "F (a, b) => (c) { c = MatMul(a, b) }"
T = HEAD + "T (a, b) => (c) { t = Transpose<perm = [1, 0]>(b) c = MatMul(a, t) }"
G = HEAD + "G (a, b) => (c) { c = local.F(a, b) }"
TWO = HEAD + "Two (a, v, w) => (c) { h = local.F(a, v) r = Relu(h) c = local.F(r, w) }"
MLP = HEAD + "M (a, g, u, d) => (c) { p = MatMul(a, g) q = MatMul(a, u) r = Mul(p, q) c = MatMul(r, d) }"
QKV = HEAD + "A (a, q, k) => (c, d) { c = MatMul(a, q) d = MatMul(a, k) }"


def model(folder: Path, calls: str, functions: str, **shapes: tuple[int, ...]) -> Model:
    text = f"g (float[T, 8] x) => (float[A, B] y) {{ {calls} }}{functions}"
    return parse(folder, text, {name: matrix(*shape) for name, shape in shapes.items()})


LIFTED = {
    "one weight twice": ("h = local.F(x, w) y = local.F(h, w)", F, {"w": (8, 8)}),
    "two weights": ("h = local.F(x, w) y = local.F(h, v)", F, {"w": (8, 8), "v": (8, 8)}),
    "two shapes": ("h = local.F(x, w) y = local.F(h, v)", F, {"w": (8, 6), "v": (6, 4)}),
    "transposed inside": ("h = local.T(x, w) y = local.T(h, v)", T, {"w": (6, 8), "v": (4, 6)}),
    "transposed outside": ("t = Transpose(w) h = local.F(x, t) y = local.F(h, v)", F, {"w": (6, 8), "v": (6, 4)}),
    "nested": ("h = local.G(x, w) y = local.G(h, v)", F + G, {"w": (8, 6), "v": (6, 4)}),
}


@pytest.mark.parametrize(("calls", "functions", "shapes"), LIFTED.values(), ids=LIFTED)
def test_a_function_that_is_one_layer_is_a_layer_of_each_call(
    tmp_path: Path, calls: str, functions: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    opened = model(tmp_path, calls, functions, **shapes)
    found = find_sites(opened)
    assert [s.name for s in found.sites] == ["h", "y"] and found.total == 2
    for site, given in zip(found.sites, ("x", "h"), strict=True):
        assert (site.scope, site.op) == ("", site.node.op) and site.splice == ((site.node, 0),)
        assert site.activation.name == given
        assert site.fusable is None and site.not_fusable == f"it lies inside the function {site.op}"
        stored = {t.name: numpy_helper.to_array(t) for t in opened.proto.graph.initializer}[site.initializer]
        turned = "Transpose" in calls + functions and site.weight().shape != stored.shape
        np.testing.assert_array_equal(site.weight(), stored.T if turned else stored)


@pytest.mark.parametrize(
    ("calls", "functions", "shape", "fused"),
    [
        ("y = local.F(x, w)", F, (8, 6), True),
        ("y = local.G(x, w)", F + G, (8, 6), True),
        ("t = Transpose(w) y = local.F(x, t)", F, (6, 8), True),
        ("y = local.T(x, w)", T, (6, 8), False),
    ],
    ids=["one call", "nested", "transposed outside", "transposed inside"],
)
def test_a_function_that_runs_once_is_pruned_inside(
    tmp_path: Path, calls: str, functions: str, shape: tuple[int, int], fused: bool
) -> None:
    (site,) = find_sites(model(tmp_path, calls, functions, w=shape)).sites
    assert site.scope in ("function:F", "function:T") and site.name == f"{site.scope}/c"
    assert site.weight().shape == (8, 6)
    assert (site.fusable is not None) is fused
    assert fused or site.not_fusable == "its weight is stored transposed and comes through a function's input"


def test_each_call_can_be_left_by_the_name_of_the_call_or_of_its_weight(tmp_path: Path) -> None:
    found = find_sites(model(tmp_path, "h = local.F(x, w) y = local.F(h, v)", F, w=(8, 6), v=(6, 4)))
    assert [s.name for s in select(found, exclude=("v",)).chosen] == ["h"]
    assert [s.name for s in select(found, exclude=("h",)).chosen] == ["y"]


def test_a_call_with_a_weight_made_at_run_time_is_no_layer(tmp_path: Path) -> None:
    found = find_sites(model(tmp_path, "h = local.F(x, w) t = Transpose(h) y = local.F(x, t)", F, w=(8, 8)))
    assert [s.name for s in found.sites] == ["h"]
    assert [(s.name, s.linear, s.reason) for s in found.skipped] == [("y", False, "its weight is made at run time")]


def test_a_layer_moves_out_of_as_many_functions_as_bring_its_activation(tmp_path: Path) -> None:
    """The second of the two reads what the body makes: it stays inside, where its calls must agree."""
    shapes = {"a": (8, 6), "b": (6, 8), "c": (8, 4), "d": (4, 8)}
    found = find_sites(model(tmp_path, "h = local.Two(x, a, b) y = local.Two(h, c, d)", F + TWO, **shapes))
    assert [(s.name, s.scope, s.k, s.n) for s in found.sites] == [("h", "", 8, 6), ("y", "", 8, 4)]
    assert [(s.name, s.linear, s.reason) for s in found.skipped] == [
        ("function:Two/c", True, "calls of its function bring weights of different shapes")
    ]


def test_a_module_with_equal_shapes_is_pruned_inside_where_it_can_be_fused(tmp_path: Path) -> None:
    shapes = {n: (8, 6) for n in ("g1", "u1", "g2", "u2")} | {n: (6, 8) for n in ("d1", "d2")}
    found = find_sites(model(tmp_path, "h = local.M(x, g1, u1, d1) y = local.M(h, g2, u2, d2)", MLP, **shapes))
    assert [s.name for s in found.sites] == ["function:M/p", "function:M/q", "function:M/c"]
    assert all(s.fusable is not None and s.fusable.tensor is s.node.inputs[1] for s in found.sites)
    with pytest.raises(InputError, match=r"stands for 2 weights.*inline"):
        found.sites[0].weight()


def test_layers_that_share_an_input_of_a_call_go_together(tmp_path: Path) -> None:
    shapes = {"q": (8, 8), "k": (8, 4), "r": (8, 6), "l": (8, 2)}
    found = find_sites(model(tmp_path, "h, i = local.A(x, q, k) y, j = local.A(h, r, l)", QKV, **shapes))
    assert [(s.name, s.k, s.n) for s in found.sites] == [("h/c", 8, 8), ("h/d", 8, 4), ("y/c", 8, 6), ("y/d", 8, 2)]
    chosen = select(found, exclude=("k",))
    assert [s.name for s in chosen.chosen] == ["y/c", "y/d"]
    assert [s.reason for s in chosen.left] == ["shares its call with 'h/d', which is left", "excluded by 'k'"]


def test_layers_that_share_an_input_of_a_call_with_one_that_is_left_are_left(tmp_path: Path) -> None:
    calls = "t = Transpose(x) h, i = local.A(x, q, t) y, j = local.A(h, r, l)"
    found = find_sites(model(tmp_path, calls, QKV, q=(8, 8), r=(8, 6), l=(8, 2)))
    assert [s.name for s in found.sites] == ["y/c", "y/d"]
    assert [(s.name, s.linear) for s in found.skipped] == [("h/c", True), ("h/d", False)]
    assert "another layer on this input" in found.skipped[0].reason


@pytest.mark.parametrize(
    "function",
    ["F (a, b) => (c) { m = MatMul(a, b) c = Add(m, a) }", "F (a, b) => (c) { n = Relu(a) c = MatMul(n, b) }"],
    ids=["another reader", "made inside"],
)
def test_an_activation_that_is_not_the_layers_alone_keeps_it_inside(tmp_path: Path, function: str) -> None:
    shapes = {"w": (8, 8), "v": (8, 8)}
    found = find_sites(model(tmp_path, "h = local.F(x, w) y = local.F(h, v)", HEAD + function, **shapes))
    assert [s.scope for s in found.sites] == ["function:F"]


def test_a_function_that_nothing_calls_brings_no_layer(tmp_path: Path) -> None:
    found = find_sites(model(tmp_path, "y = local.F(x, w)", F + G, w=(8, 6)))
    assert [s.scope for s in found.sites] == ["function:F"]


ATTRIBUTES = HEAD + "L <turn> (a, b) => (c) { c = Gemm<transB: int = @turn>(a, b) }"


def test_attributes_that_a_call_sets_are_read_at_the_call(tmp_path: Path) -> None:
    calls = "h = local.L<turn = 1>(x, w) y = local.L<turn = 0>(h, v)"
    sites = find_sites(model(tmp_path, calls, ATTRIBUTES, w=(6, 8), v=(6, 4))).sites
    assert [(s.name, s.k, s.n) for s in sites] == [("h", 8, 6), ("y", 6, 4)]


def test_a_layer_whose_calls_set_its_attributes_differently_is_left_inside(tmp_path: Path) -> None:
    function = HEAD + "L <turn> (a, b) => (c) { r = Relu(a) c = Gemm<transB: int = @turn>(r, b) }"
    calls = "h = local.L<turn = 1>(x, w) y = local.L<turn = 0>(h, w)"
    found = find_sites(model(tmp_path, calls, function, w=(8, 8)))
    assert not found.sites and "set by the caller" in found.skipped[0].reason and found.total == 1


def overloaded(folder: Path) -> Model:
    """Two functions of one name and domain, one of the same name in another domain."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "a" : 1, "b" : 1]> g (float[T, 8] x) => (float[A, B] y)'
        " { h = a.L:one(x) i = a.L:two(h) y = b.L(i) }"
    )
    for domain, overload in (("a", "one"), ("a", "two"), ("b", "")):
        function = onnx.parser.parse_function(
            f'<domain: "{domain}", opset_import: ["" : 20]> L (x) => (y) {{ w = Constant<value = float[1] {{0}}>()'
            " y = MatMul(x, w) }"
        )
        function.overload = overload
        function.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(matrix(8, 8)))
        proto.functions.append(function)
    return saved(folder, proto)


@pytest.mark.skipif(not hasattr(onnx.FunctionProto(), "overload"), reason="this onnx knows no overloads")
def test_functions_of_one_name_are_told_apart_by_domain_and_overload(tmp_path: Path) -> None:
    sites = find_sites(overloaded(tmp_path)).sites
    assert [s.scope for s in sites] == ["function:a:L:one", "function:a:L:two", "function:b:L"]
    assert [s.name for s in sites] == [f"{s.scope}/y" for s in sites]


def test_calls_of_functions_that_call_functions_take_bounded_work(tmp_path: Path) -> None:
    """Twenty functions, each of which calls the one below twice: a million paths lead to the layer."""
    levels = F.replace("F (", "F0 (") + "".join(
        HEAD
        + f"F{i} (a, b) => (c, d) {{ c, e = local.F{i - 1}(a, b) d, f = local.F{i - 1}(a, b) }}".replace(
            "c, e = local.F0", "c = local.F0"
        ).replace("d, f = local.F0", "d = local.F0")
        for i in range(1, 21)
    )
    opened = load(model(tmp_path, "y, z = local.F20(x, w)", levels, w=(8, 8)).path)
    assert 0 < find_sites(opened).total < 1000
