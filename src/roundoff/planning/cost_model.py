"""Time and memory of a run from its tokens, parameters and formats, before anything is run.

On an accelerator a pass through the model takes the larger of two times; on a CPU it takes their sum:

    issue  = calls * (layers * operations + FIXED_OPERATIONS) * time to issue one operation
    device = products / rate + (weights read + elementwise traffic + cache read) / bandwidth

The operations and the elementwise traffic of a decoder layer were counted (`python -m benchmarks operations`) for the
plain model and for each kind of hardware, on the plain torch path and with the compiled kernels. Whatever else the
settings do not say is an entry of `Assumptions`, which is printed with the estimate.

The model leaves out compiling, loading, saving checkpoints, reading data, and waiting for the slowest device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from roundoff.config import ConfigError, Experiment, Hardware, Profile
from roundoff.planning.machine import Machine
from roundoff.planning.shape import ModelShape
from roundoff.planning.work import ADDED, FIXED_OPERATIONS, FUSED, NOTHING, PLAIN, Passes, Work

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
VOCABULARY_PASSES = 14
"""Times that a float32 row of the vocabulary is read or written to draw a token, or to compute a log-probability and
its gradient."""
OPTIMIZER_PASSES = 12
"""Times that a float32 parameter is read or written by gradient clipping and AdamW."""
SAVED_HIDDEN, SAVED_INTERMEDIATE = 9.4, 3.75
"""Elements that each layer keeps per token for the backward pass, in units of the hidden and of the intermediate size
(counted)."""
PACKING_LOSS = 1.15
"""Columns of packed rows divided by the tokens in them (assumed)."""
REPEATS_BELOW = 6.0
"""Responses shorter than this (tokens) are often equal within a group."""

# Limits of modules that import torch, which planning must not do: a test compares each with its origin.
MAX_ROWS = 512
"""Maximum number of rollouts that are decoded together (`sampling.sampler.MAX_ROWS`)."""
LOGIT_BYTES = 1 << 26
"""Maximum number of bytes of logits that a training pass holds at once (`models.logprobs.LOGIT_BYTES`)."""
LOGIT_COPIES = 3
"""Tensors of that size that are held together: the logits, their softmax and their gradient."""
MOST_FUSED_COLUMNS = 64
"""Longest prompt that the fused decoder takes, in tokens (`sampling.fused_decoder.MOST_COLUMNS`)."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the settings do not say."""

    prompt_tokens: float
    """Mean length of a prompt (tokens)."""
    response_tokens: float
    """Mean length of a response (tokens)."""
    spread: float = 0.5
    """The longest of n responses is 1 + spread*ln(n) times the mean, but at most the limit."""
    equal_groups: float = 0.5
    """Share of groups whose rewards are all equal, which dynamic sampling drops (fraction)."""
    source: str = "a quarter of the limits"
    """Where the lengths come from, in words."""

    @property
    def distinct(self) -> float:
        """Share of a group's responses that differ (fraction); without noise, equal ones are computed only once."""
        return min(1.0, self.response_tokens / REPEATS_BELOW)

    def longest(self, rows: float, limit: int) -> float:
        """Expected length of the longest of `rows` responses (tokens)."""
        return min(float(limit), self.response_tokens * (1 + self.spread * math.log(max(rows, 1.0))))

    def lines(self) -> list[str]:
        """The assumptions, one line each, for the user to judge."""
        return [
            f"a prompt has {self.prompt_tokens:.0f} and a response {self.response_tokens:.0f} tokens on average "
            f"({self.source})",
            f"the longest of n responses is 1 + {self.spread:g} ln n times the mean, at most the limit",
            f"{100 * self.equal_groups:g} % of groups have equal rewards (dynamic sampling drops them)",
            f"{100 * self.distinct:.0f} % of a group's responses differ (without noise, equal ones are computed once)",
        ]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time and memory of one run on one or more devices."""

    experiment: str
    steps: int
    parts: Mapping[str, float]
    """Seconds of one step, by the kind of work."""
    evaluations: int
    evaluation: float
    """Seconds of one evaluation."""
    memory: Mapping[str, float]
    """Bytes on one device, by what holds them; `sampling` and `training` are never held at the same time."""

    @property
    def step(self) -> float:
        """Seconds of one step, without evaluation."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.steps * self.step + self.evaluations * self.evaluation

    @property
    def peak(self) -> float:
        """Bytes on one device at the worst moment."""
        moments = ("sampling", "training")
        return sum(v for k, v in self.memory.items() if k not in moments) + max(self.memory[k] for k in moments)


