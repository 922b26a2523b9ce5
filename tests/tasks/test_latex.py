"""Answers in LaTeX: which box is the answer, and that no response can hang the process."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from roundoff.tasks import TASKS, TaskError
from roundoff.tasks.latex import last_box
from roundoff.tasks.limited_process import LimitedProcess, LimitExceededError, Limits
from roundoff.tasks.score import score_responses
from tests.tasks.problem_files import write_jsonl

ENDLESS = "\\boxed{10^{10^{10}}}"


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("no box", None),
        ("\\boxed{4}", "4"),
        ("\\boxed{3} then \\boxed{4}", "4"),
        ("\\boxed{3}, and \\fbox{4}", "4"),
        ("\\boxed {4} and text {after} it", "4"),
        ("\\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{4}}", "{4}"),
        ("\\boxed{\\fbox{1} + 3}", "{1} + 3"),
        ("{\\boxed{4}", "4"),
        ("}} \\boxed{4}", "4"),
        ("\\boxed{3 and then \\boxed{4}", "4"),  # cut off before the outer one was closed
        ("\\boxed{3} and \\boxed{4", ""),  # the last box is never closed, and the earlier one does not take its place
        ("\\boxed{3} and \\boxed 4", ""),
        ("\\boxed{3} and \\boxed{}", ""),
        ("\\boxed", ""),
        ("\\boxedness{3}", None),
    ],
)
def test_the_last_box_is_the_answer(text: str, held: str | None) -> None:
    assert last_box(text) == held


@pytest.mark.parametrize("unit", ["\\boxed{", "\\boxed", "{", "}", "\\", "\\boxed{}", "\\boxed{1} "])
def test_boxes_are_found_in_linear_time(unit: str) -> None:
    last_box(unit * (200_000 // len(unit)))


@pytest.fixture
def task(tmp_path: Path):
    pytest.importorskip("math_verify")
    rows = [{"question": "a", "answer": "4"}, {"question": "b", "answer": "12000"}, {"question": "c", "answer": "-5"}]
    write_jsonl(tmp_path / "test.jsonl", rows)
    write_jsonl(tmp_path / "train.jsonl", [{"question": "d", "answer": "4"}])
    return TASKS["gsm8k"]({"path": str(tmp_path), "answer": "latex"})


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("The answer is \\boxed{4}.", 1.0),
        ("\\boxed{4}\n\n**Final answer**\n\\boxed{4}", 1.0),
        ("We had \\boxed{3}, and now \\boxed{4}", 1.0),
        ("\\boxed{1}\nstep \\boxed{2}\nstep \\boxed{3}\nstep \\boxed{4}", 1.0),
        ("first \\boxed{4} then \\boxed{3}", 0.0),
        ("\\boxed{4} or \\boxed{3}", 0.0),
        ("\\boxed{3} or \\fbox{4}", 1.0),
        ("\\boxed{4} and \\boxed{", 0.0),
        ("\\boxed{4} within \\boxed{}", 0.0),
        ("\\boxed{4}, since $3 + 2 = 5$", 1.0),
        ("\\boxed{4\\text{ apples}}", 1.0),
        ("\\boxed{\\text{4}}", 1.0),
        ("\\boxed{$4$}", 1.0),
        ("\\boxed{４}", 1.0),
        ("it is $4$", 1.0),
        ("$3$, then $4$", 1.0),
        ("\\boxed{3, 4}", 0.0),
        ("\\boxed{" + "1+" * 2000 + "4}", 0.0),
    ],
)
def test_reward(task, response: str, reward: float) -> None:
    assert task.reward(task.test()[0], response) == reward


@pytest.mark.parametrize("number", ["12\\,000", "12{,}000", "12,000", "12\\ 000", "12 000", "12\u202f000", "12,\\!000"])
def test_groups_of_digits_are_one_number(task, number: str) -> None:
    assert task.reward(task.test()[1], f"\\boxed{{{number}}}") == 1.0


@pytest.mark.parametrize("minus", "-−–‐－")
def test_dashes_are_signs(task, minus: str) -> None:
    assert task.reward(task.test()[2], f"\\boxed{{{minus}5}}") == 1.0


def test_an_answer_that_cannot_be_compared_is_an_error_in_every_thread(task, monkeypatch) -> None:
    """huggingface/Math-Verify and verl-project/verl#5839: the signals of math-verify do not reach other threads."""
    process = LimitedProcess("roundoff.tasks.latex_process", Limits(seconds=1, clock_seconds=6, memory=2 << 30))
    monkeypatch.setattr("roundoff.tasks.latex.child_process", lambda: process)
    problem, found = task.test()[0], []

    def score() -> None:
        found.append(score_responses(task, [problem] * 3, [ENDLESS, "\\boxed{4}", "\\boxed{3}"]))

    score()
    thread = threading.Thread(target=score)
    thread.start()
    thread.join(60)
    assert [(s.rewards, s.errors) for s in found] == [((0.0, 1.0, 0.0), 1)] * 2
    assert task.reward(problem, ENDLESS) == 0.0
    process.close()


