"""The plugin's settings, which it reads from environment variables; nothing else in roundoff reads any.

`ROUNDOFF_VERL_SETTINGS` holds the settings as JSON, as `roundoff verl-config` writes it. Without it, the variables of
older launch scripts are read, with these meanings:

| variable | meaning here |
|---|---|
| `VERL_NOISY_OPS_ENABLED` | `1`, `true` or `yes`: the variables below are read; otherwise none of them is |
| `VERL_NOISY_OPS_SCALE` | `matmul_noise.relative_std` (fraction); 1e-4 if unset, as in those scripts |
| `VERL_NOISY_OPS_TYPE` | must be `relative_gaussian` (the default), because roundoff has no other noise |
| `VERL_NOISY_OPS_FORWARD_ONLY` | true: `matmul_noise.backward = false` |
| `VERL_NOISY_OPS_ALL_OPS` | true: `matmul_noise.attention = true`, so QK^T and PV too; else Linear products only |

For those scripts `ALL_OPS` also perturbed softmax, activations and norms. These are no matrix products and have no
noise here, which the plugin says in a warning. The importance ratio is `recomputed`, as in those scripts. Any other
variable that begins with `VERL_NOISY_OPS_` is an error, because ignoring it would change the meaning of a script.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Literal

from roundoff.config import AQN, PHASES, ConfigError, Count, Hardware, MatmulNoise, Settings, nearest, validate
from roundoff.errors import RoundoffWarning

VARIABLE = "ROUNDOFF_VERL_SETTINGS"
PREFIX = "VERL_NOISY_OPS_"
KNOWN = tuple(PREFIX + name for name in ("ENABLED", "SCALE", "TYPE", "FORWARD_ONLY", "ALL_OPS"))
MODULES = "VERL_USE_EXTERNAL_MODULES"
"""verl's variable for modules to import in every process; verl passes their errors on."""
ENTRY = "roundoff.plugins.verl.entry"
PLATFORM = "VERL_PLATFORM"
"""verl's variable for the kind of device."""
VERL_VERSION = "0.9.1"
"""The version whose extension points and private names the plugin was written for."""

_TRUE, _FALSE = ("1", "true", "yes"), ("", "0", "false", "no")


class PluginSettings(Settings):
    """What one verl run computes on, in every one of its processes."""

    experiment: str = ""
    """Id of the experiment, for display only."""
    hardware: Hardware
    """The hardware of all phases: actor and reference compute on that of training, rollout processes on the others."""
    aqn: AQN | None = None
    multipliers: dict[int, float] | None = None
    """Factors on AQN's sigma by decoder layer, from a scan; None: 1 in every layer."""
    ratio: Literal["replayed", "recomputed"] = "replayed"
    """Whether old and new log-probabilities see the same noise draws (see `Algorithm.ratio`)."""
    oversampling: Count = 1
    """Prompts drawn for each one that is trained on, which shortens an epoch (see `Algorithm.oversampling`)."""
    seed: int = 0
    """Seed of the noise, of the faults and of AQN."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of a hash of all settings; processes with the same fingerprint have the same hardware."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def rollout_hardware(self) -> Hardware:
        """The hardware of a rollout process, which never trains: that of rollouts, and evaluation where it differs."""
        return self.hardware.model_copy(update={"training": self.hardware.rollout})


def from_environment(environment: Mapping[str, str]) -> PluginSettings | None:
    """The settings that these environment variables hold; None if they ask for nothing.

    Raises:
        ConfigError: if a variable cannot be understood, or two of them contradict each other.
    """
    unknown = [name for name in environment if name.startswith(PREFIX) and name not in KNOWN]
    if unknown:
        raise ConfigError(
            f"{unknown[0]} is not a variable that roundoff knows{nearest(unknown[0], KNOWN)} "
            f"(known: {', '.join(KNOWN)})"
        )
    text = environment.get(VARIABLE, "")
    noisy = _flag(environment, PREFIX + "ENABLED")
    if text and noisy:
        raise ConfigError(f"{VARIABLE} and {PREFIX}ENABLED are both set: set one of them")
    if noisy:
        return _from_noisy_ops(environment)
    if not text:
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{VARIABLE} must be JSON as `roundoff verl-config` writes it: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{VARIABLE} must be a JSON object, but is {text[:40]!r}")
    return check(validate(PluginSettings, content, source=VARIABLE))


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that every process must have, if a process with this environment starts the run.

    The plugin's entry is among them, so that a process on a node without roundoff fails instead of running without it.
    """
    variables = {name: environment[name] for name in (*KNOWN, VARIABLE, PLATFORM) if name in environment}
    modules = [name for name in environment.get(MODULES, "").split(",") if name]
    return variables | {MODULES: ",".join(modules if ENTRY in modules else [*modules, ENTRY])}


