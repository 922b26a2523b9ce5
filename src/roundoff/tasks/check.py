"""What every task must keep to, as a check that a task of one's own can be given to."""

from collections import Counter
from collections.abc import Sequence

from roundoff.tasks.base import Problem, RewardError, Task
from roundoff.tasks.score import as_reward

ODD_TEXTS = ("", " ", "\n", ">", "=", "-", "\x00", "\ud800", "é", "####", "\\boxed{", "<answer>", "1" * 10_000)
"""Responses that are right for no problem, and that a reward must survive."""
CHECKED = 32
"""Problems of each side whose reward is tried."""


def check_task(task: Task) -> list[str]:
    """What is wrong with a task, one sentence each; empty if it can be trained on and scored."""
    train, test = task.train(), task.test()
    if not train or not test:
        return [f"{'train' if not train else 'test'}() returns no problems"]
    found = []
    if list(task.train()) != list(train) or list(task.test()) != list(test):
        found.append("train() or test() returns other problems when called again")
    found += check_names(train, test)
    for problem in (*train[:CHECKED], *test[:CHECKED]):
        solution = task.solution(problem)
        if solution is not None and task.reward(problem, solution) != 1.0:
            found.append(f"{problem.id}: its own solution {solution[-60:]!r} does not earn the reward 1.0")
        found += _odd(task, problem)
    return found


def check_names(train: Sequence[Problem], test: Sequence[Problem]) -> list[str]:
    """What is wrong with ids and prompts: scores are paired by id, and no test problem may be trained on."""
    found = []
    counts = Counter(problem.id for problem in (*train, *test))
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        found.append(f"{len(repeated)} ids name more than one problem, such as {repeated[0]!r}")
    shared = {p.prompt for p in train} & {p.prompt for p in test}
    if shared:
        found.append(f"{len(shared)} test problems are training problems, such as {min(shared)[:60]!r}")
    if any(not (problem.id and problem.prompt) for problem in (*train, *test)):
        found.append("a problem has no id or no prompt")
    return found


def _odd(task: Task, problem: Problem) -> list[str]:
    found = []
    for text in ODD_TEXTS:
        try:
            reward = task.reward(problem, text)
        except (Exception, SystemExit) as error:  # whatever it is: a reward must not raise
            found.append(f"{problem.id}: reward raises {type(error).__name__} on {text[:20]!r}")
            continue
        try:
            reward = as_reward(reward)
        except RewardError as error:
            found.append(f"{problem.id}: {error} on {text[:20]!r}")
            continue
        if reward == 1.0:
            found.append(f"{problem.id}: {text[:20]!r} earns the full reward")
    return found
