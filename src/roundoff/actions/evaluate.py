"""What `roundoff eval` does: scores a run, a checkpoint, an adapter or a model directory, on any hardware.

The code that trains a run also loads it here, and the code that scores its training curve scores it, so that the two
agree problem by problem. If the run has an evaluation of that step under the same settings, the result says whether
they do.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from roundoff.actions.evaluation_subject import EvaluationSubject, open_subject
from roundoff.config import ConfigError, Hardware
from roundoff.evaluation import SampledOutcome, evaluate, evaluate_samples, pass_at_k
from roundoff.models.lora import load_adapters
from roundoff.models.prompts import check_asked
from roundoff.numerics.rng import Key
from roundoff.runs.files import write_atomic
from roundoff.runs.health import Tally
from roundoff.runs.outcomes import Evaluation
from roundoff.sampling.sampler import check_sampling
from roundoff.srdd import LayerScan
from roundoff.stats import Interval, score
from roundoff.tasks import make_task
from roundoff.training.policy import load_policy, put_weights

__all__ = ["Result", "describe", "open_subject", "save", "score_subject"]


@dataclass(frozen=True, slots=True)
class Result:
    """Outcomes of one evaluation, and the scores that they add up to."""

    subject: EvaluationSubject
    evaluation: Evaluation
    samples: tuple[SampledOutcome, ...]
    """Outcomes of sampled responses; empty if none were sampled."""
    temperature: float
    """Temperature of the samples."""
    agrees: bool | None
    """Whether the run recorded the same outcomes; None if it recorded none under these settings."""

    def scores(self) -> dict[str, tuple[Interval, Interval]]:
        """Deployed and clean score by name, each with its 95 % interval over problems."""
        outcomes = self.evaluation.outcomes
        greedy = ([sum(o.deployed) / len(o.deployed) for o in outcomes], [float(o.clean) for o in outcomes])
        rows = {"greedy pass@1": greedy}
        samples = len(self.samples[0].deployed) if self.samples else 0
        for k in (2**n for n in range(samples.bit_length())):
            both = [[pass_at_k(len(s), sum(s), k) for s in (o.deployed, o.clean)] for o in self.samples]
            rows[f"sampled pass@{k}"] = ([d for d, _ in both], [c for _, c in both])
        return {name: (score([deployed]), score([clean])) for name, (deployed, clean) in rows.items()}


def _scan_of(subject: EvaluationSubject) -> LayerScan | None:
    """The SRDD scan that the subject's run used, if it is scored on the run's own hardware."""
    run = subject.run
    if run is None or subject.experiment.hardware != run.experiment.hardware or run.scan is None:
        return None
    return LayerScan.from_json(run.scan)


def score_subject(
    subject: EvaluationSubject, *, draws: int | None = None, samples: int = 0, temperature: float = 1.0
) -> Result:
    """Score the greedy responses, and also `samples` sampled responses to each problem if that is above 0.

    Args:
        subject: what to score.
        draws: noise draws that the deployed score averages over; None: the profile's.
        samples: sampled responses to each problem.
        temperature: of the samples.

    Raises:
        ConfigError: if the settings do not fit the model.
    """
    experiment, profile = subject.experiment, subject.profile
    torch.set_num_threads(profile.threads)
    task = make_task(profile)
    if not task.test():
        raise ConfigError(f"task {task.name!r} has no test problems")
    policy = load_policy(experiment, profile, subject.seed, scan=_scan_of(subject))
    if subject.checkpoint is not None:
        put_weights(policy, subject.checkpoint)
    if subject.adapter is not None:
        load_adapters(policy.model, subject.adapter)
    key, limit = Key.from_seed(subject.seed), profile.training.max_new_tokens
    lengths = [len(tokens) for tokens in check_asked(policy.loaded, task.test())]
    check_sampling(policy.model, policy.loaded.tokenizer, lengths, limit)
    evaluation = evaluate(
        policy.model,
        policy.loaded.tokenizer,
        task,
        key=key,
        max_new_tokens=limit,
        noise_draws=draws or profile.training.noise_draws,
        noisy=experiment.hardware.is_noisy,
        step=subject.step,
    )
    sampled: tuple[SampledOutcome, ...] = ()
    if samples:
        sampled = evaluate_samples(
            policy.model,
            policy.loaded.tokenizer,
            task,
            key=key,
            max_new_tokens=limit,
            samples=samples,
            temperature=temperature,
        )
    return Result(subject, evaluation, sampled, temperature, _agrees(subject, evaluation, draws))


def describe(result: Result) -> str:
    """The text to print: what was scored and how, the scores, and whether they agree with the run."""
    subject, outcomes = result.subject, result.evaluation.outcomes
    draws = len(outcomes[0].deployed)
    decoding = f"greedy, {draws} noise draw{'s' if draws > 1 else ''}"
    if result.samples:
        decoding += f"; {len(result.samples[0].deployed)} samples at temperature {result.temperature:g}"
    lines = [
        *subject.notes,
        subject.name,
        f"hardware: {_shown(subject.experiment.hardware)}",
        f"task {subject.profile.task.name}: {len(outcomes)} test problems; {decoding}; [95 % interval over problems]",
        "",
        f"{'':<18}{'deployed':<24}clean",
    ]
    for name, scores in result.scores().items():
        shown = [f"{s.estimate:6.1%}  [{s.low:.1%}, {s.high:.1%}]" for s in scores]
        lines.append(f"{name:<18}{shown[0]:<24}{shown[1]}".rstrip())
    lines += _flaws(result)
    if result.agrees is not None:
        relation = "equal to" if result.agrees else "NOT EQUAL to"
        lines += ["", f"{relation} what the run recorded at step {subject.step}, problem by problem"]
    return "\n".join(lines)


def _flaws(result: Result) -> list[str]:
    """A line for each kind of response that is no ordinary answer, after an empty line; nothing if there are none."""
    evaluation = result.evaluation
    tallies = {"deployed": evaluation.deployed_tally, "clean": evaluation.clean_tally}
    if result.samples:
        tallies["deployed samples"] = Tally.of(flaw for o in result.samples for flaw in o.flaws)
        tallies["clean samples"] = Tally.of(flaw for o in result.samples for flaw in o.clean_flaws)
    lines = [f"{name}: {line}" for name, tally in tallies.items() for line in tally.words()]
    if evaluation.nonfinite_at:
        lines.append(f"not finite first in {evaluation.nonfinite_at}")
    return ["", *lines] if lines else []


def save(result: Result, path: Path) -> None:
    """Write settings, scores and per-problem outcomes as JSON.

    Raises:
        ConfigError: if the file is there already.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: name another file")
    subject = result.subject
    content: dict[str, Any] = {
        "subject": subject.name,
        "step": subject.step,
        "seed": subject.seed,
        "hardware": subject.experiment.hardware.model_dump(mode="json"),
        "profile": subject.profile.model_dump(mode="json"),
        "temperature": result.temperature if result.samples else None,
        "agrees_with_run": result.agrees,
        "scores": {
            name: {"deployed": _numbers(deployed), "clean": _numbers(clean)}
            for name, (deployed, clean) in result.scores().items()
        },
        "flaws": {
            "deployed": asdict(result.evaluation.deployed_tally),
            "clean": asdict(result.evaluation.clean_tally),
            "nonfinite_at": result.evaluation.nonfinite_at,
        },
        "outcomes": [asdict(outcome) for outcome in result.evaluation.outcomes],
        "samples": [asdict(outcome) for outcome in result.samples],
    }
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def _agrees(subject: EvaluationSubject, evaluation: Evaluation, draws: int | None) -> bool | None:
    """Whether the run recorded these outcomes; None if it recorded none, or if a setting differs."""
    run = subject.run
    if run is None or subject.step not in run.evaluated_steps or subject.seed != run.seed:
        return None
    own = subject.profile == run.profile and draws in (None, run.profile.training.noise_draws)
    same = own and subject.experiment.hardware == run.experiment.hardware
    return run.evaluation(subject.step) == evaluation if same else None


def _shown(hardware: Hardware) -> str:
    """The settings that change the arithmetic, in one line."""
    if hardware.changes_nothing:
        return "none (plain arithmetic)"
    precision, noise = hardware.precision, hardware.matmul_noise
    names = {"weight": "weight", "activation": "activation", "kv_cache": "key-value cache", "attention": "attention"}
    parts = [f"{shown} {fmt}" for name, shown in names.items() if (fmt := getattr(precision, name))]
    parts += [f"layers {precision.keep} kept"] if precision.keep else []
    parts += [f"matmul noise {noise.relative_std:.3g}"] if noise.relative_std and noise.forward else []
    parts += [f"deadzone {hardware.deadzone.threshold:g}"] if hardware.deadzone else []
    parts += [f"fault {fault.kind} in layer {fault.layer}" for fault in hardware.faults]
    return ", ".join(parts) or "none in the forward pass"


def _numbers(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
