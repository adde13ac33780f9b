"""What is built from a GGUF file equals the same weights built from a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_llama import CONFIG, Runner, weights, write_folder

from nmonnx.errors import InputError
from nmonnx.models import build
from nmonnx.models.q4 import LOSSLESS, from_gguf
from nmonnx.models.weights_gguf import GgufSource

gguf = pytest.importorskip("gguf", reason="install the extra 'demo'")
quants = pytest.importorskip("gguf.quants")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}
TOKENS = ["<|endoftext|>", "<s>", "</s>", *"abcdefgh", "Ġ", "1", "2", "ab", "Ġab", "12"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_gguf_file_gives_the_graph_and_bytes_of_the_folder(family: str, tied: bool, tmp_path: Path) -> None:
    config = CONFIG | {"model_type": family, "tie_word_embeddings": tied}
    folder = write_folder(tmp_path / "hf", config, weights(config))
    file = _write_gguf(tmp_path / "m.gguf", config, weights(config))
    one, other = build(folder, tmp_path / "a"), build(file, tmp_path / "b")
    assert one.read_bytes() == other.read_bytes()
    assert _data(one) == _data(other)


def test_stretched_rotary_waves_are_read_from_rope_freqs(tmp_path: Path) -> None:
    divisors = np.array([1, 1, 1, 2, 3, 5, 8, 8], np.float32)
    file = _write_gguf(tmp_path / "m.gguf", CONFIG, {**weights(CONFIG), "rope_freqs.weight": divisors})
    plain = (1e4 ** (-np.arange(0, 16, 2) / 16)).astype(np.float32)
    np.testing.assert_allclose(GgufSource(file).config.inv_freq, plain / divisors, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("fuse_qkv", [False, True], ids=["separate", "packed"])
def test_int4_equals_the_dequantised_model_to_rounding(kind: str, fuse_qkv: bool, tmp_path: Path) -> None:
    file = _write_gguf(tmp_path / "m.gguf", CONFIG, weights(CONFIG), kind)
    ids = np.arange(3, 43)[None]
    exact = Runner(build(file, tmp_path / "a"))(ids)
    path = build(file, tmp_path / "b", dtype="int4", fuse_qkv=fuse_qkv)
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert sum(n.op_type == "MatMulNBits" for n in nodes) == 2 * (5 if fuse_qkv else 7)
    assert [n.name for n in nodes if n.op_type == "MatMul"] == ["/lm_head/MatMul"]
    np.testing.assert_allclose(Runner(path)(ids), exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_blocks_hold_the_values_that_gguf_dequantises(kind: str) -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((12, 96)).astype(np.float32) * rng.uniform(1e-3, 1e3, (12, 1)).astype(np.float32)
    dense[0] = 0.0
    dense[1] = 0.37  # no spread: d = 0, m = 0.37
    dense[2] = np.where(rng.random(96) < 0.5, 1000.0, 1000.5)
    rows = quants.quantize(dense, gguf.GGMLQuantizationType[kind])
    blocks = from_gguf(rows, kind)
    codes = np.stack([blocks.codes & 15, blocks.codes >> 4], axis=-1).reshape(12, 3, 32).astype(np.float32)
    values = (codes - blocks.zero_points[..., None]) * blocks.scales[..., None]
    expected = quants.dequantize(rows, gguf.GGMLQuantizationType[kind]).reshape(12, 3, 32)
    bound = 2.0**-22 * np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(values - expected) <= bound).all()


def test_int4_keeps_an_untied_head_of_another_type(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": False}
    path = build(_write_gguf(tmp_path / "m.gguf", config, weights(config), "Q4_1"), tmp_path / "o", dtype="int4")
    graph = onnx.load(path, load_external_data=False).graph
    assert [n.name for n in graph.node if n.op_type == "MatMul"] == ["/lm_head/MatMul"]


def test_int4_refuses_other_block_types_and_names_the_tensor(tmp_path: Path) -> None:
    file = _write_gguf(tmp_path / "m.gguf", CONFIG, weights(CONFIG), "Q8_0")
    with pytest.raises(InputError, match=r"'model.layers.0.self_attn.q_proj.weight' is Q8_0; int4 takes over"):
        build(file, tmp_path / "o", dtype="int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture is 'mamba'"),
        ({"split.count": 2}, "one part of several"),
        ({"llama.rope.dimension_count": 8}, "only a part of each head"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not one of"),
        ({"llama.block_count": 0}, "'block_count' is 0"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"'attention.head_count_kv' is \[2, 2\]"),
        ({"tokenizer.ggml.pre": "qwen2"}, "split 'qwen2'"),
        ({"tokenizer.ggml.model": "llama"}, "the tokenizer is 'llama'"),
        ({"tokenizer.ggml.merges": None}, "no tokens or no merges"),
    ],
)
def test_a_file_the_recipe_does_not_cover_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = _write_gguf(tmp_path / "m.gguf", CONFIG, weights(CONFIG), changes=changes)
    with pytest.raises(InputError, match=message):
        build(file, tmp_path / "o")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = _write_gguf(tmp_path / "m.gguf", CONFIG, weights(CONFIG))
    whole = file.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="incomplete download"):
            build(file, tmp_path / "o")


def test_the_tokenizer_splits_digits_and_adds_bos_only_when_told(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    for add_bos in (False, True):
        changes = {"tokenizer.ggml.add_bos_token": add_bos}
        file = _write_gguf(tmp_path / "m.gguf", CONFIG, weights(CONFIG), changes=changes)
        out = build(file, tmp_path / "o", overwrite=True).parent
        tokens = Tokenizer.from_file(str(out / "tokenizer.json")).encode("ab ab12</s>").tokens
        assert tokens == ["<s>"] * add_bos + ["ab", "Ġab", "1", "2", "</s>"]
        config = json.loads((out / "tokenizer_config.json").read_text())
        assert (config["bos_token"], config["eos_token"], config["chat_template"]) == ("<s>", "</s>", "{{ x }}")


def test_a_tokenizer_beside_the_file_wins(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.model": "llama"}
    file = _write_gguf(tmp_path / "m.gguf", CONFIG, weights(CONFIG), changes=changes)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (build(file, tmp_path / "o").parent / "tokenizer.json").read_text() == "{}"


def _write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
    changes: dict[str, Any] | None = None,
) -> Path:
    """As llama.cpp's converter writes it; `kind` is the type of the linear layers."""
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    changes = {**_metadata(arch, config), **(changes or {})}
    if "general.architecture" in changes:
        writer.arch = changes.pop("general.architecture")
        writer.kv_data[0]["general.architecture"].value = writer.arch
    for key, value in changes.items():
        if value is not None:
            _add(writer, key, value)
    for name, values in tensors.items():
        stem, leaf = name.rsplit(".", 1)
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            values = _in_pairs(values, heads)
        for long, short in NAMES.items():
            stem = stem.replace(long, short)
        quantised = kind if stem.startswith("blk") and values.ndim == 2 else "F32"
        _add_tensor(writer, f"{stem}.{leaf}", values, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(arch: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 3)],
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ x }}",
    }


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders[list] = writer.add_array
    adders[type(value)](key, value)


def _add_tensor(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    if kind == "F32":
        writer.add_tensor(name, values)
        return
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, quants.quantize(values, raw), raw_dtype=raw)


def _in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i and row i + size / 2 of each head side by side."""
    size = rows.shape[0] // heads
    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return np.ascontiguousarray(rows[order])


def _data(path: Path) -> bytes:
    return path.with_name("model.onnx.data").read_bytes()
