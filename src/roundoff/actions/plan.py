"""What `roundoff plan` does: the seeds and problems that an effect needs, or what runs take, before anything is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import RenderableType

from roundoff.config import ConfigError, Experiment, Profile, nearest, steps_per_epoch
from roundoff.experiments import families, load_profile, select, with_overrides
from roundoff.planning.cost_model import Assumptions, CostModel, default_assumptions
from roundoff.planning.cost_table import CostRow, cost_table
from roundoff.planning.machine import find_machine, with_limits
from roundoff.planning.seeds import RunTime, measured_time, measured_variance, seeds_table
from roundoff.planning.shape import model_shape
from roundoff.runs.record import Run, find_runs
from roundoff.tasks import make_task

SIZES = {"gsm8k": (7473, 1319)}
"""Training and test problems of tasks that can be planned for without their data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The command's options; None where one was not given."""

    names: Sequence[str]
    """Ids, families or files of experiments."""
    effect: float | None
    """Difference to be shown (points)."""
    profile_name: str | None
    root: Path
    """Directory that holds the run directories."""
    seeds: int
    """Seeds of each experiment."""
    assignments: Sequence[str]
    power: float
    comparisons: int
    problems: str | None
    """Sizes of the test set, with commas between them."""
    gpus: int | None
    ranks: int
    machine: str | None
    memory: float | None
    """Memory of a device (GB)."""
    prompt_tokens: float | None
    response_tokens: float | None
    config: Path | None
    """A model's `config.json`."""


