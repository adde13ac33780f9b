"""The fields of a message that are told as they are: whatever nothing else compares, so that none is missed."""

from __future__ import annotations

import hashlib
from typing import Any

_TOLD = {
    "ModelProto": {"graph", "functions", "opset_import", "metadata_props"},
    "GraphProto": {
        *("node", "initializer", "sparse_initializer", "input", "output", "value_info"),
        "metadata_props",
    },
    "FunctionProto": {
        *("name", "domain", "overload", "input", "output", "attribute", "node", "value_info"),
        *("opset_import", "metadata_props"),
    },
    "NodeProto": {
        *("name", "domain", "op_type", "overload", "input", "output", "attribute", "doc_string"),
        "metadata_props",
    },
    "ValueInfoProto": {"name", "type", "metadata_props"},
    "TensorProto": {
        *("name", "dims", "data_type", "segment", "data_location", "external_data", "raw_data", "metadata_props"),
        *("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"),
    },
}
"""Fields by message that `Comparison` tells in a way of their own."""


def field_texts(message: Any) -> dict[str, str]:
    """The other fields of a protobuf message by name, in a few words: numbers and strings as they are, messages as
    their count and digest, "" for what is not set."""
    told = _TOLD[message.DESCRIPTOR.name]
    names = (field.name for field in message.DESCRIPTOR.fields if field.name not in told)
    return {name: _text(getattr(message, name)) for name in names}


def _text(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    digest = hashlib.sha256()
    parts = list(value)
    for part in parts:
        piece = (
            part.SerializeToString(deterministic=True) if hasattr(part, "SerializeToString") else repr(part).encode()
        )
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return f"{len(parts)}, sha256:{digest.hexdigest()[:16]}" if parts else ""
