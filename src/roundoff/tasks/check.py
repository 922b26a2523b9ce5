"""Checks whether a task, packaged or the user's own, keeps the rules that training and scoring rely on."""

from collections import Counter
from collections.abc import Sequence

from roundoff.tasks.base import Problem, RewardError, Task
from roundoff.tasks.score import as_reward

ODD_TEXTS = ("", " ", "\n", ">", "=", "-", "\x00", "\ud800", "é", "####", "\\boxed{", "<answer>", "1" * 10_000)
"""Responses that solve no problem, and that a reward must handle without raising."""
CHECKED = 32
"""Number of training problems, and of test problems, whose reward is tried."""


def check_task(task: Task) -> list[str]:
    """The faults of a task, one sentence each; empty if it can be trained on and scored."""
    train, test = task.train(), task.test()
    if not train or not test:
        return [f"{'train' if not train else 'test'}() returns no problems"]
    faults = []
    if list(task.train()) != list(train) or list(task.test()) != list(test):
        faults.append("train() or test() returns different problems when called again")
    faults += check_names(train, test)
    for problem in (*train[:CHECKED], *test[:CHECKED]):
        solution = task.solution(problem)
        if solution is not None and task.reward(problem, solution) != 1.0:
            faults.append(f"{problem.id}: its own solution {solution[-60:]!r} does not earn the reward 1.0")
        faults += _odd(task, problem)
    return faults


def check_names(train: Sequence[Problem], test: Sequence[Problem]) -> list[str]:
    """Faults of ids and prompts: scores are paired by id, and no test problem may be trained on."""
    faults = []
    counts = Counter(problem.id for problem in (*train, *test))
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        faults.append(f"{len(repeated)} ids name more than one problem, such as {repeated[0]!r}")
    shared = {p.prompt for p in train} & {p.prompt for p in test}
    if shared:
        faults.append(f"{len(shared)} test problems are training problems, such as {min(shared)[:60]!r}")
    if any(not (problem.id and problem.prompt) for problem in (*train, *test)):
        faults.append("a problem has no id or no prompt")
    return faults


def _odd(task: Task, problem: Problem) -> list[str]:
    """Faults of the reward on `ODD_TEXTS`."""
    faults = []
    for text in ODD_TEXTS:
        try:
            reward = task.reward(problem, text)
        except (Exception, SystemExit) as error:  # a reward must not raise anything
            faults.append(f"{problem.id}: reward raises {type(error).__name__} on {text[:20]!r}")
            continue
        try:
            reward = as_reward(reward)
        except RewardError as error:
            faults.append(f"{problem.id}: {error} on {text[:20]!r}")
            continue
        if reward == 1.0:
            faults.append(f"{problem.id}: {text[:20]!r} earns the full reward")
    return faults
