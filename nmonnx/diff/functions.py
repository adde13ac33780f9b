"""How the functions of a model are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from onnx import FunctionProto, NodeProto

from nmonnx.onnx_file.graph import DOMAIN


def function_key(function: FunctionProto) -> str:
    """ "DOMAIN::NAME" or "DOMAIN::NAME:OVERLOAD": no two functions of a model share it."""
    return f"{function.domain}::{function.name}{_overload(function)}"


def function_paths(functions: Iterable[FunctionProto]) -> dict[str, str]:
    """The scope path of each body by `function_key`, as `Model.scopes` names it: "function:NAME", or, where several
    functions share the name, "function:DOMAIN:NAME" with ":OVERLOAD" if there is one. Functions that nmonnx adds change
    no path."""
    functions = list(functions)
    users = Counter(f.name for f in functions if f.domain != DOMAIN)
    paths = {}
    for f in functions:
        shared = users[f.name] > (f.domain != DOMAIN)
        paths[function_key(f)] = f"function:{f.domain}:{f.name}{_overload(f)}" if shared else f"function:{f.name}"
    return paths


def called(node: NodeProto) -> tuple[str, str, str]:
    """What a node runs: domain, op and overload."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type, getattr(node, "overload", "")


def _overload(function: FunctionProto) -> str:
    overload = getattr(function, "overload", "")  # newer than some supported onnx releases
    return f":{overload}" if overload else ""
