"""Decoding on CUDA: a step is captured once for each size of the batch, and replayed for every further token.

Eagerly, each token costs the time in which Python launches some thousand kernels, during which the device mostly
waits. A replay launches all of them at once. Rollouts of any model whose step can be captured are decoded so;
otherwise they are decoded eagerly, and one line says why.

**Sizes.** A graph computes a number of rows that is a power of two, over a number of columns that is a multiple of
`COLUMNS_STEP`. When half of a batch has ended, the others move together and go on in the next smaller graph; when the
columns are used up, they go on in the next longer one.

**What a graph holds.** Addresses of weights, of `Q(W)` and of the buffers, keys of noise, and every number that the
model's code computed when it was captured. Weights may change in place (an optimizer's step, AQN, adapters). For
anything else a graph is captured anew: noise has other keys in each rollout, and another setting, another weight or
`Q(W)` in another place is noticed by a stamp. The first step of each batch is eager, so that stale `Q(W)` are computed
again before a graph reads them.

**Trust.** The first graph of each size is compared with an eager step on the token after the one that it was captured
on, which shows a number that should have been read from a tensor. If they differ by more than rounding, a warning says
so and everything is eager from then on.

The buffers and graphs stay with the model between rollouts, because capturing costs about as much as ten tokens: `2 *
layers * key heads * head size * columns` numbers for each of at most `max_rows` rows. `release` frees them.

The logic is tested on the CPU with graphs that record torch's operations and repeat them. `CudaGraphs` itself has never
been run.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundoff.hardware import installed
from roundoff.hardware.experts import is_experts
from roundoff.models.position_limit import has_static_positions
from roundoff.numerics.transfer import fetch, put
from roundoff.sampling.choice import SamplingSettings
from roundoff.sampling.decoding import Passes, Prompts
from roundoff.sampling.kv_cache import KVCache
from roundoff.sampling.static_buffers import Buffers, Step, bucket, rounded_columns, vacancies

MARK = "static_decoder"
"""Attribute of a model that holds its `StaticDecoder`."""
KEPT_STAMPS = 3
"""Sets of graphs that are kept: rollouts, and evaluations with the hardware on and off."""
ROUNDING = 0.05
"""Largest accepted difference of a log-probability between a replay and an eager step (nats). Both run the same
kernels, so they are equal but for another choice of a product's algorithm, in the model's dtype."""
FLIPPED = 0.1
"""Largest accepted share of rows whose token differs because of that."""

Size = tuple[int, int]
"""Rows and columns of a graph."""


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Do again what was captured."""
        ...


class Graphs(Protocol):
    """A way to capture steps."""

    def capture(self, step: Callable[[], None]) -> Graph:
        """Record a step without executing it."""
        ...


class CudaGraphs:
    """CUDA graphs with one pool of memory; never run."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Graph:
        """Record a step without executing it; this waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        return graph


