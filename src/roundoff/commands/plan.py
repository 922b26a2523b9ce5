"""`roundoff plan`: how many seeds and problems an effect needs, and what runs take, before anything is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roundoff.commands.options import parse_seeds, runs_option, seeds_option, set_option
from roundoff.commands.terminal import show
from roundoff.config import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from roundoff.config import Experiment, Profile
    from roundoff.planning.cost_model import Assumptions, CostModel
    from roundoff.planning.seeds import RunTime
    from roundoff.runs.record import Run

SIZES = {"gsm8k": (7473, 1319)}
"""Training and test problems of tasks whose data need not be here to plan."""


@click.command("plan")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--effect", type=click.FloatRange(0, 100, min_open=True, max_open=True), help="To be shown (points).")
@click.option("--profile", "profile_name", help="Scale to plan for. [default with --effect: that of the runs]")
@runs_option
@seeds_option
@set_option
@click.option("--power", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.8, show_default=True)
@click.option("--comparisons", type=click.IntRange(min=1), default=1, show_default=True, help="Benefits in the table.")
@click.option("--problems", help="Sizes of the test set, such as 256,1024. [default: around the present one]")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Devices, or runs at a time.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Devices that share a run.")
@click.option("--machine", help="here (measured), or an accelerator by name. [default: here; a100-80gb with --gpus]")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help="Memory of a device instead (GB).")
@click.option("--prompt-tokens", type=click.FloatRange(min=1), help="Mean length of a prompt.")
@click.option("--response-tokens", type=click.FloatRange(min=1), help="Mean length of a response.")
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The model's config.json.")
@click.pass_context
def plan_command(
    context: click.Context,
    names: Sequence[str],
    effect: float | None,
    profile_name: str | None,
    root: Path,
    seeds: str,
    assignments: Sequence[str],
    power: float,
    comparisons: int,
    problems: str | None,
    gpus: int,
    ranks: int,
    machine: str | None,
    memory: float | None,
    prompt_tokens: float | None,
    response_tokens: float | None,
    config: Path | None,
) -> None:
    """Say what evidence costs: with --effect, the seeds and problems that it takes to show a difference as variable as
    those of the experiments NAME; with --profile alone, their time and memory (default: all experiments).
    """
    from roundoff.experiments import load_profile, select, with_overrides

    if effect is None and profile_name is None:
        raise ConfigError("give --effect POINTS, for the seeds it needs, or --profile NAME, for what its runs take")
    if gpus % ranks:
        raise ConfigError(f"--gpus {gpus} must be a multiple of --ranks {ranks}")
    is_given = context.get_parameter_source("gpus") is not click.core.ParameterSource.DEFAULT
    place = machine or ("a100-80gb" if is_given and effect is None else "here")
    runs = _runs(root, profile_name, names if effect is not None else ())
    if profile_name is not None:
        experiments, profile = with_overrides(
            select(names, everything=not names), load_profile(profile_name), assignments
        )
        lengths = _lengths(profile, runs, prompt_tokens, response_tokens)
    if effect is not None:
        from roundoff.planning.seeds import measured_time

        time = measured_time(runs)
        if time is None and profile_name is not None:
            time = _estimated_time(_model(profile, place, ranks, memory, lengths, config), experiments)
        show(_seeds(effect, runs, time, power, comparisons, problems, gpus // ranks))
        return
    model = _model(profile, place, ranks, memory, lengths, config)
    show(_costs(model, experiments, len(parse_seeds(seeds)), gpus))


def _seeds(
    effect: float, runs: Sequence[Run], time: RunTime | None, power: float, comparisons: int, sizes: str | None, at: int
) -> RenderableType:
    from roundoff.planning.seeds import measured_variance, seeds_table

    present = {len(run.evaluation(run.status.total_steps).outcomes) for run in runs if run.is_final}
    wanted = _sizes(sizes) if sizes else sorted({n for p in present or {1319} for n in (p // 4, p, 4 * p) if n > 1})
    return seeds_table(
        effect / 100,
        measured_variance(runs),
        time,
        problems=wanted,
        power=power,
        comparisons=comparisons,
        workers=at,
    )


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 1 for part in parts):
        raise ConfigError(f"--problems must read 256 or 256,1024, each at least 2, but is {text!r}")
    return [int(part) for part in parts]


def _runs(root: Path, profile_name: str | None, names: Sequence[str]) -> list[Run]:
    """Runs of one profile (the one of most runs, unless it is named), of the experiments named and their baselines.

    Raises:
        ConfigError: if one is named that has no run.
    """
    from roundoff.runs.record import find_runs

    found = find_runs([root])[0] if root.is_dir() else []
    if names:
        from roundoff.experiments import families

        meant = {name: families().get(name, (name,)) for name in names}
        absent = [name for name, ids in meant.items() if not any(run.experiment.id in ids for run in found)]
        if absent:
            known = tuple(dict.fromkeys(run.experiment.id for run in found))
            raise ConfigError(
                f"there is no run of {', '.join(absent)} in {root}{nearest(absent[0], known)}: how much it varies is "
                "not known"
            )
        wanted = {one for ids in meant.values() for one in ids}
        wanted |= {run.experiment.baseline for run in found if run.experiment.id in wanted and run.experiment.baseline}
        found = [run for run in found if run.experiment.id in wanted]
    profiles = Counter(run.profile.name for run in found)
    chosen = profile_name or (profiles.most_common(1)[0][0] if profiles else "")
    return [run for run in found if run.profile.name == chosen]


def _estimated_time(model: CostModel, experiments: Sequence[Experiment]) -> RunTime:
    from roundoff.planning.seeds import RunTime

    found = [model.estimate(e, steps=_steps(model, e)) for e in experiments]
    training = sum(e.steps * e.step for e in found) / len(found)
    problem = sum(e.evaluations * e.evaluation for e in found) / len(found) / model.problems[1]
    return RunTime(training, problem, f"estimated for {model.profile.name} on {model.machine.name}, mean of its runs")


def _lengths(profile: Profile, runs: Sequence[Run], prompt: float | None, response: float | None) -> Assumptions:
    from roundoff.planning.cost_model import default_assumptions

    found = default_assumptions(profile)
    trained = [run for run in runs if not run.health.untrained]
    measured = [float(row["response_tokens"]) for run in trained for row in run.metrics if "response_tokens" in row]
    if measured and response is None:
        response = sum(measured) / len(measured)
        found = replace(found, source=f"response as in {len(trained)} runs, prompt a quarter of the limit")
    if prompt is not None or response is not None:
        found = replace(
            found, prompt_tokens=prompt or found.prompt_tokens, response_tokens=response or found.response_tokens
        )
    if not measured and (prompt or response):
        found = replace(
            found, source="as given" if prompt and response else "partly given, else a quarter of the limit"
        )
    return found


def _model(
    profile: Profile, place: str, ranks: int, memory: float | None, lengths: Assumptions, config: Path | None
) -> CostModel:
    from roundoff.planning.cost_model import CostModel
    from roundoff.planning.machine import find_machine, with_limits
    from roundoff.planning.shape import model_shape

    shape = model_shape(profile.model, config)
    device = with_limits(find_machine(place), memory_gb=memory)
    return CostModel(profile, shape, device, ranks, _problems(profile), lengths)


def _problems(profile: Profile) -> tuple[int, int]:
    """Training and test problems of a profile's task, without its data where the task is known."""
    given = {name: int(profile.task.settings.get(name, 0)) for name in ("train_problems", "test_problems")}
    if profile.task.name in SIZES:
        train, test = SIZES[profile.task.name]
        return given["train_problems"] or train, given["test_problems"] or test
    if all(given.values()):
        return given["train_problems"], given["test_problems"]
    from roundoff.tasks import make_task

    task = make_task(profile)
    return len(task.train()), len(task.test())


