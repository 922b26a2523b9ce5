"""Time of a training and a decoding step of `tiny` on simulated hardware, and the memory of a frozen 135 M model.

A decoding step is measured as the sampler takes it, and as `generate` does: the model's own pass over the cache of
transformers.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.hardware import install, noise_key
from roundoff.models.load import load_model
from roundoff.models.masks import AttentionPattern
from roundoff.numerics.backend import computed_by
from roundoff.numerics.rng import Key
from roundoff.sampling.decoding import Passes, Prompts, RolloutRows
from roundoff.sampling.fused_decoder import FusedDecoder

TRAINED = (64, 20)  # rollouts x tokens of a training pass
DECODED = (256, 16)  # rollouts x tokens in the cache of a decoding step
REPEATS = 41
NOISE = MatmulNoise(relative_std=0.05)
SETTINGS: dict[str, Hardware] = {
    "plain": Hardware(),
    "W4A16 (mxfp4)": Hardware(precision=Precision(weight="mxfp4")),
    "W4A4 (mxfp4)": Hardware(precision=Precision(weight="mxfp4", activation="mxfp4")),
    "W4A4 (nvfp4)": Hardware(precision=Precision(weight="nvfp4", activation="nvfp4")),
    "W8A8G8 (mxfp8)": Hardware(
        precision=Precision(weight="mxfp8_e4m3", activation="mxfp8_e4m3", gradient="mxfp8_e4m3")
    ),
    "W4A4G4 (NVIDIA's recipe)": Hardware(
        precision=Precision(
            weight="nvfp4:2d",
            activation="nvfp4:te",
            gradient="nvfp4:te",
            gradient_rounding="stochastic",
            hadamard="dw",
        )
    ),
    "FP8 key-value cache": Hardware(precision=Precision(kv_cache="fp8_e4m3")),
    "FP8 attention": Hardware(precision=Precision(attention="fp8_e4m3")),
    "5 % noise, all products": Hardware(matmul_noise=NOISE),
    "5 % noise, Linear only": Hardware(matmul_noise=NOISE.model_copy(update={"attention": False})),
    "5 % noise, W4A4 (mxfp4)": Hardware(matmul_noise=NOISE, precision=Precision(weight="mxfp4", activation="mxfp4")),
}
# Goals of a training step by target, as ratios to the plain step; on other targets there are none.
GOALS = {
    "avx512": {
        "W4A16 (mxfp4)": 1.07,
        "W4A4 (mxfp4)": 1.12,
        "W4A4G4 (NVIDIA's recipe)": 1.8,
        "5 % noise, all products": 1.33,
    },
    "avx2": {
        "W4A16 (mxfp4)": 1.1,
        "W4A4 (mxfp4)": 1.25,
        "W4A4G4 (NVIDIA's recipe)": 1.8,
        "5 % noise, all products": 1.6,
    },
}

# Goals of a decoding step of the sampler, on every target.
SAMPLED_GOALS = {"FP8 key-value cache": 1.1}


def training_step(hardware: Hardware) -> Callable[[], None]:
    """One optimizer step of `tiny`: forward, loss on every token, backward, AdamW."""
    model = load_model("tiny", dtype=torch.float32, device="cpu").model.train()
    installed = not hardware.changes_nothing
    if installed:
        install(model, hardware, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    count, length = TRAINED
    ids = torch.randint(3, model.config.vocab_size, TRAINED, generator=torch.Generator().manual_seed(0))
    rows = (torch.arange(count)[:, None] << 20) + torch.arange(length)
    key, mask = Key.from_seed(0), torch.ones_like(ids)
    calls = iter(range(1 << 30))

    def gradients() -> None:
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()

    def step() -> None:
        if installed:
            with noise_key(model, key.fold(next(calls)), rows):
                gradients()
        else:
            gradients()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding_step(hardware: Hardware) -> Callable[[], None]:
    """One forward pass of `tiny` on one new token of each rollout, with a cache."""
    model = load_model("tiny", dtype=torch.float32, device="cpu").model
    installed = not hardware.changes_nothing
    if installed:
        install(model, hardware, seed=0)
    count, length = DECODED
    ids = torch.randint(3, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    rows = (torch.arange(count)[:, None] << 20) + length
    mask, key = torch.ones(count, length + 1, dtype=torch.int64), Key.from_seed(0)

    @torch.no_grad()
    def step() -> None:
        if installed:
            with noise_key(model, key, rows):
                model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
        else:
            model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def sampling_step(hardware: Hardware) -> Callable[[], None]:
    """The same step as the sampler takes it: by the fused pass, with roundoff's own cache."""
    model = load_model("tiny", dtype=torch.float32, device="cpu").model
    if not hardware.changes_nothing:
        install(model, hardware, seed=0)
    count, length = DECODED
    ids = torch.randint(3, model.config.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(0))
    passes = Passes(
        model=model,
        pattern=AttentionPattern.of(model),
        noise=Key.from_seed(0) if hardware.is_noisy else None,
        fused=FusedDecoder.of(model, length + 2),
        max_new_tokens=2,
    )
    with torch.no_grad():
        batch = RolloutRows(
            passes, Prompts.of(ids[:, :length].tolist(), 0, ids.device, alone=True), torch.arange(count)
        )

    @torch.no_grad()
    def step() -> None:
        batch.feed(ids[:, length])
        batch.column -= 1
        for layer in batch.cache.stack:
            layer.length -= 1

    return step


