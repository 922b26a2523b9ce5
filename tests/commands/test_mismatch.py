"""`roundoff mismatch` as a user meets it: its numbers against exact ones, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from roundoff.actions import mismatch as action
from roundoff.actions.mismatch import MismatchOptions, summary
from roundoff.commands.mismatch import mismatch_command
from roundoff.config import ConfigError, Hardware, Precision
from roundoff.hardware import hardware_off, hardware_phase, install
from roundoff.models.load import load_model
from roundoff.models.logprobs import token_logprobs
from roundoff.stats import weight_growth


def run(*arguments, model="tiny"):
    done = CliRunner().invoke(mismatch_command, [model, "--prompts", "32", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def options(**changes):
    settings = {"model": "tiny", "rollout": "mxfp4", "training": "none", "profile_name": None, "task": None}
    settings |= {"prompts": 96, "group": 4, "max_new_tokens": None, "temperature": 1.0, "cap": 2.0, "device": "cpu"}
    return MismatchOptions(**settings | {"allow_download": False, "seed": 0, "json_file": None} | changes)


def test_equal_hardware_differs_by_rounding(tmp_path):
    file = tmp_path / "found.json"
    shown = run("--rollout", "mxfp4", "--training", "mxfp4", "--json", str(file))
    assert "differ by rounding alone" in shown and "no length is extrapolated: " in shown
    found = json.loads(file.read_text())
    assert found["measures"]["max"][0] < 1e-3 and abs(found["measures"]["kl"][0]) < 1e-5
    assert found["measures"]["ess_seq"][0] == pytest.approx(1, abs=1e-5)
    assert sum(row["responses"] for row in found["lengths"] if row) == found["responses"] == 128


def distributions(model, rollouts):
    """Log-probabilities of all tokens [rollouts, tokens, vocabulary] where each response token was sampled."""
    positions = (rollouts.attention_mask.cumsum(1) - 1).clamp(min=0)
    mask = rollouts.attention_mask.long()
    with torch.no_grad():
        logits = model(input_ids=rollouts.tokens, attention_mask=mask, position_ids=positions).logits
    return torch.log_softmax(logits[:, rollouts.prompt_length - 1 : -1].double(), dim=-1)


def test_the_estimators_agree_with_the_exact_kl_of_full_distributions():
    mxfp4 = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"))
    rollouts, difference = action._measured(options(), mxfp4, Hardware())
    model = load_model("tiny").model
    install(model, mxfp4, seed=0)
    p = distributions(model, rollouts)
    with hardware_off(model):
        q = distributions(model, rollouts)
    inside = rollouts.response_mask
    exact = float((p.exp() * (p - q)).sum(-1)[inside].mean())
    reverse = float((q.exp() * (q - p)).sum(-1)[inside].mean())
    found = summary(rollouts, difference, 2.0, 0)["measures"]
    assert exact > 0.05
    for name, expected in (("kl", exact), ("k3_kl", exact), ("kl_reverse", reverse), ("k3_kl_reverse", reverse)):
        assert found[name][1] <= expected <= found[name][2], (name, expected, found[name])


@pytest.mark.parametrize(("power", "supported"), [(1.0, True), (2.5, False)])
def test_a_planted_growth_is_recovered_and_another_is_not_extrapolated(power, supported):
    generator = np.random.default_rng(0)
    t = np.arange(1, 41)
    steps = generator.normal(size=(800, 40)) * np.sqrt(0.002 * np.diff(t**power, prepend=0.0))
    lengths = generator.integers(10, 41, 800)
    counts = generator.multinomial(800, np.full(800, 1 / 800), size=300).astype(float)
    found = weight_growth(steps.cumsum(axis=1), lengths, counts)
    assert bool(found.refusal) != supported
    if supported:
        assert found.rate[1] <= 0.002 <= found.rate[2] and found.exponent[1] <= 1 <= found.exponent[2]
        assert found.length[1] <= np.log(2) / 0.002 <= found.length[2]
    else:
        assert "does not grow in proportion" in found.refusal and found.length is None


def test_short_responses_and_far_lengths_are_not_extrapolated():
    generator = np.random.default_rng(0)
    counts = np.ones((5, 100))
    steps = generator.normal(size=(100, 20)) * 1e-3
    assert "a line needs" in weight_growth(steps.cumsum(axis=1), np.full(100, 4), counts).refusal
    counts = generator.multinomial(100, np.full(100, 0.01), size=100).astype(float)
    assert "beyond 100 times" in weight_growth(steps.cumsum(axis=1), np.full(100, 20), counts).refusal
    assert "level of rounding" in weight_growth(steps.cumsum(axis=1) * 1e-3, np.full(100, 20), counts).refusal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollout", "mxfp4", "--training", "none", "--temperature", "0"], "greedy responses are no samples"),
        (["--rollout", "mxfp4", "--training", "none", "--prompts", "4"], "at least 16, for intervals"),
        (["--rollout", "mxfp4", "--training", "none", "--prompts", "100000"], "training problems"),
        (["--rollout", "mxpf4", "--training", "none"], "mxfp4"),
        (["--rollout", "none", "--training", "gradients.toml"], "changes gradients alone"),
        (["--rollout", "none", "--training", "none", "--cap", "0"], "--cap must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("gradients.toml").write_text('[precision]\ngradient = "mxfp8_e4m3"\n')
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_a_model_without_a_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is to be asked"):
        run("--rollout", "mxfp4", "--training", "none", model=str(tmp_path))


def test_two_hardwares_are_measured_as_the_phases_of_one():
    noise = {"matmul_noise": {"relative_std": 0.05}}
    rollout, training = Hardware.model_validate(noise), Hardware(precision=Precision(weight="mxfp8_e4m3"))
    rollouts, difference = action._measured(options(prompts=16), rollout, training)
    phases = {**noise, "training": {"matmul_noise": "none", "precision": {"weight": "mxfp8_e4m3"}}}
    model = load_model("tiny").model
    install(model, Hardware.model_validate(phases), seed=0)
    inside, width = rollouts.response_mask, rollouts.response_mask.shape[1]
    batch = rollouts.tokens, rollouts.attention_mask, width
    with torch.no_grad():
        logprobs, _ = token_logprobs(model, *batch, temperature=1.0)
        with hardware_phase(model, "rollout"):
            key = rollouts.noise_key
            sampled, _ = token_logprobs(model, *batch, temperature=1.0, rows=rollouts.rows, key=key)
    torch.testing.assert_close(sampled[inside], rollouts.logprobs[inside], atol=1e-4, rtol=0)
    found = torch.from_numpy(difference.log_ratio + difference.rollout).float()
    torch.testing.assert_close(logprobs[inside], found, atol=1e-4, rtol=0)
