"""The examples run as they stand, and the README shows the same code."""

import re
import runpy
from pathlib import Path

from roundoff.experiments import load_experiment, load_profile
from tests.training.test_loop import run

ROOT = Path(__file__).parents[1]


def test_the_example_in_python_prints_both_scores(capsys):
    runpy.run_path(str(ROOT / "examples" / "from_python.py"), run_name="__main__")
    deployed, clean = map(float, re.findall(r"(\d+\.\d)%", capsys.readouterr().out))
    assert 0 < deployed < clean < 100


def test_the_readme_shows_the_example():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL).group(1)
    example = (ROOT / "examples" / "from_python.py").read_text("utf-8").split('"""')[2]
    assert code.strip() == example.strip()


def test_the_example_experiment_is_valid():
    mine = load_experiment(str(ROOT / "examples" / "my-noise.toml"))
    assert (mine.id, mine.hardware.matmul_noise.relative_std, mine.hardware.matmul_noise.backward) == (
        "my-noise",
        0.05,
        False,
    )


def test_the_example_task_is_trained_on_and_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    profile = load_profile("examples/doubling.toml")
    training = profile.training.model_copy(update={"prompts_per_step": 18})  # 36 problems: two steps
    done = run(tmp_path, load_experiment("quickstart-clean"), profile.model_copy(update={"training": training}))
    assert [row["step"] for row in done.metrics] == [0, 1, 2]
    outcomes = done.evaluation(2).outcomes
    assert len(outcomes) == 12
    assert all(o.id.startswith("doubling/") and o.prompt.endswith("=") for o in outcomes)
    assert 0 < done.metrics[-1]["deployed"] <= 1  # tiny adds numbers of that size
