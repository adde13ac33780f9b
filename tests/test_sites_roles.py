"""Roles and blocks read from the names that exporters and model families use."""

from __future__ import annotations

import pytest

from nmonnx.sites.roles import block_of, module_paths, role_of

NAMES = {
    "/model/layers.0/self_attn/q_proj/MatMul": ("q", 0),
    "/model/layers.11/attn/qkv_proj/MatMul_Q4": ("qkv", 11),
    "model.layers.3.attn.qkv_proj.MatMul.weight_Q4G32": ("qkv", 3),
    "/m/model/layers.1/mlp/gate_up_proj/MatMul": ("gate_up", 1),
    "/transformer/h.7/attn/c_attn/Gemm": ("qkv", 7),
    "/transformer/h.7/attn/c_proj/Gemm": ("o", 7),
    "/transformer/h.7/mlp/c_proj/Gemm": ("down", 7),
    "/transformer/h.7/mlp/c_fc/Gemm": ("up", 7),
    "/gpt_neox/layers.2/attention/query_key_value/MatMul": ("qkv", 2),
    "/gpt_neox/layers.2/attention/dense/MatMul": ("o", 2),
    "/gpt_neox/layers.2/mlp/dense_4h_to_h/MatMul": ("down", 2),
    "/model/decoder/layers.5/fc1/Gemm": ("up", 5),
    "/model/layers.0/self_attn/dense/MatMul": ("o", 0),
    "/bert/encoder/layer.9/attention/self/query/MatMul": ("q", 9),
    "/bert/encoder/layer.9/attention/output/dense/MatMul": ("o", 9),
    "/bert/encoder/layer.9/intermediate/dense/MatMul": ("up", 9),
    "/bert/encoder/layer.9/output/dense/MatMul": ("down", 9),
    "/model/layers.0/mlp/gate/MatMul": ("router", 0),
    "/m/model/layers.1/block_sparse_moe/gate/MatMul": ("router", 1),
    "/m/model/layers.1/block_sparse_moe/experts.3/w2/MatMul": ("down", 1),
    "/model/layers.0/mlp/experts.2/gate_proj/MatMul": ("gate", 0),
    "/model/layers.0/moe/router/MatMul": ("router", 0),
    "/model/layers.0/mlp/experts/MatMul_1": ("experts", 0),
    "model_layers_4_self_attn_v_proj_matmul": ("v", 4),
    "/lm_head/MatMul": ("lm_head", None),
    "/embed_out/MatMul": ("lm_head", None),
    "lm_head_weight": ("lm_head", None),
    "onnx::MatMul_733": (None, None),
    "node_linear_7": (None, None),
    "/model/layers.0/self_attn/MatMul": (None, 0),
    "past_key_values.0.key": ("k", None),
    "model.embed_tokens.weight": (None, None),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=NAMES)
def test_role_and_block_of_a_name(name: str, expected: tuple[str | None, int | None]) -> None:
    assert (role_of([name]), block_of([name])) == expected


def test_the_first_telling_name_wins() -> None:
    assert role_of(["node_linear_7", "val_68", "model.layers.1.mlp.down_proj", "x.q_proj"]) == "down"


@pytest.mark.parametrize("text", ["not a list", "[", "{'a': 1}", ""])
def test_broken_metadata_tells_nothing(text: str) -> None:
    assert module_paths({"pkg.torch.onnx.name_scopes": text}) == ()


def test_module_paths_come_innermost_first_without_the_call() -> None:
    scopes = "['', 'm', 'm.layers.0', 'm.layers.0.q_proj', 'linear_3']"
    assert module_paths({"pkg.torch.onnx.name_scopes": scopes}) == ("m.layers.0.q_proj", "m.layers.0", "m")
