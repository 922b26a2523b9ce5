"""What `roundoff mismatch` does: samples on one hardware, scores the samples on another, and prints the difference.

Each hardware is installed by itself: that which the first has in rollouts, then that which the second has in training.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from roundoff.actions.named_hardware import load_hardware
from roundoff.config import TEMPERATURE_RULE, ConfigError, Hardware, Task, is_temperature
from roundoff.experiments import load_profile
from roundoff.models.embedded import EMBEDDED, default_profile
from roundoff.runs.files import write_atomic
from roundoff.runs.metrics import METRICS
from roundoff.stats import LEVEL, Growth, weight_growth
from roundoff.tasks import make_task

if TYPE_CHECKING:
    from roundoff.models.load import LoadedModel
    from roundoff.sampling.rollouts import Rollouts
    from roundoff.training.mismatch import Difference

FEWEST_PROMPTS = 16
"""Fewest prompts over which an interval is resampled."""
RESAMPLES = 1000
PASS_ROWS = 64
"""Responses scored in one pass."""
BAR = 30
"""Characters of a bar that stands for an effective sample size of 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchOptions:
    """The command's options; None where one was not given."""

    model: str
    rollout: str
    training: str
    profile_name: str | None
    task: str | None
    prompts: int
    group: int
    max_new_tokens: int | None
    temperature: float
    cap: float
    device: str
    allow_download: bool
    seed: int
    json_file: Path | None


def run_mismatch(options: MismatchOptions) -> None:
    """Measure and print.

    Raises:
        ConfigError: if an option cannot be used.
    """
    rollout, training = _checked(options)
    if rollout == training:
        drawn = ", and by other draws of its noise" if rollout.is_noisy else ""
        click.echo(f"both hardwares compute alike: their passes differ by rounding alone{drawn}")
    rollouts, difference = _measured(options, rollout, training)
    data = summary(rollouts, difference, options.cap, options.seed)
    for line in describe(data, options):
        click.echo(line)
    if options.json_file is not None:
        settings = {name: getattr(options, name) for name in MismatchOptions.__slots__ if name != "json_file"}
        write_atomic(options.json_file, json.dumps({"settings": settings, **_finite(data)}, indent=1) + "\n")
        click.echo(f"wrote {options.json_file}")


def _checked(options: MismatchOptions) -> tuple[Hardware, Hardware]:
    """The hardware of rollouts and that of training, without phases of their own.

    Raises:
        ConfigError: naming the option that cannot be used.
    """
    if options.model not in EMBEDDED and options.task is None and options.profile_name is None:
        raise ConfigError(
            f"say what {options.model} is to be asked: --profile NAME takes task and lengths of a profile, and --task "
            "NAME alone the lengths of profile tiny"
        )
    if options.temperature <= 0 or not is_temperature(options.temperature):
        raise ConfigError(
            f"--temperature must be {TEMPERATURE_RULE}, but is {options.temperature:g}: greedy responses are no "
            "samples of the rollout's policy, and no KL can be estimated from them"
        )
    if options.prompts < FEWEST_PROMPTS:
        raise ConfigError(f"--prompts must be at least {FEWEST_PROMPTS}, for intervals, but is {options.prompts}")
    if not (math.isfinite(options.cap) and options.cap > 0):
        raise ConfigError(f"--cap must be above 0, but is {options.cap:g}")
    found = load_hardware(options.rollout).of("rollout"), load_hardware(options.training).of("training")
    for option, name, hardware in zip(
        ("--rollout", "--training"), (options.rollout, options.training), found, strict=True
    ):
        if hardware.needs_scan:
            raise ConfigError(f"{option} {name}: keep = {hardware.precision.keep!r} needs a scan: name the layers")
        if not hardware.changes_nothing and not hardware.changes_forward:
            raise ConfigError(
                f"{option} {name} changes gradients alone, on which no log-probability depends: its forward pass is "
                "that of none"
            )
    return found


def _measured(options: MismatchOptions, rollout: Hardware, training: Hardware) -> tuple[Rollouts, Difference]:
    """Rollouts on one hardware, and the difference to a pass on the other."""
    import torch

    from roundoff.hardware import install, uninstall
    from roundoff.models.device import resolve_device
    from roundoff.models.load import load_model
    from roundoff.models.prompts import check_asked
    from roundoff.numerics.rng import Key
    from roundoff.sampling.sampler import check_sampling, sample
    from roundoff.training.mismatch import Difference

    profile = load_profile(options.profile_name or default_profile(options.model))
    if options.task is not None:
        profile = profile.model_copy(update={"task": Task(name=options.task)})
    problems = make_task(profile).train()
    if len(problems) < options.prompts:
        raise ConfigError(f"--prompts is {options.prompts}, but the task has {len(problems)} training problems")
    places = np.random.default_rng(options.seed).permutation(len(problems))[: options.prompts]
    asked = [problems[i] for i in places.tolist()]
    torch.set_num_threads(profile.threads)
    loaded = load_model(
        options.model,
        dtype=getattr(torch, profile.dtype),
        device=resolve_device(options.device),
        allow_download=options.allow_download,
        chat=profile.chat,
    )
    limit, key = options.max_new_tokens or profile.training.max_new_tokens, Key.from_seed(options.seed)
    check_sampling(loaded.model, loaded.tokenizer, [len(ids) for ids in check_asked(loaded, asked)], limit)
    if not rollout.changes_nothing:
        install(loaded.model, rollout, seed=options.seed)
    rollouts = sample(
        loaded.model,
        loaded.tokenizer,
        asked,
        group_size=options.group,
        max_new_tokens=limit,
        temperature=options.temperature,
        key=key,
    )
    if not rollout.changes_nothing:
        uninstall(loaded.model)
    if bool(rollouts.nonfinite.any()):
        raise ConfigError(f"--rollout {options.rollout}: {int(rollouts.nonfinite.sum())} responses were not finite")
    if not training.changes_nothing:
        install(loaded.model, training, seed=options.seed)
    logprobs = torch.cat(_passes(loaded, rollouts, options.temperature, key.fold("training")))
    if bool(logprobs.isnan().any()):
        raise ConfigError(f"--training {options.training}: the pass is not finite")
    return rollouts, Difference.of([(rollouts.logprobs, logprobs, rollouts.response_mask)])


