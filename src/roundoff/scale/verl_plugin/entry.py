"""Importing this module activates the plugin; verl's plugin mechanism is an import, so there is no other way.

`VERL_USE_EXTERNAL_MODULES=roundoff.scale.verl_plugin.entry` makes verl import it in every process at `import verl`,
and passes its errors on. Where no variable asks for hardware, nothing is done.
"""

from __future__ import annotations

import os

from roundoff.config import ConfigError
from roundoff.scale.verl_plugin.settings import VERL_VERSION, from_environment


def activate() -> bool:
    """Register platform, rollout, engine and trainer with verl, as the environment asks; whether anything was.

    Raises:
        ConfigError: if the settings are wrong, or verl is of another version than the plugin was written for.
    """
    settings = from_environment(os.environ)
    on_cpu = os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
    if settings is None:
        return False
    import verl

    if verl.__version__ != VERL_VERSION:
        raise ConfigError(f"roundoff's plugin is for verl {VERL_VERSION}, but {verl.__version__} is installed")
    if on_cpu:
        from roundoff.scale.verl_plugin import cpu_platform

        cpu_platform.register()
    from verl.plugin.platform import get_platform

    from roundoff.scale.verl_plugin import engine, plain_prompts, trainer

    platform = get_platform()
    engine.register(platform.device_name, platform.vendor_name)
    trainer.register()
    assert plain_prompts.NAME  # its import has registered it
    if on_cpu:
        from roundoff.scale.verl_plugin import cpu_rollout

        cpu_platform.register_engine()
        cpu_rollout.register()
    return True


ACTIVE = activate()
"""Whether this process has the plugin in force."""
