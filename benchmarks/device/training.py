"""Part c, training: a training step of Qwen2.5-1.5B's shape with and without simulated hardware.

It is `roundoff.training.update.update`, the step of the loop without its rollouts: log-probabilities, loss, backward
pass, and the optimizer with float32 master weights, on random tokens. No two prompts are equal, so that no setting
shares work that another cannot. The weights move at every step, so each step quantizes them again.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from benchmarks.device import qwen
from benchmarks.device.decoding import frequent
from benchmarks.device.machine import Device
from benchmarks.device.results import Results
from benchmarks.sampling import NumberTokenizer
from roundoff.aqn.plan import AqnPlan
from roundoff.config import ALGORITHMS, Experiment, validate
from roundoff.experiments import load_profile
from roundoff.models.load import LoadedModel
from roundoff.models.masks import row_ids
from roundoff.numerics.rng import Key
from roundoff.sampling.rollouts import Rollouts
from roundoff.tasks import make_task
from roundoff.training.batch import Batch, PromptStream
from roundoff.training.optimizer import MasterAdamW
from roundoff.training.policy import Policy
from roundoff.training.session import Session
from roundoff.training.update import update

SIZES, SMALL_SIZES = (16, 8, 4, 2), (4, 2)
"""Rollouts of a step: each hardware takes the most that fit into memory, and so does the plain step beside it."""
COLUMNS, SMALL_COLUMNS = 512, 16
"""Tokens of a rollout, of which half are the response."""
STEPS = 7
LEARNING_RATE = 1e-6
SYNCHRONISATIONS_GOAL = 1.0
GROUP = 2


def session_of(model: PreTrainedModel) -> Session:
    """A run of GRPO without KL penalty on this model, with one optimizer step for all of a batch."""
    base = load_profile("tiny")
    changes = {"minibatches": 1, "learning_rate": LEARNING_RATE, "max_new_tokens": COLUMNS // 2}
    profile = base.model_copy(update={"training": base.training.model_copy(update=changes)})
    algorithm = {**ALGORITHMS["GRPO"], "group_size": GROUP, "kl_coefficient": 0.0}
    experiment = validate(Experiment, {"id": "gpu", "algorithm": algorithm}, source="benchmark")
    policy = Policy(LoadedModel(model, NumberTokenizer(), "random", "benchmark"), None, None, "")  # type: ignore[arg-type]
    return Session(
        experiment=experiment,
        profile=profile,
        key=Key.from_seed(0),
        policy=policy,
        reference=None,
        task=make_task(base),
        stream=PromptStream([], Key.from_seed(0)),
        optimizer=MasterAdamW(policy.trainable, LEARNING_RATE, profile.training),
        total_steps=1,
        aqn=AqnPlan.silent(1),
    )


def batch_of(device: str, count: int, *, small: bool) -> Batch:
    """Random rollouts without padding, with advantages of 1 and -1 in turn."""
    columns = SMALL_COLUMNS if small else COLUMNS
    response = columns // 2
    tokens = qwen.random_tokens(count, columns, small=small, seed=3)
    positions = torch.arange(columns).expand(count, -1)
    none = torch.zeros(count, dtype=torch.bool)
    rollouts = Rollouts(
        tokens=tokens,
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
        prompt_length=columns - response,
        response_mask=torch.ones(count, response, dtype=torch.bool),
        logprobs=torch.full((count, response), -12.0),
        texts=[""] * count,
        truncated=none,
        nonfinite=none,
        rows=row_ids(torch.arange(count), positions),
        group_size=GROUP,
        noise_key=Key.from_seed(1),
        pad_token_id=0,
    )
    advantages = 1.0 - 2.0 * (torch.arange(count) % 2)
    return Batch(rollouts, advantages, 0.5, 0.5, 1.0, count // GROUP, 0, float(response), 0.0, 0.0, count, 0)


class Steps:
    """Training steps of one model on one device, of any size, with whatever hardware is installed."""

    def __init__(self, device: Device, model: PreTrainedModel, *, small: bool) -> None:
        self.device, self.small = device, small
        self.session = session_of(model)
        self._plain: dict[int, float] = {}

    def step(self, count: int) -> Callable[[], object]:
        """A step on so many rollouts."""
        batch = batch_of(self.device.name, count, small=self.small)
        return lambda: update(self.session, 1, batch)

    def seconds(self, count: int, until: float) -> float:
        """Median seconds of a few steps, of fewer where they would take longer than `until` (s)."""
        step = self.step(count)
        self.device.wall_seconds(step)
        first = self.device.wall_seconds(step)
        steps = min(STEPS, max(1, int(until / first)))
        return statistics.median([first, *(self.device.wall_seconds(step) for _ in range(steps - 1))])

    def largest(self, sizes: tuple[int, ...], until: float) -> tuple[int, float]:
        """The largest size that fits into memory, and the seconds of its step.

        Raises:
            torch.OutOfMemoryError: if even the smallest does not fit.
        """
        for count in sizes:
            self.device.free_memory()
            try:
                return count, self.seconds(count, until)
            except torch.OutOfMemoryError as error:
                if count == sizes[-1]:
                    raise
                print(f"{count} rollouts do not fit: {error}")
            self.session.model.zero_grad()
            self.session.optimizer.zero_grad()
        raise AssertionError("there is a size")

    def remember(self, count: int, seconds: float) -> None:
        """Take this time for the plain step of a size."""
        self._plain[count] = seconds

    def plain(self, count: int, until: float) -> float:
        """Seconds of a step without hardware; each size is timed once."""
        if count not in self._plain:
            self._plain[count] = self.seconds(count, until)
        return self._plain[count]

    def synchronisations(self, count: int) -> Counter[str]:
        """Host synchronisations of one step, by line of code."""
        return self.device.synchronisations(self.step(count))


def measure(device: Device, results: Results, *, small: bool) -> None:
    """All of this part."""
    model = qwen.build(device.name, small=small)
    steps = Steps(device, model, small=small)
    columns = SMALL_COLUMNS if small else COLUMNS
    for number, (name, hardware) in enumerate(qwen.HARDWARE.items()):
        what = f"training step, {name}"
        left = results.seconds_left() / (len(qwen.HARDWARE) - number)
        sizes = SMALL_SIZES if small else SIZES
        if why := qwen.too_slow(device, model, hardware, sizes[-1] * columns, left / 3, trained=True):
            results.left_out(what, why)
            continue
        with results.attempt(what, device):
            with qwen.installed(model, name):
                count, seconds = steps.largest(sizes, left / 2)
                peak = device.peak_gibibytes()
                shown = f"{1e3 * seconds:.0f} ms, {count} x {columns} tokens, {count * columns / seconds:,.0f} tokens/s"
                shown += "" if peak is None else f", peak {peak:.1f} GiB"
                results.shown(what, shown, seconds=seconds, rollouts=count, tokens=count * columns)
                if device.finds_synchronisations:
                    places = steps.synchronisations(count)
                    met = places.total()
                    row = f"{what}, host synchronisations"
                    results.at_most(row, met, SYNCHRONISATIONS_GOAL, f"{met} {frequent(places)}", places=dict(places))
                else:
                    results.left_out(f"{what}, host synchronisations", f"torch does not find them on {device.name}")
            if name in qwen.GOALS:
                ratio = seconds / steps.plain(count, left / 4)
                results.at_most(f"{what}, over plain", ratio, qwen.GOALS[name], f"{ratio:.2f} x")
            else:
                steps.remember(count, seconds)
