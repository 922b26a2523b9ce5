"""The scan: one clean forward pass per batch (and backward passes), with hooks that measure on the way.

At each Linear, a hook quantizes the input and counts its errors. At each decoder layer, a hook runs the layer a second
time on the same clean input with the hardware on (the shadow), and takes the difference of the two outputs as the
layer's error e_t. The hooks do not affect the clean pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from roundoff.config import PHASES, ConfigError, Hardware, Precision, nearest, validate
from roundoff.hardware import InstalledHardware, install, installed, uninstall
from roundoff.models.calibration import Calibration, decoder_layers, draw_of, frozen_evaluation, read_batches
from roundoff.numerics.rng import Key
from roundoff.srdd.damage import (
    InputErrors,
    Tallies,
    WeightDamage,
    add_classic,
    decibel,
    input_errors,
    sink_tokens,
    weight_damage,
)
from roundoff.srdd.exact import Divergence, exact_divergences
from roundoff.srdd.gradient import layer_gradients, summed_loss, token_scores
from roundoff.srdd.layer_scan import METRICS, LayerMetrics, LayerScan, LinearMetrics

LABEL_DRAWS = 4
"""Number of backward passes of the gradient score, each with labels of its own; 4 rank better than 1 (docs/srdd.md)."""


def scan(
    model: nn.Module,
    batches: Sequence[Mapping[str, Shaped[Tensor, "_texts _columns"]]],
    fmt: str | Hardware,
    *,
    gradient: bool = True,
    exact: bool = False,
    rank_by: str | None = None,
    labels: str = "drawn",
    label_draws: int = LABEL_DRAWS,
    seed: int = 0,
) -> LayerScan:
    """Damage of every decoder layer and every Linear of a plain causal model under a format or hardware.

    Args:
        model: without hardware installed; unchanged afterwards, bit for bit.
        batches: what a tokenizer returns (`input_ids` and `attention_mask`, both [texts, columns]), padded on either
            side. Even and odd batches (or texts of a single batch) are the two halves whose rankings are compared.
        fmt: a format for weights and activations, or hardware, of which `precision.keep` is ignored.
        gradient: measure the gradient score (backward passes for each batch).
        exact: measure the KL when each layer alone is perturbed (one forward pass per layer and batch).
        rank_by: metric that ranks the layers; None: the gradient score or, without it, the shadow score.
        labels: of the gradient score's loss: `drawn` from the model, or the next tokens of the `text`.
        label_draws: number of backward passes, each with newly drawn labels, over which the score is averaged.
        seed: of matmul noise and drawn labels.

    Raises:
        ConfigError: if the model has no decoder layers or already has hardware installed, if the texts hold no token,
            if the hardware would change nothing, or if an argument is out of range or cannot be combined.
    """
    if installed(model) is not None:
        raise ConfigError("hardware is installed on this model: scan it before install, or call uninstall first")
    if labels not in ("drawn", "text"):
        raise ConfigError(f"labels must be 'drawn' or 'text', but is {labels!r}")
    hardware = scanned_hardware(fmt)
    if label_draws < 1:
        raise ConfigError(f"label_draws must be at least 1, but is {label_draws} (gradient=False leaves the score out)")
    ranking_metric = rank_by or ("gradient" if gradient else "shadow")
    _check_ranked(ranking_metric, hardware, gradient=gradient, exact=exact)
    layers = decoder_layers(model)
    texts = read_batches(batches, next(model.parameters()).device)
    key = Key.from_seed(seed).fold("srdd")
    draws = (label_draws if labels == "drawn" else 1) if gradient else 0
    divergences: dict[int, list[Divergence]] = {}
    with frozen_evaluation(model):
        state = install(model, hardware, seed=seed)
        try:
            state.switch(False)
            halves = [Probe(model, state, layers) for _ in texts[:2]]
            for number, batch in enumerate(texts):
                with torch.set_grad_enabled(gradient), draw_of(model, key, batch):
                    logits = halves[number % 2].forward(batch)
                    for draw in range(draws):
                        label_key = key.fold("labels", draw) if labels == "drawn" else None
                        halves[number % 2].backward(logits, batch, label_key, last=draw + 1 == draws)
                    del logits
            weights = weight_damage(state)
            if exact:
                divergences = exact_divergences(model, state, layers, texts, key)
        finally:
            uninstall(model)
    both = halves[0] if len(halves) == 1 else halves[0].merged(halves[1])
    parts = [_layer_metrics(probe.by_layer, weights, divergences, part) for part, probe in enumerate(halves, 1)]
    result = LayerScan(
        hardware,
        sum(batch.count for batch in texts),
        _layer_metrics(both.by_layer, weights, divergences, 0),
        tuple(parts) if len(parts) == 2 else (),
        _linear_metrics(both, weights),
        ranking_metric,
    )
    result.ranking()  # a metric that is not finite is an error here, not at first use
    return result


def _check_ranked(metric: str, hardware: Hardware, *, gradient: bool, exact: bool) -> None:
    """Check that the scan will measure the metric that it is to rank by."""
    if metric not in METRICS:
        raise ConfigError(f"rank_by must be one of {', '.join(METRICS)}, but is {metric!r}{nearest(metric, METRICS)}")
    reason = {
        "gradient": None if gradient else "gradient is off",
        "shadow": None,
        "exact": None if exact else "it is measured only with exact=True (--exact)",
        "weight_error": None if hardware.precision.weight else "no format of weights is set",
    }.get(metric, None if hardware.precision.activation else "no format of activations is set")
    if reason is not None:
        raise ConfigError(f"this scan cannot rank by {metric!r}: {reason}")


def scanned_hardware(fmt: str | Hardware) -> Hardware:
    """The hardware that a scan runs layers on, one at a time.

    Raises:
        ConfigError: if the format is unknown, or if the hardware changes nothing in the forward pass.
    """
    if isinstance(fmt, str):
        return Hardware(precision=validate(Precision, {"weight": fmt, "activation": fmt}, source="scan"))
    hardware = next((one for one in map(fmt.of, PHASES) if one.changes_forward), None)
    if hardware is None:
        raise ConfigError("this hardware leaves every forward pass as it is: set a format or forward matmul noise")
    return hardware.with_keep(lambda keep: ())


@dataclass(eq=False)
class Probe:
    """Hooks on a model and the tallies that they fill, for one half of the calibration texts."""

    model: nn.Module
    installed: InstalledHardware
    layers: Mapping[int, nn.Module]
    by_layer: dict[int, Tallies] = field(default_factory=dict)
    by_linear: dict[str, Tallies] = field(default_factory=dict)
    _batch: Calibration | None = None
    _listening: bool = True
    _last: tuple[Tensor, InputErrors] | None = None
    _inputs: dict[str, InputErrors] = field(default_factory=dict)
    _hidden: list[Tensor] = field(default_factory=list)
    _errors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.linears = {e.name: e.layer for e in self.installed.entries if e.layer is not None}
        self.by_layer = {index: Tallies() for index in self.layers}
        self.by_linear = {name: Tallies() for name in self.linears}

    @property
    def format(self) -> str | None:
        """The format of activations; None if they are not quantized."""
        return self.installed.hardware.precision.activation

    def forward(self, batch: Calibration) -> Float[Tensor, "texts columns vocabulary"]:
        """Run the clean pass and return its logits; fills every tally except the gradient score's."""
        self._batch, self._hidden, self._errors = batch, [], []
        with self._hooks():
            logits: Tensor = self.model(**batch.inputs()).logits
        return logits

    def backward(
        self, logits: Float[Tensor, "texts columns vocabulary"], batch: Calibration, key: Key | None, *, last: bool
    ) -> None:
        """Run a backward pass and fill the gradient score's tally; called after `forward` on the same batch.

        Labels are drawn under `key`; without one they are those of the text. `last` frees the graph.
        """
        loss = summed_loss(logits, batch, key)
        gradients = layer_gradients(self._hidden, loss, keep_graph=not last)
        for index, gradient, error in zip(self.layers, gradients, self._errors, strict=True):
            scores = token_scores(gradient, error, batch.mask)
            self.by_layer[index].add("gradient", scores.sum(), len(scores))

    def merged(self, other: Probe) -> Probe:
        """A probe with the tallies of both."""
        both = Probe(self.model, self.installed, self.layers)
        both.by_layer = {index: tallies.merged(other.by_layer[index]) for index, tallies in self.by_layer.items()}
        both.by_linear = {name: tallies.merged(other.by_linear[name]) for name, tallies in self.by_linear.items()}
        return both

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for position, (index, layer) in enumerate(self.layers.items()):
                if position == 0 and torch.is_grad_enabled():
                    handles.append(layer.register_forward_pre_hook(_grow_graph, with_kwargs=True))
                handles.append(layer.register_forward_hook(self._on_layer(index), with_kwargs=True))
            if self.format is not None:
                for name in self.linears:
                    handles.append(self.model.get_submodule(name).register_forward_pre_hook(self._on_linear(name)))
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _on_linear(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._listening:
                assert self.format is not None and self._batch is not None
                x = inputs[0].detach()
                if self._last is None or self._last[0] is not inputs[0]:
                    sees_all = x.shape[:-1].numel() == self._batch.mask.numel()  # an expert sees only some tokens
                    flat = x.reshape(-1, x.shape[-1])
                    tokens = flat[self._batch.mask.flatten()] if sees_all else flat
                    self._last = (inputs[0], input_errors(tokens, self.format))
                self._inputs[name] = self._last[1]

        return hook

    def _on_layer(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._listening:
                assert self._batch is not None
                h = output[0] if isinstance(output, tuple) else output
                before = args[0] if args else kwargs["hidden_states"]
                shadow = self._shadow(layer, args, kwargs)
                error = shadow - h.detach()
                self._tally_layer(index, before.detach(), h.detach(), error)
                if torch.is_grad_enabled():
                    self._hidden.append(h)
                    self._errors.append(error)

        return hook

    @torch.no_grad()
    def _shadow(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer's output [texts, columns, hidden] on the same clean input with the hardware on."""
        self._listening = False
        self.installed.switch(True)
        try:
            output = layer.forward(*args, **kwargs)
        finally:
            self.installed.switch(False)
            self._listening = True
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _tally_layer(self, index: int, before: Tensor, h: Tensor, error: Tensor) -> None:
        assert self._batch is not None
        mask, tallies = self._batch.mask, self.by_layer[index]
        h = h[mask]
        sinks = sink_tokens(before[mask], h)
        tallies.add("sink_share", sinks.sum(), len(sinks))
        size = h.double().norm(dim=-1).clamp(min=1e-300)
        tallies.add("shadow", (error[mask].double().norm(dim=-1) / size).sum(), len(sinks))
        if self.format is not None:
            add_classic(tallies, h, self.format)
        for name, errors in self._inputs.items():
            sees_all = len(errors.energy) == len(sinks)
            energy = errors.energy[~sinks] if sees_all else errors.energy
            for part in (tallies, self.by_linear[name]):
                part.add("energy_error", energy.sum(), len(energy))
                part.add("deadzone_ratio", errors.dead.sum(), errors.nonzero.sum())
                part.add("saturation_ratio", errors.saturated.sum(), errors.nonzero.sum())
        self._inputs = {}


def _grow_graph(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Make the first layer's input a leaf that requires a gradient, so that autograd records the layers."""
    if args:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}


def _layer_metrics(
    tallies: Mapping[int, Tallies],
    weights: Mapping[str, WeightDamage],
    divergences: Mapping[int, list[Divergence]],
    part: int,
) -> tuple[LayerMetrics, ...]:
    """One row per layer; `part` 0 is the entire text, 1 and 2 are its halves."""
    rows = []
    for index, tally in tallies.items():
        exact = divergences[index][part] if index in divergences else None
        damages = [damage for damage in weights.values() if damage.layer == index]
        signal = sum(damage.signal for damage in damages)
        rows.append(
            LayerMetrics(
                index,
                gradient=tally.mean("gradient"),
                energy_error=tally.mean("energy_error"),
                shadow=tally.mean("shadow"),
                deadzone_ratio=tally.mean("deadzone_ratio"),
                saturation_ratio=tally.mean("saturation_ratio"),
                weight_error=sum(damage.noise for damage in damages) / signal if signal else None,
                exact=None if exact is None else exact.kl,
                relative_error=tally.mean("relative_error"),
                sqnr=decibel(tally.mean("sqnr")),
                exact_se=None if exact is None else exact.se,
                sink_share=tally.mean("sink_share") or 0.0,
            )
        )
    return tuple(rows)


def _linear_metrics(probe: Probe, weights: Mapping[str, WeightDamage]) -> tuple[LinearMetrics, ...]:
    rows = []
    for name, layer in probe.linears.items():
        tally, weight = probe.by_linear[name], weights.get(name)
        means = [tally.mean(metric) for metric in ("energy_error", "deadzone_ratio", "saturation_ratio")]
        rows.append(LinearMetrics(name, layer, None if weight is None else weight.noise / weight.signal, *means))
    return tuple(rows)
