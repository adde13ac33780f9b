"""Arguments and options that several commands take, and where their output goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from nmonnx.errors import InputError
from nmonnx.report import Report, check_place, show, write

if TYPE_CHECKING:
    from nmonnx.feeds import Feed
    from nmonnx.records.gradients import Gradients
    from nmonnx.records.sensitivity import Sensitivity
    from nmonnx.records.stats import Stats

ModelPath = Annotated[Path, typer.Argument(help="The model, an .onnx file.", show_default=False)]
ReportPath = Annotated[
    Optional[Path],  # noqa: UP045 - typer on Python 3.10 wants it spelled out
    typer.Option("--report", help="Also write the result as .json, .md or .html.", show_default=False),
]
Include = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="Only these layers: role (q, down), glob, re:REGEX, op:MatMul, block:0-3. Repeatable."),
]
Exclude = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="Not these layers; selectors as for --include. Repeatable."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line for every layer.")]
TokenizerPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--tokenizer", help="tokenizer.json, or the folder it lies in. [default: beside MODEL]"),
]
FeedFiles = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option("--feeds", help="Instead of a text: .npz or a folder of .npy, named as the inputs. Repeatable."),
]
StatsPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--stats", help="What 'nmonnx calibrate' saw on MODEL (.npz).", show_default=False),
]
SensitivityPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--sensitivity", help="What 'nmonnx sensitivity' measured on MODEL (.json).", show_default=False),
]
GradientsPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--gradients", help="What 'nmonnx gradients' measured on MODEL (.npz).", show_default=False),
]
Threads = Annotated[int, typer.Option(min=0, help="Intra-op threads; 0: ONNX Runtime decides.")]


WIDTH = 140
"""Columns where there is no terminal to ask."""


def tell(report: Report, path: Path | None, quiet: bool = False) -> None:
    """Show the report on stdout and write it to `path`."""
    if not quiet:
        console = Console()
        show(report, console if console.is_terminal else Console(width=WIDTH))
    if path is not None:
        write(report, path)


def beside(model: Path, ending: str) -> Path:
    """The default output beside the model, MODEL`ending`. Raises InputError for a model that is no file name."""
    if not model.stem:
        raise InputError(f"{model} is a folder; give the .onnx file in it")
    return model.with_name(model.stem + ending)


def read_measured(
    stats: Path | None, sensitivity: Path | None, gradients: Path | None
) -> tuple[Stats | None, Sensitivity | None, Gradients | None]:
    """What was measured on the model before. Raises InputError."""
    from nmonnx.records.gradients import Gradients
    from nmonnx.records.sensitivity import Sensitivity
    from nmonnx.records.stats import Stats

    return (
        Stats.load(stats) if stats else None,
        Sensitivity.load(sensitivity) if sensitivity else None,
        Gradients.load(gradients) if gradients else None,
    )


def read_feed_files(model: Path, files: list[Path]) -> list[Feed]:
    """The arrays that the user gives, checked against the inputs of the model. Raises InputError."""
    from nmonnx.feeds import read_feeds, signature
    from nmonnx.library import make_session

    expected = signature(make_session(model), model)
    return [feed for file in files for feed in read_feeds(file, expected)]


def refuse_output(output: Path, suffix: str, overwrite: bool, feeds: list[Path] | None = None) -> None:
    """Refuse an --output that could not be written before minutes of work are done. Raises UsageError."""
    from nmonnx.onnx_file.save import refuse_clash

    refuse_clash(output, feeds or [], overwrite, "one of the feeds")
    check_place("--output", output, (suffix,))