def graphs_for(device: torch.device) -> Graphs | None:
    """The way to capture steps on a device; None where there is none."""
    return CudaGraphs() if device.type == "cuda" and torch.cuda.is_available() else None


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, and the step that it repeats, whose tensors it reads."""

    graph: Graph
    step: Step


@dataclass(eq=False, slots=True)
class StaticDecoder:
    """The buffers of a model's batches, and the graphs that were captured over them."""

    buffers: Buffers | None = None
    graphs: Graphs | None = None
    captured: OrderedDict[tuple[Any, ...], dict[Size, Captured | None]] = field(default_factory=OrderedDict)
    """For each stamp, the graph of each size; None after one eager step of that size."""
    verified: set[Size] = field(default_factory=set)
    """Sizes whose first graph agreed with an eager step."""
    refusal: str = ""
    """Why everything is eager; empty if it is not."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> StaticDecoder | None:
        """The decoder of a model; None where its steps cannot be captured."""
        decoder: StaticDecoder | None = model.__dict__.get(MARK)
        if decoder is None:
            graphs = graphs_for(model.device)
            if graphs is None:
                return None
            decoder = model.__dict__[MARK] = cls(graphs=graphs)
            if reason := _obstacle(model):
                decoder.refuse(model, reason)
        return None if decoder.refusal else decoder

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy (deepcopy, pickle) of the model has no buffers and no graphs yet, and looks for obstacles itself."""
        return _nothing, ()

    def decode(
        self,
        passes: Passes,
        prompts: Prompts,
        ids: Int[Tensor, " rollouts"],
        uniforms: Float[Tensor, "rollouts tokens"] | None,
        settings: SamplingSettings,
        ask_every: int,
    ) -> Buffers | None:
        """Decode rollouts to their ends. The first rows of the returned results are theirs, until the next call.

        Returns None, and does so from then on, if there is no memory for the buffers.
        """
        cache, logits, row = _read(passes, prompts, ids)
        count, width, limit = len(ids), prompts.tokens.shape[1], settings.max_new_tokens
        rows = bucket(count)
        try:
            whole = self._buffers(passes, cache, rows, rounded_columns(width + limit - 1), limit)
        except torch.OutOfMemoryError as error:
            self.refuse(passes.model, str(error).splitlines()[0])
            return None
        left = prompts.left[put(row, ids.device)]
        columns = whole.keys[0].shape[2]
        whole.part(rows, columns).load(cache, row, left, ids, uniforms, limit)
        is_end = settings.ends(logits.shape[-1], logits.device)
        filled = put(torch.cat([row, row.new_zeros(rows - count)]), ids.device)
        Step(passes, whole.part(rows, columns), is_end, settings).record(logits[filled])
        graphs: dict[Size, Captured | None] | None = None
        for time in range(1, limit):
            if time % ask_every == 0:
                (running,) = fetch([whole.running[:rows]])
                if not running.any():
                    break
                rows = _shrink(whole, running.tolist(), width + time - 1)
            size = rows, rounded_columns(width + time)
            step = Step(passes, whole.part(*size), is_end, settings)
            if graphs is None:  # the first step is eager, so that every Q(W) is there and new
                step()
                graphs = self._graphs_of(_stamp(passes, settings, whole))
            else:
                self._take(step, size, graphs)
        return whole

    def release(self) -> None:
        """Free the buffers and the graphs; the next rollouts make new ones."""
        self.buffers = None
        self.captured.clear()

    def refuse(self, model: PreTrainedModel, reason: str) -> None:
        """Decode this model eagerly from now on, and say why."""
        self.refusal = reason
        self.release()
        logging.getLogger("roundoff").warning(
            "roundoff: decoding %s eagerly, because its steps cannot be captured: %s", type(model).__name__, reason
        )

    def _buffers(self, passes: Passes, cache: KVCache, rows: int, columns: int, tokens: int) -> Buffers:
        """Buffers that hold a batch; larger ones replace those that are too small, and the graphs over them."""
        if self.buffers is None or not self.buffers.holds(rows, columns, tokens, cache):
            if self.buffers is not None:
                before = self.buffers
                rows = max(rows, len(before.token))
                columns, tokens = max(columns, before.keys[0].shape[2]), max(tokens, before.uniforms.shape[1])
            self.release()
            self.buffers = Buffers.allocate(rows, columns, tokens, cache, passes.model.device)
        return self.buffers

    def _graphs_of(self, stamp: tuple[Any, ...]) -> dict[Size, Captured | None]:
        """The graphs under a stamp; the ones that were not used for longest make room."""
        found = self.captured.setdefault(stamp, {})
        self.captured.move_to_end(stamp)
        while len(self.captured) > KEPT_STAMPS:
            self.captured.popitem(last=False)
        return found

    def _take(self, step: Step, size: Size, graphs: dict[Size, Captured | None]) -> None:
        """Take a step by its graph if there is one; if not, eagerly, and capture it the second time."""
        captured = graphs.get(size)
        if captured is not None and not self.refusal:
            if size in self.verified:
                captured.graph.replay()
            else:
                self._compare(step, size, captured.graph)
            return
        step()
        if self.refusal:
            return
        if size not in graphs:
            graphs[size] = None  # libraries choose algorithms and take memory at the first use of a size
            return
        assert self.graphs is not None
        try:
            with _unchecked(step.passes.model):
                graphs[size] = Captured(self.graphs.capture(step), step)
        except RuntimeError as error:
            self.refuse(step.passes.model, f"{type(error).__name__}: {str(error).splitlines()[0]}")

    def _compare(self, step: Step, size: Size, graph: Graph) -> None:
        """Take a step eagerly and by its graph, and compare them; the graph's counts unless they differ."""
        state = step.state
        before = state.snapshot()
        step()
        eager = state.snapshot()
        state.restore(before)
        graph.replay()
        replayed = state.snapshot()
        tokens, others, logprobs, other_logprobs, running, after = fetch(
            [
                *(eager.values["token"], replayed.values["token"], eager.logprob, replayed.logprob),
                *(before.values["running"], eager.values["running"]),
            ]
        )
        same = tokens == others
        difference = (logprobs - other_logprobs).abs().nan_to_num(0.0)[same & running & after]
        flipped = int((~same & running).sum())
        if flipped > max(1, FLIPPED * int(running.sum())) or bool((difference > ROUNDING).any()):
            self.refuse(step.passes.model, "a replayed step differs from an eager one")
            state.restore(before)
            step()
            return
        self.verified.add(size)


