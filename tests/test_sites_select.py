"""Selectors: what they match, what is left and why, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from site_models import matrix, parse, saved

from nmonnx.errors import UsageError
from nmonnx.pruning.presets import PRESETS
from nmonnx.sites import Found, Selection, block_selectors, converted_with, find_sites, select

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture
def found(tmp_path: Path) -> Found:
    nodes = [_layer(f"/model/layers.{b}/{_folder(r)}/{r}_proj/MatMul", f"w_{r}{b}") for b in range(3) for r in ROLES]
    nodes.append(_layer("/lm_head/MatMul", "head.weight"))
    gemm = helper.make_node("Gemm", ["x", "odd"], ["extra"], name="/extra/Gemm", transA=1)
    names = [n.input[1] for n in nodes] + ["odd"]
    graph = helper.make_graph(
        [*nodes, gemm],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 8])],
        [helper.make_tensor_value_info("extra", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(matrix(8, 8), name) for name in names],
    )
    return find_sites(saved(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])))


def chosen(selection: Selection) -> set[str]:
    return {f"{s.role}{'' if s.block is None else s.block}" for s in selection.chosen}


def every(roles: str, blocks: str = "012") -> set[str]:
    return {r + b for r in roles.split() for b in blocks}


ALL = every("q k v o gate up down")
MATCHES = {
    "q": every("q"),
    "role:down": every("down"),
    "block:1": every("q k v o gate up down", "1"),
    "block:1-2": every("q k v o gate up down", "12"),
    "op:MatMul": ALL,
    "op:matmul": ALL,
    "re:layers\\.[02].*(gate|up)_proj": every("gate up", "02"),
    "*/mlp/*": every("gate up down"),
    "/model/layers.2/self_attn/o_proj/MatMul": {"o2"},
    "w_q?": every("q"),
    "*_proj/MatMul": ALL,
}


@pytest.mark.parametrize(("selector", "expected"), MATCHES.items(), ids=MATCHES)
def test_include_chooses_what_it_matches_and_exclude_all_else(found: Found, selector: str, expected: set[str]) -> None:
    included, excluded = select(found, include=(selector,)), select(found, exclude=(selector,))
    assert chosen(included) == expected and chosen(excluded) == ALL - expected
    for selection in (included, excluded):
        assert len(selection.chosen) + len(selection.left) == found.total == 23
    reasons = {s.reason for s in excluded.left if s.role not in ("lm_head", "other")}
    assert reasons == {f"excluded by {selector!r}"}


def test_lm_head_is_left_dense_unless_asked_for(found: Found) -> None:
    assert chosen(select(found)) == ALL
    (head,) = [s for s in select(found).left if s.role == "lm_head"]
    assert head.reason == "lm_head is left dense unless asked for (--lm-head)"
    assert chosen(select(found, lm_head=True)) == ALL | {"lm_head"}
    assert chosen(select(found, include=("q",), lm_head=True)) == every("q") | {"lm_head"}
    for selector in ("lm_head", "role:lm_head", "*lm_head*", "head.weight"):
        assert chosen(select(found, include=(selector,))) == {"lm_head"}
    for selector in ("*", "op:MatMul", "re:."):
        assert chosen(select(found, include=(selector,))) == ALL, "names it only among others"
    assert chosen(select(found, exclude=("lm_head",), lm_head=True)) == ALL


def test_exclude_wins_over_include(found: Found) -> None:
    selection = select(found, include=("q", "down"), exclude=("block:0",))
    assert chosen(selection) == every("q down", "12")
    reasons = {(s.role, s.block): s.reason for s in selection.left}
    assert reasons["q", 0] == "excluded by 'block:0'" and reasons["k", 1] == "not selected by --include"


def test_layers_that_cannot_be_pruned_keep_their_reason(found: Found) -> None:
    (extra,) = [s for s in select(found, include=("/extra/Gemm",)).left if s.op == "Gemm"]
    assert "transA" in extra.reason and (extra.k, extra.n, extra.output) == (8, 8, "extra")


REFUSED = {
    "qkv": r"--include 'qkv' matches no linear layer; roles here: down \(3\), .*; a name: '/model/layers.0/",
    "block:7": "matches no linear layer",
    "block:x": "write block:3 or block:0-3",
    "role:mlp": "roles are q, k, v",
    "re:(": "not a regular expression",
    "op:Conv": "matches no linear layer",
    "nothing*": "matches no linear layer",
}


@pytest.mark.parametrize(("selector", "message"), REFUSED.items(), ids=REFUSED)
def test_a_selector_that_matches_nothing_is_refused(found: Found, selector: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(found, include=(selector,))
    with pytest.raises(UsageError):
        select(found, exclude=(selector,))


def test_names_with_glob_characters_are_matched_literally_too(tmp_path: Path) -> None:
    model = parse(tmp_path, "g (float[T, 8] x) => (float y) { y = MatMul(x, w) }", {"w": matrix(8, 8)})
    model.graph.nodes[0].name = "a[0]*"
    assert select(find_sites(model), include=("a[0]*",)).chosen


def test_module_paths_of_dynamo_exports_are_matched(tmp_path: Path) -> None:
    node = _layer("node_linear", "val_68")
    path = "['', 'model', 'model.layers.4', 'model.layers.4.mlp.up_proj', 'linear']"
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=path)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 8])],
        [helper.make_tensor_value_info("node_linear_y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(matrix(8, 8), "val_68")],
    )
    found = find_sites(saved(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])))
    assert (found.sites[0].role, found.sites[0].block) == ("up", 4)
    assert select(found, include=("model.layers.4.*",)).chosen and select(found, include=("up",)).chosen


def test_layers_behind_one_quantiser_are_left_together(tmp_path: Path) -> None:
    nodes = "q, s, z = DynamicQuantizeLinear(x) a = MatMulInteger(q, w, z) b = MatMulInteger(q, v, z) y = Add(a, b)"
    codes = np.ones((8, 8), np.int8)
    model = parse(tmp_path, f"g (float[T, 8] x) => (int32[A, B] y) {{ {nodes} }}", {"w": codes, "v": codes})
    selection = select(find_sites(model), exclude=("b",))
    assert not selection.chosen
    assert {s.name: s.reason for s in selection.left} == {
        "a": "shares its quantiser with 'b', which is left",
        "b": "excluded by 'b'",
    }


def test_nothing_to_select_from_is_said(tmp_path: Path) -> None:
    found = find_sites(parse(tmp_path, "g (float[T, 8] x) => (float y) { y = Relu(x) }"))
    assert select(found) == Selection((), ())
    with pytest.raises(UsageError, match="the model has none"):
        select(found, include=("q",))


def test_an_already_converted_model_tells_its_pattern(tmp_path: Path) -> None:
    text = "g (float[T, 8] x) => (float y) { h = Relu(x) y = MatMul(h, w) }"
    model = parse(tmp_path, text, {"w": matrix(8, 8)})
    assert converted_with(model) is None
    node = model.graph.nodes[0]
    node.op, node.domain, node.attrs = "NMPrune", "ai.nmonnx", {"keep": 2, "group": 4}
    assert converted_with(model) == "2:4"


def _layer(name: str, weight: str) -> NodeProto:
    return helper.make_node("MatMul", ["x", weight], [f"{name}_y"], name=name)


def _folder(role: str) -> str:
    return "self_attn" if role in ("q", "k", "v", "o") else "mlp"


def test_blocks_are_left_dense_by_number_from_either_end(found: Found) -> None:
    selectors = block_selectors(found, (0, -1))
    assert chosen(select(found, (), tuple(selectors))) == every("q k v o gate up down", "1")
    for block in (3, -4):
        with pytest.raises(UsageError, match="3 blocks"):
            block_selectors(found, (block,))


def test_a_preset_leaves_what_is_there_of_several_roles(found: Found, tmp_path: Path) -> None:
    (exclude,) = PRESETS["paper-qwen"]["exclude"]
    assert chosen(select(found, exclude=(exclude,))) == every("o gate up down")
    text = "g (float[T, 8] x) => (float y) { y = MatMul(x, attn_qkv_proj) }"
    packed = find_sites(parse(tmp_path, text, {"attn_qkv_proj": matrix(8, 24)}))
    assert [site.role for site in packed.sites] == ["qkv"]
    assert select(packed, exclude=(exclude,)).chosen == ()
    with pytest.raises(UsageError, match="'k' matches no linear layer; k lies in 'qkv'; roles here"):
        select(packed, include=("k",))
