"""The contents of a report: a row per arm, and what the report says besides.

`assemble` builds them; `words`, `plots` and `render` turn them into sentences, pictures and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from roundoff import stats
from roundoff.report.aqn_table import AqnRow
from roundoff.report.compare import Comparison
from roundoff.report.curves import Curve
from roundoff.report.flips import Flips
from roundoff.report.published import Published
from roundoff.report.scans import Scan
from roundoff.report.settings import SettingsInWords
from roundoff.report.sources import Source
from roundoff.report.status import SeedRow
from roundoff.runs.health import Tally


@dataclass(frozen=True)
class Row:
    """One arm of the report, or a declared experiment without runs."""

    id: str
    """Id of the experiment."""
    title: str
    family: str
    key: str
    """Name that is unique in the report; it is also the anchor in the page."""
    qualifier: str
    """What tells it from other arms with this id: the name of its profile, with the hash of its settings if another arm
    has this id and profile; empty if the id is unique in the report."""
    baseline: str | None
    """Id of the declared baseline."""
    against: str
    """Label of the arm that is the baseline, or its id if there is no such arm; empty if none was declared."""
    settings: SettingsInWords
    seeds: tuple[SeedRow, ...]
    """Its runs."""
    status: str
    """What became of its runs, in words."""
    is_whole: bool
    """Whether every run is complete and scored, and no seed that its family has is missing."""
    start: float | None
    """Mean deployed score before training (fraction)."""
    deployed: stats.Interval | None
    """Deployed score, with the hardware on."""
    clean: stats.Interval | None
    """Clean score, with the hardware off."""
    truncated: float | None
    """Share of first responses that were cut at the length limit (fraction)."""
    flaws: Tally | None
    """Flaws of the responses with the hardware on in the last evaluations."""
    notes: tuple[str, ...]
    """What a reader must know about its score, one sentence each: the parts of it that were not computed."""
    collapsed: tuple[int, ...]
    """Seeds of the runs that collapsed; if there are any, its intervals take two groups for one."""
    comparison: Comparison | None
    """Its comparison with the declared baseline."""
    no_comparison: str
    """Why there is no comparison; empty if there is one or no baseline was declared."""
    is_best: bool
    """Whether it beats every other arm of its family on the same hardware, with every difference excluding zero."""
    best_over_collapsed: int
    """Number of collapsed runs in the comparisons that make it the best; 0 if it is not the best."""
    learning: Curve | None
    """Deployed score over the steps."""
    sigma: Curve | None
    """Sigma of AQN over the steps."""
    diagnostics: dict[str, Curve]
    """Curves of `DIAGNOSTICS` and `CORRECTIONS` by key."""
    flips: Flips | None
    """Problems that it solves and its baseline does not, and the other way round."""
    aqn: AqnRow | None
    """Settings and effect of AQN; None without AQN."""
    published: Published | None
    """The score that others published for an experiment of this id; it is shown beside the others and never used."""

    @property
    def label(self) -> str:
        """Its id, with the profile where that is needed to tell it from other arms."""
        return qualified(self.id, self.qualifier)

    @property
    def name(self) -> str:
        """Its title (or else its id), with the profile where that is needed to tell it from other arms."""
        return qualified(self.title or self.id, self.qualifier)


@dataclass(frozen=True)
class Report:
    """All contents of the written report."""

    rows: tuple[Row, ...]
    sources: tuple[Source, ...]
    skipped: tuple[str, ...]
    """Directories that could not be used, each with the reason."""
    tests: int
    """Number of comparisons that were tested, over which Holm's correction runs."""
    updated: str
    """Time at which a run last changed (UTC)."""
    scans: tuple[Scan, ...] = ()
    """The different SRDD scans that runs depend on."""

    @property
    def families(self) -> dict[str, tuple[Row, ...]]:
        """Rows by family, in order of appearance."""
        families: dict[str, tuple[Row, ...]] = {}
        for row in self.rows:
            families[row.family] = (*families.get(row.family, ()), row)
        return families

    @property
    def runs(self) -> int:
        """Number of runs that are listed, whatever their state."""
        return sum(len(row.seeds) for row in self.rows)


def qualified(name: str, qualifier: str) -> str:
    """The name of an arm with its qualifier, such as `E5 under tiny`, or alone if that is empty."""
    return f"{name} under {qualifier}" if qualifier else name
