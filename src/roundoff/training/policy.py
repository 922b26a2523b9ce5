"""The policy of a run: a model on its hardware, with its adapters if the run has any."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from roundoff.config import ConfigError, Experiment, Profile
from roundoff.hardware import InstalledHardware, install
from roundoff.models.device import resolve_device
from roundoff.models.load import LoadedModel, load_model
from roundoff.models.lora import Adapters, attach
from roundoff.models.weights import weights_digest
from roundoff.numerics.rng import Key
from roundoff.runs.checkpoint import Checkpoint, DamagedCheckpointError
from roundoff.srdd import LayerScan, experiment_scan, keep_names_a_scan, resolve_keep
from roundoff.tasks import make_task


@dataclass(frozen=True, slots=True)
class Policy:
    """A model as a run computes it, with the hardware and the adapters."""

    loaded: LoadedModel
    installed: InstalledHardware | None
    adapters: Adapters | None
    base: str
    """SHA-256 of the weights as they were loaded."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.loaded.model

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the optimizer moves, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load_policy(experiment: Experiment, profile: Profile, seed: int, *, scan: LayerScan | None = None) -> Policy:
    """Load the model of a run as it is before the first step: on its hardware, with fresh adapters if it has any.

    `scan` is the SRDD scan that the run rests on. If the hardware needs a scan and none is given, the model is scanned.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    loaded = load_plain(profile)
    if scan is None and keep_names_a_scan(experiment.hardware):
        scan = experiment_scan(experiment, loaded, make_task(profile), seed)
    return make_policy(experiment, loaded, seed, scan)


def make_policy(experiment: Experiment, loaded: LoadedModel, seed: int, scan: LayerScan | None) -> Policy:
    """Put a plain model on its hardware, with fresh adapters if the experiment has any."""
    installed = install_plain(experiment, loaded.model, seed, scan)
    base = weights_digest(loaded.model)
    lora = experiment.lora
    adapters = attach(loaded.model, lora, Key.from_seed(seed)) if lora is not None else None
    return Policy(loaded, installed, adapters, base)


def load_plain(profile: Profile) -> LoadedModel:
    """Load the profile's model without hardware or adapters."""
    return load_model(
        profile.model,
        dtype=getattr(torch, profile.dtype),
        device=resolve_device(profile.device),
        allow_download=profile.allow_download,
        chat=profile.chat,
    )


def install_plain(
    experiment: Experiment, model: PreTrainedModel, seed: int, scan: LayerScan | None
) -> InstalledHardware | None:
    """Put the experiment's hardware on a plain model; None if the hardware changes nothing."""
    hardware = experiment.hardware if scan is None else resolve_keep(experiment.hardware, scan)
    return None if hardware.changes_nothing else install(model, hardware, seed=seed)


def put_weights(policy: Policy, checkpoint: Checkpoint) -> None:
    """Restore the weights of a checkpoint, which are all that a run trains, bit for bit.

    Raises:
        ConfigError: if the run trains adapters, and their base has changed since it began.
        DamagedCheckpointError: if they are the weights of another model.
    """
    if policy.adapters is not None:
        check_base(policy, checkpoint)
    weights = checkpoint.tensors["model"]
    trained = policy.trainable
    expected = {name: tuple(p.shape) for name, p in trained.items()}
    held = {name: tuple(w.shape) for name, w in weights.items()}
    if held != expected:
        differing = sorted({name for name, _ in expected.items() ^ held.items()})
        raise DamagedCheckpointError(f"a checkpoint holds the weights of another model: {', '.join(differing[:4])}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def check_base(policy: Policy, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint was made over the weights that the policy was loaded with.

    Raises:
        ConfigError: if the model has changed since.
    """
    if checkpoint.state["base"] != policy.base:
        raise ConfigError(
            f"model {policy.loaded.name!r} has changed since this run began: bring the old one back to go on, or move "
            "the run's directory away to begin again"
        )
