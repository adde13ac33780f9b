"""Say in a few words what a node, an attribute, a value or a function is."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, NodeProto, TypeProto, ValueInfoProto, helper

from nmonnx.diff.functions import called
from nmonnx.diff.weights import shape_text
from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.onnx_file.tensors import TensorReader, type_name

_LONGEST = 200


def op_text(node: NodeProto) -> str:
    """ "MatMul", "com.microsoft::MatMulNBits", "NMPrune 8:16"."""
    if node.domain == DOMAIN:
        attributes = {a.name: a.i for a in node.attribute}
        return f"{node.op_type} {attributes.get('keep', '?')}:{attributes.get('group', '?')}"
    domain, op, overload = called(node)
    return (f"{domain}::" if domain else "") + op + (f":{overload}" if overload else "")


def attribute_text(attribute: AttributeProto, reader: TensorReader) -> str:
    """The value in a few words; a tensor as type, shape and digest."""
    if attribute.ref_attr_name:
        return f"@{attribute.ref_attr_name}"
    if attribute.type == AttributeProto.TENSOR:
        return f"{shape_text(attribute.t)} sha256:{reader.sha256(attribute.t)}"
    if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        return "graph"
    text = str(helper.get_attribute_value(attribute))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def value_text(value: ValueInfoProto) -> str:
    """ "FLOAT[batch, 576]"; "FLOAT" when the rank is not known; denotations in brackets."""
    return _type_text(value.type)


def signature(function: FunctionProto) -> str:
    """ "(x, W) <keep, group> -> (y)" """
    names = [*function.attribute, *(a.name for a in function.attribute_proto)]
    attributes = f" <{', '.join(names)}>" if names else ""
    return f"({', '.join(function.input)}){attributes} -> ({', '.join(function.output)})"


def _type_text(kind: TypeProto) -> str:
    text = _plain_text(kind)
    return f"{text} ({kind.denotation})" if kind.denotation else text


def _plain_text(kind: TypeProto) -> str:
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, which)
        sparse = "sparse " if which == "sparse_tensor_type" else ""
        return f"{sparse}{type_name(tensor.elem_type)}{_dims_text(tensor)}"
    if which in ("sequence_type", "optional_type"):
        return f"{which.removesuffix('_type')}({_type_text(getattr(kind, which).elem_type)})"
    if which == "map_type":
        return f"map({type_name(kind.map_type.key_type)}, {_type_text(kind.map_type.value_type)})"
    return "no type"


def _dims_text(tensor) -> str:  # type: ignore[no-untyped-def]
    if not tensor.HasField("shape"):
        return ""
    return f"[{', '.join(_dim_text(d) for d in tensor.shape.dim)}]"


def _dim_text(dim) -> str:  # type: ignore[no-untyped-def]
    size = str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"
    return f"{size} ({dim.denotation})" if dim.denotation else size
