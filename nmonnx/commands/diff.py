"""`nmonnx diff`: what differs between two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmonnx.commands.options import ReportPath
from nmonnx.report import Report, check_format, to_json, write


def command(
    first: Annotated[Path, typer.Argument(help="A model.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    full: Annotated[bool, typer.Option("--full", help="Every edit on a line of its own, nothing folded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
    report: ReportPath = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the exit code: 0 the same, 1 different.")] = False,
) -> None:
    """List the edits that lead from FIRST to SECOND: nodes, wiring, attributes, weights, shapes, metadata, functions.

    Layers that changed alike are folded into one line. Exit code 1 when the files differ, as diff(1).
    """
    from nmonnx.diff import diff, to_data, to_text

    check_format(report)
    edits = diff(first, second)
    title = f"{first} -> {second}: " + (f"{len(edits)} edits" if edits else "no difference")
    text = "\n".join(to_text([e]) for e in edits) if full and edits else to_text(edits)
    result = Report(title, tuple(text.splitlines()), (), {"command": "diff", **to_data(edits)}, (first, second))
    if report is not None:
        write(result, report)
    if not quiet:
        print(to_json(result) if json else text)
    if edits:
        raise typer.Exit(1)
