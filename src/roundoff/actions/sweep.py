"""What `roundoff sweep` does around `make_runs`: the variants to run, and the report on what has been made of them."""

from __future__ import annotations

from collections.abc import Sequence

from roundoff.config import ConfigError, Experiment, Profile
from roundoff.experiments import load_profile, select, variants
from roundoff.launch.request import RunRequest
from roundoff.parallel.ranks import launched
from roundoff.report.assemble import build_report
from roundoff.report.contents import Report
from roundoff.runs.record import read_run


def swept(names: Sequence[str], profile_name: str, assignments: Sequence[str]) -> list[tuple[Experiment, Profile]]:
    """Every variant and its baseline, each with its profile.

    Raises:
        ConfigError: under torchrun, or if a name or a setting cannot be used.
    """
    if launched():
        raise ConfigError(
            "a sweep makes many runs, but torchrun shares one run among processes: use --workers or --ray"
        )
    return variants(select(names), load_profile(profile_name), assignments)


def report_of(requests: Sequence[RunRequest]) -> Report | None:
    """The report on those of the requested runs that have begun; None if none has."""
    begun = [read_run(request.path) for request in requests if (request.path / "status.json").exists()]
    return build_report(begun) if begun else None