def _steps(model: CostModel, experiment: Experiment) -> int:
    from roundoff.config import steps_per_epoch

    return experiment.epochs * steps_per_epoch(model.problems[0], experiment.algorithm, model.profile.training)


def _costs(model: CostModel, experiments: Sequence[Experiment], seeds: int, gpus: int) -> RenderableType:
    from roundoff.planning.cost_table import CostRow, cost_table

    rows = []
    for experiment in experiments:
        found = model.estimate(experiment, steps=_steps(model, experiment))
        sampling = found.parts["sampling"]
        rows.append(
            CostRow(
                id=experiment.id,
                steps=found.steps,
                sampling=sampling,
                updating=found.step - sampling,
                evaluation=found.evaluation,
                seconds=found.seconds,
                memory=found.peak,
                parts=found.memory,
            )
        )
    shape, machine = model.shape, model.machine
    millions = shape.parameters / 1e6
    size = f"{millions / 1000:.2f} billion" if millions >= 1000 else f"{millions:.3g} million"
    title = (
        f"{model.profile.name}: {shape.name}, {size} parameters in {model.profile.dtype}, on {gpus} x {machine.name}"
    )
    assumed = [
        f"{machine.name}: {machine.source}",
        "roundoff's compiled kernels" if machine.compiled else "the plain torch path of formats and noise",
        f"{model.problems[0]:,} training and {model.problems[1]:,} test problems",
        *model.assumptions.lines(),
        "left out: loading, compiling, checkpoints, waiting for the slowest device. A lower bound: the one published "
        "run of the 1.5 B scale, in another system, took 11 times what this model gives (docs/planning.md)",
    ]
    return cost_table(title, rows, seeds=seeds, devices=gpus, ranks=model.ranks, limit=machine.memory, assumed=assumed)
