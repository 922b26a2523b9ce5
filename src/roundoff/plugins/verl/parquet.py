"""A task's problems as the parquet files that verl reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roundoff.optional_packages import require
from roundoff.tasks import Problem, Task


def write_problems(task: Task, directory: Path, *, conversations: bool = True) -> tuple[Path, Path]:
    """Write `train.parquet` and `val.parquet` into `directory`; returns their paths.

    Args:
        task: the task whose problems to write.
        directory: it is made if it does not exist.
        conversations: whether to write a problem's messages, for a chat template; otherwise its plain prompt.

    Raises:
        ConfigError: if pyarrow is not installed.
    """
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.parquet", directory / "val.parquet"
    for path, split, problems in zip(paths, ("train", "test"), (task.train(), task.test()), strict=True):
        temporary = path.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist(_rows(task.name, split, problems, conversations)), temporary)
        temporary.replace(path)
    return paths


def _rows(source: str, split: str, problems: Sequence[Problem], conversations: bool) -> list[dict[str, object]]:
    return [
        {
            "data_source": f"roundoff/{source}",
            "prompt": _conversation(problem, conversations),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"index": index, "split": split, "id": problem.id},
        }
        for index, problem in enumerate(problems)
    ]


def _conversation(problem: Problem, conversations: bool) -> list[dict[str, str]]:
    """The messages to which verl applies the model's chat template."""
    if problem.messages and conversations:
        return [{"role": message.role, "content": message.content} for message in problem.messages]
    return [{"role": "user", "content": problem.prompt}]