@pytest.mark.parametrize("answer", ["\\boxed{}", "\\boxed{4", " "])
def test_a_right_answer_that_is_not_an_expression_is_an_error_of_its_row(tmp_path, answer: str) -> None:
    pytest.importorskip("math_verify")
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": answer}])
    with pytest.raises(TaskError, match="row 1: the final answer must be an expression"):
        TASKS["gsm8k"]({"train": path, "test": path, "answer": "latex"})


def test_a_right_answer_that_takes_too_long_is_an_error_of_its_row(tmp_path, monkeypatch) -> None:
    class Late:
        def ask(self, question):
            raise LimitExceededError("it took more than 5 s")

    monkeypatch.setattr("roundoff.tasks.latex.child_process", Late)
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "9^{9}"}])
    with pytest.raises(TaskError, match=r"row 1: the final answer '9\^\{9\}' cannot be read: .* more than 5 s"):
        TASKS["gsm8k"]({"train": path, "test": path, "answer": "latex"})


def test_math_verify_stays_out_of_this_process(tmp_path) -> None:
    pytest.importorskip("math_verify")
    code = (
        "import sys; from roundoff.tasks.latex import Expression;"
        "assert Expression.of_truth('4').is_answer_of('\\\\boxed{2+2}'); sys.exit('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_forked_process_starts_its_own_child() -> None:
    pytest.importorskip("math_verify")
    code = """
import os, json
from roundoff.tasks.latex import Expression, child_process
four = Expression.of_truth("4")
before = child_process().pid
read, write = os.pipe()
if os.fork() == 0:
    right = four.is_answer_of("\\\\boxed{4}")
    os.write(write, json.dumps([right, child_process().pid]).encode())
    os._exit(0)
os.wait()
right, other = json.loads(os.read(read, 1000))
assert right and other != before, (right, other, before)
assert four.is_answer_of("\\\\boxed{4}") and child_process().pid == before
"""
    if hasattr(os, "fork"):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_the_child_ends_with_its_parent() -> None:
    pytest.importorskip("math_verify")
    code = (
        "import os, signal; from roundoff.tasks.latex import Expression, child_process; Expression.of_truth('4');"
        "print(child_process().pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        threading.Event().wait(0.05)
    pytest.fail(f"{child} still runs")


def test_many_threads_share_one_child(task) -> None:
    problem = task.test()[0]
    found: list[tuple[int, float]] = []

    def score(start: int) -> None:
        found.extend((i, task.reward(problem, f"\\boxed{{{i}}}")) for i in range(start, start + 8))

    threads = [threading.Thread(target=score, args=(start,)) for start in range(0, 32, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(i, float(i == 4)) for i in range(32)]


def test_a_package_that_is_missing_is_named(monkeypatch) -> None:
    process = LimitedProcess("tests.tasks.no_such_module", Limits(1, 5, 1 << 30))
    from roundoff.config import ConfigError

    with pytest.raises(ConfigError, match="cannot start"):
        process.ask({})
    assert process.pid is None


def test_an_interrupted_question_leaves_no_answer_behind(monkeypatch) -> None:
    process = LimitedProcess("tests.tasks.answering_child", Limits(1, 5, 1 << 30))
    assert process.ask({"say": 1}) == {"said": 1}
    first = process.pid
    with monkeypatch.context() as patch:
        patch.setattr(
            "roundoff.tasks.limited_process._Child.read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            process.ask({"say": 2})
    assert process.ask({"say": 3}) == {"said": 3}
    assert process.pid != first
    process.close()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"loop": True}, "more than 1 s"),
        ({"power": True}, "more than 1 s"),
        ({"sleep": True}, "more than 1 s, or too much memory"),
        ({"memory": True}, "too much memory"),
        ({"depth": True}, "nested too deeply"),
        ({"exit": True}, "more than 1 s, or too much memory"),
    ],
)
def test_each_limit_ends_a_question_with_its_message(question: dict[str, bool], message: str) -> None:
    process = LimitedProcess("tests.tasks.answering_child", Limits(seconds=1, clock_seconds=4, memory=1 << 30))
    with pytest.raises(LimitExceededError, match=message):
        process.ask(question)
    assert process.ask({"say": "\ud800"}) == {"said": "\ud800"}
    process.close()
