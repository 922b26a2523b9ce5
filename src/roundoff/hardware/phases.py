"""The hardware of each phase on a model, and how modules go from that of one phase to that of another.

A module holds its state in every phase, and the one that is in force. Phases with the same settings have one state in
common, and phases whose weights have one format share the quantized weight, so that another phase costs at most one
more `Q(W)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from roundoff.config import Hardware, Phase
from roundoff.hardware import experts
from roundoff.hardware.inventory import Entry, Skipped, described, where
from roundoff.hardware.linear import LINEAR_STATE, LinearState

STATES = "hardware_states"
"""Attribute of a module on hardware that holds its state in each phase, and the attribute of the one in force."""


@dataclass(frozen=True, slots=True)
class ConfigSwitch:
    """An attribute of a model config that selects the plain or the installed computation."""

    config: Any
    """The config."""
    attribute: str
    """Name of the attribute."""
    original: str | None
    """Its value while the hardware is off, and in phases that leave these modules alone."""
    installed: Mapping[Phase, str]
    """Its value in the other phases while the hardware is on."""


@dataclass(frozen=True, eq=False, slots=True)
class PhaseHardware:
    """What the hardware of one phase, or of several that agree, does to a model."""

    hardware: Hardware
    """The settings."""
    entries: tuple[Entry, ...]
    """Modules that the hardware computes."""
    skipped: tuple[Skipped, ...]
    """Modules with weights that it does not compute, each with the reason."""
    modules: tuple[nn.Module, ...]
    """The Linears and experts of `entries`."""
    attention: Mapping[str, str]
    """What it does to attention layers, by name and in words; without those that it leaves alone."""

    def summary(self) -> list[str]:
        """Lines of text: how many modules are computed how, and how many were skipped for which reason."""
        kinds: dict[str, list[Entry]] = {}
        for entry in self.entries:
            kinds.setdefault(described(entry), []).append(entry)
        lines = [f"{len(e):4d} modules: {kind}\n     {where(e)}" for kind, e in kinds.items()]
        attended = Counter(self.attention.values())
        lines += [f"{count:4d} attention layers: {words}" for words, count in attended.items()]
        lines = lines or ["no module: nothing to simulate"]
        reasons = Counter(skip.reason for skip in self.skipped)
        return lines + [f"{count:4d} skipped: {reason}" for reason, count in reasons.items()]


def put_states(module: nn.Module, attribute: str, states: Mapping[Phase, Any], phase: Phase) -> None:
    """Give a module its state in each phase, and put that of one phase in force."""
    module.__dict__[STATES] = (attribute, dict(states))
    module.__dict__[attribute] = states[phase]


def put_in_force(module: nn.Module, phase: Phase) -> None:
    """Put a module's state of another phase in force, if it has states; its weights are checked at the next use."""
    held = module.__dict__.get(STATES)
    if held is not None:
        attribute, states = held
        state = module.__dict__[attribute] = states[phase]
        if attribute == LINEAR_STATE:
            state.stored.begin_pass()
        elif attribute == experts.STATE:
            for inner in state.states():
                inner.stored.begin_pass()


def take_states(module: nn.Module) -> None:
    """Take the states off a module."""
    held = module.__dict__.pop(STATES, None)
    if held is not None:
        del module.__dict__[held[0]]


def states_of(module: nn.Module) -> list[LinearState]:
    """The states in force of a Linear or of experts on hardware; an empty list for every other module."""
    linear = module.__dict__.get(LINEAR_STATE)
    if linear is not None:
        return [linear]
    stacked = module.__dict__.get(experts.STATE)
    return [] if stacked is None else stacked.states()


def states_of_phases(module: nn.Module) -> list[LinearState]:
    """The same for all phases."""
    attribute, states = module.__dict__.get(STATES, ("", {}))
    if attribute == LINEAR_STATE:
        return list(states.values())
    return [inner for state in states.values() for inner in state.states()] if attribute == experts.STATE else []
