"""What the recipe writes: the graph of the onnxruntime-genai builder, laid out for memory mapping."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_llama import CONFIG, Runner, weights, write_folder, write_safetensors

from nmonnx.errors import InputError, UsageError
from nmonnx.models import build
from nmonnx.onnx_file.graph import load

Zoo = Callable[[str], Path]
SAME_AS_ZOO: dict[str, tuple[dict[str, Any], bool]] = {
    "smollm-genai-fp32": ({}, True),
    "llama-genai-fp32": ({"tie_word_embeddings": False}, True),
    "llama-genai-fp32-nofuse": ({"tie_word_embeddings": False}, False),
    "qwen2-genai-fp32": ({"model_type": "qwen2"}, True),
    "qwen3-genai-fp32": ({"model_type": "qwen3", "head_dim": 32}, True),
    "mistral-genai-fp32": ({"model_type": "mistral", "tie_word_embeddings": False}, True),
}


@pytest.mark.parametrize("name", SAME_AS_ZOO)
def test_nodes_weights_and_ends_are_those_of_the_genai_builder(name: str, zoo: Zoo, tmp_path: Path) -> None:
    changes, fuse_qkv = SAME_AS_ZOO[name]
    config = CONFIG | changes
    mine = onnx.load(_build(tmp_path, config, fuse_qkv=fuse_qkv), load_external_data=False).graph
    theirs = onnx.load(zoo(name), load_external_data=False).graph
    assert [_node(n) for n in mine.node] == [_node(n) for n in theirs.node]
    assert {t.name: list(t.dims) for t in mine.initializer} == {t.name: list(t.dims) for t in theirs.initializer}
    assert [i.name for i in mine.input] == [i.name for i in theirs.input]
    assert [o.name for o in mine.output] == [o.name for o in theirs.output]


def test_genai_config_is_that_of_the_genai_builder(zoo: Zoo, tmp_path: Path) -> None:
    mine = json.loads((_build(tmp_path, CONFIG).parent / "genai_config.json").read_text())
    theirs = json.loads((zoo("smollm-genai-fp32").parent / "genai_config.json").read_text())
    assert mine == theirs


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_checker_accepts_the_graph_and_every_value_has_a_shape(dtype: str, tmp_path: Path) -> None:
    path = _build(tmp_path, CONFIG, dtype=dtype)
    model = onnx.load(path)
    named = {v.name for v in (*model.graph.value_info, *model.graph.output)}
    assert {o for n in model.graph.node for o in n.output if o} <= named
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"  # ONNX Runtime keeps it in the ONNX domain, where the checker looks
    onnx.checker.check_model(model)


def test_weights_are_aligned_in_one_data_file_and_readable_by_the_toolchain(tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 8192, "tie_word_embeddings": False}
    tensors = weights(config)
    model = load(_build(tmp_path, config, tensors))
    offsets = {}
    for tensor in model.proto.graph.initializer:
        file, offset, length = model.tensors.span(tensor)
        assert file.name == "model.onnx.data"
        assert offset % (4096 if length >= 1 << 20 else 64) == 0
        offsets[tensor.name] = model.tensors.array(tensor)
    np.testing.assert_array_equal(offsets["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(offsets["lm_head.MatMul.weight"], tensors["lm_head.weight"].T)


def test_packed_and_separate_qkv_give_the_same_logits(tmp_path: Path) -> None:
    ids = np.arange(3, 23)[None]
    logits = [Runner(_build(tmp_path / str(f), CONFIG, fuse_qkv=f))(ids) for f in (False, True)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = _build(tmp_path, CONFIG)
    before = path.stat().st_mtime_ns
    with pytest.raises(UsageError, match="is there already"):
        _build(tmp_path, CONFIG)
    assert path.stat().st_mtime_ns == before
    build(tmp_path / "hf", tmp_path / "out", overwrite=True)
    assert path.stat().st_mtime_ns != before


def test_tokenizer_files_of_the_folder_are_copied(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", CONFIG, weights(CONFIG))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    build(tmp_path / "hf", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_build_that_fails_leaves_no_file(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    tensors["model.norm.weight"][0] = 1e6
    with pytest.raises(InputError, match="fp16 cannot hold"):
        _build(tmp_path, CONFIG, tensors, dtype="fp16")
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_ends_at_the_size_of_all_weights(tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", CONFIG, weights(CONFIG))
    seen: list[tuple[int, int]] = []
    path = build(tmp_path / "hf", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    assert seen == sorted(seen) and len(seen) == len(initializers)
    assert seen[-1] == (seen[-1][1], sum(4 * int(np.prod(t.dims)) for t in initializers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 1}, "has no place in this recipe"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"intermediate_size": 64}, r"has shape \[128, 64\], the configuration asks for \[64, 64\]"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"num_attention_heads": 16}, "the head size is 4"),
        ({"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not one of"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3' lacks 'factor'"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
    ],
)
def test_a_model_the_recipe_does_not_cover_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", CONFIG | changes, weights(CONFIG))
    with pytest.raises(InputError, match=message):
        build(tmp_path / "hf", tmp_path / "out")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", CONFIG, weights(CONFIG))
    whole = (folder / "model.safetensors").read_bytes()
    for content, message in (
        (whole[:-1], "does not fit the file"),
        (whole[:50], "incomplete download"),
        (b"", "incomplete download"),
        (b"\x02\0\0\0\0\0\0\0{x", "header cannot be read"),
        (b"\x04\0\0\0\0\0\0\0null", "header cannot be read"),
    ):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=message):
            build(folder, tmp_path / "out")
    write_safetensors(folder / "model.safetensors", {"x": np.zeros(1, np.int64)})
    with pytest.raises(InputError, match="'x' is I64"):
        build(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        build(folder, tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret"}}))
    with pytest.raises(InputError, match="its own folder"):
        build(folder, tmp_path / "out")
    (folder / "config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        build(folder, tmp_path / "out")


def test_int4_is_refused_where_it_would_round(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'model.layers.0.self_attn.q_proj.weight' is F32; int4 takes over"):
        _build(tmp_path, CONFIG, dtype="int4")


def test_an_unknown_dtype_or_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'bf16' is not one of fp32, fp16, int4"):
        build(tmp_path, tmp_path / "out", dtype="bf16")
    with pytest.raises(InputError, match="does not exist"):
        build(tmp_path / "no", tmp_path / "out")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"neither a .gguf file nor"):
        build(tmp_path / "model.bin", tmp_path / "out")


def _build(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray] | None = None,
    dtype: str = "fp32",
    fuse_qkv: bool = False,
) -> Path:
    write_folder(folder / "hf", config, tensors or weights(config))
    return build(folder / "hf", folder / "out", dtype, fuse_qkv)


def _node(node: onnx.NodeProto) -> tuple[object, ...]:
    """Everything but optional inputs left out at the end, which the builder spells as empty names."""
    inputs = list(node.input)
    while inputs and not inputs[-1]:
        inputs.pop()
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if node.op_type != "Constant"}
    return node.op_type, node.domain, node.name, inputs, list(node.output), attrs
