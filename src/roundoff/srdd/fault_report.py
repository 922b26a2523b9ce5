"""What a fault scan says: its alarms, what it checked, and the odds of having met an error that comes and goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Alarm:
    """One check that failed at one site."""

    check: str
    site: str
    """Dotted name of the Linear or of the decoder layer."""
    layer: int | None
    value: float
    limit: float
    detail: str


@dataclass(frozen=True, slots=True)
class FaultReport:
    """What a fault scan found."""

    alarms: tuple[Alarm, ...]
    """In forward order."""
    checked: tuple[str, ...]
    """Sites that were checked."""
    unchecked: tuple[str, ...]
    """What could not be checked, each with the reason."""
    calls: int = 0
    """How often each product was computed and compared: once a batch, and `replays` times again."""

    def odds(self, share: float) -> float:
        """Probability that an error in this share of a unit's calls (fraction) was met at least once."""
        return 1.0 - (1.0 - share) ** self.calls

    @property
    def suspect(self) -> Alarm | None:
        """The first alarm; None on a machine without a finding."""
        return self.alarms[0] if self.alarms else None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self) | {"suspect": None if self.suspect is None else self.suspect.site}
