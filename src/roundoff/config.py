"""Frozen settings of an experiment (*what* is run) and of a profile (*how big*), and their error messages.

Every setting is checked before any weight is loaded. An error names the full path of the setting, the rule, the value
and, for an unknown key, the nearest known one. This module imports neither torch nor any other part of roundoff.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it in full and says what to do."""


class Settings(BaseModel):
    """Base of every settings model: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _rule(holds: Callable[[Any], bool], text: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(check)


Fraction = Annotated[float, _rule(lambda v: 0 <= v < 1, "must be in [0, 1) (5 % is 0.05)")]
Share = Annotated[float, _rule(lambda v: 0 <= v <= 1, "must be in [0, 1]")]
NonNegative = Annotated[float, _rule(lambda v: v >= 0, "must be 0 or more")]
Positive = Annotated[float, _rule(lambda v: v > 0, "must be above 0")]
Count = Annotated[int, _rule(lambda v: v >= 1, "must be a whole number of at least 1")]
Whole = Annotated[int, _rule(lambda v: v >= 0, "must be a whole number of at least 0")]

SCALE_RULES = ("floor", "ceil", "even", "rceil")
MX_FORMATS = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2")
FORMAT_NAMES = (
    *MX_FORMATS,
    *(f"{name}:{rule}" for name in MX_FORMATS for rule in SCALE_RULES),
    *("nvfp4", "nvfp4_block", "fp8_e4m3", "fp8_e4m3_row", "int8", "int8:full", "int4", "int4:full"),
    *("bf16", "fp16"),
)
"""Names of the entries of `numerics.FORMATS`, known here without importing torch (a test compares the two)."""


def nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """A clause `; did you mean 'x'?` for the nearest of `known`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _known_format(name: str) -> str:
    if name not in FORMAT_NAMES:
        shown = ", ".join(n for n in FORMAT_NAMES if ":" not in n)
        raise ValueError(f"must be a number format{nearest(name, FORMAT_NAMES)} (known: {shown}; MX with ':rule')")
    return name


FormatName = Annotated[str, AfterValidator(_known_format)]


def _kept_layers(value: Any) -> Any:
    scan = isinstance(value, str) and re.fullmatch(r"srdd:[1-9]\d*", value)
    if not scan and not (isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value)):
        raise ValueError("must be a list of layer indices from 0, or 'srdd:k' with k of at least 1")
    return value


