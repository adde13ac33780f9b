"""Every spelling of a linear layer: found with K, N, type and weight, or left alone with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from site_models import matrix, parse, run_layer, saved

from nmonnx.onnx_file.graph import Model
from nmonnx.sites import Site, Skipped, find_sites

X = "float[T, 8] x"
Y = "float[A, B] y"


def one(model: Model) -> Site:
    found = find_sites(model)
    assert len(found.sites) == 1 and not any(s.linear for s in found.skipped), found
    return found.sites[0]


def left(model: Model) -> Skipped:
    found = find_sites(model)
    assert not found.sites and len(found.skipped) == 1, found
    return found.skipped[0]


def body(nodes: str, head: str = f"{X}) => ({Y}") -> str:
    return f"g ({head}) {{ {nodes} }}"


MATMULS = {
    "stored": ("y = MatMul(x, w)", (8, 6), False),
    "the other name of the domain": ("y = ai.onnx.MatMul(x, w)", (8, 6), False),
    "Identity": ("v = Identity(w) y = MatMul(x, v)", (8, 6), False),
    "Transpose": ("v = Transpose<perm = [1, 0]>(w) y = MatMul(x, v)", (6, 8), True),
    "Transpose without perm": ("v = Transpose(w) y = MatMul(x, v)", (6, 8), True),
    "two Transposes": ("u = Transpose(w) v = Transpose(u) y = MatMul(x, v)", (8, 6), False),
    "Identity, Transpose": ("t = Identity(w) v = Transpose(t) y = MatMul(x, v)", (6, 8), True),
    "idle Reshape": ("s = Constant<value_ints = [8, 6]>() v = Reshape(w, s) y = MatMul(x, v)", (8, 6), False),
    "Gemm": ("y = Gemm(x, w)", (8, 6), False),
    "Gemm transB": ("y = Gemm<transB = 1>(x, w)", (6, 8), True),
    "Gemm of Transpose with transB": ("v = Transpose(w) y = Gemm<transB = 1>(x, v)", (8, 6), False),
    "FusedMatMul": ("y = com.microsoft.FusedMatMul(x, w)", (8, 6), False),
    "FusedMatMul transB": ("y = com.microsoft.FusedMatMul<transB = 1>(x, w)", (6, 8), True),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "shape", "transposed"), MATMULS.values(), ids=MATMULS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weight_is_traced_to_the_stored_tensor_and_may_be_fused(
    tmp_path: Path, nodes: str, shape: tuple[int, int], transposed: bool, dtype: type
) -> None:
    kind = "float16" if dtype == np.float16 else "float"
    w = matrix(*shape, dtype=dtype)
    model = parse(tmp_path, body(nodes, f"{kind}[T, 8] x) => ({kind}[A, B] y"), {"w": w})
    site = one(model)
    assert (site.k, site.n, site.initializer, site.elem) == (8, 6, "w", model.proto.graph.initializer[0].data_type)
    np.testing.assert_array_equal(site.weight(), (w.T if transposed else w).astype(np.float32))
    fusable = site.fusable
    assert fusable and (fusable.transposed, fusable.tensor.name, fusable.bias) == (transposed, "w", None)
    assert fusable.proto is model.proto.graph.initializer[0]
    assert site.splice[0][0] is site.node and site.activation is site.node.inputs[0]


def test_half_weight_widened_by_cast_is_fusable_as_stored(tmp_path: Path) -> None:
    w = matrix(6, 8, dtype=np.float16)
    site = one(parse(tmp_path, body("u = Cast<to = 1>(w) v = Transpose(u) y = MatMul(x, v)"), {"w": w}))
    assert site.elem == TensorProto.FLOAT and site.fusable is not None
    assert (site.fusable.elem, site.fusable.transposed) == (TensorProto.FLOAT16, True)
    np.testing.assert_array_equal(site.weight(), w.astype(np.float32).T)


PRUNE_ONLY = {
    "narrowed by Cast": ("v = Cast<to = 10>(w) y = MatMul(x, v)", (8, 6), "FLOAT to FLOAT16", "float16"),
    "reshaped": ("s = Constant<value_ints = [8, -1]>() v = Reshape(w, s) y = MatMul(x, v)", (48,), "Reshape", "float"),
    "alpha": ("y = Gemm<alpha = 0.5>(x, w)", (8, 6), "alpha is 0.5", "float"),
    "FusedMatMul alpha": ("y = com.microsoft.FusedMatMul<alpha = 0.5>(x, w)", (8, 6), "alpha", "float"),
    "activation": ('y = com.microsoft.FusedGemm<activation = "Relu">(x, w)', (8, 6), "activation function", "float"),
    "vector": ("y = MatMul(x, w)", (8,), "1 axes", "float"),
    "experts": ("y = MatMul(x, w)", (3, 8, 6), "3 axes", "float"),
    "double": ("y = MatMul(x, w)", (8, 6), "no kernel for DOUBLE", "double"),
    "Einsum": ('y = Einsum<equation = "tk,kn->tn">(x, w)', (8, 6), "Einsum", "float"),
    "one of several": ("i = Constant<value_int = 1>() v = Gather(w, i) y = MatMul(x, v)", (2, 8, 6), "one of", "float"),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "shape", "reason", "kind"), PRUNE_ONLY.values(), ids=PRUNE_ONLY)
def test_what_nmmatmul_cannot_compute_is_pruned_only(
    tmp_path: Path, nodes: str, shape: tuple[int, ...], reason: str, kind: str
) -> None:
    w = matrix(*shape, dtype=np.float64 if kind == "double" else np.float32)
    site = one(parse(tmp_path, body(nodes, f"{kind}[T, 8] x) => ({kind}[A, B] y"), {"w": w}))
    assert site.fusable is None and reason in site.not_fusable
    assert site.k == 8 and site.weight().shape[-2:] == (8, site.n)


LEFT = {
    "weight on the left": ("y = MatMul(w, x)", (4, 6), "on the left", True, (6, 4)),
    "Gemm with the weight on the left": ("y = Gemm(w, x)", (4, 6), "on the left", True, (6, 4)),
    "transA": ("y = Gemm<transA = 1>(x, w)", (8, 6), "transA", True, (8, 6)),
    "FusedMatMul transA": ("y = com.microsoft.FusedMatMul<transA = 1>(x, w)", (8, 6), "transA", True, (8, 6)),
    "transBatchA": ("y = com.microsoft.FusedMatMul<transBatchA = 1>(x, w)", (8, 6), "transBatchA", True, (8, 6)),
    "1x1 convolution": ("y = Conv(x, w)", (6, 8, 1, 1), "axis 1", True, (8, 6)),
    "Einsum over the first axis": ('y = Einsum<equation = "kt,kn->tn">(x, w)', (8, 6), "last axis", True, (8, 6)),
    "Einsum over two axes": ('y = Einsum<equation = "ab,abn->n">(x, w)', (4, 8, 6), "not handled", True, (0, 0)),
    "computed from constants": ("v = Add(w, w) y = MatMul(x, v)", (8, 6), "fold", True, (0, 0)),
    "sum of an Einsum": ('y = Einsum<equation = "tk,kn->t">(x, w)', (8, 6), "own axes", True, (8, 6)),
    "two activations": ("y = MatMul(x, x)", (8, 6), "", False, (0, 0)),
    "scores": ("r = Relu(x) t = Transpose(r) y = MatMul(x, t)", (1,), "run time", False, (0, 0)),
    "one channel": ("y = MatMul(x, w)", (1, 16), "one channel", False, (1, 16)),
    "one channel on the left": ("y = MatMul(w, x)", (1, 16, 1), "one channel", False, (1, 16)),
    "both constant": ("v = MatMul(w, w) y = Mul(x, v)", (8, 8), "both", False, (0, 0)),
    "no elements": ("y = MatMul(x, w)", (8, 0), "no elements", False, (8, 0)),
    "scalar": ("y = MatMul(x, w)", (), "scalar", False, (0, 0)),
    "invalid Einsum": ("y = Einsum(x, w)", (8, 6), "'equation' is missing", False, (0, 0)),
    "outer Einsum": ('y = Einsum<equation = "t,n->tn">(x, w)', (6,), "no channels", False, (0, 0)),
    "chosen at run time": ("v = Gather(w, i) y = MatMul(x, v)", (4, 8, 6), "chosen from 'w'", False, (0, 0)),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "shape", "reason", "linear", "kn"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_pruned_is_left_with_the_reason(
    tmp_path: Path, nodes: str, shape: tuple[int, ...], reason: str, linear: bool, kn: tuple[int, int]
) -> None:
    model = parse(tmp_path, body(nodes, f"float x, int64 i) => ({Y}"), {"w": matrix(*shape)})
    skipped = left(model)
    assert reason in skipped.reason and skipped.linear is linear
    assert (skipped.k, skipped.n) == kn


@pytest.mark.parametrize("nodes", ["y = Gather(w, x)", "y = Relu(x)", "y = Mul(x, w)", "y = Conv<group = 8>(x, w)"])
def test_other_operators_with_a_constant_are_not_even_mentioned(tmp_path: Path, nodes: str) -> None:
    found = find_sites(parse(tmp_path, body(nodes, f"float x) => ({Y}"), {"w": matrix(8, 1, 1, 1)}))
    assert not found.sites and not found.skipped


BIASES = {
    "vector": ((6,), 1.0, True),
    "row": ((1, 6), 1.0, True),
    "scalar": ((), 1.0, False),
    "one": ((1,), 1.0, False),
    "column": ((4, 1), 1.0, False),
    "matrix": ((4, 6), 1.0, False),
    "beta": ((6,), 3.0, False),
    "no beta": ((4, 6), 0.0, True),
}


@pytest.mark.parametrize(("shape", "beta", "fusable"), BIASES.values(), ids=BIASES)
def test_gemm_is_fusable_only_with_a_bias_vector(
    tmp_path: Path, shape: tuple[int, ...], beta: float, fusable: bool
) -> None:
    weights = {"w": matrix(8, 6), "c": matrix(*shape)}
    site = one(parse(tmp_path, body(f"y = Gemm<beta = {beta}>(x, w, c)"), weights))
    assert (site.fusable is not None) is fusable
    if site.fusable is not None:
        assert (site.fusable.bias.name if site.fusable.bias is not None else "") == ("c" if beta else "")


def test_gemm_with_an_activation_as_bias_is_pruned_only(tmp_path: Path) -> None:
    model = parse(tmp_path, body("y = Gemm(x, w, c)", f"{X}, float[6] c) => ({Y}"), {"w": matrix(8, 6)})
    assert "C is not constant" in one(model).not_fusable


@pytest.mark.parametrize("attribute", ["value", "sparse_value", "value_floats"])
def test_weights_in_constant_nodes_are_found(tmp_path: Path, attribute: str) -> None:
    w = np.zeros((8, 6), np.float32)
    w[1, 2], w[7, 5] = 3, -4
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [2], [3, -4]),
        helper.make_tensor("i", TensorProto.INT64, [2], [8, 47]),
        [8, 6],
    )
    value = {"value": numpy_helper.from_array(w), "sparse_value": sparse, "value_floats": w.reshape(-1).tolist()}
    nodes = [
        helper.make_node("Constant", [], ["w0"], **{attribute: value[attribute]}),
        helper.make_node("Constant", [], ["s"], value_ints=[8, 6]),
        helper.make_node("Reshape", ["w0", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    site = one(saved(tmp_path, _model(nodes)))
    np.testing.assert_array_equal(site.weight(), w)
    assert (site.fusable is not None) is (attribute == "value")
    assert site.initializer == "w0"


@pytest.mark.parametrize("coordinates", [True, False])
def test_sparse_initializers_are_weights_that_cannot_be_fused(tmp_path: Path, coordinates: bool) -> None:
    where, dims = ([1, 2, 7, 5], [2, 2]) if coordinates else ([8, 47], [2])
    proto = _model([helper.make_node("MatMul", ["x", "w"], ["y"])])
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [3, -4])
    indices = helper.make_tensor("i", TensorProto.INT64, dims, where)
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8, 6]))
    site = one(saved(tmp_path, proto))
    assert site.fusable is None and "sparse" in site.not_fusable
    assert (site.weight()[1, 2], site.weight()[7, 5], np.abs(site.weight()).sum()) == (3, -4, 7)


@pytest.mark.parametrize(("ir", "sites"), [(3, 1), (4, 0), (9, 0)])
def test_initializers_that_are_inputs_are_constant_below_ir_4_only(tmp_path: Path, ir: int, sites: int) -> None:
    model = parse(tmp_path, body("y = MatMul(x, w)", f"{X}, float[8, 6] w) => ({Y}"), {"w": matrix(8, 6)}, ir, 9)
    found = find_sites(model)
    assert len(found.sites) == sites and found.total == 1
    assert all(s.linear and "caller may replace it" in s.reason and (s.k, s.n) == (8, 6) for s in found.skipped)


def test_weights_of_type_bfloat16_are_left_and_counted(tmp_path: Path) -> None:
    proto = _model([helper.make_node("MatMul", ["x", "w"], ["y"])])
    proto.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [8, 6], b"\0" * 96, raw=True))
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    skipped = left(saved(tmp_path, proto))
    assert skipped.linear and "BFLOAT16" in skipped.reason and (skipped.k, skipped.n) == (8, 6)


def test_sibling_branches_with_the_same_names_have_their_own_weights(tmp_path: Path) -> None:
    branch = "{f} = g{f} () => (float[T, N] o) <float[{k}, 2] W = {{{v}}}> {{ n = Slice(x, a, b{f}) o = MatMul(n, W) }}"
    then, other = (
        branch.format(f=f, k=k, v=",".join(["1"] * k * 2)) for f, k in (("then_branch", 4), ("else_branch", 6))
    )
    text = body(f"y = If(c) <{then}, {other}>", f"{X}, bool c) => ({Y}")
    model = parse(
        tmp_path, text, {"a": np.array([0, 0]), "bthen_branch": np.array([9, 4]), "belse_branch": np.array([9, 6])}
    )
    sites = {s.scope.rsplit(".", 1)[1]: s for s in find_sites(model).sites}
    assert {scope: s.k for scope, s in sites.items()} == {"then_branch": 4, "else_branch": 6}
    assert len({s.name for s in sites.values()}) == 2
    assert all(s.name.startswith(s.scope) and s.splice_graph is s.graph for s in sites.values())


def test_weights_captured_from_the_graph_around_are_found(tmp_path: Path) -> None:
    then = "then_branch = t () => (float[T, 6] p) { p = MatMul(x, v) }"
    other = "else_branch = e () => (float[T, 6] q) { q = MatMul(x, w) }"
    text = body(f"y = If(c) <{then}, {other}> v = Identity(w)", f"{X}, bool c) => ({Y}")
    sites = find_sites(parse(tmp_path, text, {"w": matrix(8, 6)})).sites
    assert [(s.k, s.n, s.initializer) for s in sites] == [(8, 6, "w")] * 2


def test_a_weight_constant_inside_a_function_is_found(tmp_path: Path) -> None:
    text = body("y = local.F(x)") + (
        '\n<domain: "local", opset_import: ["" : 20]> F (a) => (c)'
        " { w = Constant<value = float[2, 2] {1, 2, 3, 4}>() c = MatMul(a, w) }"
    )
    site = one(parse(tmp_path, text))
    np.testing.assert_array_equal(site.weight(), [[1, 2], [3, 4]])


def test_names_are_unique_and_fall_back_to_the_output(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="y"),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    proto = _model(nodes)
    proto.graph.initializer.append(numpy_helper.from_array(matrix(8, 8), "w"))
    assert [s.name for s in find_sites(saved(tmp_path, proto)).sites] == ["y", "y#2"]


EINSUMS = ["tk,kn->tn", "tk,nk->tn", "btk,khd->bthd", "etk,ekn->etn", "tk,kn->nt", "...k,kn->...n", "tk,kn"]


@pytest.mark.parametrize("equation", EINSUMS)
@pytest.mark.parametrize("first", [True, False])
def test_einsum_weights_are_what_numpy_contracts(tmp_path: Path, equation: str, first: bool) -> None:
    size = dict(t=5, k=8, n=6, b=2, h=3, d=4, e=2)
    inputs, arrow, output = equation.partition("->")
    a, b = inputs.split(",")
    shape = [size[c] for c in b]
    w, x = matrix(*shape), matrix(*[size[c] for c in a.replace("...", "bt")])
    text, operands = (equation, "x, w") if first else (f"{b},{a}{arrow}{output}", "w, x")
    model = parse(tmp_path, body(f'y = Einsum<equation = "{text}">({operands})', "float x) => (float y"), {"w": w})
    site = one(model)
    assert site.splice[0][1] == (0 if first else 1)
    product = x @ site.weight()
    expected = np.einsum(equation, x, w)
    expected = expected.T if equation in ("tk,kn->nt", "tk,kn") else expected  # implicit output: sorted letters
    np.testing.assert_allclose(product.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize(("equation", "shape"), [("bk,knn->bn", (8, 6, 6)), ("bk,knm->bn", (8, 6))])
def test_einsums_of_other_kinds_are_left_with_their_equation(
    tmp_path: Path, equation: str, shape: tuple[int, ...]
) -> None:
    nodes = f'y = Einsum<equation = "{equation}">(x, w)'
    assert equation in left(parse(tmp_path, body(nodes), {"w": matrix(*shape)})).reason


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.sampled_from(["Identity", "Transpose", "Widen", "Squeeze", "Reshape"]), max_size=6),
    data=st.data(),
)
def test_any_chain_on_the_weight_side_reads_as_onnx_computes_it(
    tmp_path: Path, steps: list[str], data: st.DataObject
) -> None:
    k, n = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 9))
    w = matrix(k, n, dtype=np.float16)
    nodes, value = ["v0 = Identity(w)"], w
    for i, step in enumerate(steps):
        source, made = f"v{i}", f"v{i + 1}"
        if step in ("Identity", "Transpose"):
            nodes.append(f"{made} = {step}({source})")
            value = value.T if step == "Transpose" else value
        elif step == "Widen":
            nodes.append(f"{made} = Cast<to = 1>({source})")
            value = value.astype(np.float32)
        elif step == "Squeeze":
            nodes.append(
                f"a{i} = Constant<value_ints = [0]>() u{i} = Unsqueeze({source}, a{i}) {made} = Squeeze(u{i}, a{i})"
            )
        else:
            nodes.append(f"s{i} = Constant<value_ints = [{value.shape[1]}, -1]>() {made} = Reshape({source}, s{i})")
            value = value.reshape(value.shape[1], -1)
    kind = "float" if value.dtype == np.float32 else "float16"
    nodes.append(f"y = MatMul(x, v{len(steps)})")
    model = parse(tmp_path, body(" ".join(nodes), f"{kind} x) => ({kind} y"), {"w": w})
    found = find_sites(model)
    if value.shape[0] == 1:
        assert not found.sites
        return
    (site,) = found.sites
    np.testing.assert_array_equal(site.weight(), value.astype(np.float32))
    if site.fusable is not None:
        np.testing.assert_array_equal(w.T if site.fusable.transposed else w, value)


def test_run_layer_multiplies_with_the_weight_of_a_gemm(tmp_path: Path) -> None:
    """The oracle of the zoo tests, checked on a layer whose weight is known."""
    w = matrix(6, 8)
    model = parse(tmp_path, body("y = Gemm<transB = 1>(x, w, c)"), {"w": w, "c": matrix(6)})
    np.testing.assert_allclose(run_layer(onnx.load(model.path), one(model)), w.T, atol=1e-6)


def _model(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
