"""Write tokenizer.json from the tokens and merges that a GGUF file holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmonnx.errors import InputError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from nmonnx.models.weights_gguf import GgufSource

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
SPLITS = ("smollm", "gpt-2")
"""Values of tokenizer.ggml.pre that can be rebuilt: how the text is cut before the merges."""


def write_tokenizer(source: GgufSource, folder: Path) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json (with the chat template, when there is one) to `folder`;
    returns their names.

    1. A tokenizer.json beside the GGUF file is copied: it is the original.
    2. Byte-level BPE with a split of `SPLITS` is rebuilt. BOS is added only if the GGUF says so.
    3. Anything else raises InputError.
    """
    beside = source.path.parent / "tokenizer.json"
    if beside.is_file():
        shutil.copyfile(beside, folder / "tokenizer.json")
    else:
        _tokenizer(source).save(str(folder / "tokenizer.json"))
    config = json.dumps(_config(source), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    return ["tokenizer.json", "tokenizer_config.json"]


def _tokenizer(source: GgufSource) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model, pre = source.field("tokenizer.ggml.model"), source.field("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in SPLITS:
        raise InputError(
            f"{source.path}: the tokenizer is {model!r} with split {pre!r}; this recipe rebuilds 'gpt2' with"
            f" {' or '.join(SPLITS)}. Put the model's own tokenizer.json beside the GGUF file"
        )
    tokens = source.field("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bytes_split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_split]) if pre == "smollm" else bytes_split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(source, tokens, _CONTROL))
    tokenizer.add_tokens(_added(source, tokens, _USER_DEFINED))
    if source.field("tokenizer.ggml.add_bos_token", False):
        _add_bos(tokenizer, tokens[source.config.bos], source.config.bos)
    return tokenizer


def _added(source: GgufSource, tokens: list[str], kind: int) -> list[AddedToken]:
    from tokenizers import AddedToken

    kinds = source.field("tokenizer.ggml.token_type", [])
    return [
        AddedToken(t, normalized=False, special=kind == _CONTROL)
        for t, k in zip(tokens, kinds, strict=False)
        if k == kind
    ]


def _add_bos(tokenizer: Tokenizer, token: str, index: int | None) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, index)]
    )


def _config(source: GgufSource) -> dict[str, Any]:
    tokens = source.field("tokenizer.ggml.tokens")
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {key: source.field(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{key}_token": tokens[i] for key, i in ids.items() if i is not None}
    config |= {"model_max_length": source.config.context, "clean_up_tokenization_spaces": False}
    template = source.field("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})
