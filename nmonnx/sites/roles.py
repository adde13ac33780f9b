"""Role and block of a linear layer from names: exporters keep the path of the module in one of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata in which torch's dynamo exporter keeps the path of the module."""

_WORDS = {
    "q": ("q_proj", "q_lin", "wq", "to_q", "query"),
    "k": ("k_proj", "k_lin", "wk", "to_k", "key"),
    "v": ("v_proj", "v_lin", "wv", "to_v", "value"),
    "o": ("o_proj", "out_proj", "out_lin", "wo", "to_out", "attention.output.dense"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "wqkv", "qkv", "in_proj", "in_proj_qkv", "to_qkv"),
    "gate": ("gate_proj", "w1"),
    "up": (
        "up_proj",
        "w3",
        "fc1",
        "c_fc",
        "fc_in",
        "lin1",
        "dense_h_to_4h",
        "wi",
        "intermediate",
        "intermediate.dense",
    ),
    "down": ("down_proj", "w2", "fc2", "fc_out", "lin2", "dense_4h_to_h", "output.dense"),
    "gate_up": ("gate_up_proj", "gate_up", "w12", "dense_gate_up"),
    "lm_head": ("lm_head", "embed_out", "output_layer", "lm_head_proj"),
    "router": ("router", "shared_expert_gate", "block_sparse_moe.gate", "moe.gate"),
    "experts": ("experts",),
}
_ROLE_OF = {word: role for role, words in _WORDS.items() for word in words}
_BY_CONTEXT = ("c_proj", "dense", "gate", "proj", "linear_proj")
_WORD = re.compile(
    r"(?:(?<=^)|(?<=[./:_]))("
    + "|".join(re.escape(w) for w in sorted((*_ROLE_OF, *_BY_CONTEXT), key=len, reverse=True))
    + r")(?=$|[./:]|_\d|_matmul|_gemm|_weight)"
)
_ATTENTION = re.compile(r"attn|attention")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_forward|moe|experts")
_BLOCK = re.compile(r"(?:^|[./_])(?:layers?|h|blocks?)[._/](\d+)(?=$|[./_])")


def role_of(names: Iterable[str]) -> str | None:
    """The role that the first telling name gives, None when none does."""
    return next((role for name in names if (role := _role(name.lower()))), None)


def block_of(names: Iterable[str]) -> int | None:
    """The index of the transformer block that the first telling name gives."""
    return next((int(m[1]) for name in names if (m := _BLOCK.search(name.lower()))), None)


def module_paths(props: Mapping[str, str]) -> tuple[str, ...]:
    """Module paths of a dynamo node, innermost first, without the name of the call itself."""
    try:
        scopes = ast.literal_eval(props.get(NAME_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ()
    return tuple(s for s in reversed(scopes[:-1]) if s) if isinstance(scopes, list) else ()


def _role(name: str) -> str | None:
    words = list(_WORD.finditer(name.replace("/", ".")))
    if not words:
        return None
    word = words[-1][1]
    if word in _ROLE_OF:
        return _ROLE_OF[word]
    path = name[: words[-1].start()]
    if word == "gate":
        return "router" if _FEED_FORWARD.search(path) else "gate"
    if _is_inner(_ATTENTION, _FEED_FORWARD, path):
        return "o"
    return "down" if _is_inner(_FEED_FORWARD, _ATTENTION, path) else None


def _is_inner(wanted: re.Pattern[str], other: re.Pattern[str], path: str) -> bool:
    """`wanted` is the word nearest to the end of the path."""
    ends = [max((m.end() for m in p.finditer(path)), default=-1) for p in (wanted, other)]
    return ends[0] > ends[1]