def _nothing() -> None:
    return None


def _read(
    passes: Passes, prompts: Prompts, ids: Tensor
) -> tuple[KVCache, Float[Tensor, "rows vocabulary"], Int[Tensor, " rollouts"]]:
    """Read the prompts: their cache, the logits that follow each, and the prompt of each rollout (in host memory)."""
    row = torch.arange(len(prompts.counts)).repeat_interleave(prompts.counts)
    first = put(prompts.counts.cumsum(0) - prompts.counts, ids.device)
    cache, logits = passes.read(prompts, ids[first], prompts.tokens.shape[1])
    return cache, logits, row


def _shrink(whole: Buffers, running: list[bool], columns: int) -> int:
    """Move the running rows together if they fit into fewer rows; returns the number of rows from now on."""
    rows = bucket(sum(running))
    if rows < len(running):
        device = whole.token.device
        keep, holes, tails = (put(part, device, torch.int64) for part in vacancies(running, rows))
        whole.part(len(running), columns).move(keep, holes, tails)
    return rows


def _stamp(passes: Passes, settings: SamplingSettings, buffers: Buffers) -> tuple[Any, ...]:
    """Everything that a graph depends on, but for the values of weights and buffers."""
    model = passes.model
    hardware = installed(model)
    chip: tuple[Any, ...] = ()
    if hardware is not None:
        held = tuple(state.stored.cached_address for state in hardware.current_states())
        chip = (id(hardware), id(hardware.in_force), hardware.is_on, held)
    without_adapters = any(getattr(module, "disable_adapters", False) is True for module in model.modules())
    config: Any = model.config
    return (
        passes.noise,
        replace(settings, max_new_tokens=1),  # any limit: a graph is one step
        buffers.token.data_ptr(),
        tuple(parameter.data_ptr() for parameter in model.parameters()),
        tuple(buffer.data_ptr() for buffer in model.buffers()),
        config._attn_implementation,
        without_adapters,
        chip,
    )


def _obstacle(model: PreTrainedModel) -> str:
    """Why steps of a model cannot be captured, as far as is known beforehand; empty if nothing is known."""
    if any(is_experts(module) for module in model.modules()):
        return "how many tokens each expert has decides the shapes of its products"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are spread over several devices"
    if not has_static_positions(model):
        return "its rotary embedding depends on the longest sequence"
    if any(_is_watched(module) for module in model.modules()):
        return "a module has forward hooks, which a replay would not call"
    return ""


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def _unchecked(model: nn.Module) -> Iterator[None]:
    """Inside the block, no weight is checked for writes, because the check's copies cannot be captured."""
    hardware = installed(model)
    if hardware is None:
        yield
        return
    hardware.runtime.freshness.paused = True
    try:
        yield
    finally:
        hardware.runtime.freshness.paused = False
