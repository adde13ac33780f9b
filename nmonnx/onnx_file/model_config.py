"""What the JSON files beside a model say about it: head size, vocabulary, context, end tokens."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmonnx.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Facts that a graph may not tell; None when no file says so.

    head_size  channels of one attention head
    kv_heads   key/value heads
    hidden     width of the residual stream
    vocab      number of token ids
    context    most tokens the model was made for
    window     tokens that sliding-window layers keep; their cache must hold at least so many
    eos        token ids that end a text
    """

    head_size: int | None = None
    kv_heads: int | None = None
    hidden: int | None = None
    vocab: int | None = None
    context: int | None = None
    window: int | None = None
    eos: tuple[int, ...] = ()


def read_config(model_path: Path | None) -> ModelConfig:
    """The facts from genai_config.json, config.json and generation_config.json in the model's folder, the first
    that knows winning. Raises InputError when one of them cannot be read, or holds something else than JSON objects
    where there should be some."""
    if model_path is None:
        return ModelConfig()
    folder = model_path.parent
    genai_path, config_path = folder / "genai_config.json", folder / "config.json"
    genai = _section(_read(genai_path), "model", genai_path)
    config = _read(config_path)
    generation = _read(folder / "generation_config.json")
    decoder = _section(genai, "decoder", genai_path)
    text = _section(config, "text_config", config_path) or config
    heads = _int(text.get("num_attention_heads") or text.get("n_head"))
    hidden = _int(decoder.get("hidden_size") or text.get("hidden_size") or text.get("n_embd"))
    return ModelConfig(
        head_size=_int(decoder.get("head_size") or text.get("head_dim") or (hidden and heads and hidden // heads)),
        kv_heads=_int(decoder.get("num_key_value_heads") or text.get("num_key_value_heads") or heads),
        hidden=hidden,
        vocab=_int(genai.get("vocab_size") or text.get("vocab_size")),
        context=_int(genai.get("context_length") or text.get("max_position_embeddings") or text.get("n_positions")),
        window=_int(_section(decoder, "sliding_window", genai_path).get("window_size")),
        eos=_ids(genai.get("eos_token_id"), generation.get("eos_token_id"), config.get("eos_token_id")),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise InputError(f"{path} is not valid JSON ({e}); mend it or take it away") from e
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object; mend it or take it away")
    return content


def _section(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, (dict, type(None))):
        raise InputError(f"{path}: {key!r} is not a JSON object; mend it or take the file away")
    return value or {}


def _int(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) and 0 < value < math.inf else None


def _ids(*sources: object) -> tuple[int, ...]:
    for source in sources:
        if isinstance(source, int):
            return (source,)
        if isinstance(source, list) and source:
            return tuple(i for i in source if isinstance(i, int))
    return ()
