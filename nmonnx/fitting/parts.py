"""What a fit has found so far, on disk, so that memory stays flat and a run that was cut short can go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nmonnx.errors import UsageError
from nmonnx.pruning.recipe import Recipe
from nmonnx.records.corrections import Correction, Corrections


class Parts:
    """The groups that are fitted, each a file in the folder OUT.partial, for a run that is started again."""

    def __init__(self, out: Path, fingerprint: str, source: str, recipe: Recipe, prunes: Mapping[str, str]) -> None:
        self._prunes = prunes
        self._folder, self._source, self._recipe = out.with_name(f"{out.stem}.partial"), source, recipe.to_json()
        self._mark = fingerprint
        self._files: list[Path] = []
        known = self._folder / "fingerprint"
        if not (known.is_file() and known.read_text() == fingerprint):
            shutil.rmtree(self._folder, ignore_errors=True)
            try:
                self._folder.mkdir()
                known.write_text(fingerprint)
            except OSError as e:
                raise UsageError(f"the folder {self._folder} cannot be made: {e.strerror}") from e

    def has(self, number: int) -> bool:
        file = self._file(number)
        if file.is_file():
            self._files.append(file)
        return file.is_file()

    def keep(self, number: int, fitted: Iterator[tuple[str, Correction | None, str]]) -> None:
        sites, refused = {}, {}
        for name, correction, reason in fitted:
            if correction is None:
                refused[name] = reason
            else:
                sites[name] = correction
        Corrections(sites, self._source, self._recipe, "", refused).save(self._file(number))
        self._files.append(self._file(number))

    def join(self, out: Path, protocol: str, unseen: Mapping[str, str]) -> Corrections:
        """All of it in one file, read back a site at a time; the folder goes away."""
        parts = [Corrections.load(file) for file in self._files]
        refused = dict(unseen)
        for part in parts:
            refused |= part.refused
        Corrections(_Joined(parts), self._source, self._recipe, protocol, refused, self._prunes).save(out)
        shutil.rmtree(self._folder, ignore_errors=True)
        return Corrections.load(out)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.npz"


class _Joined(Mapping[str, Correction]):
    def __init__(self, parts: Sequence[Corrections]) -> None:
        self._home = {name: part for part in parts for name in part.sites}

    def __getitem__(self, name: str) -> Correction:
        return self._home[name].sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)