def _passes(loaded: LoadedModel, rollouts: Rollouts, temperature: float, key: Any) -> list[Any]:
    """Log-probabilities of the responses, in host memory, a batch at a time."""
    import torch

    from roundoff.models.logprobs import token_logprobs
    from roundoff.numerics.transfer import fetch

    found = []
    with torch.no_grad():
        for start in range(0, len(rollouts), PASS_ROWS):
            part = rollouts.part(slice(start, start + PASS_ROWS))
            width = part.response_mask.shape[1]
            logprobs, _ = token_logprobs(
                loaded.model, part.tokens, part.attention_mask, width, temperature=temperature, rows=part.rows, key=key
            )
            found += fetch([logprobs])
    return found


def summary(rollouts: Rollouts, difference: Difference, cap: float, seed: int) -> dict[str, Any]:
    """Every measure with its interval over prompts, the measures by length, and the growth of the weights."""
    from roundoff.training.mismatch import by_length, measures

    groups = len(rollouts) // rollouts.group_size
    shares = np.full(groups, 1 / groups)
    drawn = np.random.default_rng([seed, 1]).multinomial(groups, shares, size=RESAMPLES)
    counts = np.repeat(drawn, rollouts.group_size, axis=1).astype(np.float64)
    plain, resampled = measures(difference, cap), measures(difference, cap, counts)
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    table = {name: (float(plain[name][0]), *map(float, np.quantile(resampled[name], tails))) for name in plain}
    lengths = difference.lengths
    padded = np.zeros((len(lengths), int(lengths.max())))
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = difference.log_ratio
    growth = weight_growth(padded.cumsum(axis=1), lengths, counts)
    counted = np.bincount(np.frexp(lengths)[1] - 1)
    return {
        "measures": table,
        "lengths": [
            None if row is None else {"least": 2**c, "responses": int(counted[c]), **row}
            for c, row in enumerate(by_length(difference, cap))
        ],
        "growth": {name: getattr(growth, name) for name in Growth.__slots__},
        "responses": len(lengths),
        "tokens": int(lengths.sum()),
        "prompts": groups,
    }


def describe(data: dict[str, Any], options: MismatchOptions) -> list[str]:
    """The lines to print."""
    lines = [
        f"{options.model}: rollouts on {options.rollout}, training on {options.training}",
        f"{data['prompts']} prompts, {data['responses']} responses, {data['tokens']} tokens, temperature "
        f"{options.temperature:g}; [95 % interval over prompts]",
        "",
    ]
    for name, (estimate, low, high) in data["measures"].items():
        label = METRICS[f"mismatch_{name}"].title.replace("Log-probability, training less rollout", "Difference")
        if name == "max":  # a resample has no larger one, so no interval could hold what other prompts would show
            lines.append(f"{label:<65} {estimate:10.4g}")
        else:
            lines.append(f"{label:<65} {estimate:10.4g}  [{low:.4g}, {high:.4g}]")
    lines += ["", "tokens       responses   KL (k3)     effective sample size by response"]
    for row in data["lengths"]:
        if row is not None:
            size = row["ess_seq"]
            bar = "█" * round(BAR * size) if math.isfinite(size) else ""
            span = f"{row['least']}-{2 * row['least'] - 1}"
            lines.append(f"{span:<12} {row['responses']:9}   {row['k3_kl']:<9.3g}   {size:5.3f}  {bar}".rstrip())
    growth = data["growth"]
    lines.append("")
    if growth["rate"] is not None:
        rate, low, high = growth["rate"]
        lines.append(
            f"variance of the log weight: {rate:.3g} nats^2 a token [{low:.3g}, {high:.3g}], measured up to "
            f"{growth['longest']} tokens"
        )
    if growth["length"] is None:
        return [*lines, f"no length is extrapolated: {growth['refusal']}"]
    length, low, high = growth["length"]
    return [
        *lines,
        f"effective sample size by response under 0.5 beyond {length:.0f} tokens [{low:.0f}, {high:.0f}], if the "
        "variance goes on growing",
        "in proportion to length and the log weights are normal: exp(-variance) = 0.5",
    ]


def _finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, since JSON has none of them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