class MatmulNoise(Settings):
    """Relative Gaussian error `y + s*abs(y)*eps` on the output of every matrix product."""

    relative_std: Fraction = 0.0
    """`s`: standard deviation relative to each output element (fraction; 5 % is 0.05)."""
    forward: bool = True
    """Perturb the product of the forward pass."""
    backward: bool = True
    """Perturb the two products of the backward pass, `dX` and `dW`."""
    attention: bool = True
    """Perturb attention's QK^T and PV too, not only Linear layers."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.relative_std > 0 and not (self.forward or self.backward):
            raise ValueError("perturbs nothing: set forward or backward to true, or relative_std to 0")
        return self


class Precision(Settings):
    """Number formats of the inputs of every Linear; None leaves them as they are."""

    weight: FormatName | None = None
    """Format of `Linear.weight`, blocks along `in_features`."""
    activation: FormatName | None = None
    """Format of the input of a Linear, blocks along its last axis."""
    keep: Annotated[tuple[int, ...] | str, BeforeValidator(_kept_layers)] = ()
    """Decoder layers left in high precision: a list of indices, or `srdd:k` for the k most sensitive of a scan."""


class Deadzone(Settings):
    """Inputs of a Linear with `abs(x) < threshold * max(abs(x))` become zero."""

    threshold: Annotated[float, _rule(lambda v: 0 < v < 1, "must be in (0, 1)")]
    layers: tuple[Whole, ...]
    """Decoder layers concerned."""


class Fault(Settings):
    """One broken unit: what it does to the output of the Linear layers it computes."""

    kind: Literal["deadzone", "saturation", "noise", "stuck", "bitflip", "gain"]
    layer: Whole
    """Decoder layer that the faulty unit computes."""
    module: str | None = None
    """Name of one Linear within the layer such as `mlp.up_proj`; None: all of them."""
    amount: Positive
    """Size: threshold or level relative to the token's max(abs(y)); relative standard deviation or gain error
    (fraction); for `stuck` the constant itself, in units of y."""
    share: Share = 1.0
    """Share of the elements concerned (for `stuck`: of the channels)."""
    bit: Annotated[int, _rule(lambda v: 0 <= v < 32, "must be a bit of float32, 0 to 31")] = 22
    """Bit that `bitflip` inverts, 0 being the lowest of the mantissa."""


class Hardware(Settings):
    """What the chip does to the arithmetic, in rollout, training and evaluation alike."""

    precision: Precision = Precision()
    matmul_noise: MatmulNoise = MatmulNoise()
    deadzone: Deadzone | None = None
    faults: tuple[Fault, ...] = ()
    exclude: tuple[str, ...] = ("embed_tokens", "lm_head")
    """Names of modules left alone: a Linear is excluded if a part of its dotted name matches (shell pattern)."""

    @property
    def changes_nothing(self) -> bool:
        """Whether this is plain arithmetic, so that deployed and clean scores are one."""
        quantized = self.precision.weight or self.precision.activation
        return not (quantized or self.matmul_noise.relative_std or self.deadzone or self.faults)

    @property
    def is_noisy(self) -> bool:
        """Whether two evaluations of the same input differ (unless the draws are replayed)."""
        noise = self.matmul_noise
        return (noise.relative_std > 0 and noise.forward) or any(f.kind in ("noise", "bitflip") for f in self.faults)


class AQN(Settings):
    """Adaptive Quantization Noise: scheduled noise on RMSNorm weights, in rollouts only (arXiv:2510.11696)."""

    sigma_start: Positive
    """Standard deviation at the first interval that has noise."""
    sigma_end: Positive
    """Standard deviation at the last interval."""
    schedule: Literal["epoch", "global", "constant", "linear", "cosine"] = "epoch"
    stages: Count = 10
    """`global`: intervals of the run, the first silent. `epoch`: noisy intervals of each epoch, after a silent one."""
    target: Literal["rmsnorm", "linear"] = "rmsnorm"
    noise: Literal["absolute", "relative"] = "absolute"
    """`absolute`: `w + sigma*eps`, as published. `relative`: `w*(1 + sigma*eps)`, portable between models."""
    layers: Literal["all", "targeted", "variable", "proportional", "inverse", "ceiling", "zone"] = "all"
    """Multipliers of sigma per decoder layer: none, or a mode of the SRDD scan."""

    @model_validator(mode="after")
    def _noise_falls(self) -> Self:
        if self.sigma_end > self.sigma_start:
            raise ValueError(f"sigma_end ({self.sigma_end}) must not be above sigma_start ({self.sigma_start})")
        if self.schedule == "global" and self.stages < 2:
            raise ValueError(
                "would never inject noise: with schedule = 'global' the first stage has none, so stages >= 2"
            )
        return self


class LoRA(Settings):
    """Low-rank adapters over the installed base; only they are trained, in high precision."""

    rank: Count = 32
    alpha: Positive = 16.0
    dropout: Fraction = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "GRPO": {"name": "GRPO", "group_size": 5, "kl_coefficient": 0.001},
    "DAPO": {
        "name": "DAPO",
        "group_size": 8,
        "clip_high": 0.28,
        "dynamic_sampling": True,
        "overlong_buffer": 0.25,
    },
}
"""Defaults of the named algorithms; `[algorithm] name = "GRPO"` starts from them and any key may be set beside it."""


class Algorithm(Settings):
    """Policy-gradient objective; GRPO (arXiv:2402.03300) and DAPO (arXiv:2503.14476) are two values of it."""

    name: str
    group_size: Annotated[int, _rule(lambda v: v >= 2, "must be at least 2: one rollout has no group to compare with")]
    clip_low: Fraction = 0.2
    clip_high: NonNegative = 0.2
    aggregation: Literal["token-mean", "sequence-mean", "dr_grpo"] = "token-mean"
    normalize_std: bool = True
    """Divide a group's centred rewards by their standard deviation."""
    kl_coefficient: NonNegative = 0.0
    kl_estimator: Literal["low_var_kl", "k1", "k2"] = "low_var_kl"
    dynamic_sampling: bool = False
    """Drop groups of equal reward and draw more prompts until the batch is full."""
    max_sampling_batches: Count = 5
    overlong_buffer: Share = 0.0
    """Last share of the response limit over which a length penalty rises linearly (fraction; 256 of 1,024 is 0.25)."""
    overlong_factor: NonNegative = 0.5
    """Penalty at the response limit (reward units)."""
    ratio: Literal["replayed", "recomputed", "rollout", "one"] = "replayed"
    """Which pair of log-probabilities the importance ratio compares (design section 6)."""
    tis_cap: Positive = 2.0
    """Largest truncated importance weight with ratio = 'rollout'."""
    temperature: Positive = 1.0
    top_p: Annotated[float, _rule(lambda v: 0 < v <= 1, "must be in (0, 1]")] = 1.0
    top_k: Whole = 0
    """0 keeps the whole vocabulary."""
    optimizer_epochs: Count = 1
    """Passes over one batch of rollouts."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_named(cls, data: Any) -> Any:
        return {**ALGORITHMS.get(str(data.get("name")), {}), **data} if isinstance(data, Mapping) else data


class Training(Settings):
    """Batch sizes, lengths and the optimizer: how big one run is."""

    prompts_per_step: Count
    minibatches: Count = 1
    """Optimizer steps on each batch of rollouts."""
    micro_batch: Whole = 0
    """Rollouts in one forward and backward pass (0: a whole minibatch); changes memory, not the result."""
    learning_rate: Positive
    lora_learning_rate: Positive
    warmup_steps: Whole = 0
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    gradient_clip: Positive = 1.0
    max_prompt_tokens: Count
    max_new_tokens: Count
    long_prompts: Literal["error", "filter"] = "error"
    """What to do with a training problem longer than `max_prompt_tokens`."""
    evaluate_every: Count
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    noise_draws: Count = 1
    """Noise draws over which a deployed score is averaged."""
    checkpoint_every: Count
    keep_checkpoints: Annotated[
        int, _rule(lambda v: v >= 2, "must be at least 2, so that a damaged one can be survived")
    ] = 2


class Task(Settings):
    """A task by name, with the settings that the task itself defines and checks."""

    name: str
    settings: dict[str, Any] = {}


class Profile(Settings):
    """A scale: model, task, batch sizes, lengths, learning rates."""

    name: str
    title: str = ""
    model: str
    """`tiny`, a local directory, or a hub name."""
    task: Task
    training: Training
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda", "npu", "mps"] = "cpu"
    threads: Count = 1
    """CPU threads of one run; part of what fixes its bits."""


class Experiment(Settings):
    """One row of the table: what is trained, on which hardware, with which remedy."""

    id: str
    title: str = ""
    family: str = ""
    baseline: str | None = None
    """Id of the experiment that a benefit is measured against."""
    algorithm: Algorithm
    epochs: Count = 1
    hardware: Hardware = Hardware()
    aqn: AQN | None = None
    lora: LoRA | None = None

    @model_validator(mode="after")
    def _not_its_own_baseline(self) -> Self:
        if self.baseline == self.id:
            raise ValueError(f"baseline must be another experiment, but is {self.id!r} itself")
        return self


NAMES_ONLY = {"experiment": {"id", "title", "family", "baseline"}, "profile": {"name", "title"}}
"""Fields that name a run without changing its result."""


def result_hash(experiment: Experiment, profile: Profile) -> str:
    """Eight hex digits over every setting that changes a result, and over no name."""
    content = {
        "experiment": experiment.model_dump(mode="json", exclude=NAMES_ONLY["experiment"]),
        "profile": profile.model_dump(mode="json", exclude=NAMES_ONLY["profile"] | {"device"}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


Model = TypeVar("Model", bound=Settings)


def validate(model: type[Model], data: Mapping[str, Any], *, source: str) -> Model:
    """The settings in `data` as a `model`.

    Raises:
        ConfigError: with one line per offending setting: path, rule, value, and the nearest key if it is unknown.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = [_describe(model, item) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _describe(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    path = ".".join(
        str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "constrained-", "literal["))
    )
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        known = tuple(_fields_at(model, parents))
        return f"{path} is not a setting{nearest(str(key), known) or ' (known here: ' + ', '.join(known) + ')'}"
    if item["type"] == "missing":
        return f"{path} is missing: it must be set"
    rule = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], Mapping | BaseModel):
        return f"{path} {rule}" if path else rule
    rule = rule[0].lower() + rule[1:]
    return f"{path} {rule if rule.startswith('must') else 'is wrong: ' + rule}, but is {item['input']!r}"


def _fields_at(model: type[BaseModel], path: list[str | int]) -> Iterator[str]:
    here: type[BaseModel] = model
    for part in path:
        field = here.model_fields.get(str(part))
        if field is None:
            continue
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        here = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), here)
    yield from here.model_fields