def default_assumptions(profile: Profile) -> Assumptions:
    """The lengths to assume where nothing was measured: a quarter of the limits."""
    training = profile.training
    return Assumptions(training.max_prompt_tokens / 4, training.max_new_tokens / 4)


@dataclass(frozen=True)
class CostModel:
    """Costs of one profile's model on one machine."""

    profile: Profile
    shape: ModelShape
    machine: Machine
    ranks: int
    """Number of devices that share one run."""
    problems: tuple[int, int]
    """Numbers of training and of test problems."""
    assumptions: Assumptions

    def estimate(self, experiment: Experiment, *, steps: int) -> Estimate:
        """The cost of one run of the experiment that takes `steps` steps.

        Raises:
            ConfigError: if there are more devices than prompts for them to share.
        """
        from roundoff.config import training_in_force

        algorithm = experiment.algorithm
        training = training_in_force(algorithm, self.profile.training)
        if training != self.profile.training:  # `ratio = "one"` takes shorter steps
            return replace(self, profile=self.profile.model_copy(update={"training": training})).estimate(
                experiment, steps=steps
            )
        if training.prompts_per_step < self.ranks:
            raise ConfigError(f"{self.ranks} devices cannot share {training.prompts_per_step} prompts a step")
        draws = 1.0
        if algorithm.dynamic_sampling:
            kept = 1 - self.assumptions.equal_groups
            draws = min(max(1.0, 1 / (kept * algorithm.oversampling)), algorithm.max_sampling_batches)
        prompts = training.prompts_per_step * algorithm.oversampling * draws / self.ranks
        rollout, deployed = experiment.hardware.of("rollout"), experiment.hardware.of("evaluation")
        parts = {"sampling": self._sampling(rollout, prompts, algorithm.group_size, rounds=draws)}
        parts |= self._updates(experiment)
        evaluations = 1 + -(-steps // training.evaluate_every)
        tests = self.problems[1] / self.ranks
        each = [deployed] * (training.noise_draws if deployed.is_noisy else 1)
        each += [] if experiment.hardware.changes_nothing else [Hardware()]
        evaluation = sum(self._sampling(h, tests, 1, rounds=1) for h in each)
        return Estimate(experiment.id, steps, parts, evaluations, evaluation, self._memory(experiment))

    def _work(self, hardware: Hardware) -> Passes:
        """Work of a decoder layer on this hardware: that of the plain model and what formats and noise add."""
        passes, settings = PLAIN, hardware.variants()  # a rule counts as if it held everywhere
        for kind, on in (
            ("activation", any(one.precision.activation for one in settings)),
            ("gradient", any(one.precision.gradient for one in settings)),
            ("kv_cache", any(one.precision.kv_cache for one in settings)),
            ("attention", any(one.precision.attention for one in settings)),
            ("noise", any(one.matmul_noise.relative_std for one in settings)),
        ):
            added = ADDED[kind, self.machine.compiled] if on else NOTHING
            passes = Passes(passes.forward.plus(added.forward), passes.training.plus(added.training))
        return passes

    def _decoding(self, hardware: Hardware) -> Work:
        """Work of a decoder layer in sampling, with the fused decoder where it is used."""
        small = self.profile.training.max_prompt_tokens <= MOST_FUSED_COLUMNS and self.profile.dtype == "float32"
        if not (small and self.machine.compiled):
            return self._work(hardware).forward
        precision = hardware.precision.model_copy(update={"kv_cache": None})  # the fused kernel quantizes as it goes
        work = self._work(hardware.model_copy(update={"precision": precision})).forward
        plain = PLAIN.forward
        return Work(
            work.operations - plain.operations + FUSED.operations,
            work.hidden - plain.hidden + FUSED.hidden,
            work.intermediate - plain.intermediate + FUSED.intermediate,
            work.score,
        )

    def _seconds(
        self, work: Work, *, calls: float, tokens: float, products: float, width: float, read: float = 0.0
    ) -> float:
        """Seconds of `calls` passes over `tokens` tokens in all.

        Args:
            work: operations and elementwise traffic of one decoder layer.
            calls: number of passes.
            tokens: tokens of all passes together.
            products: floating-point operations of the matrix products, without attention.
            width: length of the sequences (tokens).
            read: bytes to move besides weights and elementwise traffic.
        """
        shape, machine = self.shape, self.machine
        size = DTYPE_BYTES[self.profile.dtype]
        issue = calls * (shape.layers * work.operations + FIXED_OPERATIONS) * machine.operation
        scores = work.score * shape.heads * width
        elements = work.hidden * shape.hidden + work.intermediate * shape.intermediate + scores
        traffic = tokens * shape.layers * elements * size + calls * shape.linear * size + read
        attention = 4 * tokens * shape.layers * shape.heads * shape.head_size * width
        device = (products + attention) / machine.rate(self.profile.dtype) + traffic / machine.bandwidth
        return max(issue, device) if machine.is_asynchronous else issue + device

    def _sampling(self, hardware: Hardware, prompts: float, group: int, *, rounds: float) -> float:
        """Seconds to sample `group` responses to each prompt, in `rounds` calls of the sampler."""
        shape, lengths, limit = self.shape, self.assumptions, self.profile.training.max_new_tokens
        size, work = DTYPE_BYTES[self.profile.dtype], self._decoding(hardware)
        rollouts = prompts * group
        batches = rounds * math.ceil(rollouts / rounds / MAX_ROWS)
        rows = rollouts / batches
        tokens = rollouts * lengths.response_tokens * (1.0 if hardware.is_noisy else lengths.distinct)
        context = lengths.prompt_tokens + lengths.response_tokens / 2
        cache = tokens * context * 2 * shape.layers * shape.kv_width * size
        vocabulary = tokens * shape.vocabulary * 4 * VOCABULARY_PASSES
        decoding = self._seconds(
            work,
            calls=batches * lengths.longest(rows, limit),
            tokens=tokens,
            products=2 * tokens * (shape.linear + shape.embedding),
            width=context,
            read=cache + vocabulary,
        )
        read = (rollouts if hardware.is_noisy else prompts) * lengths.prompt_tokens
        prefill = self._seconds(
            work, calls=batches, tokens=read, products=2 * read * shape.linear, width=lengths.prompt_tokens
        )
        return decoding + prefill

    def _updates(self, experiment: Experiment) -> dict[str, float]:
        """Seconds that a step spends on passes over its batch of rollouts and on the optimizer, by the kind of work."""
        shape, training, algorithm = self.shape, self.profile.training, experiment.algorithm
        work = self._work(experiment.hardware.of("training"))
        rollouts = training.prompts_per_step * algorithm.group_size / self.ranks
        micro, width = self._micro_batch(experiment)
        calls = math.ceil(rollouts / micro)
        tokens, answered = self._laid_out(experiment, rollouts, width)
        vocabulary = answered * shape.vocabulary * 4 * VOCABULARY_PASSES / 2
        products = 2 * (tokens * shape.linear + answered * shape.embedding)

        def forward() -> float:
            return self._seconds(
                work.forward, calls=calls, tokens=tokens, products=products, width=width, read=vocabulary
            )

        # A frozen base model needs no gradient of its weights; a checkpointed layer is computed a second time.
        times = (2 if experiment.lora else 3) + training.gradient_checkpointing
        update = self._seconds(
            work.training, calls=calls, tokens=tokens, products=times * products, width=width, read=2 * vocabulary
        )
        passes = algorithm.optimizer_epochs
        needed = [
            algorithm.ratio_rule.needs_old_pass(first_minibatch=i == 0, optimizer_epochs=passes)
            for i in range(training.minibatches)
        ]
        moved = passes * training.minibatches * self._trained(experiment) * 4  # bytes, over all optimizer steps
        parts = {
            "update": update * passes,
            "old log-probabilities": forward() * sum(needed) / len(needed),
            "reference": forward() if algorithm.kl_coefficient else 0.0,
            "optimizer": moved * OPTIMIZER_PASSES / self.machine.bandwidth,
        }
        if self.ranks > 1 and self.machine.interconnect:
            parts["all-reduce"] = moved / self.machine.interconnect
        return parts

    def _laid_out(self, experiment: Experiment, rollouts: float, width: float) -> tuple[float, float]:
        """Number of columns in all rows of a training pass, and how many of them predict a token."""
        lengths = self.assumptions
        plain, answered = rollouts * width, rollouts * lengths.response_tokens
        if experiment.hardware.of("training").separates_rollouts:
            return plain, answered
        prompts = rollouts / experiment.algorithm.group_size
        packed = PACKING_LOSS * (prompts * lengths.prompt_tokens + answered * lengths.distinct)
        return min(plain, packed), answered * lengths.distinct

    def _micro_batch(self, experiment: Experiment) -> tuple[float, float]:
        """Number of rollouts in one pass on one device, and their padded length (tokens)."""
        training = self.profile.training
        rows = training.prompts_per_step * experiment.algorithm.group_size / self.ranks / training.minibatches
        micro = min(training.micro_batch or rows, rows)
        return micro, self.assumptions.prompt_tokens + self.assumptions.longest(micro, training.max_new_tokens)

    def _trained(self, experiment: Experiment) -> int:
        """Number of parameters that the optimizer updates."""
        return self.shape.adapters(experiment.lora.rank) if experiment.lora else self.shape.parameters

    def _memory(self, experiment: Experiment) -> dict[str, float]:
        """Bytes on one device, by what holds them."""
        shape, training = self.shape, self.profile.training
        size = DTYPE_BYTES[self.profile.dtype]
        trained = self._trained(experiment)
        micro, width = self._micro_batch(experiment)
        columns, _ = self._laid_out(experiment, micro, width)
        layer = SAVED_HIDDEN * shape.hidden + SAVED_INTERMEDIATE * shape.intermediate
        saved = shape.layers * shape.hidden + layer if training.gradient_checkpointing else shape.layers * layer
        rollouts = training.prompts_per_step * experiment.algorithm.oversampling * experiment.algorithm.group_size
        rows = min(MAX_ROWS, max(rollouts, self.problems[1]) / self.ranks)  # an evaluation samples as well
        length = training.max_prompt_tokens + training.max_new_tokens
        masters = 4 if size < 4 and experiment.lora is None else 0
        of_phases = {one.precision.weight for one in experiment.hardware.variants()} - {None}
        needs_copy = experiment.algorithm.kl_coefficient > 0 and experiment.lora is None
        return {
            "weights": shape.parameters * size + (trained * 4 if experiment.lora else 0),
            "gradients and optimizer": (3 * 4 + masters) * trained,
            "quantized weights": shape.linear * size * len(of_phases),
            "reference": shape.parameters * size if needs_copy else 0.0,
            "sampling": rows * length * 2 * shape.layers * shape.kv_width * size + rows * shape.vocabulary * 4 * 5,
            "training": columns * saved * size + LOGIT_COPIES * LOGIT_BYTES,
        }
