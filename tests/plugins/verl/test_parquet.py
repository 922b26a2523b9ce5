"""Problems in the files that verl reads, and rewards for the responses that it passes."""

import json
import math

import pytest

from roundoff.config import ConfigError
from roundoff.plugins.verl.parquet import write_problems
from roundoff.plugins.verl.reward import compute_score
from roundoff.tasks import Message, Problem, load_task
from tests.tasks.problem_files import TRAIN, raw_files, verl_rows
from tests.tasks.test_own import SOURCE

pq = pytest.importorskip("pyarrow.parquet")


class Conversations:
    """A task of one problem that comes as a conversation."""

    name = "talk"

    def train(self):
        return [Problem("talk/1", "2+2=", "4", (Message("system", "Be brief."), Message("user", "What is 2+2?")))]

    test = train


def test_rows_are_in_verls_form(tmp_path):
    task = load_task("arithmetic", {"train_problems": 3, "test_problems": 2})
    train, val = write_problems(task, tmp_path / "data")
    rows = pq.read_table(train).to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in rows] == [p.answer for p in task.train()]
    assert rows[0]["prompt"] == [{"role": "user", "content": task.train()[0].prompt}]
    assert rows[0]["data_source"] == "roundoff/arithmetic"
    assert [row["extra_info"]["id"] for row in pq.read_table(val).to_pylist()] == [p.id for p in task.test()]
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_conversations_are_kept_unless_the_model_is_asked_without_a_template(tmp_path):
    train, _ = write_problems(Conversations(), tmp_path)
    assert [turn["role"] for turn in pq.read_table(train).to_pylist()[0]["prompt"]] == ["system", "user"]
    train, _ = write_problems(Conversations(), tmp_path, conversations=False)
    assert pq.read_table(train).to_pylist()[0]["prompt"] == [{"role": "user", "content": "2+2="}]


@pytest.mark.parametrize(("name", "form"), [("gsm8k", "#### {}"), ("reasoning-gym", "<answer>{}</answer>")])
def test_tasks_that_know_their_problems_by_id_are_asked_about_the_right_one(tmp_path, name, form):
    if name == "gsm8k":
        settings = raw_files(tmp_path)
    else:
        pytest.importorskip("reasoning_gym")
        settings = {"dataset": "countdown", "train_problems": 3, "test_problems": 2, "answer": "tags"}
    task = load_task(name, settings)
    for path, problems in zip(write_problems(task, tmp_path / "data"), (task.train(), task.test()), strict=True):
        for row, problem in zip(pq.read_table(path).to_pylist(), problems, strict=True):
            told = row["reward_model"]["ground_truth"], row["extra_info"]
            for response, reward in ((task.solution(problem), 1.0), (form.format("x"), 0.0)):
                given = compute_score("", response, *told, task=name, settings=json.dumps(settings))
                assert given == pytest.approx(reward, abs=0.06)  # some scorers give a point for having tried


def test_files_of_verls_own_have_no_ids_and_need_none_where_the_answer_says_all(tmp_path):
    settings = json.dumps(raw_files(tmp_path))
    row = verl_rows(TRAIN, "train")[1]  # 1,080, which verl writes 1080
    told = row["reward_model"]["ground_truth"], row["extra_info"]
    assert compute_score("openai/gsm8k", "#### 1080", *told, task="gsm8k", settings=settings) == 1.0
    assert compute_score("openai/gsm8k", "#### 1081", *told, task="gsm8k", settings=settings) == 0.0


@pytest.mark.parametrize(("answer", "extra"), [("30", {"id": "arithmetic/other"}), ("no number", {"index": 0})])
def test_problems_of_another_task_are_refused(answer, extra):
    with pytest.raises(ConfigError, match=r"task 'arithmetic' has no problem with extra_info\.id"):
        compute_score("", "30", answer, extra, task="arithmetic", settings="{}")


def test_the_reward_is_the_tasks_own():
    def score(response: str, answer: str) -> float:
        return compute_score("roundoff/arithmetic", response, answer, {"index": 0}, task="arithmetic", settings="{}")

    assert score("25>30", "30") == 1.0
    assert score("25>31", "30") == 0.0
    assert not math.isnan(score("", "30"))


def test_a_reward_that_cannot_be_computed_is_zero_and_said(tmp_path, caplog):
    (tmp_path / "odd.py").write_text(SOURCE.replace("float(response == problem.answer)", "None"))
    name = f"{tmp_path}/odd.py:Mine"
    assert compute_score("", "1", "1", {"id": "mine/a"}, task=name, settings="{}") == 0.0
    assert "reward error at problem mine/a, counted as 0: a reward must be a number" in caplog.text
