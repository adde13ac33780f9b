"""SHA-256 of files, streamed, and of arrays."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def array_sha256(values: np.ndarray) -> str:
    """Of the type, the shape and the bytes of an array."""
    head = f"{values.dtype.str}{list(values.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()
