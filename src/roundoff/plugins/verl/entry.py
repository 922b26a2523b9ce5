"""Importing this module activates the plugin, because verl loads plugins by importing them.

With `VERL_USE_EXTERNAL_MODULES=roundoff.plugins.verl.entry` verl imports it in every process at `import verl`, and
passes its errors on. If no variable asks for hardware, it does nothing.
"""

from __future__ import annotations

import json
import os
from typing import Any

from roundoff.config import ConfigError
from roundoff.plugins.verl.settings import PLATFORM, VERL_VERSION, forwarded, from_environment


def activate() -> bool:
    """Register platform, rollout, engine and trainer with verl, if the environment asks for it.

    Returns:
        Whether anything was registered.

    Raises:
        ConfigError: if the settings are wrong, or if the plugin was written for another version of verl.
    """
    settings = from_environment(os.environ)
    on_cpu = os.environ.get(PLATFORM, "").strip().lower() == "cpu"
    if settings is None:
        return False
    import verl

    if verl.__version__ != VERL_VERSION:
        raise ConfigError(
            f"roundoff's plugin is for verl {VERL_VERSION}, but {verl.__version__} is installed: install that one"
        )
    if on_cpu:
        from roundoff.plugins.verl import cpu_platform

        cpu_platform.register()
    from verl.plugin.platform import get_platform

    from roundoff.plugins.verl import engine, plain_prompts, trainer

    platform = get_platform()
    engine.register(platform.device_name, platform.vendor_name)
    trainer.register()
    assert plain_prompts.NAME  # importing the module has registered it
    if on_cpu:
        from roundoff.plugins.verl import cpu_rollout

        cpu_platform.register_engine()
        cpu_rollout.register()
    _forward_variables()
    return True


def _forward_variables() -> None:
    """Make verl's driver pass the plugin's variables to every process, even if Ray was started before this shell.

    Processes of such a cluster have the environment of `ray start`, and would run without any hardware.
    """
    from verl.trainer import constants_ppo

    plain = constants_ppo.get_ppo_ray_runtime_env

    def with_variables(config: Any = None) -> dict[str, Any]:
        environment: dict[str, Any] = plain(config)
        job = json.loads(os.environ.get(constants_ppo.RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
        of_job = (job.get("runtime_env") or {}).get(
            "env_vars"
        ) or {}  # all processes have these; Ray refuses them twice
        ours = {name: value for name, value in forwarded(os.environ).items() if name not in of_job}
        environment.setdefault("env_vars", {}).update(ours)
        return environment

    constants_ppo.get_ppo_ray_runtime_env = with_variables


ACTIVE = activate()
"""Whether the plugin is active in this process."""
