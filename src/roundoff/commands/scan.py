"""`roundoff scan`: which layers of a model a format, noise or a fault damages. Torch is imported when it runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from roundoff.commands.options import check_new_file
from roundoff.commands.terminal import show
from roundoff.config import ConfigError, Hardware, MatmulNoise, Precision, validate
from roundoff.runs.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from roundoff.models.load import LoadedModel
    from roundoff.srdd import LayerScan

DEFAULT_FORMAT = "mxfp4"
LINEARS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scanned, on which texts."""

    loaded: LoadedModel
    batches: list[dict[str, Tensor]]
    fresh: list[dict[str, Tensor]]
    """Texts that no ranking sees, for the frontier."""


@click.command("scan")
@click.argument("model")
@click.option("--format", "both", help="Format of weights and activations. [default: mxfp4]")
@click.option("--weight", help="Format of weights alone.")
@click.option("--activation", help="Format of activations alone.")
@click.option("--noise", type=float, help="Relative standard deviation of matmul noise (fraction; 5 % is 0.05).")
@click.option("--hardware", help="Hardware of an experiment or a TOML file, instead of the four options above.")
@click.option("--profile", "profile_name", default="tiny", show_default=True, help="Profile whose task is asked.")
@click.option("--task", help="Another task, with its default settings.")
@click.option("--texts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One text a line instead.")
@click.option("--tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Calibration tokens.")
@click.option("--rank-by", help="Metric that ranks. [default: gradient; shadow without it]")
@click.option("--gradient/--no-gradient", default=True, help="Measure the gradient score (a backward pass).")
@click.option("--exact", is_flag=True, help="Measure the KL when each layer alone is perturbed (a pass a layer).")
@click.option("--frontier", "with_frontier", is_flag=True, help="Print KL against the number of kept layers.")
@click.option("--multipliers", "mode", help="Print AQN's multipliers: targeted, variable, proportional, inverse, ...")
@click.option("--direction", default="sensitive", show_default=True, help="End the ranking starts at, or: robust.")
@click.option("--faults", is_flag=True, help="Look for faults of this machine instead.")
@click.option("--replays", type=click.IntRange(min=0), help="Of --faults: repeats of each product. [default: 2]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, npu or mps.")
@click.option("--allow-download", is_flag=True, help="Fetch MODEL from the hub if it is a hub name.")
@click.option("--seed", default=0, show_default=True, help="Of noise, drawn labels and checksums.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything as JSON.")
@click.option("--picture", type=click.Path(path_type=Path), help="Write layers x metrics as SVG.")
def scan_command(model: str, **options: Any) -> None:
    """Measure what a format or matmul noise does to every decoder layer and Linear of MODEL.

    MODEL is `tiny`, a directory or a hub name. Two halves of the task's texts are ranked apart and compared.
    """
    for option, name in (("json_file", "--json"), ("picture", "--picture")):
        if options[option] is not None:
            check_new_file(options[option], name)
    _check_idle(options)
    if options["faults"]:
        _find_faults(model, options)
        return
    hardware, title = chosen_hardware(options)
    _scan(model, hardware, title, options)


def _check_idle(options: dict[str, Any]) -> None:
    """Refuse options that would do nothing beside the others.

    Raises:
        ConfigError: naming them.
    """
    of_a_scan = {"both": "--format", "rank_by": "--rank-by", "with_frontier": "--frontier", "mode": "--multipliers"}
    of_a_scan |= {name: f"--{name}" for name in ("weight", "activation", "noise", "hardware", "exact", "picture")}
    idle = [shown for name, shown in of_a_scan.items() if options[name] not in (None, False)]
    if options["faults"] and idle:
        raise ConfigError(f"--faults looks for faults of this machine as it is: leave out {', '.join(idle)}")
    if options["replays"] is not None and not options["faults"]:
        raise ConfigError("--replays is an option of --faults, and does nothing to a scan of a format: leave it out")
    if options["direction"] != "sensitive" and options["mode"] is None:
        raise ConfigError("--direction does nothing without --multipliers: give --multipliers too")


def chosen_hardware(options: dict[str, Any]) -> tuple[Hardware, str]:
    """The hardware that the options name, and its name.

    Raises:
        ConfigError: if they contradict one another.
    """
    given = {name: options[name] for name in ("both", "weight", "activation", "noise") if options[name] is not None}
    if options["hardware"] is not None:
        if given:
            raise ConfigError("--hardware names formats and noise already: leave --format, --weight, ... away")
        from roundoff.actions.evaluation_subject import load_hardware

        return load_hardware(options["hardware"]), options["hardware"]
    if "both" in given and ("weight" in given or "activation" in given):
        raise ConfigError("--format sets weights and activations: use either it, or --weight and --activation")
    both = given.get("both", None if given else DEFAULT_FORMAT)
    formats = {"weight": given.get("weight", both), "activation": given.get("activation", both)}
    noise = validate(MatmulNoise, {"relative_std": given.get("noise", 0.0)}, source="--noise")
    hardware = Hardware(precision=validate(Precision, formats, source="scan"), matmul_noise=noise)
    parts = [f"{name} {fmt}" for name, fmt in formats.items() if fmt]
    if noise.relative_std:
        parts.append(f"noise {noise.relative_std:g}")
    return hardware, ", ".join(parts)


