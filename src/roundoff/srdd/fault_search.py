"""Finds faults without a reference machine: a forward pass in which every Linear and every decoder layer is checked.

Sites are visited in forward order, and the checks of a site run in the order of `roundoff.srdd.checks`. Every check
judges a site by its own inputs, so that an error made upstream raises no alarms downstream. The first alarm names the
suspect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from roundoff.config import ConfigError
from roundoff.hardware import installed
from roundoff.hardware.inventory import layer_index, plain_name
from roundoff.hardware.linear import HardwareLinear
from roundoff.models.calibration import Calibration, decoder_layers, frozen_evaluation, read_batches
from roundoff.numerics.rng import Key
from roundoff.srdd import checks
from roundoff.srdd.fault_report import Alarm, FaultReport

ATTENTION_NAMES = ("self_attn", "attention", "attn")
"""Names under which a decoder layer may hold its attention."""
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
"""Names under which a decoder layer may hold its MLP."""
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Norms whose outputs a layer adds to its input, in models that have the second one (Gemma 2 and 3, OLMo 2)."""
_NOT_FINITE = " and what follows it: the input is not finite"


def find_faults(
    model: nn.Module,
    batches: Sequence[Mapping[str, Shaped[Tensor, "_texts _columns"]]],
    *,
    replays: int = 2,
    seed: int = 0,
    host: bool = True,
    stop_at_first: bool = False,
) -> FaultReport:
    """Check every Linear and decoder layer on the machine that the model runs on.

    The model runs as it is: on its device, with the hardware that is installed and on.

    Args:
        model: a causal model.
        batches: what a tokenizer returns (`input_ids` and `attention_mask`, both [texts, columns]).
        replays: how often each product is repeated with the same input. An error in a share f of a unit's calls is met
            with probability `1 - (1 - f)^(batches * (1 + replays))`.
        seed: of the random weights of the checksums.
        host: compute the checks on the CPU.
        stop_at_first: stop after the first site with an alarm; what follows it is not checked.

    Raises:
        ConfigError: if the model has no decoder layers or the batches no tokens, or if matmul noise is installed, which
            a check could not tell from a fault.
        ValueError: if `replays` is negative.
    """
    if replays < 0:
        raise ValueError(f"replays must be 0 or more, but is {replays}")
    state = installed(model)
    if state is not None and state.is_on:
        noisy = any(entry.noise or entry.errors for entry in state.entries)
        if noisy or any(entry.accumulator for entry in state.entries):
            name, what = ("matmul_noise", "declared noise") if noisy else ("accumulator", "the error of its sums")
            raise ConfigError(f"hardware.{name} is installed: {what} cannot be told from a fault, so take it off first")
    key = Key.from_seed(seed).fold("checksum")
    inspector = Inspector(model, decoder_layers(model), replays, key, host, stop_at_first)
    with frozen_evaluation(model), torch.no_grad(), suppress(_Stopped):
        for batch in read_batches(batches, next(model.parameters()).device):
            inspector.forward(batch)
    return inspector.report()


