"""A check that every process of a verl run computes on the same hardware, from what the processes report."""

from __future__ import annotations

from typing import Any

from roundoff.config import ConfigError
from roundoff.plugins.verl.settings import PluginSettings


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
