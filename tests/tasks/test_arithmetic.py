"""The arithmetic task; every expected value was derived by hand."""

from itertools import islice

import pytest

from roundoff.tasks import TASKS, Problem, TaskError
from roundoff.tasks.arithmetic import ArithmeticSettings, ArithmeticTask, split_of


@pytest.fixture(scope="module")
def task() -> ArithmeticTask:
    return ArithmeticTask(ArithmeticSettings())


def terms(problem: Problem) -> int:
    body = problem.prompt.removesuffix("=")
    return 1 + body.count("+") + body.count("-")


def canonical(problem: Problem) -> tuple[int, ...]:
    return tuple(sorted(int(t) for t in problem.prompt.removesuffix("=").replace("+", " +").replace("-", " -").split()))


@pytest.mark.parametrize(
    ("prompt", "solution"),
    [
        ("37-12+5=", "25>30"),
        ("12-37+5=", "-25>-20"),
        ("8+9=", "17"),
        ("5-5=", "0"),
        ("1-2+1=", "-1>0"),
        ("50+50+50=", "100>150"),
        ("1+2+3-4-5=", "3>6>2>-3"),
    ],
)
def test_solution_writes_the_running_results(task: ArithmeticTask, prompt: str, solution: str) -> None:
    assert task.solution(Problem("", prompt, "")) == solution


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("25>30", 1.0),
        ("30", 1.0),  # intermediate results are not required
        ("24>30", 1.0),  # nor checked
        ("1>2>3>30", 1.0),
        (" 25>30\n", 1.0),
        ("25>31", 0.0),
        ("25>3", 0.0),  # cut off
        ("25>", 0.0),  # cut off
        ("30>25", 0.0),
        ("25>-30", 0.0),
        ("25>030", 0.0),
        ("25>+30", 0.0),
        ("25>30.0", 0.0),
        ("25>30>", 0.0),
        (">30", 0.0),
        ("25>>30", 0.0),
        ("25 > 30", 0.0),
        ("25=30", 0.0),
        ("--25>30", 0.0),
        ("the answer is 30", 0.0),
        ("x>30", 0.0),
        ("25>30<eos>", 0.0),
        ("25>\u0663\u0660", 0.0),  # 30 in Arabic digits
        ("", 0.0),
        (">", 0.0),
        ("-", 0.0),
        ("\x00", 0.0),
        ("9" * 100_000, 0.0),
    ],
)
def test_reward(task: ArithmeticTask, response: str, reward: float) -> None:
    assert task.reward(Problem("", "37-12+5=", "30"), response) == reward


def test_reward_of_negative_and_zero_answers(task: ArithmeticTask) -> None:
    assert task.reward(Problem("", "12-37+5=", "-20"), "-25>-20") == 1.0
    assert task.reward(Problem("", "12-37+5=", "-20"), "-25>20") == 0.0
    assert task.reward(Problem("", "5-5=", "0"), "0") == 1.0
    assert task.reward(Problem("", "5-5=", "0"), "-0") == 0.0


def test_default_problems(task: ArithmeticTask) -> None:
    train, test = task.train(), task.test()
    assert (len(train), len(test)) == (4096, 1024)
    for problems in (train, test):
        assert len({problem.id for problem in problems}) == len(problems)
        # half of 4,096 and of 1,024: both fit the two-term chains of their side, about 4,375 and 625
        assert sum(terms(problem) == 2 for problem in problems) == len(problems) // 2
        assert {terms(problem) for problem in problems} == {2, 3}
        values = {abs(value) for problem in problems for value in canonical(problem)}
        assert (min(values), max(values)) == (1, 50)
        for problem in problems:
            assert eval(problem.prompt.removesuffix("=")) == int(problem.answer)
            assert task.reward(problem, task.solution(problem)) == 1.0
        assert any(problem.answer.startswith("-") for problem in problems)
        lengths = [terms(problem) for problem in problems[:64]]
        assert len(set(lengths)) == 2, "lengths must be mixed, not sorted"


