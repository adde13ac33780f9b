"""Write tokenizer.json from the tokens and merges that a GGUF file holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmonnx.errors import InputError
from nmonnx.models.gguf_metadata import GgufMetadata

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SPLITS = ("smollm", "gpt-2")
"""Values of tokenizer.ggml.pre that can be rebuilt: how the text is cut before the merges."""

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(metadata: GgufMetadata, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template when there is one.

    1. A tokenizer.json beside the GGUF file is the original: it is copied.
    2. Byte-level BPE with a split of `SPLITS` is rebuilt. BOS is added only if the GGUF says so.
    3. Any other tokenizer raises InputError.
    """
    beside = metadata.path.parent / "tokenizer.json"
    if beside.is_file():
        shutil.copyfile(beside, folder / "tokenizer.json")
    else:
        _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    config = json.dumps(_config(metadata), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def _tokenizer(metadata: GgufMetadata) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or split not in SPLITS:
        raise InputError(
            f"{metadata.path}: the tokenizer is {model!r} with split {split!r}; this recipe rebuilds 'gpt2' with"
            f" {' or '.join(SPLITS)}. Put the model's own tokenizer.json beside the GGUF file"
        )
    tokens, merges = (metadata.get(f"tokenizer.ggml.{part}", []) for part in ("tokens", "merges"))
    if not tokens or not merges:
        raise InputError(f"{metadata.path} has no tokens or no merges; put the model's tokenizer.json beside it")
    merges = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split == "smollm" else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(metadata, tokens, _CONTROL))
    tokenizer.add_tokens(_added(metadata, tokens, _USER_DEFINED))
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        _add_bos(tokenizer, metadata.get("tokenizer.ggml.bos_token_id"), tokens)
    return tokenizer


def _added(metadata: GgufMetadata, tokens: list[str], kind: int) -> list[AddedToken]:
    from tokenizers import AddedToken

    kinds = metadata.get("tokenizer.ggml.token_type", [])
    found = [t for t, k in zip(tokens, kinds, strict=False) if k == kind]
    return [AddedToken(t, normalized=False, special=kind == _CONTROL) for t in found]


def _add_bos(tokenizer: Tokenizer, index: int, tokens: list[str]) -> None:
    from tokenizers import processors

    bos = tokens[index]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
    )


def _config(metadata: GgufMetadata) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, name in _SPECIAL.items():
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and index < len(tokens):
            config[f"{key}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})
