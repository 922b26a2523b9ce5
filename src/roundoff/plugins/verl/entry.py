"""Importing this module activates the plugin; verl's plugin mechanism is an import, so there is no other way.

`VERL_USE_EXTERNAL_MODULES=roundoff.plugins.verl.entry` makes verl import it in every process at `import verl`,
and passes its errors on. Where no variable asks for hardware, nothing is done.
"""

from __future__ import annotations

import json
import os
from typing import Any

from roundoff.config import ConfigError
from roundoff.plugins.verl.settings import PLATFORM, VERL_VERSION, forwarded, from_environment


def activate() -> bool:
    """Register platform, rollout, engine and trainer with verl, as the environment asks; whether anything was.

    Raises:
        ConfigError: if the settings are wrong, or verl is of another version than the plugin was written for.
    """
    settings = from_environment(os.environ)
    on_cpu = os.environ.get(PLATFORM, "").strip().lower() == "cpu"
    if settings is None:
        return False
    import verl

    if verl.__version__ != VERL_VERSION:
        raise ConfigError(f"roundoff's plugin is for verl {VERL_VERSION}, but {verl.__version__} is installed")
    if on_cpu:
        from roundoff.plugins.verl import cpu_platform

        cpu_platform.register()
    from verl.plugin.platform import get_platform

    from roundoff.plugins.verl import engine, plain_prompts, trainer

    platform = get_platform()
    engine.register(platform.device_name, platform.vendor_name)
    trainer.register()
    assert plain_prompts.NAME  # its import has registered it
    if on_cpu:
        from roundoff.plugins.verl import cpu_rollout

        cpu_platform.register_engine()
        cpu_rollout.register()
    _forward_variables()
    return True


def _forward_variables() -> None:
    """Let verl's driver give the plugin's variables to every process, also where Ray was started before this shell.

    Processes of such a cluster have the environment of `ray start`, and would go on without any hardware.
    """
    from verl.trainer import constants_ppo

    plain = constants_ppo.get_ppo_ray_runtime_env

    def with_variables(config: Any = None) -> dict[str, Any]:
        environment: dict[str, Any] = plain(config)
        job = json.loads(os.environ.get(constants_ppo.RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
        given = (job.get("runtime_env") or {}).get("env_vars") or {}  # every process has these; Ray refuses them twice
        ours = {name: value for name, value in forwarded(os.environ).items() if name not in given}
        environment.setdefault("env_vars", {}).update(ours)
        return environment

    constants_ppo.get_ppo_ray_runtime_env = with_variables


ACTIVE = activate()
"""Whether this process has the plugin in force."""
