"""What AQN costs: entering and leaving its noise, as a share of a training step on `tiny` (goal: under 1 %)."""

from __future__ import annotations

import statistics
import time

import torch

from roundoff.config import Experiment, validate
from roundoff.experiments import load_experiment, load_profile
from roundoff.training.before_first_step import measure_aqn
from roundoff.training.loop import take_step
from roundoff.training.preparation import prepare

GOAL = 0.01
STEPS = 3
REPEATS = 101


def noisy(name: str, target: str) -> Experiment:
    """A declared experiment with AQN at every step, on the norms or on the Linears."""
    content = load_experiment(name).model_dump(exclude_none=True)
    content["aqn"] = {**content["aqn"], "target": target, "schedule": "constant"}
    return validate(Experiment, content, source=name)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'experiment':12} {'target':8} {'step (ms)':>10} {'AQN (ms)':>9} {'share':>8}   goal <= {GOAL:.1%}")
    for name in ("E5b", "E9b", "E13j"):
        for target in ("rmsnorm", "linear"):
            session = prepare(noisy(name, target), load_profile("tiny"), 0)
            steps, entries = [], []
            for step in range(1, STEPS + 1):
                began = time.thread_time()
                take_step(session, step, None)  # type: ignore[arg-type]
                steps.append(time.thread_time() - began)
            for _ in range(REPEATS):
                began = time.thread_time()
                with session.aqn.in_force(session.model, 1, session.key):
                    pass
                session.aqn.at(1).by_layer()
                entries.append(time.thread_time() - began)
            whole, aqn = 1e3 * statistics.median(steps), 1e3 * statistics.median(entries)
            verdict = "reached" if aqn / whole <= GOAL else "MISSED"
            print(f"{name:12} {target:8} {whole:10.0f} {aqn:9.2f} {aqn / whole:8.2%}   {verdict}")
    session = prepare(load_experiment("E5b"), load_profile("tiny"), 0)
    began = time.thread_time()
    measure_aqn(session)
    print(f"pre-flight, once a run: {1e3 * (time.thread_time() - began):.0f} ms")


if __name__ == "__main__":
    main()
