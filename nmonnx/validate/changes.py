"""Tell the edits that a conversion accounts for from those that nothing explains."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto

from nmonnx.diff.compare import label
from nmonnx.diff.edits import (
    AttributeEdit,
    Edit,
    FunctionEdit,
    MetadataEdit,
    NodeEdit,
    OpsetEdit,
    OrderEdit,
    RewireEdit,
    TensorEdit,
    ValueEdit,
)
from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.passes.bodies import FUSED
from nmonnx.validate.claims import Claim
from nmonnx.validate.scopes import Key, Scopes, Trail, factors


class Explained:
    """What the pruned layers account for.

    fused     nodes that a fused op stands for, with the op
    inserted  the ops themselves, and constants that they alone read
    removed   nodes that only served what is dropped: fused layers, and Constant nodes that a new constant stands for
    rewired   (node, input) -> tensors that a layer may read there instead of its activation
    replaced  tensors of the original that a declared constant stands for
    added     new constants of ops: declared, or saying what leaving the input out says
    fallbacks functions that say in stock ops what the ops do
    read      activations, and sums behind layers; what value_info says of their shapes is a hint that may go
    """

    def __init__(self, old: Scopes, new: Scopes, changed: dict[str, tuple[str, str]]) -> None:
        self.old, self.new = old, new
        self.changed = changed
        self.replaced: set[str] = set()
        self.fused: set[Key] = set()
        self.inserted: set[Key] = set()
        self.removed: set[Key] = set()
        self.rewired: dict[tuple[Key, str], set[str]] = {}
        self.added: set[Key] = set()
        self.read: set[Key] = set()
        self.fallbacks: set[str] = set()
        self.dropped: set[Key] = set()

    def add(self, claim: Claim, before: Trail, after: Trail) -> None:
        """Account for one pruned layer: what lies between its activation and its output."""
        self.inserted |= after.own.keys()
        self.fallbacks |= {f"{DOMAIN}::{node.op_type}" for node in after.own.values()}
        self.read.add((claim.scope, claim.activation))
        if claim.kernel in FUSED:
            self.fused |= {key for key, node in after.own.items() if claim.output in node.output}
            self.dropped |= before.nodes.keys()
            if claim.kernel == "NMMatMulNBits":  # zero points of no effect, and what quantised the activation
                self.replaced |= {name for _, name in before.leaves}
            return
        outputs = {output for node in after.own.values() for output in node.output}
        for key, node in before.nodes.items():
            for slot, name in factors(node).items():
                if name == claim.activation:
                    self.rewired.setdefault((key, f"input {slot}"), set()).update(outputs)

    def finish(self) -> None:
        """Find the nodes that only fed fused layers: weights' Cast, Transpose, Identity, constants."""
        readers = self.old.readers()
        self.removed = set(self.dropped)
        growing = True
        while growing:
            growing = False
            for scope in self.old:
                for node in reversed(scope.nodes):
                    key = (scope.path, label(node))
                    if key not in self.removed and self._only_feeds_removed(scope.path, node, readers):
                        self.removed.add(key)
                        growing = True
        for scope_path, name in self.added:
            maker = self.new.maker((scope_path, name))
            if maker is not None:
                self.inserted.add((scope_path, label(maker)))

    def _only_feeds_removed(self, path: str, node: NodeProto, readers: dict) -> bool:  # type: ignore[type-arg]
        reads = [r for output in node.output for r in readers.get((path, output), ())]
        is_output = any(output in self.old.by_path[path].outputs for output in node.output)
        return bool(reads) and not is_output and all((s.path, label(n)) in self.removed for s, n in reads)

    def allows_removal(self, scope: str, name: str) -> bool:
        """Whether an initializer may be gone: it was repacked under another name, or a constant took its place."""
        return name in {source for source, _ in self.changed.values()} or name in self.replaced


def unexplained(edits: Sequence[Edit], explained: Explained) -> dict[str, list[str]]:
    """The edits that no pruned layer accounts for, in words, by what they concern: "ports" (graph inputs and outputs),
    "weights", "nodes" and "model"."""
    strange: dict[str, list[str]] = {"ports": [], "weights": [], "nodes": [], "model": []}
    for edit in edits:
        topic = _topic(edit)
        if not _is_explained(edit, explained):
            strange[topic].append(_words(edit))
    return strange


def _topic(edit: Edit) -> str:
    match edit:
        case ValueEdit() if edit.role != "value" and not edit.scope:
            return "ports"
        case TensorEdit():
            return "weights"
        case NodeEdit() | RewireEdit() | AttributeEdit() | OrderEdit() | ValueEdit():
            return "nodes"
        case _:
            return "model"


def _is_explained(edit: Edit, explained: Explained) -> bool:
    key = (edit.scope, edit.name)
    match edit:
        case OrderEdit():
            return True  # the wiring says what runs when
        case NodeEdit() if edit.change == "added":
            return key in explained.inserted
        case NodeEdit() if edit.change == "removed":
            return key in explained.removed
        case NodeEdit():
            return key in explained.fused
        case AttributeEdit():
            return key in explained.fused
        case RewireEdit():
            after = edit.after or ""
            return key in explained.fused or after in explained.rewired.get((key, edit.slot), ())
        case TensorEdit() if edit.change == "added":
            return edit.name in explained.changed or key in explained.added
        case TensorEdit() if edit.change == "removed":
            return explained.allows_removal(edit.scope, edit.name)
        case ValueEdit() if edit.role == "value" and edit.change == "removed":
            maker = explained.old.maker(key)
            return maker is not None and (edit.scope, label(maker)) in explained.removed
        case ValueEdit() if edit.role == "value" and edit.change == "changed":
            return key in explained.read and edit.after == str(edit.before).partition("[")[0]
        case MetadataEdit() if edit.key.startswith("nmonnx.") and edit.change == "added":
            return edit.owner == "model"
        case OpsetEdit():
            return edit.name == DOMAIN and edit.change == "added"
        case FunctionEdit():
            return edit.change == "added" and edit.name in explained.fallbacks
        case _:
            return False


def _words(edit: Edit) -> str:
    what = f"{edit.kind} {edit.name!r}" + (f" in {edit.scope}" if edit.scope else "")
    if isinstance(edit, TensorEdit) and edit.before == edit.after:
        return f"{what} has other bytes"
    if edit.change != "changed":
        return f"{what} was {edit.change}"
    part = {
        RewireEdit: lambda e: f"{e.slot} ",
        AttributeEdit: lambda e: f"attribute {e.attribute} ",
        MetadataEdit: lambda e: f"entry {e.key} ",
    }.get(type(edit), lambda e: "")(edit)
    return f"{what}: {part}{edit.before} -> {edit.after}"
