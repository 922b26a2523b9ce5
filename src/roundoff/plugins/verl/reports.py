"""What the processes of a verl run report about their hardware, and a check that it is the same everywhere."""

from __future__ import annotations

from typing import Any

from roundoff.config import ConfigError, Hardware, Phase, hardware_in_words
from roundoff.hardware import InstalledHardware
from roundoff.plugins.verl.settings import PluginSettings


def phase_report(hardware: Hardware, installed: InstalledHardware | None, phase: Phase) -> dict[str, Any]:
    """The hardware of a phase as a process computes it.

    Args:
        hardware: the settings of the run.
        installed: what this process has installed; None if its phases are plain arithmetic.
        phase: the phase.

    Returns:
        The phase, its settings in words (`hardware`; of the forward pass), and the number of modules and of attention
        layers that the hardware computes.
    """
    found = None if installed is None else installed.phases[phase]
    return {
        "phase": phase,
        "hardware": hardware_in_words(hardware.of(phase)),
        "modules": 0 if found is None else len(found.entries),
        "attention_layers": 0 if found is None else len(found.attention),
    }


def check_reports(reports: dict[str, list[Any]], settings: PluginSettings) -> None:
    """Check that every process computes on the hardware of these settings.

    Args:
        reports: under `engines` a list of engine reports for each worker, and under `rollouts` one report for each
            rollout server. vLLM's servers give None, because they compare the fingerprint themselves.
        settings: those of the trainer.

    Raises:
        ConfigError: naming the processes that do not, and saying what to do.
    """
    wrong = [f"worker {n} has no engine" for n, engines in enumerate(reports["engines"]) if not engines]
    for n, engines in enumerate(reports["engines"]):
        for engine in engines:
            if engine["fingerprint"] != settings.fingerprint:
                wrong.append(f"the {engine['role']} of worker {n} ({engine.get('engine', 'other settings')})")
    for n, rollout in enumerate(reports["rollouts"]):
        if rollout is not None and rollout["fingerprint"] != settings.fingerprint:
            wrong.append(f"rollout server {n}")
    if not reports["engines"] or not reports["rollouts"]:
        wrong.append("no actor or no rollout server was found")
    if wrong:
        raise ConfigError(
            f"these processes do not compute on the hardware of this run: {'; '.join(wrong)}. Give every process "
            "VERL_USE_EXTERNAL_MODULES and ROUNDOFF_VERL_SETTINGS (`roundoff verl-config` prints the arguments that "
            "do), and use the strategy fsdp or fsdp2"
        )
