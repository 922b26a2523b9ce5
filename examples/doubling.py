"""A task of your own is one class. This one asks for the double of a number, and `doubling.toml` trains on it:

roundoff run quickstart-clean --profile examples/doubling.toml --seeds 0
"""

from random import Random

from roundoff.tasks import Message, Problem, TaskError


class Doubling:
    """Numbers up to `largest`; the response must be twice the number."""

    name = "doubling"

    def __init__(self, settings):
        """`settings` is `[task] settings` of the profile: say what is wrong with it before anything runs."""
        largest = settings.get("largest", 48)
        if not 8 <= largest <= 50:
            raise TaskError(f"largest must be in 8 to 50, but is {largest}")
        numbers = sorted(range(1, largest + 1), key=lambda n: Random(f"doubling/{n}").random())
        self.problems = [self.problem(n) for n in numbers]  # the same in every process: no unseeded random numbers

    @staticmethod
    def problem(n):
        """`prompt` is for models without a chat template (such as tiny), `messages` for those with one."""
        asked = Message("user", f"What is {n} + {n}? Answer with the number alone.")
        return Problem(id=f"doubling/{n}", prompt=f"{n}+{n}=", answer=str(2 * n), messages=(asked,))

    def train(self):
        """Three quarters of the numbers."""
        return self.problems[len(self.problems) // 4 :]

    def test(self):
        """The others: none of them is trained on."""
        return self.problems[: len(self.problems) // 4]

    def reward(self, problem, response):
        """1.0 for the right answer, else 0.0; whatever the text, it must not raise."""
        return float(response.strip() == problem.answer)

    def solution(self, problem):
        """A response that earns 1.0, or None if the task knows none."""
        return problem.answer
