"""What `roundoff recommend` does: finds what the studies measured on a hardware, and prints what helped there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import click

from roundoff.actions.named_hardware import load_hardware
from roundoff.config import NAMES_ONLY, ConfigError, Experiment, Hardware, flatten
from roundoff.experiments import Evidence, evidence, load_experiment, load_profile
from roundoff.report import words
from roundoff.report.chips import same_chip, same_deployment
from roundoff.runs.files import write_atomic

Match = Literal["trained", "deployed"]
"""Whether the studied hardware is the same in every phase, or deployed alike but trained in another way."""
declared = cache(load_experiment)
"""A packaged experiment, which many rows name; its file is read once."""
LISTED = 6
"""Most settings of a remedy that are printed one by one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of a study that concerns the hardware."""

    row: Evidence
    title: str
    settings: tuple[str, ...]
    """What the remedy sets otherwise than its baseline, as `--set` takes it."""
    match: Match
    of_baseline: str
    """Title of the experiment without the remedy."""


def run_recommend(hardware: str, json_file: Path | None) -> None:
    """Print what helped on the hardware with this name, or that nothing did.

    Raises:
        ConfigError: if there is no hardware of that name, or it is plain arithmetic.
    """
    wanted = load_hardware(hardware)
    if wanted.changes_nothing:
        raise ConfigError(f"{hardware} is plain arithmetic, which needs no remedy")
    rows = evidence()
    found = findings(wanted, rows)
    for line in (*describe_costs(wanted, rows), *describe(hardware, found, rows)):
        click.echo(line)
    if json_file is not None:
        content = {"hardware": wanted.model_dump(mode="json"), "findings": [_as_json(one) for one in found]}
        write_atomic(json_file, json.dumps(content, indent=1) + "\n")
        click.echo(f"wrote {json_file}")


def findings(wanted: Hardware, rows: Sequence[Evidence]) -> list[Finding]:
    """The rows whose baseline is this hardware, those that help most first."""
    found = []
    for row in rows:
        new, old = declared(row.experiment), declared(row.baseline)
        if old.hardware.changes_nothing or not same_deployment(wanted, old.hardware):
            continue
        match: Match = "trained" if same_chip(wanted, old.hardware) else "deployed"
        found.append(Finding(row, new.title, changed_settings(new, old), match, old.title))
    return sorted(found, key=lambda one: (one.match != "trained", -one.row.deployed.points))


def changed_settings(new: Experiment, old: Experiment) -> tuple[str, ...]:
    """The settings in which `new` differs from `old`, as `--set` takes them."""

    after, before = (
        flatten(experiment.model_dump(mode="json", exclude=NAMES_ONLY["experiment"], exclude_none=True))
        for experiment in (new, old)
    )
    changed = {path: value for path, value in after.items() if before.get(path) != value}
    gone = {path: "none" for path in before if path not in after and path.startswith("hardware.")}
    return tuple(f"{path}={_value(value)}" for path, value in {**changed, **gone}.items())


def describe_costs(wanted: Hardware, rows: Sequence[Evidence]) -> Iterator[str]:
    """A line for each experiment on this hardware that was compared with plain arithmetic."""
    for row in rows:
        new, old = declared(row.experiment), declared(row.baseline)
        if old.hardware.changes_nothing and same_deployment(wanted, new.hardware):
            yield f"{new.title}: {_points(row)} against plain arithmetic"


def describe(hardware: str, found: Sequence[Finding], rows: Sequence[Evidence]) -> Iterator[str]:
    """The answer, line by line."""
    if not found:
        yield f"No study has measured a remedy on {hardware}."
        yield "Studied, each beside the same without the remedy:"
        yield from (f"  {name:28}  {title}" for name, title in studied(rows).items())
        return
    best = [one for one in found if one.row.deployed.is_shown and one.row.deployed.points > 0]
    scales = dict.fromkeys((one.row.profile, one.row.seeds, one.row.problems, one.row.tests) for one in found)
    if not best:
        yield f"None of {words.number(len(found), 'remedy', 'remedies')} is shown to help on {hardware}."
    else:
        yield f"{len(best)} of {words.number(len(found), 'remedy', 'remedies')} helped on {hardware}:"
    yield ""
    for one in best:
        yield from _row(one)
    for text, chosen in (
        ("Shown to hurt", [one for one in found if one.row.deployed.is_shown and one not in best]),
        (
            "Only a hint, which the correction for the number of tests does not bear out",
            [one for one in found if one.row.deployed.is_hint],
        ),
        ("No effect shown", [one for one in found if not one.row.deployed.is_shown and not one.row.deployed.is_hint]),
    ):
        if chosen:
            yield f"{text}:"
            for one in chosen:
                yield f"  {one.title}: {_points(one.row)}"
            yield ""
    for profile, seeds, problems, tests in scales:
        scale = load_profile(profile)
        yield (
            f"Measured with model {scale.model} on {scale.task.name}, {words.number(seeds, 'seed')}, "
            f"{words.number(problems, 'test problem')}; points of deployed accuracy with 95 % intervals, p "
            f"Holm-corrected over {tests} tests. Another model may answer otherwise."
        )


def studied(rows: Sequence[Evidence]) -> dict[str, str]:
    """The experiments on whose hardware the studies have measured remedies, with their titles."""
    baselines = dict.fromkeys(row.baseline for row in rows)
    experiments = map(declared, baselines)
    return {one.id: one.title for one in experiments if not one.hardware.changes_nothing}


def _row(one: Finding) -> Iterator[str]:
    """A remedy that helped, with what to set."""
    yield f"  {one.title}: {_points(one.row)}"
    if one.match == "deployed":
        yield f"    measured against: {one.of_baseline}"
    if len(one.settings) <= LISTED:
        yield from (f"    --set {text}" for text in one.settings)
    yield f"    declared as {one.row.experiment}, beside {one.row.baseline}"
    yield ""


def _points(row: Evidence) -> str:
    measured = row.deployed
    middle, low, high = (words.points(value / 100) for value in (measured.points, measured.low, measured.high))
    return f"{middle} [{low}, {high}], p {words.p_text(measured.p)}"


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _as_json(one: Finding) -> dict[str, Any]:
    return {**asdict(one.row), "title": one.title, "settings": list(one.settings), "match": one.match}
