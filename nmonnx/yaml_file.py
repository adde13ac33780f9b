"""Files of settings that people write: recipes, grids, tasks; YAML, of which JSON is a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nmonnx.errors import InputError


def read_yaml(path: Path, what: str) -> Any:
    """The content of a file; `what` it should be, for the message. Raises InputError with the line that is wrong."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise InputError(f"{what} {path}{place} cannot be read: {reason}") from e
