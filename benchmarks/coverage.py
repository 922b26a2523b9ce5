"""How often intervals hold the truth and a true null is rejected, by simulation; the bootstrap beside them."""

import sys

import numpy as np
from tests.simulated import WORLDS, World, rates

REPEATS, PROBLEMS, DRAWS = 6000, 512, 1000
SEEDS = (3, 5, 10)


def bootstrap_rejects(world: World, seeds: int, repeats: int) -> float:
    """Rejection rate of a true null by the percentile interval over resampled seeds and then problems."""
    rng, rejected = np.random.default_rng(3), 0
    for _ in range(repeats):
        difficulty = world.difficulty(rng, PROBLEMS)
        difference = world.arm(rng, difficulty, seeds) - world.arm(rng, difficulty, seeds)
        some_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
        some_problems = rng.multinomial(PROBLEMS, np.full(PROBLEMS, 1 / PROBLEMS), DRAWS) / PROBLEMS
        means = np.einsum("bs,sp,bp->b", some_seeds, difference, some_problems, optimize=True)
        low, high = np.percentile(means, [2.5, 97.5])
        rejected += not low <= 0 <= high
    return rejected / repeats


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else REPEATS
    print(f"{repeats:,} repeats of {PROBLEMS} problems; wanted: rejects 3 to 7 %, covers 93 to 97 %\n")
    print("| population | seeds | rejects a true null | benefit covered | score covered | bootstrap rejects |")
    print("|---|---|---|---|---|---|")
    for name, world in WORLDS.items():
        for seeds in SEEDS:
            found = rates(world, seeds, repeats=repeats, problems=PROBLEMS, start=11)
            other = bootstrap_rejects(world, seeds, repeats // 10)
            cells = [f"{100 * value:.1f} %" for value in (*found, other)]
            print(f"| {name} | {seeds} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
