"""Fold the edits of repeated layers into one line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nmonnx.diff.edits import (
    AttributeEdit,
    Edit,
    MetadataEdit,
    NodeEdit,
    OrderEdit,
    RewireEdit,
    TensorEdit,
    ValueEdit,
)

_NUMBER = re.compile(r"\d+")
_PART = re.compile(r"[/._:]+|[^/._:]+")

Pattern = tuple[tuple[str, ...], ...]
"""A text cut into parts; each part is the tuple of its alternatives."""


@dataclass(frozen=True)
class Fold:
    """Edits that are the same but for the numbers in their names.

    what    the change in words, numbers folded: "node MatMul -> NMMatMul 8:16"
    where   the places, folded: "/model/layers.{0..29}/attn/{q,k,v}_proj/MatMul"
    layers  how many values the first number that varies takes; 1 when none varies or the rows do not agree
    edits   all of them
    """

    kind: str
    change: str
    what: str
    where: tuple[str, ...]
    layers: int
    edits: tuple[Edit, ...]

    @property
    def count(self) -> int:
        return len(self.edits)


def fold(edits: Iterable[Edit]) -> list[Fold]:
    """Group edits, in the order in which each group begins:

    1. Edits that differ only in the numbers of their scope, names and wiring are one row; a number that varies is
       written as its range, {0..29}.
    2. Rows that say the same change are one fold; their places are written with alternatives, {q,k,v}_proj.

    Nothing is dropped: every edit is in exactly one fold.
    """
    rows: dict[tuple[str, ...], list[Edit]] = {}
    for edit in edits:
        rows.setdefault(_row_key(edit), []).append(edit)
    folds: dict[tuple[str, ...], list[_Row]] = {}
    for group in rows.values():
        row = _row(group)
        folds.setdefault((group[0].kind, group[0].change, row.what), []).append(row)
    return [_joined(key, members) for key, members in folds.items()]


@dataclass(frozen=True)
class _Row:
    what: str
    where: Pattern
    layers: int
    edits: tuple[Edit, ...]


def _row_key(edit: Edit) -> tuple[str, ...]:
    fixed, free = _texts(edit)
    return (edit.kind, edit.change, *fixed, *(_NUMBER.sub("#", text) for text in (*_place(edit), *free)))


def _row(group: Sequence[Edit]) -> _Row:
    """One row of edits that share a key: its numbers as ranges."""
    places = [_place(edit) for edit in group]
    columns = _columns(["\n".join(place) for place in places])
    layers = next((len(set(c)) for c in columns if len(set(c)) > 1), 1)
    fixed, _ = _texts(group[0])
    frees = [_texts(edit)[1] for edit in group]
    free = tuple(_ranged([f[i] for f in frees], columns) for i in range(len(frees[0])))
    scope, name = ([place[i] for place in places] for i in (0, 1))
    where = _parts(scope)
    where = (*where, ("|",), *_parts(name)) if scope[0] else _parts(name)
    return _Row(_words(group[0], fixed, free), where, layers, tuple(group))


def _place(edit: Edit) -> tuple[str, str]:
    return edit.scope, edit.name


def _texts(edit: Edit) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what must be equal in a row, what may differ in its numbers); digests and positions may differ freely."""
    before, after = _or_nothing(edit.before), _or_nothing(edit.after)
    match edit:
        case RewireEdit():
            return (edit.op, edit.slot), (before, after)
        case AttributeEdit():
            free = edit.attribute in ("name", "doc_string")
            return (edit.op, edit.attribute, *(() if free else (before, after))), ((before, after) if free else ())
        case MetadataEdit():
            return (edit.owner, edit.key), (before, after)
        case ValueEdit():
            return (edit.role, before, after), ()
        case OrderEdit():
            return (edit.op,), ()
        case _:
            return (before, after), ()


def _or_nothing(text: str | None) -> str:
    return "nothing" if text is None else text


