"""What `roundoff show` prints: resolved settings, the layers that the hardware touches, and where AQN acts.

Nothing is trained. The scan and the pre-flight are those with which seed 0 of the run would begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import tomli_w

from roundoff.config import PHASES, Experiment, Hardware, HardwareOfAPhase, Profile, result_hash, rules_in_words
from roundoff.experiments import load_recipe
from roundoff.formats.table import Format, get_format

if TYPE_CHECKING:
    from roundoff.training.session import Session

BAR = 30
"""Width of the longest bar of the sigma curve (characters)."""


def settings(experiment: Experiment, profile: Profile) -> str:
    """Every setting in force, as TOML, below the name of the run directory."""
    content = {
        "experiment": experiment.model_dump(mode="json", exclude_none=True),
        "profile": profile.model_dump(mode="json", exclude_none=True),
    }
    head = f"# runs/{experiment.id}/{profile.name}-{result_hash(experiment, profile)}/seed-<n>\n"
    return head + tomli_w.dumps(content)


def products(hardware: Hardware) -> str:
    """The products of a Linear and of attention on this hardware, for each phase, and for the modules of each rule.

    They show which operand is stored in which format, and the noise; those of attention are left out if none of their
    operands has a format, and for a rule if it sets none: only with a model is known which rules reach attention. Where
    several rules match a module, each changes what those before it left; that is not drawn here.
    """
    phases: dict[Hardware, list[str]] = {}
    for phase in PHASES:
        phases.setdefault(hardware.of(phase), []).append(phase)
    texts = []
    for one, names in phases.items():
        backward = "training" in names
        heading = f"# {' and '.join(names)}\n" if len(phases) > 1 else ""
        texts.append(heading + _linear_products(one, backward=backward) + _attention_products(one))
        for number, words in enumerate(rules_in_words(one)):
            rule = one.under_rule(number)
            drawn = _linear_products(rule, backward=backward)
            drawn += _attention_products(rule) if one.rules[number].formats_of_attention else ""
            texts.append(f"# in modules that match {words}\n{drawn}")
    return "\n".join(texts)


def _has_an_axis(spec: Format) -> bool:
    """Whether a format has scales along one axis; casts, HiF8 and 2-D blocks do not."""
    return spec.rows == 1 and not (spec.scale == "none" and spec.tensor_divisor is None)


def _operand(name: str, fmt: str | None, along: str, *extras: str) -> str:
    stored = [] if fmt is None else [f"{fmt} along {along}" if _has_an_axis(get_format(fmt)) else fmt]
    return f"{name} [{', '.join([*stored, *extras])}]" if stored or extras else name


def _attention_products(hardware: HardwareOfAPhase) -> str:
    p, noise = hardware.precision, hardware.matmul_noise
    if not (p.kv_cache or p.attention):
        return ""

    def cached(name: str) -> str:
        parts = [f"cache {p.kv_cache}"] if p.kv_cache else []
        parts += [p.attention] if p.attention and p.attention != p.kv_cache else []
        formats = [get_format(fmt) for fmt in (p.kv_cache, p.attention) if fmt]
        along = " along the head" if any(map(_has_an_axis, formats)) else ""
        return f"{name} [{', then '.join(parts)}{along}]"

    error = f"  + {100 * noise.attention_std:.4g} % noise" if noise.attention_std and noise.forward else ""
    lines = ["# products of attention: operands, and the axis along which their rows and blocks lie"]
    lines.append(f"scores = {_operand('Q', p.attention, 'the head')} . {cached('K')}{error}")
    lines.append(f"output = {_operand('P', p.attention, 'the keys')} . {cached('V')}{error}")
    return "\n".join(lines) + "\n"


def _linear_products(hardware: HardwareOfAPhase, *, backward: bool) -> str:
    p, noise, operand = hardware.precision, hardware.matmul_noise, _operand
    zone = hardware.deadzone
    if not (p.weight or p.activation or p.gradient or noise.changes_products or hardware.accumulator or zone):
        return "# products of a Linear: plain arithmetic\n"

    relative_to = {"output": "noise", "operands": "noise of the operands", "row": "noise of the row"}[noise.scale]

    def error(on: bool) -> str:
        return f"  + {100 * noise.relative_std:.4g} % {relative_to}" if noise.relative_std and on else ""

    rounding = ("stochastic",) if p.gradient_rounding == "stochastic" else ()
    hadamard = ("Hadamard",) if p.hadamard == "dw" else ()
    layers = f" in layers {', '.join(map(str, zone.layers))}" if zone and zone.layers else ""
    dead = (f"deadzone {zone.threshold:g}{layers}",) if zone else ()
    x, w = operand("x", p.activation, "in_features", *dead), operand("W", p.weight, "in_features")
    lines = ["# products of a Linear: operands, and the axis along which their blocks lie"]
    reading = "".join(f", {part}" for part in noise.other_errors if not part.startswith("noise"))
    lines.append(f"y  = {x} . {w}{error(noise.forward)}{reading}")
    if not backward:
        pass
    elif p.gradient is None:
        lines += [f"dX = dY . {w}{error(noise.backward)}", f"dW = dY . {x}{error(noise.backward)}"]
    else:
        dy = operand("dY", p.gradient, "out_features", *rounding)
        lines.append(f"dX = {dy} . {operand('W', p.weight, 'out_features')}{error(noise.backward)}")
        dy = operand("dY", p.gradient, "the tokens", *rounding, *hadamard)
        x = operand("x", p.activation, "the tokens", *dead, *hadamard)
        lines.append(f"dW = {dy} . {x}{error(noise.backward)}")
    if hardware.accumulator is not None:
        lines.append(f"{'all three' if backward else 'y'}: {hardware.accumulator.in_words}")
    return "\n".join(lines) + "\n"


def recipe(name: str) -> str:
    """A recipe's title, its settings as TOML, and its products."""
    found = load_recipe(name)
    return f"# {found.title}\n{tomli_w.dumps(found.tables)}\n{products(found.hardware)}"


