"""What a pass did, and what it left alone with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PassResult:
    """name      the pass
    changed   how many things it changed
    left      site name (or "model") -> why the pass left it alone
    """

    name: str
    changed: int = 0
    left: dict[str, str] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        return self.changed > 0