def _words(edit: Edit, fixed: tuple[str, ...], free: tuple[str, ...]) -> str:
    arrow = " -> ".join(free or fixed[-2:])
    alone = (free or fixed)[-1 if edit.change == "added" else -2 :][:1]
    change = arrow if edit.change == "changed" else "".join(alone)
    match edit:
        case RewireEdit():
            return f"{edit.slot} of {edit.op}: {arrow}"
        case AttributeEdit():
            return f"{edit.attribute} of {edit.op}: {arrow}"
        case MetadataEdit():
            return f"metadata {edit.key} of the {edit.owner}: {change}"
        case ValueEdit():
            return f"graph {edit.role}: {change}" if edit.role != "value" else f"value: {change}"
        case OrderEdit():
            return f"order: {edit.op}"
        case TensorEdit():
            return f"initializer {change}" if edit.before != edit.after else f"initializer {edit.after}: other bytes"
        case NodeEdit():
            return f"node {change}"
        case _:
            return f"{edit.kind} {change}"


def _columns(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """The numbers of texts that differ only in numbers: one tuple for each place in the text."""
    return list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))


def _ranged(texts: Sequence[str], known: Sequence[tuple[str, ...]]) -> str:
    """The texts as one, numbers that vary as ranges; one that takes the values of a number of the place in another
    order says so, because then it is not the same number."""
    columns = iter(_columns(texts))

    def text_of(_: re.Match) -> str:
        column = next(columns)
        same_values = any(sorted(column) == sorted(k) for k in known)
        shuffled = len(set(column)) > 1 and same_values and column not in known
        return f"{_range(column)}{' in another order' if shuffled else ''}"

    return _NUMBER.sub(text_of, texts[0])


def _parts(texts: Sequence[str]) -> Pattern:
    columns = iter(_columns(texts))
    parts: list[tuple[str, ...]] = []
    for part in _PART.findall(texts[0]):
        parts.append((_NUMBER.sub(lambda _: _range(next(columns)), part),))
    return tuple(parts)


def _range(column: Sequence[str]) -> str:
    """ "7" when all are the same, "{0..29}" when consecutive, else "{0,4,9}"; long lists are cut."""
    values = sorted(set(column), key=lambda v: (int(v), v))
    if len(values) == 1:
        return values[0]
    numbers = [int(v) for v in values]
    if len(values) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(values)}}}" if len(values) <= 8 else f"{{{','.join(values[:3])},..,{values[-1]}}}"


def _joined(key: tuple[str, ...], rows: Sequence[_Row]) -> Fold:
    kind, change, what = key
    where = tuple("".join(_braced(part) for part in pattern) for pattern in _merged([r.where for r in rows]))
    edits = tuple(edit for row in rows for edit in row.edits)
    layers = {row.layers for row in rows}
    return Fold(kind, change, what, where, layers.pop() if len(layers) == 1 else 1, edits)


def _merged(patterns: Sequence[Pattern]) -> list[Pattern]:
    """Fewer patterns that cover the same texts: those that differ in one part become one with alternatives."""
    merged = list(patterns)
    position = 0
    while position < max(map(len, merged)):
        groups: dict[tuple, list[Pattern]] = {}
        for pattern in merged:
            rest = (*pattern[:position], None, *pattern[position + 1 :])
            groups.setdefault(rest if position < len(pattern) else pattern, []).append(pattern)
        merged = [_union(group, position) for group in groups.values()]
        position += 1
    return merged


def _union(group: Sequence[Pattern], position: int) -> Pattern:
    first = group[0]
    if len(group) == 1:
        return first
    options = tuple(dict.fromkeys(option for pattern in group for option in pattern[position]))
    return (*first[:position], options, *first[position + 1 :])


def _braced(options: tuple[str, ...]) -> str:
    return options[0] if len(options) == 1 else f"{{{','.join(options)}}}"