def sigma(experiment: Experiment, profile: Profile) -> str:
    """AQN's sigma over the run, one line for each interval of equal value; no model is loaded.

    Raises:
        ConfigError: if sigma would be zero in every step.
    """
    from roundoff.aqn.schedule import sigma_curve
    from roundoff.config import steps_per_epoch
    from roundoff.tasks import make_task

    if experiment.aqn is None:
        return "# aqn: none\n"
    per_epoch = steps_per_epoch(len(make_task(profile).train()), experiment.algorithm, profile.training)
    total = experiment.epochs * per_epoch
    lines = [f"# aqn: sigma of {total} steps, {per_epoch} an epoch"]
    step = 0
    for value, group in groupby(sigma_curve(total, per_epoch, experiment.aqn)):
        count = len(list(group))
        bar = "#" * round(BAR * value / experiment.aqn.sigma_start)
        lines.append(f"steps {step + 1:>4} to {step + count:>4}  {value:<10.4g} {bar}".rstrip())
        step += count
    return "\n".join(lines) + "\n"


def model(experiment: Experiment, profile: Profile) -> str:
    """The layers with hardware, those without and why; AQN's multipliers and its pre-flight. It loads the model.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    from roundoff.training.before_first_step import measure_aqn, rounding_warnings
    from roundoff.training.preparation import prepare

    session = prepare(experiment, profile, seed=0)
    installed = session.policy.installed
    lines = ["# hardware: plain arithmetic, no layer is touched" if installed is None else installed.summary()]
    lines += _multipliers(session)
    measured = measure_aqn(session)
    if measured is not None:
        lines += ["# aqn: before training", *measured.lines()]
        lines += [f"warning: {line}" for line in rounding_warnings(session)]
    return "\n".join(lines) + "\n"


def _multipliers(session: Session) -> Iterator[str]:
    """Lines with AQN's factor on sigma by layer, for each interval of steps in which the factors stay the same."""
    scan = session.scan
    if scan is None:
        return
    yield f"# srdd: {scan.tokens} tokens, ranked by {scan.rank_by}: {', '.join(map(str, scan.ranking()))}"
    yield from (f"warning: {line}" for line in scan.warnings())
    begin = 1
    for factors, group in groupby(session.aqn.multipliers):
        count = len(list(group))
        if factors is not None:
            yield f"# aqn: factor on sigma by layer, steps {begin} to {begin + count - 1}"
            yield "  ".join(f"{layer}: {value:.3g}" for layer, value in factors.items())
        begin += count
