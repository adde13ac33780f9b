"""The vocabulary of a diff: one frozen dataclass for each kind of thing that can change in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Edit:
    """One thing that differs between two models.

    scope   where: "" for the main graph, the path of a subgraph or of a function body
    name    what: name of the node (its first output when it has none), tensor, function, opset domain, field
    before  what it was in the first model; None when only the second has it
    after   what it is in the second model; None when only the first has it
    """

    kind: ClassVar[str] = ""

    scope: str
    name: str
    before: str | None
    after: str | None

    @property
    def change(self) -> str:
        """ "added", "removed" or "changed"."""
        return "added" if self.before is None else "removed" if self.after is None else "changed"


@dataclass(frozen=True)
class NodeEdit(Edit):
    """A node was inserted, removed, or does something else now; `before` and `after` are its op."""

    kind: ClassVar[str] = "node"
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewireEdit(Edit):
    """An input or output of a node that is in both models has another name; `slot` is "input 0"."""

    kind: ClassVar[str] = "wire"
    op: str = ""
    slot: str = ""


@dataclass(frozen=True)
class AttributeEdit(Edit):
    """An attribute (or the name or doc string) of a node that is in both models."""

    kind: ClassVar[str] = "attribute"
    op: str = ""
    attribute: str = ""


@dataclass(frozen=True)
class OrderEdit(Edit):
    """A node stands elsewhere among the nodes that are in both models; `before` and `after` are positions."""

    kind: ClassVar[str] = "order"
    op: str = ""


@dataclass(frozen=True)
class TensorEdit(Edit):
    """An initializer; `before` and `after` are type and shape, the digests cover type, shape and bytes."""

    kind: ClassVar[str] = "initializer"
    sha256_before: str = ""
    sha256_after: str = ""


@dataclass(frozen=True)
class ValueEdit(Edit):
    """Type and shape of a graph input, a graph output or an inner value; `role` says which."""

    kind: ClassVar[str] = "value"
    role: str = ""


@dataclass(frozen=True)
class MetadataEdit(Edit):
    """One entry of metadata_props; `owner` is "model", "graph", "function", "node", "input", "output",
    "value" or "initializer"."""

    kind: ClassVar[str] = "metadata"
    owner: str = ""
    key: str = ""


@dataclass(frozen=True)
class FunctionEdit(Edit):
    """A model-local function; `before` and `after` are its signature. Its nodes are edits of their own when both
    models have it."""

    kind: ClassVar[str] = "function"


@dataclass(frozen=True)
class OpsetEdit(Edit):
    """The version of an operator set; `name` is the domain."""

    kind: ClassVar[str] = "opset"


@dataclass(frozen=True)
class FieldEdit(Edit):
    """Any other field, such as ir_version, "graph doc_string" or "doc_string of input x"."""

    kind: ClassVar[str] = "field"