def interleaved(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of the thread in each repeat of each step, in turns, so that a slow moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(REPEATS + 3):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            if repeat >= 3:  # warm-up: caches, allocator, clock
                times[name].append(time.thread_time() - start)
    return times


def report(title: str, times: dict[str, list[float]], goals: dict[str, float]) -> None:
    """Print medians, and the median ratio to the plain step of the same turn."""
    print(f"\n{title}\n{'':28s} {'ms':>8s} {'ratio':>7s} {'goal':>6s}")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["plain"], strict=True))
        print(f"{name:28s} {1e3 * statistics.median(seconds):8.2f} {ratio:7.2f} {goals.get(name, ''):>6}")


def tensor_bytes() -> int:
    """Bytes of all tensor storages that this process holds, each counted once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def memory() -> None:
    """Print what `install` adds to a frozen model of SmolLM2-135M's shape after a forward pass, W4A16."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    empty = tensor_bytes()
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.bfloat16()
    before = tensor_bytes()
    hardware = Hardware(precision=Precision(weight="mxfp4"))
    entries = install(model, hardware, seed=0).entries
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.int64))
    added = tensor_bytes() - before
    copies = sum(p.nbytes for e in entries for p in model.get_submodule(e.name).parameters(recurse=False))
    print(
        f"\nmemory, frozen 135 M bfloat16 model, W4A16: weights {(before - empty) / 2**20:.1f} MiB, of which Linear ",
        end="",
    )
    print(f"{copies / 2**20:.1f}; install adds {added / 2**20:.1f} MiB ({added / copies:.3f} x the Linear weights)")


def main() -> None:
    torch.set_num_threads(1)
    goals = GOALS.get(computed_by(torch.ones(1)), {})
    trained = interleaved({name: training_step(hardware) for name, hardware in SETTINGS.items()})
    report(f"training step, {TRAINED}, thread time", trained, goals)
    sampled = interleaved({name: sampling_step(hardware) for name, hardware in SETTINGS.items()})
    report(f"decoding step of the sampler, {DECODED}, thread time", sampled, SAMPLED_GOALS)
    decoded = interleaved({name: decoding_step(hardware) for name, hardware in SETTINGS.items()})
    report(f"decoding step over the cache of transformers, {DECODED}, thread time", decoded, {})
    memory()


if __name__ == "__main__":
    main()
