"""The options that say what a recipe asks for, where several commands take them, and the recipe that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from nmonnx.pruning.presets import PRESETS, preset_named

if TYPE_CHECKING:
    from nmonnx.pruning.recipe import Recipe

PatternFlag = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--pattern", "-p", help="N:M, keep N of every M input channels; or a share kept, 50%. [default: 8:16]"
    ),
]
Criterion = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="What makes a channel worth keeping: act, wina, sqrt-wina, amber, amber-code, var-weight,"
        " clact-static, pcs, grad, random, clact, anti, or the path of an .npz with a vector for"
        " each layer. [default: act]"
    ),
]
Share = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="joint: layers on one activation share a prune; separate: one each. [default: joint]"),
]
Order = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="deal: deal the channels over the groups by calibrated rms; swap: then part those wanted together;"
        " none. [default: none]"
    ),
]
Allocate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="A kept N for each layer, same bytes: forward (by --sensitivity), fisher (by --gradients); or uniform."
        " [default: uniform]"
    ),
]
LmHead = Annotated[bool, typer.Option("--lm-head", help="Prune the input of lm_head too.")]
Preset = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help=f"A named recipe: {', '.join(PRESETS)}; other flags win over it."),
]
Config = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--config", "-c", help="A recipe in YAML or JSON; flags win over it."),
]


def asked(flags: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """The entries of a recipe that were given; those of the preset below them. Raises UsageError."""
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    return {**preset_named(preset), **given} if preset else given


def made_of(entries: dict[str, Any], config: Path | None, where: str) -> Recipe:
    """The recipe of these entries, those of a file below them. Raises InputError and UsageError."""
    from nmonnx.pruning.recipe import Recipe

    return Recipe.read(config, entries) if config else Recipe.from_dict(entries, where)