def plan(options: PlanOptions) -> RenderableType:
    """The table of seeds for an effect, or of time and memory for a profile.

    Raises:
        ConfigError: if an option is missing or cannot be used.
    """
    effect, profile_name, names = options.effect, options.profile_name, options.names
    if effect is None and profile_name is None:
        raise ConfigError("give --effect POINTS, for the seeds it needs, or --profile NAME, for what its runs take")
    gpus = options.gpus or 1
    if gpus % options.ranks:
        raise ConfigError(f"--gpus {gpus} must be a multiple of --ranks {options.ranks}")
    place = options.machine or ("a100-80gb" if options.gpus is not None and effect is None else "here")
    runs = _runs(options.root, profile_name, names if effect is not None else ())
    experiments: list[Experiment] = []
    model: CostModel | None = None
    time = measured_time(runs) if effect is not None else None
    if profile_name is not None:
        declared = select(names, everything=not names)
        experiments, profile = with_overrides(declared, load_profile(profile_name), options.assignments)
        lengths = _lengths(profile, runs, options.prompt_tokens, options.response_tokens)
        if time is None:
            model = _model(profile, place, lengths, options)
    if effect is None:
        assert model is not None  # there is a profile, and no measured time takes the model's place
        return _costs(model, experiments, options.seeds, gpus)
    if model is not None:
        time = _estimated_time(model, experiments)
    return _seeds(effect, runs, time, gpus // options.ranks, options)


def _seeds(
    effect: float, runs: Sequence[Run], time: RunTime | None, workers: int, options: PlanOptions
) -> RenderableType:
    present = {len(run.evaluation(run.status.total_steps).outcomes) for run in runs if run.is_final}
    around = sorted({n for p in present or {1319} for n in (p // 4, p, 4 * p) if n > 1})
    return seeds_table(
        effect / 100,
        measured_variance(runs),
        time,
        problems=_sizes(options.problems) if options.problems else around,
        power=options.power,
        comparisons=options.comparisons,
        workers=workers,
    )


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 1 for part in parts):
        raise ConfigError(f"--problems must read 256 or 256,1024, each at least 2, but is {text!r}")
    return [int(part) for part in parts]


def _runs(root: Path, profile_name: str | None, names: Sequence[str]) -> list[Run]:
    """Runs of one profile, restricted to the named experiments and their baselines.

    Without `profile_name` the profile is the one that most of these runs have.

    Raises:
        ConfigError: if a named experiment has no run.
    """
    runs = find_runs([root])[0] if root.is_dir() else []
    if names:
        meant = {name: families().get(name, (name,)) for name in names}
        absent = [name for name, ids in meant.items() if not any(run.experiment.id in ids for run in runs)]
        if absent:
            known = tuple(dict.fromkeys(run.experiment.id for run in runs))
            raise ConfigError(
                f"there is no run of {', '.join(absent)} in {root}{nearest(absent[0], known)}: how much it varies is "
                "not known"
            )
        kept = {one for ids in meant.values() for one in ids}
        kept |= {run.experiment.baseline for run in runs if run.experiment.id in kept and run.experiment.baseline}
        runs = [run for run in runs if run.experiment.id in kept]
    profiles = Counter(run.profile.name for run in runs)
    chosen = profile_name or (profiles.most_common(1)[0][0] if profiles else "")
    return [run for run in runs if run.profile.name == chosen]


def _estimated_time(model: CostModel, experiments: Sequence[Experiment]) -> RunTime:
    estimates = [model.estimate(e, steps=_steps(model, e)) for e in experiments]
    training = sum(e.steps * e.step for e in estimates) / len(estimates)
    problem = sum(e.evaluations * e.evaluation for e in estimates) / len(estimates) / model.problems[1]
    return RunTime(training, problem, f"estimated for {model.profile.name} on {model.machine.name}, mean of its runs")


def _lengths(profile: Profile, runs: Sequence[Run], prompt: float | None, response: float | None) -> Assumptions:
    assumptions = default_assumptions(profile)
    trained = [run for run in runs if not run.health.untrained]
    measured = [float(row["response_tokens"]) for run in trained for row in run.metrics if "response_tokens" in row]
    if measured and response is None:
        response = sum(measured) / len(measured)
        source = f"response as in {len(trained)} runs, prompt a quarter of the limit"
        assumptions = replace(assumptions, source=source)
    if prompt is not None or response is not None:
        assumptions = replace(
            assumptions,
            prompt_tokens=prompt or assumptions.prompt_tokens,
            response_tokens=response or assumptions.response_tokens,
        )
    if not measured and (prompt or response):
        source = "as given" if prompt and response else "partly given, else a quarter of the limit"
        assumptions = replace(assumptions, source=source)
    return assumptions


def _model(profile: Profile, place: str, lengths: Assumptions, options: PlanOptions) -> CostModel:
    shape = model_shape(profile.model, options.config)
    device = with_limits(find_machine(place), memory_gb=options.memory)
    return CostModel(profile, shape, device, options.ranks, _problems(profile), lengths)


def _problems(profile: Profile) -> tuple[int, int]:
    """Training and test problems of a profile's task; its data are only read where the numbers are not known."""
    given = {name: int(profile.task.settings.get(name, 0)) for name in ("train_problems", "test_problems")}
    if profile.task.name in SIZES:
        train, test = SIZES[profile.task.name]
        return given["train_problems"] or train, given["test_problems"] or test
    if all(given.values()):
        return given["train_problems"], given["test_problems"]
    task = make_task(profile)
    return len(task.train()), len(task.test())


def _steps(model: CostModel, experiment: Experiment) -> int:
    return experiment.epochs * steps_per_epoch(model.problems[0], experiment.algorithm, model.profile.training)


def _costs(model: CostModel, experiments: Sequence[Experiment], seeds: int, gpus: int) -> RenderableType:
    rows = []
    for experiment in experiments:
        estimate = model.estimate(experiment, steps=_steps(model, experiment))
        sampling = estimate.parts["sampling"]
        rows.append(
            CostRow(
                id=experiment.id,
                steps=estimate.steps,
                sampling=sampling,
                updating=estimate.step - sampling,
                evaluation=estimate.evaluation,
                seconds=estimate.seconds,
                memory=estimate.peak,
                parts=estimate.memory,
            )
        )
    shape, machine = model.shape, model.machine
    millions = shape.parameters / 1e6
    size = f"{millions / 1000:.2f} billion" if millions >= 1000 else f"{millions:.3g} million"
    title = (
        f"{model.profile.name}: {shape.name}, {size} parameters in {model.profile.dtype}, on {gpus} x {machine.name}"
    )
    unpriced = [
        e.id
        for e in experiments
        if any(one.accumulator or one.matmul_noise.other_errors for one in e.hardware.variants())
    ]
    assumed = [
        f"{machine.name}: {machine.source}",
        "roundoff's compiled kernels" if machine.compiled else "the plain torch path of formats and noise",
        f"{model.problems[0]:,} training and {model.problems[1]:,} test problems",
        *model.assumptions.lines(),
        "left out: loading, compiling, checkpoints, waiting for the slowest device. A lower bound: the one published "
        "run of the 1.5 B scale, in another system, took 11 times what this model gives (docs/planning.md)",
    ]
    if unpriced:
        assumed.append(
            f"left out, too, in {', '.join(unpriced)}: what hardware.accumulator and errors besides the published "
            "noise add (docs/hardware.md has the measured factors of a small model)"
        )
    return cost_table(title, rows, seeds=seeds, devices=gpus, ranks=model.ranks, limit=machine.memory, assumed=assumed)
