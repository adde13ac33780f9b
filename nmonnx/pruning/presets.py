"""Named recipes: what the papers prune, and what we tell users to take."""

from __future__ import annotations

from typing import Any

from nmonnx.errors import UsageError

_BEST = {"criterion": "sqrt-wina", "share": "separate", "order": "swap", "allocate": "forward"}

PRESETS: dict[str, dict[str, Any]] = {
    "paper-all": {},
    "paper-qwen": {"exclude": ["q|k|v|qkv"]},
    "paper-best": {"include": ["k", "v", "gate", "down"]},
    "paper-kogd": {"include": ["k", "o", "gate", "down"]},
    "amber": {"criterion": "amber", "include": ["q", "gate", "down"]},
    "teal": {"pattern": "50%", "scope": "threshold"},
    "chess": {"pattern": "50%", "criterion": "wina", "scope": "threshold"},
    "best": _BEST,
    "best-learned": {**_BEST, "mitigations": ["distil"]},
}
"""The paper is arXiv 2509.22166: all linear layers of every block (Table 6); the choice for Qwen2.5; the two of
Table 5. amber: what arXiv 2508.02128 prunes, but for the blocks that it lists for each model. teal and chess: the
thresholds of arXiv 2408.14690 and of CHESS (EMNLP 2024) on all layers, with one share everywhere. best: what we tell
users to take; it needs `nmonnx calibrate` and `nmonnx sensitivity`. best-learned: the same with weights that have
learned to predict what the dense model does; it needs `nmonnx fit` too."""


def preset_named(name: str) -> dict[str, Any]:
    """Entries of a recipe. Raises UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]
