"""What a pass did, and what it left alone with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PassResult:
    """name      the pass
    changed   how many things it changed
    left      site name (or "model") -> why the pass left it alone
    bytes     how much larger it made the weights of the model
    """

    name: str
    changed: int = 0
    left: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    @property
    def modified(self) -> bool:
        return self.changed > 0
