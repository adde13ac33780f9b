"""Two open models and the cases that both of them can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nmonnx.bench.subject import Case, Subject
from nmonnx.digest import file_sha256
from nmonnx.errors import InputError, ModelError, UsageError
from nmonnx.library import get_library_path
from nmonnx.onnx_file.graph import read_skeleton


class Pair:
    """The first model and the second, with as many threads."""

    def __init__(self, paths: tuple[Path, Path], threads: int) -> None:
        """Raises UsageError for models that cannot be compared, InputError and ModelError for files that cannot be
        opened."""
        self.threads = threads
        self.subjects = (Subject(paths[0], threads), Subject(paths[1], threads))
        one, other = self.subjects
        self.vocabulary = min(one.vocabulary, other.vocabulary)
        if one.reads_text != other.reads_text:
            reader, blind = (one, other) if one.reads_text else (other, one)
            raise UsageError(
                f"{blind.path} takes no tokens and {reader.path} does, so no call is the same work for both; give two"
                " models of one kind"
            )
        lengths = {s.only_length for s in self.subjects} - {None}
        if len(lengths) > 1:
            raise UsageError(
                f"{one.path} reads {one.only_length} tokens a call and {other.path} {other.only_length}, so they cannot"
                " be compared; export them with a dynamic length"
            )
        self._only = lengths.pop() if lengths else None

    def cases(self, tokens: Sequence[int], past: Sequence[int]) -> tuple[list[Case], list[str]]:
        """What both can run of every combination, and a sentence for each thing that they cannot."""
        notes = []
        if self._only is not None:
            if set(tokens) != {self._only}:
                notes.append(f"The graph reads {self._only} tokens a call; other numbers of tokens are left out.")
            tokens = (self._only,)
        elif not all(s.has_length for s in self.subjects):
            notes.append("The models have no token dimension: the number of tokens is ignored, a call counts as one.")
            tokens = (1,)
        without = [str(s.path) for s in self.subjects if not s.sig.has_cache]
        if without and any(past):
            has = "have" if len(without) > 1 else "has"
            notes.append(f"{' and '.join(without)} {has} no inputs for past tokens, so the past is ignored.")
        past = (0,) if without else past
        context = min((s.context for s in self.subjects if s.context), default=None)
        cases = [Case(self.threads, t, p) for p in past for t in tokens]
        for case in cases:
            if context and case.tokens + case.past > context:
                notes.append(f"Not measured: {case.calls}: the models were made for {context}.")
        return [c for c in cases if not context or c.tokens + c.past <= context], notes

    def runs(self, case: Case) -> list[Callable[[], object]]:
        """A call of each model. Raises InputError with the reason when one of them does not run it."""
        made = []
        for subject in self.subjects:
            try:
                made.append(subject.call(case.tokens, case.past, self.vocabulary))
            except InputError as e:
                raise InputError(f"Not measured: {case.calls}: {subject.path}: {e}.") from e
        return made

    def notes(self) -> list[str]:
        """A sentence for everything in which the second is not simply a conversion of the first."""
        one, other = self.subjects
        return [
            n for n in (_other_inputs(one, other), _other_model(one.path, other.path), _no_library(other.path)) if n
        ]


def _other_inputs(one: Subject, other: Subject) -> str:
    mine, theirs = ({p.name: (p.dtype, p.shape) for p in s.sig.inputs} for s in (one, other))
    names = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if not names:
        return ""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"The models differ in the inputs {shown}; each is given its own, with the same number of tokens."


def _other_model(one: Path, other: Path) -> str:
    if one.resolve() == other.resolve():
        return "Both are the same file: what differs is noise."
    source = _metadata(other).get("nmonnx.source")
    if source is None:
        return f"{other} is not a conversion by nmonnx; the two may do different work."
    if source != file_sha256(one):
        return f"{other} was converted from another file than {one}; the two may do different work."
    return ""


def _no_library(path: Path) -> str:
    if "nmonnx.source" not in _metadata(path):
        return ""
    try:
        get_library_path()
    except ModelError:
        return f"The custom op library is not there: {path} runs on its fallback functions, which skip nothing."
    return ""


def _metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in read_skeleton(path).metadata_props}
