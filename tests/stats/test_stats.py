"""Intervals and tests, checked against values derived by hand and against simulation from a known model."""

import numpy as np
import pytest
from scipy import stats as reference

from roundoff import stats
from tests.simulated import WORLDS, World, rates

ARM = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1.0]])
OTHER = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0.0]])


def test_benefit_by_hand() -> None:
    """D = ARM - OTHER: rows 1/4, 1/4, 1/2; columns 1/3, 1/3, 0, 2/3; grand mean 1/3.

    MS_seed = 4 * ((1/12)^2 + (1/12)^2 + (1/6)^2) / 2 = 1/12; MS_problem = 3 * (0 + 0 + 1/9 + 1/9) / 3 = 2/9.
    Sum of squares of D about the mean: 4 * (2/3)^2 + 8 * (1/3)^2 = 8/3, so the residual is
    (8/3 - 2/12 - 3 * 2/9) / 6 = (11/6) / 6 = 11/36, and 1/12 + 2/9 - 11/36 = 0: the floor, 11/144, applies.
    """
    result = stats.paired_benefit(ARM, OTHER)
    total = 11 / 144
    spread = (1 / 12) ** 2 / 2 + (2 / 9) ** 2 / 3 + (11 / 36) ** 2 / 6
    df = max(total**2 / spread, 2)
    se = stats.WIDENING_AT_THREE * np.sqrt(total / 12)
    assert result.estimate == pytest.approx(1 / 3)
    assert result.high - result.estimate == pytest.approx(reference.t.ppf(0.975, df) * se)
    assert result.p == pytest.approx(2 * reference.t.sf((1 / 3) / se, df))
    assert (result.seeds, result.problems, result.covers) == (3, 4, "seeds and problems")


def test_seeds_alone_give_the_t_test_on_seed_means() -> None:
    """If all problems of a seed are alike, only seeds vary: the interval is the plain t interval over seed means."""
    means = np.array([0.2, 0.5, 0.1, 0.4])
    difference = np.tile(means[:, None], (1, 50))
    result = stats.paired_benefit(difference, np.zeros_like(difference))
    low, high = reference.t.interval(0.95, 3, means.mean(), means.std(ddof=1) / 2)
    assert (result.low, result.high) == pytest.approx((low, high))
    assert result.p == pytest.approx(reference.ttest_1samp(means, 0).pvalue)


def test_the_interval_excludes_zero_exactly_where_p_is_below_five_percent() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ((rng.random((4, 60)) < rng.uniform(0.3, 0.7)).astype(float) for _ in range(2))
        result = stats.paired_benefit(a, b)
        assert result.p is not None
        assert result.excludes_zero == (result.p < 0.05)


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_seeds_nothing_is_tested(seeds: int) -> None:
    result = stats.paired_benefit(np.ones((seeds, 200)), np.zeros((seeds, 200)))
    assert result.p is None
    assert not result.excludes_zero
    assert result.covers == "problems only"
    together = stats.equivalence(ARM[:seeds], OTHER[:seeds], 0.5)
    assert together.p_not_worse is None and together.p_equivalent is None


def test_swapping_the_arms_mirrors_the_benefit() -> None:
    one, two = stats.paired_benefit(ARM, OTHER), stats.paired_benefit(OTHER, ARM)
    assert (one.estimate, one.low, one.high, one.p) == pytest.approx((-two.estimate, -two.high, -two.low, two.p))


def test_arms_that_never_differ_are_not_known_to_be_equal() -> None:
    """Among 100 problems without a difference, a rate of up to 1 - 0.025^(1/100) = 3.6 % may have gone unseen."""
    same = np.tile((np.arange(100) % 2).astype(float), (3, 1))
    result = stats.paired_benefit(same, same)
    assert (result.estimate, result.p) == (0.0, 1.0)
    assert result.high == pytest.approx(0.0362, abs=1e-4)


@pytest.mark.parametrize("rate", [0.0, 1.0, 1 / 3, 0.999])
@pytest.mark.parametrize("problems", [2, 3, 7, 100, 256, 1024, 1319])
def test_no_end_of_an_interval_is_on_the_wrong_side_of_its_estimate(rate: float, problems: int) -> None:
    """Rounding once put the upper end of a score of 100 % below the score, by one part in 1e16."""
    found = [stats.score(np.full((s, problems), rate)) for s in (1, 2, 3, 5, 10)]
    found.append(stats.proportion(rate, problems))
    found.append(stats.unpaired_difference(found[-1], stats.proportion(1.0, problems)))
    for interval in found:
        assert -1 <= interval.low <= interval.estimate <= interval.high <= 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_score_at_the_edge_keeps_a_width(value: float) -> None:
    result = stats.score(np.full((3, 100), value))
    assert 0.02 < result.high - result.low < 0.06
    assert 0 <= result.low <= value <= result.high <= 1


