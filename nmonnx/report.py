"""What a command tells: words and tables, shown on the terminal or written as JSON, Markdown or HTML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from nmonnx.digest import file_sha256
from nmonnx.errors import ModelError, UsageError

SCHEMA_VERSION = 1
FORMATS = (".json", ".md", ".html")


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; cells are text already."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """title   one line
    words   sentences in front of the tables
    tables  what a person reads
    data    what a program reads (JSON)
    inputs  the files it speaks of; the JSON names them with their SHA-256
    """

    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Path, ...] = ()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of anything that prints."""
    return Table(title, tuple(columns), tuple(tuple(str(cell) for cell in row) for row in rows))


def counted(count: int, what: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{count} {what}" + "s" * (count != 1)


def tally(head: str, reasons: Counter[str]) -> list[str]:
    """A sentence for each reason: of how many layers it is told."""
    return [f"{head}{counted(n, 'layer')}: {why}." for why, n in reasons.items()]


def show(report: Report, console: Console) -> None:
    """Print the report for a person. Names are printed as they are, never as markup."""
    for words in (report.title, *report.words):
        console.print(Text(words), soft_wrap=True)
    for part in report.tables:
        if part.rows:
            console.print(_rich(part))


def check_format(path: Path | None) -> None:
    """Refuse a report that could not be written before any work is done. Raises UsageError."""
    if path is not None:
        check_place("--report", path, FORMATS)


def check_place(flag: str, path: Path, suffixes: Collection[str]) -> None:
    """Refuse a file that `flag` names where none of these suffixes ends it or nothing can be written. Raises
    UsageError."""
    if path.suffix not in suffixes:
        raise UsageError(f"{flag} {path}: the name must end in {', '.join(suffixes)}")
    try:
        if path.is_dir():
            raise UsageError(f"{flag} {path} is a folder; name a file")
        with TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as e:
        raise UsageError(f"{flag} {path} cannot be written: {e.strerror}; choose another place") from e


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write(report: Report, path: Path) -> None:
    """Write the report as its file name asks. Raises ModelError when the file cannot be written."""
    text = {".json": to_json, ".md": to_markdown, ".html": to_html}[path.suffix](report)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ModelError(f"cannot write the report {path}: {e.strerror}") from e


def to_json(report: Report) -> str:
    """The data with schema version, versions of the tools and SHA-256 of the inputs."""
    envelope = {
        "schema_version": SCHEMA_VERSION,
        "versions": {name: _version(name) for name in ("nmonnx", "onnx", "onnxruntime", "numpy")},
        "inputs": [{"path": str(p), "sha256": file_sha256(p)} for p in report.inputs],
        **report.data,
    }
    return json.dumps(envelope, indent=2, ensure_ascii=False, default=str) + "\n"


def to_markdown(report: Report) -> str:
    lines = [f"# {report.title}", "", *report.words, ""]
    for part in (t for t in report.tables if t.rows):
        lines += [f"## {part.title}", "", "| " + " | ".join(part.columns) + " |", "|" + " --- |" * len(part.columns)]
        lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in part.rows] + [""]
    return "\n".join(lines)


def to_html(report: Report) -> str:
    with open("/dev/null", "w") as nowhere:
        console = Console(record=True, width=160, file=nowhere)
        show(report, console)
        return console.export_html()


def _rich(part: Table) -> RichTable:
    rich = RichTable(title=part.title, title_justify="left", title_style="bold")
    for column, cells in zip(part.columns, zip(*part.rows, strict=True), strict=True):
        numeric = all(c[:1].isdigit() or c[:2].lstrip("-")[:1].isdigit() or c in ("", "-") for c in cells)
        rich.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in part.rows:
        rich.add_row(*(Text(cell) for cell in row))
    return rich


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
