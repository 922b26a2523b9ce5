"""What `roundoff scan` does: measures which layers of a model a format, noise or a fault damages, and prints it.

Options are checked before torch is imported, so that a wrong one is refused at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from roundoff.actions.named_hardware import load_hardware
from roundoff.actions.terminal import show
from roundoff.aqn.multipliers import DIRECTIONS, MODES
from roundoff.config import (
    ConfigError,
    Hardware,
    MatmulNoise,
    Precision,
    Task,
    activation_format,
    known_format,
    nearest,
    validate,
)
from roundoff.experiments import load_profile
from roundoff.report.scan_picture import scan_picture
from roundoff.report.scan_tables import fault_lines, frontier_table, linear_table, scan_table
from roundoff.runs.files import write_atomic
from roundoff.tasks import make_task

if TYPE_CHECKING:
    from torch import Tensor

    from roundoff.models.load import LoadedModel
    from roundoff.models.prompts import Asked
    from roundoff.srdd import LayerScan

DEFAULT_FORMAT = "mxfp4"
LINEARS_SHOWN = 8
"""Linears in the table of the most damaged ones."""
DEFAULT_REPLAYS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanOptions:
    """The command's options; None where one was not given."""

    model: str
    both: str | None
    """Format of weights and activations."""
    weight: str | None
    activation: str | None
    noise: float | None
    """Relative standard deviation of matmul noise (fraction)."""
    hardware: str | None
    """Name of hardware, instead of the four above."""
    profile_name: str
    task: str | None
    texts: Path | None
    """A file of texts, one a line."""
    tokens: int
    """Calibration tokens."""
    rank_by: str | None
    gradient: bool
    exact: bool
    frontier: bool
    multipliers: str | None
    """Mode of AQN's multipliers."""
    direction: str
    faults: bool
    """Whether to look for faults of this machine instead."""
    replays: int | None
    dtype: str
    device: str
    allow_download: bool
    seed: int
    json_file: Path | None
    picture: Path | None


@dataclass(frozen=True, slots=True)
class ModelAndTexts:
    """A model and the batches of texts that it is scanned on."""

    loaded: LoadedModel
    batches: list[dict[str, Tensor]]
    """Batches that the ranking rests on."""
    fresh: list[dict[str, Tensor]]
    """Batches of other texts, for the frontier; empty without one."""


def run_scan(options: ScanOptions) -> int:
    """Scan the model, or look for faults of this machine; print what was found and return the exit code.

    The code is 1 if a fault was found, else 0.

    Raises:
        ConfigError: if an option cannot be used, or does nothing beside the others.
    """
    check_options(options)
    if options.faults:
        return _print_faults(options)
    hardware, title = chosen_hardware(options)
    _print_scan(hardware, title, options)
    return 0


def check_options(options: ScanOptions) -> None:
    """Refuse unknown modes and directions, and options that would do nothing beside the others.

    Raises:
        ConfigError: naming them.
    """
    only_of_a_scan = {
        "--format": options.both,
        "--rank-by": options.rank_by,
        "--frontier": options.frontier,
        "--multipliers": options.multipliers,
        "--weight": options.weight,
        "--activation": options.activation,
        "--noise": options.noise,
        "--hardware": options.hardware,
        "--exact": options.exact,
        "--picture": options.picture,
    }
    idle = [option for option, value in only_of_a_scan.items() if value not in (None, False)]
    if options.faults and idle:
        raise ConfigError(f"--faults looks for faults of this machine as it is: leave out {', '.join(idle)}")
    if options.replays is not None and not options.faults:
        raise ConfigError("--replays is an option of --faults, and does nothing to a scan of a format: leave it out")
    if options.direction != DIRECTIONS[0] and options.multipliers is None:
        raise ConfigError("--direction does nothing without --multipliers: give --multipliers too")
    mode, direction = options.multipliers, options.direction
    if mode is not None and mode not in MODES:
        raise ConfigError(f"--multipliers must be one of {', '.join(MODES)}, but is {mode!r}{nearest(mode, MODES)}")
    if direction not in DIRECTIONS:
        raise ConfigError(f"--direction must be one of {', '.join(DIRECTIONS)}, but is {direction!r}")


def chosen_hardware(options: ScanOptions) -> tuple[Hardware, str]:
    """The hardware that the options name, and its name.

    Raises:
        ConfigError: if they contradict one another, or a format or the noise cannot be used.
    """
    formats = {"--format": options.both, "--weight": options.weight, "--activation": options.activation}
    none_given = not any(value is not None for value in (*formats.values(), options.noise))
    if options.hardware is not None:
        if not none_given:
            raise ConfigError("--hardware names formats and noise already: leave out --format, --weight, ...")
        return load_hardware(options.hardware), options.hardware
    if options.both is not None and (options.weight is not None or options.activation is not None):
        raise ConfigError("--format sets weights and activations: use either it, or --weight and --activation")
    both = DEFAULT_FORMAT if none_given else options.both
    given = {"weight": options.weight or both, "activation": options.activation or both}
    for option, name in formats.items():
        try:
            if name is not None:
                known_format(name) if option == "--weight" else activation_format(name)
        except ValueError as error:
            raise ConfigError(f"{option} {error}, but is {name!r}") from None
    precision = Precision.model_validate(given)
    noise = validate(MatmulNoise, {"relative_std": options.noise or 0.0}, source="--noise")
    parts = [f"{kind} {name}" for kind in ("weight", "activation") if (name := getattr(precision, kind))]
    if noise.relative_std:
        parts.append(f"noise {noise.relative_std:g}")
    return Hardware(precision=precision, matmul_noise=noise), ", ".join(parts)


