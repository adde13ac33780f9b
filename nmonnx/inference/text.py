"""Tokenizers and texts: from words to token ids and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nmonnx.errors import InputError
from nmonnx.onnx_file.tensors import why

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(path: str | Path | None = None, beside: str | Path | None = None) -> Tokenizer:
    """The tokenizer in `path`, a tokenizer.json or a folder that holds one; by default in the folder of the model
    `beside`. Padding and truncation that the file asks for are switched off. Raises InputError when there is none."""
    from tokenizers import Tokenizer

    file = tokenizer_file(path, beside)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:
        raise InputError(f"{file} is not a tokenizer that the tokenizers library reads: {e}") from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises InputError when it is missing, empty or not UTF-8."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file; give a UTF-8 text file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{path} cannot be read: {why(e)}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text (byte {e.start}); convert it") from e
    if not text.strip():
        raise InputError(f"{path} is empty; give a text")
    return text


def encode(tokenizer: Tokenizer, text: str, special: bool = False) -> np.ndarray:
    """Token ids of a text [T], int64; with `special` also what the tokenizer puts around a text (often a BOS).
    Raises InputError for a text with bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"the text is not valid UTF-8 (character {e.start}); convert it") from e
    return np.array(tokenizer.encode(text, add_special_tokens=special).ids, np.int64)


def tokenizer_file(path: str | Path | None, beside: str | Path | None) -> Path:
    """Where the tokenizer lies that `load_tokenizer` reads. Raises InputError when there is none."""
    if path is None and beside is None:
        raise InputError("no tokenizer was given; pass a tokenizer.json or the folder that holds it")
    where = Path(path) if path is not None else Path(beside or "").parent
    try:
        file = where / "tokenizer.json" if where.is_dir() else where
        found = file.is_file()
    except OSError as e:
        raise InputError(f"{where} cannot be read: {why(e)}") from e
    if not found:
        hint = "" if path is not None else "; pass the tokenizer's file or folder, or copy it beside the model"
        raise InputError(f"{file} does not exist{hint}")
    return file
