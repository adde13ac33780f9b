"""What is built from a Hugging Face folder computes what transformers computes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import Runner

from nmonnx.models import build

torch = pytest.importorskip("torch", reason="transformers is the reference; install the extra 'export'")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama grouped": ("Llama", {}),
    "llama every head its own cache": ("Llama", {"num_key_value_heads": 4}),
    "llama one shared cache": ("Llama", {"num_key_value_heads": 1}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head of 8, rotated outside": ("Llama", {"num_attention_heads": 8, "head_dim": 8}),
    "llama head wider than hidden / heads": ("Llama", {"head_dim": 48}),
    "llama linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2 biases": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3 norms": ("Qwen3", {"head_dim": 32}),
    "qwen3 norms, head of 8": ("Qwen3", {"head_dim": 8}),
}


@pytest.mark.parametrize("fuse_qkv", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name: str, fuse_qkv: bool, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    reference = _random(family, changes, tmp_path / "hf")
    run = Runner(build(tmp_path / "hf", tmp_path / "out", fuse_qkv=fuse_qkv))
    ids = _ids(reference, 2, 40)
    np.testing.assert_allclose(run(ids), _logits(reference, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama grouped", "llama head of 8, rotated outside", "qwen3 norms"])
def test_token_by_token_through_the_cache_equals_the_whole_text(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    reference = _random(family, changes, tmp_path / "hf")
    _check_steps(reference, build(tmp_path / "hf", tmp_path / "out"))


@pytest.mark.parametrize("name", ["llama grouped", "llama head of 8, rotated outside"])
def test_rows_of_unequal_length_padded_on_the_right_equal_each_row_alone(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    reference = _random(family, changes, tmp_path / "hf")
    run = Runner(build(tmp_path / "hf", tmp_path / "out"))
    long, short = _ids(reference, 1, 9), _ids(reference, 1, 7)[:, 1:]
    together = np.concatenate([long, np.pad(short, ((0, 0), (0, 3)))])
    mask = np.ones_like(together)
    mask[1, 6:] = 0
    first = run(together, mask)
    np.testing.assert_allclose(first[:1], _logits(reference, long), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(first[1:, :6], _logits(reference, short), atol=2e-5, rtol=1e-4)
    more = np.array([[5], [6]])
    second = run(more, np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1))
    for row, alone in enumerate((long, short)):
        expected = _logits(reference, np.concatenate([alone, more[row : row + 1]], axis=1))[:, -1:]
        np.testing.assert_allclose(second[row : row + 1], expected, atol=2e-5, rtol=1e-4)


def test_stories260k_equals_transformers_whole_and_step_by_step(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260K"
    reference = transformers.LlamaForCausalLM.from_pretrained(source).eval()
    path = build(source, tmp_path)
    ids = _ids(reference, 2, 200)
    assert np.abs(Runner(path)(ids) - _logits(reference, ids)).max() <= 1e-4
    _check_steps(reference, path)


def test_bfloat16_in_several_shards_is_read_exactly(tmp_path: Path) -> None:
    halved = _random("Llama", {}, tmp_path / "fp32").to(torch.bfloat16)
    halved.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    run = Runner(build(tmp_path / "hf", tmp_path / "out"))
    ids = _ids(reference, 1, 20)
    np.testing.assert_allclose(run(ids), _logits(reference, ids), atol=2e-5, rtol=1e-4)


def test_fp16_keeps_type_and_comes_close(tmp_path: Path) -> None:
    reference = _random("Llama", {}, tmp_path / "hf")
    run = Runner(build(tmp_path / "hf", tmp_path / "out", dtype="fp16"))
    ids = _ids(reference, 1, 20)
    logits, expected = run(ids), _logits(reference, ids)
    assert logits.dtype == np.float16 and {v.dtype for v in run.past.values()} == {np.dtype(np.float16)}
    assert np.abs(logits - expected).max() < 0.01 * np.abs(expected).max()


def test_the_context_ends_where_a_sliding_window_would_begin_to_matter(tmp_path: Path) -> None:
    reference = _random("Mistral", {"sliding_window": 24}, tmp_path / "hf")
    path = build(tmp_path / "hf", tmp_path / "out")
    assert '"context_length": 24' in (path.parent / "genai_config.json").read_text()
    ids = _ids(reference, 1, 24)
    np.testing.assert_allclose(Runner(path)(ids), _logits(reference, ids), atol=2e-5, rtol=1e-4)


def _random(family: str, changes: dict[str, Any], folder: Path) -> Any:
    """A model with every parameter random: norms of one and biases of zero would hide a mistake."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    return model


def _ids(reference: Any, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, reference.config.vocab_size, (rows, length))


def _logits(reference: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(ids)).logits.numpy()


def _check_steps(reference: Any, path: Path) -> None:
    # GroupQueryAttention takes several tokens after a past for one row only.
    run, ids = Runner(path), _ids(reference, 1, 30)
    cuts = [0, 7, 8, 9, 10, 14, *range(15, 31)]
    steps = [run(ids[:, a:b]) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), _logits(reference, ids), atol=5e-5, rtol=1e-4)
