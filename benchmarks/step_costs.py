"""What a training step holds and what safety costs: bytes per token beside trl, deterministic algorithms, checkpoints.

Memory is the most that a forward and backward pass holds at once beyond weights and gradients (torch's own record of
every allocation), divided by the tokens of prompts and responses. trl's `_compute_loss` meets the same rollouts. Two
models: `tiny`, where activations count, and four layers of SmolLM2-135M's shape, where the vocabulary of 49,152 does.
trl 1.16 computes log-probabilities in tiles of 32,768 words, for all tokens at once: most of its column.

Without `trl` and `datasets` (the extra `bench`) trl's column is left out.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.sampling import SHAPE_135M
from roundoff.config import Algorithm
from roundoff.evaluation import evaluate
from roundoff.experiments import load_experiment, load_profile
from roundoff.models.load import load_model
from roundoff.models.logprobs import token_logprobs
from roundoff.optional_packages import require
from roundoff.runs.directory import RunDirectory
from roundoff.training.loop import take_step
from roundoff.training.loss import policy_loss
from roundoff.training.preparation import prepare
from roundoff.training.saving import save

ALGORITHM = Algorithm(name="GRPO", group_size=8, kl_coefficient=0.0, ratio="one")
STEPS = 7


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` holds at once, beyond what was there before."""
    work()  # gradients exist afterwards
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most


def our_pass(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, response: int) -> None:
    """Loss and gradients by roundoff."""
    logprobs, _ = token_logprobs(model, tokens, mask, response, temperature=1.0)
    advantages = torch.ones(len(tokens))
    policy_loss(logprobs, None, None, advantages, mask[:, -response:], ALGORITHM).loss.backward()


def trl_pass(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, response: int) -> Callable[[], None]:
    """Loss and gradients by trl's trainer."""
    trl, datasets = require("trl", "bench"), require("datasets", "bench")
    with tempfile.TemporaryDirectory() as directory:
        arguments = trl.GRPOConfig(
            output_dir=directory,
            per_device_train_batch_size=len(tokens),
            num_generations=len(tokens),
            beta=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0 for _ in completions],
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1="]}),
            processing_class=load_model("tiny").tokenizer,
        )
    trainer.current_gradient_accumulation_steps = 1
    inside = mask[:, -response:]
    inputs = {
        "prompt_ids": tokens[:, :-response],
        "prompt_mask": mask[:, :-response].long(),
        "completion_ids": tokens[:, -response:],
        "completion_mask": inside.long(),
        "advantages": torch.ones(len(tokens)),
        "num_items_in_batch": inside.sum(),
    }
    return lambda: trainer._compute_loss(trainer.model, inputs).backward()


def memory() -> None:
    """Print the table of bytes per token."""
    with_trl = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
    print("| bytes per token of a training pass | roundoff | trl | roundoff / trl |\n|---|---|---|---|")
    shape = {**SHAPE_135M, "num_hidden_layers": 4}
    models: dict[str, Callable[[], Any]] = {
        "tiny": lambda: load_model("tiny").model,
        "4 layers of 135M, 49,152 words": lambda: LlamaForCausalLM(LlamaConfig(**shape)).eval(),
    }
    for name, make in models.items():
        for sharing, groups in (("8 prompts, 1 rollout each", 8), ("1 prompt, 8 rollouts", 1)):
            torch.manual_seed(0)
            prompts = torch.randint(3, 15, (groups, 64)).repeat_interleave(8 // groups, dim=0)
            tokens = torch.cat([prompts, torch.randint(3, 15, (8, 64))], dim=1)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            model = make()
            ours = peak_bytes(lambda model=model, t=tokens, m=mask: our_pass(model, t, m, 64)) / tokens.numel()
            row = f"| {name}; {sharing}, 64 + 64 tokens | {ours:,.0f} |"
            if with_trl:
                theirs = peak_bytes(trl_pass(make(), tokens, mask, 64)) / tokens.numel()
                row += f" {theirs:,.0f} | {ours / theirs:.2f} |"
            print(row, flush=True)


def safety() -> None:
    """Print what deterministic algorithms and checkpoints cost in a run of `quickstart-clean`, seed 0."""
    profile = load_profile("tiny")
    session = prepare(load_experiment("quickstart-clean"), profile, 0)
    cpu: dict[str, list[float]] = {"step": [], "deterministic": [], "save": [], "evaluate": []}
    wall: dict[str, list[float]] = {name: [] for name in cpu}
    with tempfile.TemporaryDirectory() as directory:
        run_dir = RunDirectory(Path(directory), session.experiment, session.profile, 0)
        work: dict[str, Callable[[int], object]] = {
            "step": lambda step: take_step(session, step, run_dir),
            "deterministic": lambda step: take_step(session, step, run_dir),
            "save": lambda step: save(session, run_dir, step),
            "evaluate": lambda step: evaluate(
                session.model, session.tokenizer, session.task, key=session.key, max_new_tokens=24, step=step
            ),
        }
        with run_dir:
            for step in range(1, STEPS + 2):
                for name, function in work.items():
                    torch.use_deterministic_algorithms(name == "deterministic")
                    before = time.thread_time(), time.perf_counter()
                    try:
                        function(step)
                    finally:
                        torch.use_deterministic_algorithms(False)
                    cpu[name].append(time.thread_time() - before[0])
                    wall[name].append(time.perf_counter() - before[1])
    for kind, times in (("thread CPU", cpu), ("wall", wall)):
        median = {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}
        print(f"\n{kind} (ms): " + ", ".join(f"{name} {value:.0f}" for name, value in median.items()))
        more = median["deterministic"] / median["step"] - 1
        print(f"deterministic algorithms: {more:+.1%} of a step (goal: under 10 %)")
        training = profile.training
        one = median["save"] / training.checkpoint_every
        run = median["step"] + median["evaluate"] / training.evaluate_every + one
        print(f"checkpoints every {training.checkpoint_every} steps: {one / run:.2%} of a run (goal: under 2 %)")


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        memory()
        safety()
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
