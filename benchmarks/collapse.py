"""What collapsed runs do to intervals and how often they are noticed; power of the test against simulation."""

import sys

import numpy as np
from tests.simulated import WORLDS, World, collapse_rates

from roundoff import stats

REPEATS, PROBLEMS = 3000, 512
EFFECTS = (0.25, 0.4)
"""Effects (logits) whose power is simulated."""


def print_collapse(repeats: int) -> None:
    """Coverage with and without collapse of 15 % of the runs, and the rates of the detection."""
    print("| population | collapse | seeds | score covered | or said | difference covered | or said | found | false |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in ("typical", "seeds differ much", "near the ceiling"):
        for share in (0.0, 0.15):
            for seeds in (2, 3, 5, 10):
                found = collapse_rates(WORLDS[name], seeds, repeats=repeats, problems=PROBLEMS, start=23, share=share)
                rates = (found.score_held, found.score_held_said, found.benefit_held, found.benefit_held_said)
                cells = [f"{100 * rate:.1f} %" for rate in rates]
                cells.append(f"{100 * found.hits:.1f} %" if share and seeds >= stats.MIN_SEEDS else "-")
                cells.append(f"{100 * found.false_alarms:.2f} %")
                print(f"| {name} | {100 * share:g} % | {seeds} | {' | '.join(cells)} |", flush=True)


def print_power(repeats: int) -> None:
    """Power by `stats.power` and by simulation, at the components of a large sample."""
    world = World()
    rng = np.random.default_rng(2)
    difficulty = world.difficulty(rng, 4000)
    baseline = world.arm(rng, difficulty, 200)
    print("\n| effect (points) | seeds | power | simulated |\n|---|---|---|---|")
    for effect in EFFECTS:
        variance = stats.difference_variance(world.arm(rng, difficulty, 200, effect=effect), baseline)
        size = world.score(effect) - world.score()
        for seeds in range(3, 11):
            shown = 0
            for _ in range(repeats):
                difficult = world.difficulty(rng, PROBLEMS)
                arms = [world.arm(rng, difficult, seeds, effect=e) for e in (effect, 0.0)]
                shown += stats.paired_benefit(*arms).excludes_zero
            said = stats.power(size, variance, seeds=seeds, problems=PROBLEMS)
            print(f"| {100 * size:.1f} | {seeds} | {said:.3f} | {shown / repeats:.3f} |", flush=True)


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else REPEATS
    print(f"{repeats:,} repeats of {PROBLEMS} problems\n")
    print_collapse(repeats)
    print_power(repeats)


if __name__ == "__main__":
    main()
