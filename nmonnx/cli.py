"""The command line: `nmonnx COMMAND`. Each command lives in a file of `nmonnx/commands/`.

Exit codes: 0 done; 1 a negative result (a threshold failed, the files differ); 2 a usage or input error; 3 a model
could not be loaded or written; 4 ONNX Runtime failed while running.
"""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

import nmonnx
from nmonnx.commands import (
    bench,
    calibrate,
    convert,
    demo,
    diff,
    doctor,
    evaluate,
    fit,
    generate,
    gradients,
    inspect,
    sensitivity,
    sweep,
    validate,
)
from nmonnx.errors import NmonnxError

app = typer.Typer(
    name="nmonnx",
    help="N:M activation sparsity for LLMs exported to ONNX. N is the number of channels KEPT of every M.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    inspect,
    calibrate,
    sensitivity,
    gradients,
    fit,
    convert,
    validate,
    bench,
    evaluate,
    sweep,
    diff,
    generate,
    doctor,
    demo,
):
    app.command(command.__name__.rpartition(".")[2])(command.command)


@app.callback(invoke_without_command=True)
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """N:M activation sparsity for LLMs exported to ONNX. N is the number of channels KEPT of every M."""
    if version:
        print(nmonnx.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; every error is one sentence on stderr and an exit code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        sys.exit(app([a for a in arguments if a != "--debug"], standalone_mode=False) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as e:
        if debug:
            raise
        code, words = _explain(e)
        if words:
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"nmonnx: {words}", markup=False)
        sys.exit(code)


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, NmonnxError):
        return error.exit_code, f"error: {error}"
    usage = getattr(error, "format_message", None)  # click's own errors, whichever click typer brings
    if usage is not None:
        return 2, f"error: {usage()} (--help shows the usage)" if usage() else ""  # no words: the help was shown
    if isinstance(error, UnicodeError):
        return 2, "error: an argument is not valid UTF-8; rename the file or retype the text"
    if isinstance(error, MemoryError):
        return 4, "error: out of memory"
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return 4, f"internal error: {words} (--debug shows where)"


if __name__ == "__main__":
    main()
