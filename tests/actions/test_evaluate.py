"""`roundoff eval`: it agrees with the run, problem by problem, and scores anything on any hardware."""

import json
import shutil
from pathlib import Path

import pytest

from roundoff.actions.evaluate import describe, save, score_subject
from roundoff.actions.evaluation_subject import open_subject
from roundoff.actions.named_hardware import load_hardware
from roundoff.config import ConfigError, Hardware, LoRA
from roundoff.experiments import load_experiment
from roundoff.models.load import TINY_DIRECTORY, load_model
from roundoff.runs.checkpoint import DamagedCheckpointError
from roundoff.runs.outcomes import DamagedRunError
from roundoff.runs.record import Run, read_run
from tests.training.test_loop import run, with_training

SETTINGS = [
    "profile.task.settings={train_problems = 16, test_problems = 32}",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Complete two-step runs by name, each made once."""
    known: dict[str, Run] = {}

    def made(name: str, profile, *, lora: bool = False) -> Run:
        if (name, lora) not in known:
            experiment = load_experiment(name).model_copy(update={"lora": LoRA(rank=4, dropout=0.1) if lora else None})
            scale = with_training(profile, evaluate_every=1, noise_draws=2, lora_learning_rate=0.02)
            known[name, lora] = run(tmp_path_factory.mktemp("runs"), experiment, scale)
        return known[name, lora]

    return made


@pytest.mark.parametrize(
    ("name", "lora"),
    [("quickstart-noise", False), ("quickstart-mxfp4", False), ("quickstart-noise-aqn", True)],
)
def test_a_run_and_its_separate_evaluation_agree_exactly(runs, small, name, lora):
    made = runs(name, small, lora=lora)
    result = score_subject(open_subject(str(made.path)))
    assert result.evaluation == made.evaluation(2)  # every outcome and every response
    assert result.agrees
    assert "equal to what the run recorded at step 2" in describe(result)
    assert f"{made.metrics[-1]['deployed']:6.1%}" in describe(result)


def test_an_earlier_checkpoint_is_another_state(runs, small):
    made = runs("quickstart-noise", small)
    by_path = score_subject(open_subject(str(made.path / "checkpoints" / "step-000001")))
    by_step = score_subject(open_subject(str(made.path), step=1))
    assert by_path.evaluation == by_step.evaluation == made.evaluation(1)
    assert made.evaluation(1) != made.evaluation(2)


def test_a_difference_from_the_run_is_said(runs, small, tmp_path):
    made = runs("quickstart-noise", small)
    path = tmp_path / "copy" / "seed-0"
    shutil.copytree(made.path, path)
    file = path / "evaluations" / "step-000002.jsonl"
    first, *others = file.read_text().splitlines()
    row = json.loads(first)
    file.write_text("\n".join([json.dumps({**row, "clean": 1 - row["clean"]}), *others]) + "\n")
    result = score_subject(open_subject(str(path)))
    assert result.agrees is False
    assert "NOT EQUAL" in describe(result)


def test_other_hardware_changes_the_deployed_score_alone(runs, small):
    made = runs("quickstart-noise", small)
    plain = score_subject(open_subject(str(made.path), hardware="none"))
    assert plain.agrees is None
    assert [o.clean for o in plain.evaluation.outcomes] == [o.clean for o in made.evaluation(2).outcomes]
    assert all(o.deployed == (o.clean,) for o in plain.evaluation.outcomes)
    mxfp4 = score_subject(open_subject(str(made.path), hardware="quickstart-mxfp4"))
    assert "weight mxfp4, activation mxfp4" in describe(mxfp4)
    assert [o.response for o in mxfp4.evaluation.outcomes] != [o.response for o in plain.evaluation.outcomes]
    assert [o.clean for o in mxfp4.evaluation.outcomes] == [o.clean for o in plain.evaluation.outcomes]


def test_draws_and_settings_can_be_replaced(runs, small):
    made = runs("quickstart-noise", small)
    subject = open_subject(str(made.path), assignments=["hardware.matmul_noise.relative_std=0.3"])
    assert subject.experiment.hardware.matmul_noise.relative_std == 0.3
    result = score_subject(subject, draws=3)
    assert all(len(o.deployed) == 3 for o in result.evaluation.outcomes)
    assert result.agrees is None


def test_samples_give_pass_at_k(runs, small, tmp_path):
    made = runs("quickstart-noise", small)
    result = score_subject(open_subject(str(made.path)), samples=4, temperature=0.8)
    scores = result.scores()
    assert list(scores) == ["greedy pass@1", "sampled pass@1", "sampled pass@2", "sampled pass@4"]
    deployed = [sum(o.deployed) for o in result.samples]
    assert scores["sampled pass@1"][0].estimate == pytest.approx(sum(deployed) / (4 * 32))
    assert scores["sampled pass@4"][0].estimate == pytest.approx(sum(d > 0 for d in deployed) / 32)
    assert result.agrees  # the greedy part is what it was
    save(result, tmp_path / "out" / "scores.json")
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len(saved["outcomes"]) == len(saved["samples"]) == 32
    assert saved["scores"]["greedy pass@1"]["deployed"]["estimate"] == made.evaluation(2).deployed
    with pytest.raises(ConfigError, match="exists"):
        save(result, tmp_path / "out" / "scores.json")


def test_a_model_directory_is_scored_as_a_run_scores_it_before_its_first_step(runs, small):
    made = runs("quickstart-noise", small)
    subject = open_subject(str(TINY_DIRECTORY), profile="tiny", hardware="quickstart-noise", assignments=SETTINGS)
    assert score_subject(subject, draws=2).evaluation == made.evaluation(0)
    assert score_subject(open_subject("tiny", assignments=SETTINGS)).evaluation.clean == made.evaluation(0).clean


def test_a_saved_adapter_is_scored_as_its_run(runs, small, tmp_path):
    made = runs("quickstart-noise-aqn", small, lora=True)
    result = score_subject(open_subject(str(made.path / "adapter")))
    assert "over" in result.subject.name
    assert result.evaluation == made.evaluation(2)  # on the run's own task, hardware and draws
    assert result.agrees
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(made.path / "adapter", elsewhere)
    with pytest.raises(ConfigError, match=f"roundoff eval {elsewhere} --profile"):
        open_subject(str(elsewhere))
    settings = {"profile": "tiny", "hardware": "quickstart-noise", "assignments": SETTINGS}
    copied = score_subject(open_subject(str(elsewhere), **settings), draws=2)
    assert copied.evaluation.outcomes == made.evaluation(2).outcomes
    assert made.evaluation(2).outcomes != made.evaluation(0).outcomes


def test_a_damaged_last_checkpoint_is_passed_over_and_reported(runs, small, tmp_path):
    made = runs("quickstart-noise", small)
    path = tmp_path / "copy" / "seed-0"
    shutil.copytree(made.path, path)
    victim = path / "checkpoints" / "step-000002" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    subject = open_subject(str(path))
    assert subject.step == 1
    assert "step-000002" in subject.notes[0]
    with pytest.raises(DamagedCheckpointError, match="step-000002"):
        open_subject(str(path), step=2)


def test_weights_of_another_model_are_refused(runs, small, tmp_path):
    made = runs("quickstart-noise", small)
    path = tmp_path / "copy" / "seed-0"
    shutil.copytree(made.path, path)
    settings = (path / "experiment.toml").read_text()
    (path / "experiment.toml").write_text(settings + "\n[experiment.lora]\nrank = 4\n")
    assert read_run(path).experiment.lora is not None
    with pytest.raises(ConfigError, match="was written by another run"):
        score_subject(open_subject(str(path)))


class TestHardware:
    def test_by_name(self):
        assert load_hardware("none") == Hardware()
        assert load_hardware("quickstart-noise").matmul_noise.relative_std == 0.1

    @pytest.mark.parametrize(
        "text",
        [
            'precision = { weight = "nvfp4" }',
            '[hardware.precision]\nweight = "nvfp4"',
            'extends = "quickstart-clean"\n[hardware.precision]\nweight = "nvfp4"',
        ],
    )
    def test_by_file(self, tmp_path: Path, text):
        file = tmp_path / "chip.toml"
        file.write_text(text)
        assert load_hardware(str(file)).precision.weight == "nvfp4"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("precision = {", "is not TOML"),
            ('[precision]\nwieght = "nvfp4"', "did you mean 'weight'"),
            (
                '[hardware.precision]\nweight = "nvfp4"\n[matmul_noise]\nrelative_std = 0.1',
                "matmul_noise must be inside",
            ),
        ],
    )
    def test_wrong_file(self, tmp_path: Path, text, message):
        file = tmp_path / "chip.toml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_hardware(str(file))

    def test_a_format_is_that_of_weights_and_activations(self):
        precision = load_hardware("mxfp4:even").precision
        assert (precision.weight, precision.activation) == ("mxfp4:even", "mxfp4:even")

    @pytest.mark.parametrize(("name", "nearest"), [("mxfp5", "mxfp4"), ("nowhere", "none")])
    def test_what_is_possible_is_listed(self, name, nearest):
        possible = "'none', a format for weights and .*mxfp4, .*roundoff list.*TOML file"
        with pytest.raises(ConfigError, match=f"{possible}, but is {name!r}; did you mean {nearest!r}"):
            load_hardware(name)

    def test_wrong_name(self):
        with pytest.raises(ConfigError, match="did you mean 'quickstart-noise'"):
            load_hardware("quickstart-nois")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tiny", {"step": 3}, "--step chooses a checkpoint of a run"),
        ("tiny", {"assignments": ["hardware.matmul_noise.relative_std=3"]}, "relative_std must be in"),
        ("tiny", {"profile": "tinny"}, "did you mean 'tiny'"),
        ("tiny", {"assignments": ["algorithm.temperature=0.5"]}, "--set algorithm.temperature changes no score"),
        ("tiny", {"assignments": ["profile.training.learning_rate=1.0"]}, "learning_rate changes no score"),
    ],
)
def test_wrong_settings_and_those_that_change_no_score_are_refused(target, options, message):
    with pytest.raises(ConfigError, match=message):
        open_subject(target, **options)


def test_a_checkpoint_is_named_by_its_step(runs, small):
    made = runs("quickstart-noise", small)
    with pytest.raises(ConfigError, match="last is no checkpoint: the name of one reads step-<n>"):
        open_subject(str(made.path / "checkpoints" / "last"))


def test_a_response_that_leaves_no_room_for_the_prompt_is_refused():
    limit = load_model("tiny").model.config.max_position_embeddings
    subject = open_subject("tiny", assignments=[*SETTINGS, f"profile.training.max_new_tokens={limit}"])
    with pytest.raises(ConfigError, match=f"do not fit into the {limit} positions of the model"):
        score_subject(subject)


@pytest.mark.parametrize("options", [{}, {"hardware": "mxfp4"}, {"assignments": ["profile.training.max_new_tokens=9"]}])
def test_a_model_from_elsewhere_is_not_given_a_task_in_silence(options):
    with pytest.raises(ConfigError, match="belongs to no run, so say what to score it on"):
        open_subject(str(TINY_DIRECTORY), **options)
    with pytest.raises(ConfigError, match="belongs to no run"):
        open_subject("owner/model", **options)


@pytest.mark.parametrize(
    "named", [{"task": "arithmetic"}, {"profile": "tiny"}, {"assignments": ["profile.task.name=arithmetic"]}]
)
def test_a_task_that_is_named_is_taken(named):
    subject = open_subject(str(TINY_DIRECTORY), **named)
    assert (subject.profile.task.name, subject.experiment.hardware) == ("arithmetic", Hardware())


def refusal(target) -> str:
    with pytest.raises(ConfigError) as refused:
        open_subject(str(target))
    return str(refused.value)


def advised(message: str) -> list[str]:
    """Arguments of the commands that a message advises."""
    return [command.removeprefix("roundoff eval ") for command in message.split("`")[1::2] if "eval" in command]


def test_a_path_that_cannot_be_scored_comes_with_a_command_that_can(runs, small, tmp_path, monkeypatch):
    made = runs("quickstart-noise", small)
    root = made.path.parents[2]
    monkeypatch.chdir(root.parent)
    run = made.path.relative_to(root.parent)
    assert refusal(".").startswith(". holds ")
    for directory in (root.name, run.parents[1], run.parent):
        message = refusal(directory)
        assert message.startswith(f"{directory} holds one run: name it")
        assert advised(message) == [str(run)]
    assert refusal(f"{root.name}/nothing").startswith(f"there is no {root.name}/nothing; {root.name} holds one run")
    for part in ("checkpoints", "evaluations", "metrics.jsonl"):
        message = refusal(run / part)
        assert message.startswith(f"{run / part} lies in the run {run}, and is neither a checkpoint nor an adapter")
        assert advised(message) == [str(run)]
        assert message.endswith(" with --step N an earlier one (kept: 1, 2)")
    assert refusal(run / "adapter").startswith(f"{run} has no adapter: only a complete run with LoRA has one")
    assert open_subject(advised(refusal(run / "adapter"))[0]).step == 2
    monkeypatch.chdir(run)
    assert advised(refusal("adapter"))[0] == str(made.path)
    assert open_subject("tiny").run is None  # a name, and no part of the run that one is in
    (tmp_path / "empty").mkdir()
    assert "is neither a run (it holds no experiment.toml)" in refusal(tmp_path / "empty")


def test_a_damaged_run_and_a_model_that_is_not_there_are_errors(tmp_path):
    (tmp_path / "experiment.toml").write_text("x = 1")
    with pytest.raises(DamagedRunError):
        open_subject(str(tmp_path))
    subject = open_subject(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="nothing"):
        score_subject(subject)
