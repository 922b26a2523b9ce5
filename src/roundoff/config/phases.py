"""What the chip does to the arithmetic, as a whole: its parts, other settings for some modules, and for some phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import ValidationError, field_validator, model_validator

from roundoff.config.arithmetic import Accumulator
from roundoff.config.base import LATER, Settings
from roundoff.config.changes import NONE, Changes, changed, changes_of, first_line
from roundoff.config.hardware import Deadzone, Fault, MatmulNoise, Precision
from roundoff.config.rules import Rule, ThresholdChanges

Phase = Literal["rollout", "training", "evaluation"]
"""What a pass is for. Training is every pass whose result enters the loss: log-probabilities before the update, those
of the reference, and the update itself."""
PHASES: tuple[Phase, ...] = get_args(Phase)
PARTS = ("precision", "matmul_noise", "deadzone", "accumulator")
"""The tables of a hardware, each of which the word "none" takes away."""
LISTS = ("faults", "rules")
"""Its lists of tables."""
_REFINED = ("gradient", "gradient_rounding", "hadamard")
"""Settings of the backward pass, which only training has."""


class HardwareOfAPhase(Settings):
    """What the chip does to the arithmetic of one phase."""

    precision: Precision = Precision()
    matmul_noise: MatmulNoise = MatmulNoise()
    deadzone: Deadzone | None = None
    faults: tuple[Fault, ...] = ()
    exclude: tuple[str, ...] = ("embed_tokens", "lm_head")
    """Shell patterns of modules to leave in plain arithmetic, matched against each module's dotted name and against
    each part of it."""
    rules: Annotated[tuple[Rule, ...], LATER] = ()
    """Other settings for some modules."""
    accumulator: Annotated[Accumulator | None, LATER] = None
    """How the products of each Linear are summed, except in the layers of `precision.keep`; None means float32."""
    lora: Annotated[bool, LATER] = False
    """Whether the adapters of LoRA are on the hardware too; if not, they stay in high precision and without noise."""

    @model_validator(mode="before")
    @classmethod
    def _tables_are_taken_away(cls, data: Any) -> Any:
        """The word "none" for a table stands for its defaults, as in a phase."""
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if not (key in PARTS and value == NONE)}

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        for number, one in enumerate(self.rules):
            try:
                _with_rule(self, one)
            except ValidationError as error:
                raise ValueError(f".rules.{number}.{first_line(error)}") from None
        return self

    def at(self, name: str) -> HardwareOfAPhase:
        """The settings in force for the module with a dotted name; a deadzone without layers is one of this module.

        Raises:
            ValidationError: if the rules that match it do not fit together.
        """
        result = self
        for one in self.rules:
            if one.matches(name):
                result = _with_rule(result, one)
        return result

    def under_rule(self, number: int) -> HardwareOfAPhase:
        """The settings of the modules that this rule matches and no other."""
        return _with_rule(self, self.rules[number])

    def variants(self) -> set[HardwareOfAPhase]:
        """The settings that a module may have, under some of the rules and in some phase."""
        variants: set[HardwareOfAPhase] = {self.model_copy(update={"rules": ()})}
        for one in self.rules:
            for variant in tuple(variants):
                with suppress(ValidationError):  # only modules that several rules match could have it
                    variants.add(_with_rule(variant, one))
        return variants

    @property
    def changes_nothing(self) -> bool:
        """Whether this is plain arithmetic, so that deployed and clean scores are equal."""
        return not any(variant._does_something for variant in self.variants())

    @property
    def _does_something(self) -> bool:
        quantized = self.precision.quantizes_forward or self.precision.gradient
        errors = self.matmul_noise.changes_products or self.deadzone or self.faults
        return bool(quantized or errors or self.accumulator)

    @property
    def changes_forward(self) -> bool:
        """Whether the forward pass is anything but plain arithmetic."""
        return any(
            v.precision.quantizes_forward
            or (v.matmul_noise.changes_products and v.matmul_noise.forward)
            or v.accumulator
            or v.deadzone
            or v.faults
            for v in self.variants()
        )

    @property
    def separates_rollouts(self) -> bool:
        """Whether every rollout needs a training pass of its own over its prompt.

        That is so if something is drawn for each token, or if gradients are quantized or an accumulator sums them in
        chunks: a gradient that is summed over rollouts before is another number.
        """
        return any(
            v.matmul_noise.relative_std or v.faults or v.precision.gradient or v.accumulator for v in self.variants()
        )

    @property
    def draws_in_training(self) -> bool:
        """Whether anything in a training pass is random: the forward pass, noise on gradients, or their rounding."""
        drawn = any(
            v.matmul_noise.relative_std or v.precision.gradient_rounding == "stochastic" for v in self.variants()
        )
        return drawn or self.is_noisy

    @property
    def is_noisy(self) -> bool:
        """Whether the forward pass is random: two evaluations of one input differ unless they use the same key."""
        return any(
            (v.matmul_noise.relative_std > 0 and v.matmul_noise.forward)
            or any(fault.kind in ("noise", "bitflip") for fault in v.faults)
            for v in self.variants()
        )

    @property
    def changes_attention(self) -> bool:
        """Whether the products of any attention layer are other ones: noise on them, or formats of their operands."""
        variants = self.variants()
        return any(v.matmul_noise.attention_std or v.precision.attention for v in variants)

    @property
    def concerns_attention(self) -> bool:
        """Whether attention is computed otherwise than in the plain model: other products, or a format of its cache."""
        return self.changes_attention or any(variant.precision.kv_cache for variant in self.variants())

    @property
    def quantizes_weights(self) -> bool:
        """Whether any weight has a format."""
        return any(variant.precision.weight for variant in self.variants())

    @property
    def noise(self) -> tuple[object, ...]:
        """What must be equal for one forward pass to repeat the noise of another.

        That is which modules draw (those excluded and adapters taken into account), of what size and relative to what,
        in Linears and in attention, and the faults that draw. Errors that are not drawn anew for each product (gains,
        converters, formats) may differ: they meet the same draws.
        """
        undrawn = ("backward", "gain_std", "adc_bits", "adc_range")
        of_rules = []
        for one in self.rules:
            noise = one.written.get("matmul_noise")
            of_noise = noise.written if isinstance(noise, Changes) else {NONE: noise}
            kept = [
                f"{name} = {value}" for name, value in of_noise.items() if name not in undrawn and value is not None
            ]
            if kept:
                of_rules.append((one.match, *kept))
        drawn = [fault for fault in self.faults if fault.kind in ("noise", "bitflip")]
        plain = MatmulNoise()
        forward = self.matmul_noise.model_copy(update={name: getattr(plain, name) for name in undrawn})
        return forward, self.lora, *of_rules, *drawn, frozenset(self.exclude)


def _with_rule(base: HardwareOfAPhase, one: Rule) -> HardwareOfAPhase:
    """The settings with the changes of a rule; its deadzone has no layers."""
    written = {name: value for name, value in one.written.items() if name != "match"}
    if isinstance(zone := written.get("deadzone"), ThresholdChanges):
        written["deadzone"] = Deadzone(threshold=zone.threshold, layers=())
    return changed(base.model_copy(update={"rules": ()}), written)


if TYPE_CHECKING:
    HardwareChanges: TypeAlias = Changes
else:
    HardwareChanges = changes_of(HardwareOfAPhase)


def _check_without_gradients(phase: Phase, changes: Changes, here: HardwareOfAPhase) -> None:
    """Refuse what concerns gradients alone in a phase that computes none.

    Raises:
        ValueError: naming the setting.
    """
    for number, one in enumerate(changes.written.get("rules", ())):
        precision = one.written.get("precision")
        written = precision.written if isinstance(precision, Changes) else {}
        if refined := [name for name in _REFINED if written.get(name) not in (None, NONE, "nearest")]:
            raise ValueError(
                f".{phase}.rules.{number}.precision.{refined[0]} does nothing, because no gradient is computed in that "
                "phase: set it in [[hardware.training.rules]]"
            )
    noise = changes.written.get("matmul_noise")
    if isinstance(noise, Changes) and noise.written.get("forward") is False and here.matmul_noise.relative_std:
        raise ValueError(
            f".{phase}.matmul_noise.forward = false leaves noise on gradients alone, and none is computed in that "
            "phase: set relative_std = 0"
        )


class Hardware(HardwareOfAPhase):
    """What the chip does to the arithmetic, and what is different in some phases."""

    rollout: Annotated[HardwareChanges | None, LATER] = None
    """What is different while rollouts are sampled."""
    training: Annotated[HardwareChanges | None, LATER] = None
    """What is different in every pass whose result enters the loss."""
    evaluation: Annotated[HardwareChanges | None, LATER] = None
    """What is different while the deployed score is taken; None: what is different in rollouts."""

    @classmethod
    def settled(cls, values: dict[str, Any], written: frozenset[str]) -> dict[str, Any]:
        """The values of one phase, which has no phases itself."""
        return values | dict.fromkeys(PHASES)

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        for phase in PHASES:
            changes: HardwareChanges | None = getattr(self, phase)
            if changes is None:
                continue
            precision = changes.written.get("precision")
            of_precision = precision.written if isinstance(precision, Changes) else {}
            refined = set(_REFINED) & set(of_precision)
            if phase != "training" and refined and of_precision.get("gradient") != NONE:
                raise ValueError(
                    f".{phase}.precision.{min(refined)} does nothing, because no gradient is computed in that phase: "
                    "set it in [hardware.training.precision]"
                )
            try:
                here = changed(self, changes.written)
            except ValidationError as error:
                raise ValueError(f".{phase}.{first_line(error).removeprefix('.')}") from None
            if phase != "training":
                _check_without_gradients(phase, changes, here)
        return self

    @field_validator(*PHASES, mode="before")
    @classmethod
    def _phase_is_taken_away(cls, value: Any) -> Any:
        """The word "none" for a phase stands for plain arithmetic."""
        return dict.fromkeys(PARTS, NONE) | dict.fromkeys(LISTS, ()) if value == NONE else value

    def _changes_in(self, phase: Phase) -> HardwareChanges | None:
        changes: HardwareChanges | None = getattr(self, phase)
        return self.rollout if phase == "evaluation" and changes is None else changes

    def written_in(self, phase: Phase, name: str) -> Phase | None:
        """The phase whose table writes a setting that is in force in this one; None if `[hardware]` itself does."""
        changes = self._changes_in(phase)
        if changes is None or name not in changes.written:
            return None
        return "rollout" if phase == "evaluation" and self.evaluation is None else phase

    @property
    def has_phases(self) -> bool:
        """Whether any phase differs from the others."""
        return len({self.of(phase) for phase in PHASES}) > 1

    @property
    def draws_differ(self) -> bool:
        """Whether rollouts and training draw different noise in the forward pass, so that none can be replayed."""
        rollout, training = self.of("rollout"), self.of("training")
        return (rollout.is_noisy or training.is_noisy) and rollout.noise != training.noise

    def of(self, phase: Phase) -> Hardware:
        """The hardware of one phase, without phases of its own."""
        changes = self._changes_in(phase)
        if changes is not None:
            return changed(self, changes.written)
        return self.model_copy(update=dict.fromkeys(PHASES))

    @property
    def needs_scan(self) -> bool:
        """Whether `precision.keep` of any phase names a scan that has yet to choose the layers."""
        return any(isinstance(self.of(phase).precision.keep, str) for phase in PHASES)

    def with_keep(self, choose: Callable[[tuple[int, ...] | str], tuple[int, ...]]) -> Hardware:
        """The same hardware with other layers kept, in every phase: `choose` gives them for what is set."""
        update: dict[str, Any] = {"precision": self.precision.model_copy(update={"keep": choose(self.precision.keep)})}
        for phase in PHASES:
            changes: HardwareChanges | None = getattr(self, phase)
            precision = None if changes is None else changes.written.get("precision")
            if changes is not None and isinstance(precision, Changes) and "keep" in precision.written:
                kept = precision.model_copy(update={"keep": choose(precision.written["keep"])})
                update[phase] = changes.model_copy(update={"precision": kept})
        return self.model_copy(update=update)

    def variants(self) -> set[HardwareOfAPhase]:
        """The settings that a module may have, under some of the rules and in some phase."""
        phases = {self.of(phase) for phase in PHASES}
        return {variant for phase in phases for variant in super(Hardware, phase).variants()}
