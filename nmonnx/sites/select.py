"""`select`: which of the linear layers found are to be pruned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nmonnx.errors import UsageError
from nmonnx.sites.site import ROLES, Found, Site, Skipped

_LM_HEAD = "lm_head is left dense unless asked for (--lm-head)"


@dataclass(frozen=True)
class Selection:
    """`chosen` and `left` together are every linear layer with a constant weight."""

    chosen: tuple[Site, ...]
    left: tuple[Skipped, ...]


def select(
    found: Found, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), lm_head: bool = False
) -> Selection:
    """Apply selectors: a role ("down", "role:down"), "block:0" or "block:0-3", "op:Gemm", "re:REGEX", or a glob
    on node, site, module or initializer names; "q|k|v" is any of several roles or globs.

    1. Without `include` every site is chosen but lm_head, unless `lm_head`.
    2. With `include` those it matches are; lm_head only by a selector that matches nothing else, or `lm_head`.
    3. `exclude` wins.
    4. Sites behind one quantiser, or on one input of a call, go together: if one of them is left, all are.

    Raises UsageError for a selector that matches no linear layer, or that cannot be read.
    """
    wanted = [_Selector(s, found, "--include") for s in include]
    unwanted = [_Selector(s, found, "--exclude") for s in exclude]
    reasons = [_reason(site, wanted, unwanted, lm_head) for site in found.sites]
    reasons = _together(found.sites, reasons)
    chosen = tuple(s for s, reason in zip(found.sites, reasons, strict=True) if not reason)
    left = tuple(s for s in found.skipped if s.linear)
    dense = tuple(_left(s, reason) for s, reason in zip(found.sites, reasons, strict=True) if reason)
    return Selection(chosen, dense + left)


def block_selectors(found: Found, blocks: Sequence[int]) -> list[str]:
    """Selectors of blocks by number, -1 the last. Raises UsageError for a block that the model has not."""
    layers: list[Site | Skipped] = [*found.sites, *found.skipped]
    count = 1 + max((s.block for s in layers if s.block is not None), default=-1)
    for block in blocks:
        if not -count <= block < count:
            raise UsageError(f"dense block {block}: the model has {count} blocks that are known")
    return [f"block:{block % count}" for block in blocks]


def matching(found: Found, selector: str, flag: str) -> list[str]:
    """Names of the sites that a selector matches. Raises UsageError when it matches no linear layer; `flag` says
    where it was given."""
    chosen = _Selector(selector, found, flag)
    return [site.name for site in found.sites if chosen.matches(site)]


_PACKED = {**dict.fromkeys("qkv", "qkv"), "gate": "gate_up", "up": "gate_up"}
"""Roles that some models have in one layer."""


class _Selector:
    """One selector, checked against the model."""

    def __init__(self, text: str, found: Found, flag: str) -> None:
        self.text = text
        self.matches = _matcher(text, flag)
        linears: list[Site | Skipped] = [*found.sites, *(s for s in found.skipped if s.linear)]
        here, roles = {s.role for s in linears}, {s.role for s in linears if self.matches(s)}
        if not roles:
            packed = f"{text} lies in {_PACKED[text]!r}; " if _PACKED.get(text) in here else ""
            raise UsageError(f"{flag} {text!r} matches no linear layer; {packed}{_what_is_there(linears)}")
        self.names_lm_head = roles == {"lm_head"}


def _matcher(text: str, flag: str) -> Callable[[Site | Skipped], bool]:
    kind, colon, rest = text.partition(":")
    if colon and kind == "re":
        try:
            pattern = re.compile(rest)
        except re.error as e:
            raise UsageError(f"{flag} {text!r} is not a regular expression: {e}") from e
        return lambda s: any(pattern.search(t) for t in s.texts)
    if colon and kind == "op":
        return lambda s: s.op.lower() == rest.lower()
    if colon and kind == "role":
        if rest not in ROLES:
            raise UsageError(f"{flag} {text!r}: roles are {', '.join(ROLES)}")
        return lambda s: s.role == rest
    if colon and kind == "block":
        blocks = re.fullmatch(r"(\d+)(?:-(\d+))?", rest)
        if not blocks:
            raise UsageError(f"{flag} {text!r}: write block:3 or block:0-3")
        first, last = int(blocks[1]), int(blocks[2] or blocks[1])
        return lambda s: s.block is not None and first <= s.block <= last
    names = (text, *text.split("|"))
    return lambda s: s.role in names or any(t == n or fnmatchcase(t, n) for t in s.texts for n in names)


def _what_is_there(linears: list[Site | Skipped]) -> str:
    if not linears:
        return "the model has none"
    roles = ", ".join(f"{role} ({count})" for role, count in sorted(Counter(s.role for s in linears).items()))
    return f"roles here: {roles}; a name: {linears[0].name!r}"


def _reason(site: Site, include: list[_Selector], exclude: list[_Selector], lm_head: bool) -> str:
    """Why a site is left, "" when it is chosen."""
    against = next((s for s in exclude if s.matches(site)), None)
    if against:
        return f"excluded by {against.text!r}"
    if site.role == "lm_head":
        asked = lm_head or any(s.names_lm_head and s.matches(site) for s in include)
        return "" if asked else _LM_HEAD
    return "" if not include or any(s.matches(site) for s in include) else "not selected by --include"


def _together(sites: tuple[Site, ...], reasons: list[str]) -> list[str]:
    dense = {_spliced(site): site for site, reason in zip(sites, reasons, strict=True) if reason}

    def reason_of(site: Site, reason: str) -> str:
        other, shared = dense.get(_spliced(site)), "call" if site.splice[0][0] is site.node else "quantiser"
        return reason or (f"shares its {shared} with {other.name!r}, which is left" if other else "")

    return [reason_of(site, reason) for site, reason in zip(sites, reasons, strict=True)]


def _spliced(site: Site) -> tuple[int, int]:
    node, index = site.splice[0]
    return id(node), index


def _left(site: Site, reason: str) -> Skipped:
    return Skipped(
        name=site.name,
        scope=site.scope,
        op=site.op,
        reason=reason,
        linear=True,
        output=site.output,
        k=site.k,
        n=site.n,
        role=site.role,
        block=site.block,
        texts=site.texts,
    )
