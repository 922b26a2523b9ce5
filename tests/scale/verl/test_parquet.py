"""Problems as verl reads them, and rewards as it asks for them."""

import math

import pytest

from roundoff.scale.verl_plugin.parquet import write_problems
from roundoff.scale.verl_plugin.reward import compute_score
from roundoff.tasks import Message, Problem, load_task

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


def test_the_reward_is_the_tasks_own():
    def score(response: str, answer: str) -> float:
        return compute_score("roundoff/arithmetic", response, answer, {"index": 0}, task="arithmetic", settings="{}")

    assert score("25>30", "30") == 1.0
    assert score("25>31", "30") == 0.0
    assert not math.isnan(score("", "30"))