class _Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Ends a forward pass after the first site with an alarm."""


@dataclass(eq=False)
class Inspector:
    """Hooks that check every Linear and decoder layer of a model."""

    model: nn.Module
    layers: Mapping[int, nn.Module]
    replays: int
    key: Key
    host: bool
    stop_at_first: bool = False
    alarms: dict[tuple[str, str], Alarm] = field(default_factory=dict)
    checked: dict[str, None] = field(default_factory=dict)
    unchecked: dict[str, None] = field(default_factory=dict)
    passes: int = 0
    _order: dict[str, None] = field(default_factory=dict)
    _mask: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _listening: bool = True
    _parts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(module): name for name, module in self.model.named_modules()}
        self._contributions = {index: _contributions(layer) for index, layer in self.layers.items()}

    def forward(self, batch: Calibration) -> None:
        """Run the model on a batch, with every check."""
        self._mask = batch.mask
        self.passes += 1
        with self._hooks():
            self.model(**batch.inputs())

    def report(self) -> FaultReport:
        """The findings so far, with alarms in the order in which the sites are computed."""
        order = list(self._order)
        alarms = sorted(self.alarms.values(), key=lambda alarm: order.index(alarm.site))
        failed = [alarm for alarm in alarms if alarm.check == "residual"]
        unchecked = list(self.unchecked)
        if len(failed) == len(self.layers) > 1:  # no fault fails everywhere: these layers add something else
            alarms = [alarm for alarm in alarms if alarm.check != "residual"]
            unchecked.append("residual identity: no layer's output is the sum of its input, attention and MLP")
        return FaultReport(tuple(alarms), tuple(self.checked), tuple(unchecked), self.passes * (1 + self.replays))

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.Linear):
                    handles.append(module.register_forward_hook(self._on_linear(name)))
                elif layer_index(plain_name(name)) is not None and _has_matrix(module):
                    self.unchecked[f"{name}: {type(module).__name__} is not a Linear"] = None
            for index, layer in self.layers.items():
                parts = self._contributions[index]
                if parts is None:
                    self.unchecked[f"{self.names[id(layer)]}: attention and MLP were not recognized"] = None
                for name, module in (parts or {}).items():
                    handles.append(module.register_forward_hook(self._on_part(name)))
                handles.append(layer.register_forward_hook(self._on_layer(index), with_kwargs=True))
            yield
        finally:
            self._parts = {}
            for handle in handles:
                handle.remove()

    def _alarm(self, check: str, site: str, value: float, limit: float, detail: str) -> None:
        known = self.alarms.get((check, site))
        if known is None or value > known.value:
            self.alarms[check, site] = Alarm(check, site, layer_index(plain_name(site)), value, limit, detail)

    def _site(self, name: str) -> None:
        self._order.setdefault(name)
        self.checked.setdefault(name)

    def _tokens(self, x: Tensor) -> Tensor:
        """`x` as [tokens, features] without padding, and on the CPU if `host` is set."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if flat.shape[0] == self._mask.numel():
            flat = flat[self._mask.flatten()]
        return flat.cpu() if self.host else flat

    def _on_part(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._listening:
                self._parts[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _on_linear(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._listening:
                return
            self._site(name)
            self._check_linear(name, module, inputs[0], output)
            self._leave(name)

        return hook

    def _leave(self, name: str) -> None:
        """Called when a site is done: with `stop_at_first`, end the pass if the site raised an alarm."""
        if self.stop_at_first and any(site == name for _, site in self.alarms):
            raise _Stopped

    def _check_linear(self, name: str, module: nn.Linear, inputs: Tensor, output: Tensor) -> None:
        x, weight = _operands(module, inputs)
        self._replay(name, lambda: module.forward(inputs), output)
        x, y = self._tokens(x), self._tokens(output)
        weight = weight.cpu() if self.host else weight
        bias = None if module.bias is None else module.bias.detach().to(weight.device)
        live = (weight != 0).any(-1)
        if not self._takes_numbers(name, x):
            return
        bad = float((~weight.isfinite()).double().mean())
        if bad:
            self._alarm("nonfinite", name, bad, 0.0, f"{bad:.2%} of the weight is NaN or Inf")
            return
        if bool(live.any()) and bool((x != 0).any()) and checks.loses_bits(x, weight, bias, y.dtype):
            self.unchecked[f"{name}: its products are below the normal numbers of {y.dtype}"] = None
            self.checked.pop(name, None)
            return
        if not self._statistics(name, x, y, live, coarse=_is_coarse(module)):
            return
        excess = checks.checksum_excess(x, weight, bias, y, self.key.fold(name))
        if excess > checks.CHECKSUM_LIMIT:
            text = f"sum of outputs is off by {excess:.3g} rounding units"
            self._alarm("checksum", name, excess, checks.CHECKSUM_LIMIT, text)

    def _on_layer(self, index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._listening:
                return
            name = self.names[id(layer)]
            self._site(name)
            h = output[0] if isinstance(output, tuple) else output
            before = args[0] if args else kwargs["hidden_states"]
            inner = any(check == "replay" and site.startswith(f"{name}.") for check, site in self.alarms)
            if not inner:  # a Linear that differs when repeated makes its layer differ, too
                self._replay(name, lambda: layer.forward(*args, **kwargs), h)
            x, y = self._tokens(before), self._tokens(h)
            live = torch.ones(y.shape[-1], dtype=torch.bool, device=y.device)
            nonfinite_inside = any(check == "nonfinite" and site.startswith(f"{name}.") for check, site in self.alarms)
            finite = self._takes_numbers(name, x) and not nonfinite_inside and self._statistics(name, x, y, live)
            if finite and self._contributions[index] is not None:
                parts = [self._tokens(part) for part in self._parts.values()]
                excess = checks.residual_excess(x, parts, y)
                if excess > checks.RESIDUAL_LIMIT:
                    text = f"output differs from input + attention + mlp by {excess:.3g} rounding bounds"
                    self._alarm("residual", name, excess, checks.RESIDUAL_LIMIT, text)
            self._parts = {}
            self._leave(name)

        return hook

    def _takes_numbers(self, name: str, x: Tensor) -> bool:
        """Whether the inputs [tokens, in_features] of a site are finite. If not, the site is not checked.

        If no site before it raised an alarm for such numbers, this one does, because their origin was not checked.
        """
        if bool(x.isfinite().all()):
            return True
        if not any(check == "nonfinite" for check, _ in self.alarms):
            bad = float((~x.isfinite()).double().mean())
            text = f"{bad:.2%} of the input is NaN or Inf, which no checked site produced: look right before it"
            self._alarm("nonfinite", name, bad, 0.0, text)
        if not any(line.endswith(_NOT_FINITE) for line in self.unchecked):
            self.unchecked[f"{name}{_NOT_FINITE}"] = None
        self.checked.pop(name, None)
        return False

    def _replay(self, name: str, again: Callable[[], Any], output: Tensor) -> None:
        """Repeat a computation, and compare the results to the bit."""
        self._listening = False
        try:
            for _ in range(self.replays):
                repeated = again()
                repeated = repeated[0] if isinstance(repeated, tuple) else repeated
                if not checks.same_bits(repeated, output):
                    share = float((repeated != output).double().mean())
                    self._alarm("replay", name, share, 0.0, f"{share:.2%} of outputs differ when repeated")
        finally:
            self._listening = True

    def _statistics(self, name: str, x: Tensor, y: Tensor, live: Tensor, *, coarse: bool = False) -> bool:
        """Check outputs [tokens, out_features] for zeros, constant channels and ties; False if they are not finite.

        Products of `coarse` numbers (4 bits) are exactly zero or equal now and then, so zeros and ties prove nothing.
        """
        bad = float((~y.isfinite()).double().mean())
        if bad:
            self._alarm("nonfinite", name, bad, 0.0, f"{bad:.2%} of outputs are NaN or Inf, from finite inputs")
            return False
        different = torch.unique(y, dim=0)  # a repetitive text gives the same product many times
        if bool((x != x[:1]).any()):
            constant = int(checks.constant_channels(different, live).sum())
            if constant:
                self._alarm("constant", name, constant, 0, f"{constant} channels give one value for all tokens")
        if coarse:
            return True
        live_rows = (x != 0).any(-1)
        counted = torch.unique(y[live_rows], dim=0)
        zeros = checks.zero_share(counted, live)
        limit = checks.zero_limit(y.dtype, max(1, len(counted) * int(live.sum())))
        if zeros > limit:
            self._alarm("zero", name, zeros, limit, f"{zeros:.2%} of outputs are exactly zero")
        ties, limit = checks.tie_share(different), checks.tie_limit(len(different))
        if ties > limit:
            self._alarm("tie", name, ties, limit, f"{ties:.2%} of different tokens have ties at their maximum")
        return True


def _operands(module: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the weight that are multiplied: quantized where hardware is on."""
    if isinstance(module, HardwareLinear) and module.hardware_state.runtime.on:
        state = module.hardware_state
        return state.quantized_input(x), state.stored.quantized(module.weight)
    return x.detach(), module.weight.detach()


def _is_coarse(module: nn.Linear) -> bool:
    """Whether hardware that is on multiplies quantized numbers."""
    if not (isinstance(module, HardwareLinear) and module.hardware_state.runtime.on):
        return False
    return bool(module.hardware_state.weight_format or module.hardware_state.activation_format)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _contributions(layer: nn.Module) -> dict[str, nn.Module] | None:
    """The modules whose outputs a decoder layer adds to its input, by name; None if they are not recognized."""
    children = dict(layer.named_children())
    if POST_NORMS[1] in children:
        names = [name for name in POST_NORMS if name in children]
    else:
        names = [next((n for n in kind if n in children), "") for kind in (ATTENTION_NAMES, MLP_NAMES)]
    return {name: children[name] for name in names} if len(names) == 2 and all(names) else None
