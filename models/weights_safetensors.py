"""`SafetensorsSource`: a Hugging Face folder, its safetensors memory-mapped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmonnx.errors import InputError
from nmonnx.models.config import LlamaConfig
from nmonnx.models.q4 import Q4Blocks

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}


class SafetensorsSource:
    """A folder with config.json and model.safetensors, or shards named by model.safetensors.index.json."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when a file is missing, truncated or not what it should be."""
        self.path = path
        config = _read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.config = LlamaConfig.from_huggingface(
            config, _read_json(generation) if generation.is_file() else {}, str(path / "config.json")
        )
        self._tensors: dict[str, _Tensor] = {}
        for shard in _shards(path):
            self._tensors |= _read_header(shard)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def kind(self, name: str) -> str:
        return self._tensors[name].kind

    def array(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        values = np.memmap(tensor.file, _DTYPES[tensor.kind], "r", tensor.offset, tensor.shape)
        if tensor.kind == "BF16":
            wide = values.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return values.astype(np.float32) if tensor.kind == "F64" else values

    def q4(self, name: str) -> Q4Blocks:
        raise InputError(f"{self.path}: tensor {name!r} is {self.kind(name)}, which has no 4-bit blocks")

    def write_tokenizer(self, folder: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)


@dataclass(frozen=True)
class _Tensor:
    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [path / "model.safetensors"]
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    outside = [n for n in names if not isinstance(n, str) or Path(n).name != n]
    if outside or not names:
        raise InputError(f"{index}: weight_map must name files of its own folder, found {(outside or names)!r}")
    return [path / name for name in names]


def _read_header(file: Path) -> dict[str, _Tensor]:
    if not file.is_file():
        raise InputError(f"{file} is missing; a Hugging Face folder with safetensors weights was expected")
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{file} is not a safetensors file, or an incomplete download ({size} bytes)")
        try:
            header = json.loads(f.read(length))
            return {
                name: _tensor(file, name, entry, 8 + length, size)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{file}: the safetensors header cannot be read: {e}") from e


def _tensor(file: Path, name: str, entry: dict[str, Any], start: int, size: int) -> _Tensor:
    kind, shape = entry["dtype"], tuple(int(d) for d in entry["shape"])
    begin, end = entry["data_offsets"]
    if kind not in _DTYPES:
        raise InputError(f"{file}: tensor {name!r} is {kind}; weights must be {', '.join(_DTYPES)}")
    if begin < 0 or end - begin != math.prod(shape) * _DTYPES[kind].itemsize or start + end > size:
        raise InputError(f"{file}: tensor {name!r} does not fit the file ({size} bytes); download it again")
    return _Tensor(file, kind, shape, start + begin)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InputError(f"{path} is missing; a Hugging Face folder with config.json was expected") from e
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read: {e}") from e
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object")
    return data