def check(settings: PluginSettings) -> PluginSettings:
    """The settings themselves, after checking that the plugin can carry them out.

    Raises:
        ConfigError: if a setting needs a scan that was not given, or is not supported.
    """
    hardware, aqn = settings.hardware, settings.aqn
    for keep in (hardware.of(phase).precision.keep for phase in PHASES):
        if isinstance(keep, str):
            raise ConfigError(f"hardware.precision.keep = {keep!r} needs a scan: give its file by `verl-config --scan`")
    if any(hardware.of(phase).lora for phase in PHASES):
        raise ConfigError(
            "hardware.lora = true is not available under verl, which wraps the model in adapters after the hardware "
            "is installed: leave it false"
        )
    if settings.ratio == "replayed" and hardware.draws_differ:
        raise ConfigError(
            "ratio = 'replayed' means nothing here: rollouts and training draw different noise in the forward pass "
            "(hardware.rollout, hardware.training), so no pass of training can repeat that of a rollout: set ratio = "
            "'recomputed'"
        )
    if aqn is not None and aqn.layers == "zone":
        raise ConfigError(
            "aqn.layers = 'zone' changes during the run, which the verl plugin does not: use another mode"
        )
    if aqn is not None and aqn.layers != "all" and settings.multipliers is None:
        raise ConfigError(f"aqn.layers = {aqn.layers!r} needs a scan: give its file by `verl-config --scan`")
    return settings


def _from_noisy_ops(environment: Mapping[str, str]) -> PluginSettings:
    kind = environment.get(PREFIX + "TYPE", "relative_gaussian")
    if kind != "relative_gaussian":
        raise ConfigError(f"{PREFIX}TYPE must be 'relative_gaussian', the one noise of roundoff, but is {kind!r}")
    text = environment.get(PREFIX + "SCALE", "1e-4")
    try:
        scale = float(text)
    except ValueError:
        raise ConfigError(f"{PREFIX}SCALE must be a number such as 5e-2, but is {text!r}") from None
    all_ops = _flag(environment, PREFIX + "ALL_OPS")
    if all_ops:
        warnings.warn(
            f"{PREFIX}ALL_OPS: roundoff perturbs matrix products, those of attention included; softmax, activations "
            "and norms stay exact",
            RoundoffWarning,
            stacklevel=2,
        )
    noise = validate(
        MatmulNoise,
        {"relative_std": scale, "backward": not _flag(environment, PREFIX + "FORWARD_ONLY"), "attention": all_ops},
        source=PREFIX + "SCALE",
    )
    if not noise.relative_std:
        raise ConfigError(f"{PREFIX}ENABLED is set and {PREFIX}SCALE is 0: that would do nothing")
    return PluginSettings(experiment="VERL_NOISY_OPS", hardware=Hardware(matmul_noise=noise), ratio="recomputed")


def _flag(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise ConfigError(f"{name} must be one of {', '.join(_TRUE + _FALSE[1:])}, but is {value!r}")
    return value in _TRUE
