"""What a conversion did, as `nmonnx convert` reports it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from nmonnx.pattern import Pattern
from nmonnx.report import Report, counted, table, tally

if TYPE_CHECKING:
    from nmonnx.convert import Conversion

PHASE_CALLS = {"prefill": "several tokens", "decode": "one token"}


def conversion(done: Conversion, verbose: bool = False) -> Report:
    """What was pruned by which op, and what was left and why."""
    pruned = [r for r in done.records if r["status"] == "pruned"]
    left = [r for r in done.records if r["status"] == "left"]
    ops = Counter(r["kernel"] for r in pruned)
    how = " and ".join(f"{count} by {op}" for op, count in sorted(ops.items()))
    words = [f"{len(pruned)} of {len(done.records)} linear layers pruned to {done.recipe.pattern}: {how}."]
    words += _how_chosen(done, pruned)
    words += [f"Left dense: {counted(n, 'layer')} {op}: {why}." for (op, why), n in _why_left(left).items()]
    words += [f"Skipped, not a linear layer: {n} {op}: {why}." for (op, why), n in _no_layers(done).items()]
    words += tally("Prune-only: ", _why_not_fused(done))
    words += [f"Note: {why}." for p in done.passes for where, why in p.left.items() if where == "model"]
    title = f"wrote {done.out}" if done.out else f"would convert {done.source} (dry run, nothing written)"
    groups = Counter((r["role"], r["op"], r["k"], r["n"], r["kernel"]) for r in pruned)
    by_role = table(
        "Pruned layers",
        ("role", "layers", "op", "K", "N", "now"),
        [(role, count, op, k, n, kernel) for (role, op, k, n, kernel), count in groups.items()],
    )
    each = table(
        "Layers",
        ("layer", "role", "K", "N", "now", "weight error", "drops (as it lies, bound)"),
        [(r["name"], r["role"], r["k"], r["n"], _now(r), _error(r), _drops(done, r["name"])) for r in done.records],
    )
    data = {
        "command": "convert",
        "output": str(done.out) if done.out else None,
        "recipe": json.loads(done.recipe.to_json()),
        "sites": list(done.records),
        "passes": [{"name": p.name, "changed": p.changed, "left": p.left, "bytes": p.bytes} for p in done.passes],
    }
    return Report(title, tuple(words), (each if verbose else by_role,), data, (done.source,))


def _how_chosen(done: Conversion, pruned: list[dict[str, Any]]) -> list[str]:
    """What differs from plain magnitude at one pattern."""
    recipe, words = done.recipe, []
    if recipe.prune == "weights":
        words.append(
            "A baseline: weights of small magnitude are 0 in the file, activations are dense, nothing is skipped."
        )
        lost = next(p for p in done.passes if p.name == "prune-weights").left
        words += [f"Left as it is: {name}: {why}." for name, why in lost.items()]
    if recipe.emulated:
        words.append(f"No kernel: {recipe.emulated} is made of stock operators, for research; it saves no time.")
    if recipe.scope != "token":
        words.append(f"The share is kept by {recipe.scope}.")
    if recipe.criterion != "act":
        words.append(f"Criterion {recipe.criterion}, {recipe.share} for the layers of one activation.")
    if recipe.mitigations:
        words.append(f"Mitigations: {', '.join(recipe.mitigations)}.")
    words += _how_corrected(done)
    words += _how_stored(done, pruned)
    words += _which_tokens(done)
    for what in ("shift", "center"):
        unfolded = _left_by(done, f"fold-{what}")
        words += tally(f"Without {what}: ", unfolded)
    if recipe.order != "none":
        words.append(_what_the_order_spares(done))
    patterns = Counter(r["pattern"] for r in pruned)
    if len(patterns) > 1:
        weights = sum(r["k"] * r["n"] for r in pruned)
        kept = {text: Pattern.parse(text) for text in patterns}
        read = sum(r["k"] * r["n"] * kept[r["pattern"]].n / kept[r["pattern"]].m for r in pruned)
        each = ", ".join(f"{p} ({c})" for p, c in sorted(patterns.items(), key=lambda i: kept[i[0]].n))
        words.append(f"Patterns: {each}; {100 * read / weights:.1f} % of the weights are read.")
    plain = Counter(done.plan.plain.values())
    words += tally("By plain magnitude: ", plain)
    return words


def _which_tokens(done: Conversion) -> list[str]:
    """Which tokens stay dense, and the layers that cannot know."""
    recipe, words = done.recipe, []
    if recipe.phase != "both":
        words.append(f"Pruned in {recipe.phase} only: calls with {PHASE_CALLS[recipe.phase]} in a row.")
    if recipe.dense_prefix:
        words.append(f"Dense: the tokens at the first {recipe.dense_prefix} positions.")
    untold = _left_by(done, "dense-tokens")
    return words + tally("In ", untold)


def _now(record: dict[str, Any]) -> str:
    pruned = f"{record['kernel']} {record['pattern']}" if record["status"] == "pruned" else ""
    return pruned or f"left: {record['reason']}"


def _error(record: dict[str, Any]) -> str:
    return f"{record['weight_error']:.2%}" if "weights" in record else ""


def _drops(done: Conversion, name: str) -> str:
    spared = done.plan.lost.get(name)
    return f"{spared.order:.2%} ({spared.lie:.2%}, {spared.bound:.2%})" if spared else ""


def _what_the_order_spares(done: Conversion) -> str:
    lost = list(done.plan.lost.values())
    words = f"Groups are cut along an order of the channels ({done.recipe.order})"
    if not lost:
        return words + "."
    lie, order, bound = (100 * sum(values) / len(lost) for values in zip(*map(astuple, lost), strict=True))
    return (
        f"{words}: pruning drops {order:.2f} % of the squared scores of the calibration tokens, {lie:.2f} % as the"
        f" channels lie; no order drops less than {bound:.2f} % (unstructured). Mean over layers."
    )


def _how_corrected(done: Conversion) -> list[str]:
    from nmonnx.records.corrections import brief

    fold = next((p for p in done.passes if p.name == "fold-corrections"), None)
    if fold is None or not (fold.changed or fold.left):
        return []
    words = [f"Corrections folded: {counted(fold.changed, 'layer')}; {fold.bytes:+,} bytes of weights."]
    return words + tally("Not folded: ", Counter(map(brief, fold.left.values())))


def _how_stored(done: Conversion, pruned: list[dict[str, Any]]) -> list[str]:
    """What the weights that are stored in fewer bits lose."""
    new = [r for r in pruned if "weights" in r]
    if done.recipe.weights == "keep":
        return []
    left = tally("Not stored so: ", _left_by(done, "quantise-weights"))
    if not new:
        return [f"No weight is stored as {done.recipe.weights}.", *left]
    worst = max(new, key=lambda r: r["weight_error"])
    squares = [r["weight_error"] ** 2 for r in new]
    words = (
        f"Weights of {counted(len(new), 'layer')} as {done.recipe.weights}: they differ by"
        f" {100 * math.sqrt(sum(squares) / len(squares)):.2f} % (Frobenius norm, root mean square over layers),"
        f" {100 * worst['weight_error']:.2f} % in the worst, {worst['name']}."
    )
    return [words, *left]


def _why_left(left: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((r["op"], r["reason"]) for r in left)


def _no_layers(done: Conversion) -> Counter[tuple[str, str]]:
    return Counter((s.op, s.reason) for s in done.found.skipped if not s.linear)


def _why_not_fused(done: Conversion) -> Counter[str]:
    return _left_by(done, "fuse-matmul")


def _left_by(done: Conversion, name: str) -> Counter[str]:
    """Reasons of a pass, if it ran."""
    return Counter(why for p in done.passes if p.name == name for why in p.left.values())