def _open(options: ScanOptions) -> ModelAndTexts:
    """Load the model, and the texts of the task: prompts, each with a worked solution where the task knows one."""
    import torch

    from roundoff.models.calibration import calibration_texts
    from roundoff.models.device import resolve_device
    from roundoff.models.load import load_model
    from roundoff.models.prompts import check_asked

    profile = load_profile(options.profile_name)
    if options.task is not None:
        profile = profile.model_copy(update={"task": Task(name=options.task)})
    if options.texts is not None:
        texts: list[Asked] = [*_lines(options.texts)]
    else:
        texts = [*calibration_texts(make_task(profile))]
    loaded = load_model(
        options.model,
        dtype=getattr(torch, options.dtype),
        device=resolve_device(options.device),
        allow_download=options.allow_download,
        chat=profile.chat,
    )
    check_asked(loaded, texts[: 2 * options.tokens])  # each holds at least one token
    batches = _batches(loaded, texts, options)
    used = sum(len(batch["input_ids"]) for batch in batches)
    if not options.frontier:
        return ModelAndTexts(loaded, batches, [])
    if len(texts) <= used:
        raise ConfigError(f"--frontier needs texts that the ranking did not see, but all {len(texts)} were: give more")
    return ModelAndTexts(loaded, batches, _batches(loaded, texts[used:], options))


def _batches(loaded: LoadedModel, texts: list[Asked], options: ScanOptions) -> list[dict[str, Tensor]]:
    from roundoff.models.calibration import SCAN_BATCHES, calibration_batches

    return calibration_batches(loaded.tokenizer, texts, max_tokens=options.tokens, batches=SCAN_BATCHES)


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty: each is one text, so that those used can be counted."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--texts {path} is not UTF-8: {error}") from None
    return [line for line in lines if line.strip()]


def _print_scan(hardware: Hardware, title: str, options: ScanOptions) -> None:
    from roundoff.srdd import scan

    opened = _open(options)
    result = scan(
        opened.loaded.model,
        opened.batches,
        hardware,
        gradient=options.gradient,
        exact=options.exact,
        rank_by=options.rank_by,
        seed=options.seed,
    )
    data = {"model": options.model, "title": title, **result.to_json()}
    show(scan_table(data, f"{options.model}: {title}, {result.tokens} tokens"))
    if (linears := linear_table(data, LINEARS_SHOWN)) is not None:
        show(linears)
    click.echo(f"ranking by {data['metrics'][result.rank_by]['title']}: {', '.join(map(str, result.ranking()))}")
    agreement = result.agreement()
    if agreement is not None:
        click.echo(f"rank correlation of the two halves of the text: {agreement:.2f}")
    for warning in result.warnings():
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    if options.multipliers is not None:
        factors = result.multipliers(options.multipliers, direction=options.direction)
        data["multipliers"] = {"mode": options.multipliers, "direction": options.direction, "layers": factors}
        click.echo(f"{options.multipliers}: " + ", ".join(f"{layer}: {value:.3g}" for layer, value in factors.items()))
    if options.frontier:
        data["frontier"] = _print_frontier(opened, result, options.seed)
    if options.picture is not None:
        _write(options.picture, scan_picture(data, f"{options.model}: {title}"))
    _write_json(options.json_file, data)


def _print_frontier(opened: ModelAndTexts, result: LayerScan, seed: int) -> list[dict[str, Any]]:
    from roundoff.srdd import frontier

    count = len(result.layers)
    ks = sorted({k for k in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, count // 2) if k < count})
    points = [
        {"k": p.k, "kept": list(p.kept), "kl": p.divergence.kl, "se": p.divergence.se}
        for p in frontier(opened.loaded.model, opened.fresh, result, ks, seed=seed)
    ]
    show(frontier_table(points))
    return points


def _print_faults(options: ScanOptions) -> int:
    """Print the alarms; returns 1 if there are any."""
    from roundoff.srdd import find_faults

    opened = _open(options)
    replays = DEFAULT_REPLAYS if options.replays is None else options.replays
    report = find_faults(opened.loaded.model, opened.batches, replays=replays, seed=options.seed)
    data = {"model": options.model, **report.to_json()}
    for line in fault_lines(data):
        click.echo(line)
    _write_json(options.json_file, data)
    return 1 if report.alarms else 0


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        _write(path, json.dumps(data, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    write_atomic(path, text)
    click.echo(f"wrote {path}")