def _open(model: str, options: dict[str, Any]) -> Subject:
    """Load the model, and the texts of the task: prompts, each with a worked solution where the task knows one."""
    import torch

    from roundoff.experiments import load_profile
    from roundoff.models.calibration import calibration_batches, calibration_texts
    from roundoff.models.device import resolve_device
    from roundoff.models.load import load_model
    from roundoff.models.prompts import Asked, check_asked
    from roundoff.tasks import make_task

    profile = load_profile(options["profile_name"])
    if options["task"] is not None:
        profile = profile.model_copy(update={"task": type(profile.task)(name=options["task"])})
    if options["texts"] is not None:
        texts: list[Asked] = [*_lines(options["texts"])]
    else:
        texts = [*calibration_texts(make_task(profile))]
    device = resolve_device(options["device"])
    loaded = load_model(
        model,
        dtype=getattr(torch, options["dtype"]),
        device=device,
        allow_download=options["allow_download"],
        chat=profile.chat,
    )
    check_asked(loaded, texts[: 2 * options["tokens"]])  # each holds at least one token
    batches = calibration_batches(loaded.tokenizer, texts, max_tokens=options["tokens"], batches=4)
    used = sum(len(batch["input_ids"]) for batch in batches)
    if not options["with_frontier"]:
        return Subject(loaded, batches, [])
    if len(texts) <= used:
        raise ConfigError(f"--frontier needs texts that the ranking did not see, but all {len(texts)} were: give more")
    fresh = calibration_batches(loaded.tokenizer, texts[used:], max_tokens=options["tokens"], batches=4)
    return Subject(loaded, batches, fresh)


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty: every one is a text, so that those used can be counted."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--texts {path} is not UTF-8: {error}") from None
    return [line for line in lines if line.strip()]


def _scan(model: str, hardware: Hardware, title: str, options: dict[str, Any]) -> None:
    from roundoff.aqn.multipliers import check_mode
    from roundoff.report.scan_picture import scan_picture
    from roundoff.report.scan_tables import linear_table, scan_table
    from roundoff.srdd import scan

    if options["mode"] is not None:
        check_mode(options["mode"], options["direction"])
    subject = _open(model, options)
    found = scan(
        subject.loaded.model,
        subject.batches,
        hardware,
        gradient=options["gradient"],
        exact=options["exact"],
        rank_by=options["rank_by"],
        seed=options["seed"],
    )
    data = {"model": model, "title": title, **found.to_json()}
    show(scan_table(data, f"{model}: {title}, {found.tokens} tokens"))
    if (linears := linear_table(data, LINEARS_SHOWN)) is not None:
        show(linears)
    click.echo(f"ranking by {data['metrics'][found.rank_by]['title']}: {', '.join(map(str, found.ranking()))}")
    agreement = found.agreement()
    if agreement is not None:
        click.echo(f"rank correlation of the two halves of the text: {agreement:.2f}")
    for warning in found.warnings():
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    if options["mode"] is not None:
        factors = found.multipliers(options["mode"], direction=options["direction"])
        data["multipliers"] = {"mode": options["mode"], "direction": options["direction"], "layers": factors}
        click.echo(f"{options['mode']}: " + ", ".join(f"{layer}: {value:.3g}" for layer, value in factors.items()))
    if options["with_frontier"]:
        data["frontier"] = _frontier(subject, found, options["seed"])
    if options["picture"] is not None:
        _write(options["picture"], scan_picture(data, f"{model}: {title}"))
    _write_json(options["json_file"], data)


def _frontier(subject: Subject, found: LayerScan, seed: int) -> list[dict[str, Any]]:
    from roundoff.report.scan_tables import frontier_table
    from roundoff.srdd import frontier

    count = len(found.layers)
    ks = sorted({k for k in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, count // 2) if k < count})
    points = [
        {"k": p.k, "kept": list(p.kept), "kl": p.divergence.kl, "se": p.divergence.se}
        for p in frontier(subject.loaded.model, subject.fresh, found, ks, seed=seed)
    ]
    show(frontier_table(points))
    return points


def _find_faults(model: str, options: dict[str, Any]) -> None:
    """Print the alarms; exit code 1 if there are any."""
    from roundoff.report.scan_tables import fault_lines
    from roundoff.srdd import find_faults

    subject = _open(model, options)
    replays = 2 if options["replays"] is None else options["replays"]
    report = find_faults(subject.loaded.model, subject.batches, replays=replays, seed=options["seed"])
    data = {"model": model, **report.to_json()}
    for line in fault_lines(data):
        click.echo(line)
    _write_json(options["json_file"], data)
    if report.alarms:
        sys.exit(1)


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        _write(path, json.dumps(data, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    write_atomic(path, text)
    click.echo(f"wrote {path}")