def test_score_of_one_seed_is_wilsons_interval_up_to_students_t() -> None:
    outcomes = (np.arange(1000) < 700).astype(float)[None]
    result = stats.score(outcomes)
    wilson = reference.binomtest(700, 1000).proportion_ci(method="wilson")
    assert (result.low, result.high) == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    assert result.covers == "problems only"


def test_mcnemar_by_hand() -> None:
    """Five gained, one lost: p = 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64."""
    new = np.array([1, 1, 1, 1, 1, 0, 1, 0])
    old = np.array([0, 0, 0, 0, 0, 1, 1, 0])
    result = stats.mcnemar(new, old)
    assert (result.gained, result.lost, result.p) == (5, 1, pytest.approx(14 / 64))
    assert stats.mcnemar(new, new).p == 1.0


def test_holm_by_hand() -> None:
    """Sorted, 0.01, 0.02, 0.03 times 3, 2, 1 is 0.03, 0.04, 0.03, and no value may be smaller than an earlier one."""
    assert stats.holm([0.03, None, 0.01, 0.02]) == pytest.approx([0.04, None, 0.03, 0.04])
    assert stats.holm([None, None]) == [None, None]
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([0.0, 0.04, 1.0]) == pytest.approx([0.0, 0.08, 1.0])


def test_equivalence_needs_both_sides() -> None:
    rng = np.random.default_rng(3)
    base = (rng.random((5, 2000)) < 0.7).astype(float)
    same, better = base.copy(), np.maximum(base, rng.random((5, 2000)) < 0.2)
    same[:, :10] = 1 - same[:, :10]
    alike, gain = stats.equivalence(same, base, 0.02), stats.equivalence(better, base, 0.02)
    assert alike.p_equivalent is not None and alike.p_equivalent < 0.05
    assert gain.p_not_worse is not None and gain.p_not_worse < 0.001
    assert gain.p_equivalent is not None and gain.p_equivalent > 0.9


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: stats.score([0.5, 0.5]), "must be \\[seeds, problems\\]"),
        (lambda: stats.score([[0.5, 1.5]]), "must be fractions in \\[0, 1\\]"),
        (lambda: stats.score([[0.5, np.nan]]), "must be fractions"),
        (lambda: stats.score([[1.0]]), "at least two problems"),
        (lambda: stats.paired_benefit(ARM, OTHER[:, :3]), "must pair by seed and problem"),
        (lambda: stats.mcnemar(ARM[0], OTHER[0, :2]), "equal length"),
        (lambda: stats.mcnemar([np.nan, 1], [0, 1]), "treatment must be fractions"),
        (lambda: stats.holm([0.01, np.nan]), "p-values must be in \\[0, 1\\]"),
        (lambda: stats.holm([0.01, 1.5]), "p-values must be in"),
        (lambda: stats.equivalence(ARM, OTHER, 1.5), "1 point is 0.01"),
        (lambda: stats.plan(1.5, stats.Variance(0, 0, 0.3), problems=[100]), "1.5 points is 0.015"),
    ],
)
def test_bad_input_is_refused_by_name(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_plan_more_problems_never_need_more_seeds_and_the_row_keeps_its_promise() -> None:
    variance = stats.Variance(seed=1e-4, problem=0.02, residual=0.25)
    rows = stats.plan(0.03, variance, problems=[256, 1024, 4096], seconds_per_run=60.0)
    seeds = [row.seeds or 99 for row in rows]
    assert seeds == sorted(seeds, reverse=True)
    for row in rows:
        if row.seeds:
            assert row.power >= 0.8
            assert stats.power(0.03, variance, seeds=row.seeds - 1, problems=row.problems) < 0.8
            assert (row.runs, row.seconds) == (2 * row.seeds, 120.0 * row.seeds)


@pytest.mark.parametrize("effect", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("seeds", [3, 4, 10])
def test_power_is_that_of_the_noncentral_t(effect: float, seeds: int) -> None:
    """If only seeds vary, the test is the t test on seed means, whose power is the noncentral t with S - 1 df."""
    se = 0.02 / np.sqrt(seeds)
    critical = reference.t.ppf(0.975, seeds - 1) * (stats.WIDENING_AT_THREE if seeds == 3 else 1.0)
    shifted = reference.nct(seeds - 1, effect / se)
    expected = shifted.sf(critical) + np.nan_to_num(shifted.cdf(-critical))
    found = stats.power(effect, stats.Variance(0.02**2, 0.0, 0.0), seeds=seeds, problems=2000)
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("seeds", range(3, 11))
def test_power_is_that_of_the_test_itself(seeds: int) -> None:
    """Compared with 40,000 draws of the mean squares, within four standard errors of 0.25 points."""
    rng, problems, effect = np.random.default_rng(seeds), 512, 0.03
    variance = stats.Variance(3.5e-4, 0.0075, 0.31)
    expected = (problems * variance.seed + 0.31, seeds * variance.problem + 0.31, 0.31)
    freedom = (seeds - 1, problems - 1, (seeds - 1) * (problems - 1))
    a, b, r = (m * rng.chisquare(df, 40_000) / df for m, df in zip(expected, freedom, strict=True))
    total = np.maximum(a + b - r, stats.VARIANCE_FLOOR * r)
    spread = sum(m**2 / df for m, df in zip((a, b, r), freedom, strict=True))
    df = np.maximum(total**2 / spread, seeds - 1)
    means = effect + rng.standard_normal(40_000) * np.sqrt(variance.of_mean(seeds, problems))
    se = np.sqrt(total / (seeds * problems)) * (stats.WIDENING_AT_THREE if seeds == 3 else 1.0)
    shown = np.mean(np.abs(means) > reference.t.ppf(0.975, df) * se)
    assert stats.power(effect, variance, seeds=seeds, problems=problems) == pytest.approx(shown, abs=0.01)


def test_power_never_falls_with_effect_or_seeds() -> None:
    """An effect of many standard errors is certain to be found, although scipy's noncentral t gives NaN there."""
    variance = stats.Variance(0.0, 0.0087, 0.323)
    found = [[stats.power(e, variance, seeds=s, problems=5000) for s in (3, 4, 5, 6)] for e in (0.03, 0.05, 0.1, 0.4)]
    assert np.isfinite(found).all()
    assert (np.diff(found, axis=0) >= -1e-9).all() and (np.diff(found, axis=1) >= -1e-9).all()
    assert found[-1][0] == pytest.approx(1.0)


def test_plan_says_if_no_number_of_seeds_is_enough() -> None:
    """A problem variance of 0.02 on 256 problems gives a standard error of 0.9 points, however many seeds there are."""
    (row,) = stats.plan(0.01, stats.Variance(1e-4, 0.02, 0.25), problems=[256])
    assert row.seeds is None and row.runs is None and row.power < 0.8


def test_variance_components_are_recovered() -> None:
    rng = np.random.default_rng(1)
    seeds, problems = 40, 4000
    difference = (
        0.02 * rng.standard_normal((seeds, 1))
        + 0.05 * rng.standard_normal(problems)
        + 0.1 * rng.standard_normal((seeds, problems))
    )
    found = stats.difference_variance(0.5 + difference / 2, 0.5 - difference / 2)
    # The relative standard deviation is sqrt(2/39) = 23 % for the seed component and 2 % for the others; allow four.
    assert found.seed == pytest.approx(4e-4, rel=0.9)
    assert found.problem == pytest.approx(25e-4, rel=0.1)
    assert found.residual == pytest.approx(1e-2, rel=0.02)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_error_rate_and_coverage_of_intervals_are_near_what_they_promise(seeds: int) -> None:
    """In 500 repeats, a rate of 5 % is observed between 2.1 and 7.9 % in 99.7 % of cases."""
    rejected, held, score_held = rates(WORLDS["typical"], seeds, repeats=500, problems=256, start=7)
    assert 0.021 <= rejected <= 0.079
    assert 0.921 <= held <= 0.985
    assert 0.921 <= score_held <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("world", WORLDS)
def test_error_rate_and_coverage_of_intervals_are_kept_in_every_world(world: str, seeds: int) -> None:
    """Rejection is in [3, 7] % and coverage in [93, 97] %; with 6,000 repeats the standard error is 0.3 points."""
    rejected, held, score_held = rates(WORLDS[world], seeds, repeats=6000, problems=512, start=11)
    assert 0.03 <= rejected <= 0.07
    assert 0.93 <= held <= 0.97
    assert 0.93 <= score_held <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 4, 5, 10])
def test_power_is_what_plan_promises(seeds: int) -> None:
    """Simulated power is within 3 points of `power` at the components of a large sample."""
    world, rng, problems = World(seed=0.1), np.random.default_rng(2), 512
    difficulty = world.difficulty(rng, 4000)
    large = [world.arm(rng, difficulty, 200, effect=e) for e in (0.4, 0.0)]
    promised = stats.power(
        world.score(0.4) - world.score(), stats.difference_variance(*large), seeds=seeds, problems=problems
    )
    found = 0
    for _ in range(2000):
        difficulty = world.difficulty(rng, problems)
        arms = [world.arm(rng, difficulty, seeds, effect=e) for e in (0.4, 0.0)]
        found += stats.paired_benefit(*arms).excludes_zero
    assert found / 2000 == pytest.approx(promised, abs=0.03)
