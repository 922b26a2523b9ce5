"""The policy of a run: a model on its hardware, with adapters where the run has any, and the weights it has learned."""

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
    """A model as a run computes it: with its hardware, and its adapters over that."""

    loaded: LoadedModel
    installed: InstalledHardware | None
    adapters: Adapters | None
    base: str
    """SHA-256 of the weights that the model had when it was loaded."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.loaded.model

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that the optimizer moves, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load_policy(experiment: Experiment, profile: Profile, seed: int, *, scan: LayerScan | None = None) -> Policy:
    """The model of a run before its first step: on its hardware, with fresh adapters where it has any.

    `scan` is the one that the run rests on; where the hardware needs one and none is given, it is made.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    loaded = load_plain(profile)
    if scan is None and keep_names_a_scan(experiment.hardware):
        scan = experiment_scan(experiment, loaded, make_task(profile), seed)
    return make_policy(experiment, loaded, seed, scan)


def make_policy(experiment: Experiment, loaded: LoadedModel, seed: int, scan: LayerScan | None) -> Policy:
    """A plain model made into the policy: on its hardware, with fresh adapters where the experiment has any."""
    installed = install_plain(experiment, loaded.model, seed, scan)
    base = weights_digest(loaded.model)
    lora = experiment.lora
    adapters = attach(loaded.model, lora, Key.from_seed(seed)) if lora is not None else None
    return Policy(loaded, installed, adapters, base)


def load_plain(profile: Profile) -> LoadedModel:
    """The profile's model, plain."""
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
    """Put the experiment's hardware on a plain model, if that changes anything."""
    hardware = experiment.hardware if scan is None else resolve_keep(experiment.hardware, scan)
    return None if hardware.changes_nothing else install(model, hardware, seed=seed)


def put_weights(policy: Policy, checkpoint: Checkpoint) -> None:
    """Put the weights that a checkpoint holds in place, bit for bit: all that a run trains.

    Raises:
        ConfigError: if they are adapters, and the base has changed since the run began.
        DamagedCheckpointError: if they are those of another model.
    """
    if policy.adapters is not None:
        check_base(policy, checkpoint)
    weights = checkpoint.tensors["model"]
    trained = policy.trainable
    expected = {name: tuple(p.shape) for name, p in trained.items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if found != expected:
        differing = sorted({name for name, _ in expected.items() ^ found.items()})
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
