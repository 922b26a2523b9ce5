"""The report of a fault search: its alarms, what it checked, and the odds of having met an intermittent error."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Alarm:
    """One check that failed at one site."""

    check: str
    """Name of the check, as in `roundoff.srdd.checks`."""
    site: str
    """Dotted name of the Linear or of the decoder layer."""
    layer: int | None
    """Index of the decoder layer; None outside the layers."""
    value: float
    """What the check measured, in the unit of `limit`."""
    limit: float
    """Value above which the check raises an alarm."""
    detail: str
    """The finding in words."""


@dataclass(frozen=True, slots=True)
class FaultReport:
    """The result of `find_faults`."""

    alarms: tuple[Alarm, ...]
    """Alarms in forward order."""
    checked: tuple[str, ...]
    """Sites that were checked."""
    unchecked: tuple[str, ...]
    """What could not be checked, each with the reason."""
    calls: int = 0
    """How often each product was computed and compared: once per batch, and `replays` more times."""

    def odds(self, share: float) -> float:
        """Probability that an error in this share of a unit's calls was met at least once."""
        return 1.0 - (1.0 - share) ** self.calls

    @property
    def suspect(self) -> Alarm | None:
        """The first alarm; None if there is none."""
        return self.alarms[0] if self.alarms else None

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, with the name of the suspect site."""
        return asdict(self) | {"suspect": None if self.suspect is None else self.suspect.site}
