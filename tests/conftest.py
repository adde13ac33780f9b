"""Where the shared material lies, and fixtures that skip with a reason when it is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared (zoo, cases, models, data) is not there")
    return SHARED


@pytest.fixture(scope="session")
def zoo(shared: Path) -> Callable[[str], Path]:
    """Path of the .onnx file of a zoo model, by its folder name."""

    def find(name: str) -> Path:
        folder = shared / "zoo" / name
        if not folder.is_dir():
            pytest.skip(f"zoo model {name} is not there")
        return sorted(folder.glob("*.onnx"))[0]

    return find
