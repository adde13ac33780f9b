"""genai_config.json, which onnxruntime-genai reads beside a model."""

from __future__ import annotations

from typing import Any

from nmonnx.models.config import LlamaConfig
from nmonnx.models.llama import needs_position_ids


def genai_config(config: LlamaConfig, vocabulary: int, filename: str) -> dict[str, Any]:
    """The same keys, in the same order, as the onnxruntime-genai builder writes."""
    eos: int | list[int] | None = list(config.eos) if len(config.eos) > 1 else next(iter(config.eos), None)
    position_ids = {"position_ids": "position_ids"} if needs_position_ids(config) else {}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": config.head_size,
        "hidden_size": config.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **position_ids,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
    }
    model = {
        "bos_token_id": config.bos,
        "context_length": config.context,
        "decoder": decoder,
        "eos_token_id": eos,
        "pad_token_id": next(iter(config.eos), None) if config.pad is None else config.pad,
        "type": config.family,
        "vocab_size": vocabulary,
    }
    return {"model": {k: v for k, v in model.items() if v is not None}, "search": _search(config)}


def _search(config: LlamaConfig) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": config.context,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    given = {k: v for k, v in config.search if k in defaults and k != "max_length" and v is not None}
    return defaults | given
