"""Prove from the two files alone that a conversion pruned what it says, once, and changed nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from onnx import NodeProto, TensorProto

from nmonnx.diff.compare import Comparison, label
from nmonnx.diff.edits import Edit
from nmonnx.digest import array_sha256
from nmonnx.nbits import DEFAULT_ZERO
from nmonnx.onnx_file.graph import DOMAIN
from nmonnx.onnx_file.tensors import TensorReader
from nmonnx.passes.bodies import FUSED, NEEDED
from nmonnx.passes.stamp import PACKED
from nmonnx.pattern import pattern_text
from nmonnx.pruning.emulated import OPS
from nmonnx.validate.changes import Explained, unexplained
from nmonnx.validate.claims import Claim, Claims
from nmonnx.validate.folds import Folds
from nmonnx.validate.pair import Pair
from nmonnx.validate.policy import check_policy, dense_key, policy_nodes
from nmonnx.validate.result import Check, counted
from nmonnx.validate.scopes import Key, Scopes, Trail


def check_structure(pair: Pair, found: Sequence[str] | None) -> list[Check]:
    """The invariants of a conversion. `found` are the names of the linear layers of the original, as `find_sites`
    sees them.

    1. sites: every linear layer of the original is recorded once, and nothing else.
    2. prunes: every pruned layer has exactly one op on every path from its activation, of the recorded pattern and
       kernel, which lists it; it reads the same weights as before.
    3. left: a layer that was left sees no pruned value.
    4. ops: every op serves the layers that it lists, and at least one.
       What `NMMatMulNBits` stands for may have read more: zero points of no effect, and what quantised the activation.
    5. inputs and outputs, weights, nodes, model: nothing else changed. Weights are compared byte for byte.
    """
    work = _Structure(pair)
    checks = [] if found is None else [_check_sites(pair.claims, found)]
    checks += [work.prunes(), work.left(), work.ops()]
    told = check_policy(pair, work.policy)
    checks += [told] if told else []
    edits = list(Comparison(pair.in_before, pair.in_after).models(pair.before, pair.plain))
    return checks + work.changes(edits)


def _check_sites(claims: Claims, found: Sequence[str]) -> Check:
    recorded = [c.name for c in claims.sites]
    faults = [f"{n!r} is a linear layer but not recorded" for n in found if n not in set(recorded)]
    faults += [f"{n!r} is recorded but no linear layer" for n in recorded if n not in set(found)]
    faults += [f"{n!r} is recorded twice" for n in sorted({n for n in recorded if recorded.count(n) > 1})]
    return counted("every linear layer is recorded", len(found), faults, "linear layers")


class _Structure:
    def __init__(self, pair: Pair) -> None:
        self.pair, self.claims = pair, pair.claims
        self.served: dict[Key, set[str]] = {}
        self.trails: dict[str, Trail] = {}
        self.explained = Explained(pair.old, pair.new, pair.claims.changed)
        self.folds = Folds(pair, self.explained)
        self.policy = policy_nodes(pair)
        self.explained.inserted |= self.policy.keys()

    def prunes(self) -> Check:
        faults = []
        for claim in self.claims.pruned:
            faults += [f"{claim.name!r}: {fault}" for fault in self._faults_of(claim)][:1]
        return counted("each pruned layer has one op of its pattern", len(self.claims.pruned), faults, "pruned layers")

    def left(self) -> Check:
        """A layer that was left must not read what lies between an activation and a pruned layer, such as the output
        of a quantiser that both share."""
        ends = {self.pair.new.find(c.scope, c.output) for c in self.claims.pruned}
        pruned = {
            (scope, output): label(node)
            for trail in self.trails.values()
            for (scope, _), node in trail.nodes.items()
            for output in node.output
            if output and (scope, output) not in ends
        }
        faults = []
        for claim in self.claims.left:
            key = self.pair.new.find(claim.scope, claim.output)
            maker = self.pair.new.maker(key) if key else None
            if key in ends:  # one node is both: the first product of a fused mixture of experts, and its second
                continue
            if maker is None:
                faults.append(f"{claim.name!r}: nothing makes its tensor {claim.output!r}")
                continue
            reads = [self.pair.new.find(claim.scope, name) for name in maker.input if name]
            faults += [f"{claim.name!r}: reads {k[1]!r}, pruned by {pruned[k]!r}" for k in reads if k in pruned]
        return counted("layers that were left see no pruned value", len(self.claims.left), faults, "left layers")

    def ops(self) -> Check:
        faults, total = [], 0
        for scope in self.pair.new:
            for node in scope.nodes:
                if node.domain != DOMAIN:
                    continue
                total += 1
                listed, serves = set(sites_of(node)), self.served.get((scope.path, label(node)), set())
                if not serves:
                    faults.append(f"op {label(node)!r} belongs to no pruned layer")
                elif listed != serves:
                    faults.append(f"op {label(node)!r} lists {sorted(listed)} but serves {sorted(serves)}")
        return counted("each op serves the layers it lists", total, faults, "ops")

    def changes(self, edits: Sequence[Edit]) -> list[Check]:
        self.explained.finish()
        strange = unexplained(edits, self.explained)
        stored = sum(len(scope.initializers) for scope in self.pair.old)
        nodes = sum(len(scope.nodes) for scope in self.pair.old)
        ports = len(self.pair.before.graph.input) + len(self.pair.before.graph.output)
        return [
            counted("inputs and outputs are unchanged", ports, strange["ports"], "inputs and outputs"),
            counted("weights are unchanged", stored, strange["weights"], "initializers, byte for byte"),
            self._declared(),
            counted("other nodes are unchanged", nodes, strange["nodes"], "nodes"),
            counted("the model around the graph is unchanged", 1, strange["model"], "model"),
        ]

    def _faults_of(self, claim: Claim) -> Iterator[str]:
        yield from self._faults_of_pattern(claim)
        before, after = self.pair.old_trail(claim), self.pair.new_trail(claim)
        if before is None or after is None:
            where = "the original" if before is None else "the converted model"
            yield f"{where} lacks its activation {claim.activation!r} or its output {claim.output!r}"
            return
        self.trails[claim.name] = after
        for key in after.own:
            self.served.setdefault(key, set()).add(claim.name)
        yield from self._faults_of_ops(claim, before, after)
        yield from self._faults_of_weights(claim, before, after)
        self.explained.add(claim, before, after)

    def _faults_of_pattern(self, claim: Claim) -> Iterator[str]:
        """The recipe gives every layer one pattern, some layers one of a list, or an allocation any n of its m."""
        recipe = self.claims.recipe
        asked = {str(recipe.pattern), *(str(pattern) for _, pattern in recipe.patterns)}
        if recipe.allocate != "uniform":
            asked = {f"{n}:{recipe.pattern.m}" for n in range(1, recipe.pattern.m + 1)}
        if claim.pattern not in asked:
            yield f"is pruned {claim.pattern}, the recipe asks for {recipe.pattern}"

    def _faults_of_ops(self, claim: Claim, before: Trail, after: Trail) -> Iterator[str]:
        if not before.ops:
            yield f"in the original its output does not depend on {claim.activation!r}"
        if after.ops != {1}:
            said = {frozenset(): "none is fed by its activation", frozenset({0}): "it has no op"}
            yield said.get(after.ops, f"the paths from its activation pass {sorted(after.ops)} ops")
        start = self.pair.new.find(claim.scope, claim.activation)
        source = self.pair.new.maker(start) if start else None
        if source is not None and source.domain == DOMAIN and source.op_type in {"NMPrune", *OPS}:
            yield f"its activation {claim.activation!r} is pruned already by {label(source)!r}"
        for node in after.own.values():
            if pattern_of(node) != claim.pattern:
                yield f"op {label(node)!r} keeps {pattern_of(node)}, not {claim.pattern}"
            if node.op_type != claim.kernel:
                yield f"op {label(node)!r} is {node.op_type}, not {claim.kernel}"
            if claim.name not in sites_of(node):
                yield f"op {label(node)!r} does not list it"
            yield from self._faults_of_additions(claim, node, after)

    def _faults_of_additions(self, claim: Claim, node: NodeProto, after: Trail) -> Iterator[str]:
        """What an op takes from the activation must be made up for once: in the op, or behind the layer."""
        shift = self.pair.inputs_of(claim.scope, node).get("shift")
        values = self.pair.constant(shift) if shift else None
        centered = any(a.name == "center" and a.i for a in node.attribute)
        moved = centered or (values is not None and bool(np.any(values)))
        addition = self.pair.additions.get(claim.name)
        if addition is not None:
            self.explained.read.add((claim.scope, addition.total))
        if claim.name in self.claims.fitted:
            if addition is not None and addition.low_of not in ("", claim.activation):
                yield f"its low rank reads {addition.low_of!r}, not its activation"
            biased = any(
                self.claims.constants[n].input == "bias" for _, n in after.leaves if n in self.claims.constants
            )
            if moved and not biased and (addition is None or addition.values is None):
                yield f"op {label(node)!r} moves its activation and nothing makes up for that"
        elif addition is not None and addition.low_of:
            yield "a low rank is added behind it, and no correction of this layer is recorded"
        elif node.op_type in FUSED:
            if addition is not None:
                yield "something is added behind it though its op adds it already"
        elif moved and (addition is None or addition.centered != centered):
            yield f"op {label(node)!r} moves its activation and nothing behind it makes up for that"
        elif addition is not None and not moved:
            yield "something is added behind it though its op does not move the activation"

    def _faults_of_weights(self, claim: Claim, before: Trail, after: Trail) -> Iterator[str]:
        optional = {key for (scope, _), node in after.own.items() for key, _ in self._optional(scope, node)}
        mapped = set()
        for scope, name in after.leaves:
            new = self.pair.old.find(scope, name) is None and name not in self.claims.changed
            declared = self.claims.constants.get(name)
            if new and declared and declared.replaces:
                mapped.add(self.pair.old.find(scope, declared.replaces) or (scope, declared.replaces))
            elif not (new and ((scope, name) in optional or self.folds.is_declared((scope, name)))):
                mapped.add((scope, self.claims.changed.get(name, (name, ""))[0]))
        for (scope, _), node in after.own.items():
            yield from self._faults_of_constants(scope, node)
        yield from self.folds.faults(claim, after, optional)
        strange = mapped - before.leaves if claim.kernel == "NMMatMulNBits" else mapped ^ before.leaves
        if strange:
            names = sorted(name for _, name in strange)
            yield f"it reads other weights than before: {', '.join(names[:4])}"

    def _faults_of_constants(self, scope: str, node: NodeProto) -> Iterator[str]:
        """A new constant may only say what leaving the input out says, or what the file declares."""
        for key, slot in self._optional(scope, node):
            if self.pair.old.find(*key) is not None or key[1] in self.claims.changed:
                continue
            if slot == "dense" and key == dense_key(self.policy):
                continue
            values = self.pair.constant(key)
            declared = self.claims.constants.get(key[1])
            if values is not None and declared and (declared.input, declared.sha256) == (slot, array_sha256(values)):
                self.explained.added.add(key)
                self.explained.replaced.add(declared.replaces)
            elif values is None or not _is_neutral(values, slot):
                yield f"input {slot} of op {label(node)!r} ({key[1]!r}) is new and does something"
            else:
                self.explained.added.add(key)

    def _optional(self, scope: str, node: NodeProto) -> Iterator[tuple[Key, str]]:
        for slot, key in self.pair.inputs_of(scope, node).items():
            if slot not in NEEDED:
                yield key, slot

    def _declared(self) -> Check:
        faults = []
        for name, (source, how) in self.claims.changed.items():
            new, old = self._stored(self.pair.new, name), self._stored(self.pair.old, source)
            if new is None or old is None:
                faults.append(f"{name!r} is declared but {name if new is None else source!r} is not stored")
            elif how == PACKED:
                continue  # `check_stored_weights` reads what they are worth
            elif how != "transposed":
                faults.append(f"{name!r} is declared {how!r}, which is no known change")
            elif not is_transposed(old, self.pair.in_before, new, self.pair.in_after):
                faults.append(f"{name!r} is not {source!r} transposed")
        return counted("declared changes of weights are what they say", len(self.claims.changed), faults, "declared")

    def _stored(self, scopes: Scopes, name: str) -> TensorProto | None:
        return next((s.initializers[name] for s in scopes if name in s.initializers), None)


def pattern_of(node: NodeProto) -> str:
    """ "8:16" or "50%" of a custom op."""
    values = {a.name: a.i for a in node.attribute}
    return pattern_text(values["keep"], values["group"]) if {"keep", "group"} <= values.keys() else "?:?"


def sites_of(node: NodeProto) -> list[str]:
    """The layers that a custom op lists; none when it lists them in no readable way."""
    text = next((p.value for p in node.metadata_props if p.key == "nmonnx.site"), "[]")
    try:
        names = json.loads(text)
    except ValueError:
        return []
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else []


def is_transposed(old: TensorProto, in_old: TensorReader, new: TensorProto, in_new: TensorReader) -> bool:
    """Whether `new` is the 2-D tensor `old` with its axes swapped, bit for bit; compared in blocks of rows."""
    if old.data_type != new.data_type or len(old.dims) != 2 or list(old.dims) != list(new.dims)[::-1]:
        return False
    a, b = in_old.array(old), in_new.array(new)
    bits = f"u{a.itemsize}"
    rows = max(1, (1 << 22) // max(1, a.shape[0]))
    return all(
        np.array_equal(a[:, at : at + rows].T.copy().view(bits), b[at : at + rows].view(bits))
        for at in range(0, b.shape[0], rows)
    )


def _is_neutral(values: np.ndarray, slot: str) -> bool:
    if slot == "order":
        return np.array_equal(values, np.arange(values.size))
    if slot == "threshold":
        return False
    if slot == "zeros":
        return bool((values == DEFAULT_ZERO[4 if values.dtype == np.uint8 else 8]).all())
    return bool((values == (1 if slot == "scale" else 0)).all())
