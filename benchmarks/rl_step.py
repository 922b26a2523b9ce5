"""A whole step of reinforcement learning on `tiny` beside trl's GRPOTrainer: same model, prompts, lengths; one thread.

Both sample 32 prompts x 8 rollouts, reward them, and update all weights with AdamW. trl's own loop runs; after each of
its steps a callback makes one of ours, so that the two alternate in one process. The learning rate is too small to
change what the model writes, so that both keep the same lengths. Two settings: the simplest (no KL, one optimizer step
a batch) and that of the `tiny` profile (KL 0.001, two optimizer steps a batch).

Needs `trl` and `datasets` (the extra `bench`).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from roundoff.config import ALGORITHMS, Experiment, Profile, validate
from roundoff.experiments import load_profile
from roundoff.optional_packages import require
from roundoff.training.loop import take_step
from roundoff.training.preparation import prepare
from roundoff.training.session import Session

PROMPTS, GROUP, STEPS = 32, 8, 9
LEARNING_RATE = 1e-6
GOAL = 4.0


@dataclass(frozen=True)
class Setting:
    """What both do with one batch of rollouts."""

    name: str
    kl: float
    minibatches: int


@dataclass(frozen=True)
class Cost:
    """Of one step: seconds of the one thread, seconds on the wall, the share of them spent sampling, mean length."""

    cpu: float
    wall: float
    rollout: float
    tokens: float


SETTINGS = (Setting("no KL, 1 minibatch", 0.0, 1), Setting("KL 0.001, 2 minibatches", 0.001, 2))


def our_session(setting: Setting) -> Session:
    """A run of ours that has not yet taken a step."""
    base = load_profile("tiny")
    task = base.task.model_copy(update={"settings": {**base.task.settings, "train_problems": PROMPTS}})
    changes = {"prompts_per_step": PROMPTS, "minibatches": setting.minibatches, "learning_rate": LEARNING_RATE}
    profile: Profile = base.model_copy(update={"task": task, "training": base.training.model_copy(update=changes)})
    algorithm = {**ALGORITHMS["GRPO"], "group_size": GROUP, "kl_coefficient": setting.kl}
    content = {"id": "rl-step", "algorithm": algorithm, "epochs": 1000}
    return prepare(validate(Experiment, content, source="benchmark"), profile, 0)


def trl_trainer(setting: Setting, session: Session, directory: str) -> Any:
    """trl's trainer with the settings of `session`; its model is a copy from the same weights."""
    trl, datasets = require("trl", "bench"), require("datasets", "bench")
    fresh = our_session(setting)
    problems = fresh.task.train()
    by_prompt = {problem.prompt: problem for problem in problems}

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [fresh.task.reward(by_prompt[p], c) for p, c in zip(prompts, completions, strict=True)]

    arguments = trl.GRPOConfig(
        output_dir=directory,
        per_device_train_batch_size=PROMPTS * GROUP // setting.minibatches,
        steps_per_generation=setting.minibatches,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=session.profile.training.max_new_tokens,
        temperature=session.algorithm.temperature,
        beta=setting.kl,
        loss_type="dapo",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=(STEPS + 1) * setting.minibatches,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=fresh.model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": [p.prompt for p in problems]}),
        processing_class=fresh.tokenizer,
    )


def alternate(setting: Setting) -> dict[str, list[Cost]]:
    """Costs of the steps of both, taken in turn; the first of each warms up and is left out."""
    session = our_session(setting)
    costs: dict[str, list[Cost]] = {"roundoff": [], "trl": []}
    began, generating, tokens = (0.0, 0.0), 0.0, 0.0

    def now() -> tuple[float, float]:
        return time.thread_time(), time.perf_counter()

    class InTurn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = now()

        def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            nonlocal began, generating
            if state.global_step % setting.minibatches:
                return
            cpu, wall = (end - start for end, start in zip(now(), began, strict=True))
            costs["trl"].append(Cost(cpu, wall, generating / wall, tokens))
            start = now()
            row = take_step(session, state.global_step // setting.minibatches, None)  # type: ignore[arg-type]
            cpu, wall = (end - first for end, first in zip(now(), start, strict=True))
            costs["roundoff"].append(Cost(cpu, wall, row["seconds_rollout"] / wall, row["response_tokens"]))
            generating, began = 0.0, now()

    with tempfile.TemporaryDirectory() as directory:
        trainer = trl_trainer(setting, session, directory)
        trainer.add_callback(InTurn())
        generate = trainer._generate_and_score_completions

        def timed(*arguments: Any) -> Any:
            nonlocal generating, tokens
            start = time.perf_counter()
            output = generate(*arguments)
            generating += time.perf_counter() - start
            tokens = float(output["completion_mask"].sum(dim=1).float().mean())
            return output

        trainer._generate_and_score_completions = timed
        trainer.train()
    return {name: found[1:] for name, found in costs.items()}


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"{PROMPTS} prompts x {GROUP} rollouts, {STEPS} steps of each in turn, medians\n")
    print("| | thread CPU (s) | wall (s) | sampling and reward | response tokens |\n|---|---|---|---|---|")
    try:
        for setting in SETTINGS:
            costs = alternate(setting)
            cpu = {name: statistics.median(c.cpu for c in found) for name, found in costs.items()}
            wall = {name: statistics.median(c.wall for c in found) for name, found in costs.items()}
            for name, found in costs.items():
                share = statistics.median(c.rollout for c in found)
                length = statistics.mean(c.tokens for c in found)
                print(f"| {name}, {setting.name} | {cpu[name]:.3f} | {wall[name]:.3f} | {share:.0%} | {length:.2f} |")
            faster = [times["trl"] / times["roundoff"] for times in (cpu, wall)]
            verdict = "reached" if min(faster) >= GOAL else "MISSED"
            print(
                f"| **times faster** (goal {GOAL:g}: {verdict}) | {faster[0]:.2f} | {faster[1]:.2f} | | |", flush=True
            )
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