def test_problems_are_the_same_in_every_version(task: ArithmeticTask) -> None:
    """A change here changes every published score and the embedded model's recipe."""
    assert [problem.prompt for problem in task.test()[:4]] == ["32+28-2=", "14-18-20=", "49-39-22=", "30+11="]
    assert [problem.prompt for problem in task.train()[:3]] == ["45+30-22=", "35+9=", "21+47-46="]
    assert task.test() == ArithmeticTask(ArithmeticSettings()).test()


def test_train_and_test_are_disjoint_across_seeds_and_difficulties() -> None:
    """Up to the order of terms, no training problem of one setting is a test problem of another."""
    settings = [
        ArithmeticSettings(seed=0),
        ArithmeticSettings(seed=1),
        ArithmeticSettings(max_value=20, terms_max=4, seed=2),
    ]
    tasks = [ArithmeticTask(each) for each in settings]
    train = {canonical(problem) for task in tasks for problem in task.train()}
    train |= {canonical(problem) for task in tasks for problem in islice(task.train_stream(0), 5000)}
    test = {canonical(problem) for task in tasks for problem in task.test()}
    assert train and test and not train & test
    assert tasks[0].train() != tasks[1].train()
    assert tasks[0].test() != tasks[1].test()


def test_split_ignores_the_order_of_terms_and_takes_one_in_eight() -> None:
    chains = [(a, sign * b) for a in range(1, 51) for b in range(a, 51) for sign in (1, -1)]
    assert all(split_of((a, b)) == split_of((b, a)) for a, b in chains)
    # 2,550 independent draws at 1/8: expected 318.75, standard deviation 16.7; 5 of them are 84
    assert abs(sum(split_of(chain) == "test" for chain in chains) - 318.75) < 84


def test_train_stream_mixes_lengths_and_follows_its_seed(task: ArithmeticTask) -> None:
    first = list(islice(task.train_stream(0), 2000))
    assert first == list(islice(task.train_stream(0), 2000))
    assert first != list(islice(task.train_stream(1), 2000))
    # binomial(2000, 1/2): standard deviation 22.4; 5 of them are 112
    assert abs(sum(terms(problem) == 2 for problem in first) - 1000) < 112


def test_a_short_length_gives_its_share_to_longer_ones() -> None:
    task = TASKS["arithmetic"]({"max_value": 6, "train_problems": 500, "test_problems": 40})
    lengths = [terms(problem) for problem in task.train()]
    # 2 terms up to 6: 6 * 12 = 72 chains in all, so at most 72 of the 250 that would be its share
    assert len(lengths) == 500
    assert 40 < lengths.count(2) < 72


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_value": 3}, r"train_problems is 4096, but chains of 2 to 3 terms up to 3 hold only \d+ different"),
        ({"max_value": 10, "train_problems": 100}, r"test_problems is 1024, but chains .* hold only \d+ different"),
        ({"terms_min": 4}, "terms_max must be at least terms_min, but they are 3 and 4"),
        ({"terms_max": 1}, r"^terms_max: .*greater than or equal to 2, but is 1"),
        ({"train_problems": 0}, r"^train_problems: .* but is 0"),
        ({"seed": -1}, r"^seed: .* but is -1"),
        ({"max_valeu": 3}, r"^max_valeu .* not a setting of the arithmetic task.*max_value"),
        ({"terms_min": "two"}, r"^terms_min: .* but is 'two'"),
    ],
)
def test_impossible_settings_say_what_is_wrong(settings: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TASKS["arithmetic"](settings)


def test_every_problem_of_a_small_side_can_be_asked_for() -> None:
    """2 terms up to 3: 3 * 6 = 18 chains, counted one by one."""
    chains = [(a, b) for a in (1, 2, 3) for b in (-3, -2, -1, 1, 2, 3)]
    room = sum(split_of(chain) == "test" for chain in chains)
    assert 0 < room < 18
    settings = {"terms_max": 2, "max_value": 3, "train_problems": 18 - room, "test_problems": room}
    task = TASKS["arithmetic"](settings)
    assert {canonical(p) for p in task.train()} | {canonical(p) for p in task.test()} == {
        tuple(sorted(chain)) for chain in chains
    }
    with pytest.raises(TaskError, match=f"hold only {room} different test problems"):
        TASKS["arithmetic"](settings | {"test_problems": room + 1})
