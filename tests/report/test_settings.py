"""The settings that the report prints distinguish an experiment from every other."""

from itertools import combinations

import pytest

from roundoff.config import Experiment, Profile
from roundoff.experiments import families, load_experiment, load_profile, with_overrides
from roundoff.report.settings import settings_in_words

CHANGES = (
    *("epochs=3", "algorithm.ratio=one", "algorithm.group_size=4", "algorithm.clip_low=0.1", "algorithm.clip_high=0.3"),
    *("algorithm.aggregation=dr_grpo", "algorithm.normalize_std=false", "algorithm.kl_coefficient=0.01"),
    *("algorithm.kl_estimator=k1", "algorithm.entropy_coefficient=0.001", "algorithm.dynamic_sampling=true"),
    *("algorithm.overlong_buffer=0.5", "algorithm.temperature=0.7", "algorithm.top_p=0.9", "algorithm.top_k=5"),
    *("algorithm.optimizer_epochs=2", "algorithm.tis_cap=3", "algorithm.max_sampling_batches=2"),
    *("hardware.matmul_noise.attention=false", "hardware.matmul_noise.backward=false"),
    *("hardware.matmul_noise.relative_std=0.05000001", 'hardware.exclude=["lm_head"]'),
    *("hardware.precision.kv_cache=int8", "hardware.precision.attention=int8"),
    *("hardware.precision.weight=int8", "hardware.deadzone={threshold=0.01,layers=[1]}"),
    *(
        'hardware.matmul_noise.scale="operands"',
        "hardware.matmul_noise.gain_std=0.02",
        "hardware.accumulator={bits=13}",
    ),
    *("hardware.matmul_noise.adc_bits=8", "hardware.matmul_noise={relative_std=0.1,adc_bits=8,adc_range=6.0}"),
    *(
        "hardware.accumulator={bits=14}",
        "hardware.accumulator={bits=13,group=64}",
        'hardware.accumulator={bits="bf16"}',
    ),
    *('hardware.accumulator={bits=13,rounding="nearest"}', "hardware.accumulator={bits=13,promote=256}"),
    'hardware.faults=[{kind="gain",layer=0,amount=0.1}]',
    'hardware.faults=[{kind="gain",layer=0,amount=0.2}]',
    'hardware.faults=[{kind="gain",layer=0,amount=0.1,module="mlp.up_proj"}]',
    'hardware.faults=[{kind="gain",layer=0,amount=0.1,share=0.5}]',
    'hardware.faults=[{kind="bitflip",layer=0,amount=0.1,bit=3}]',
    *("aqn.sigma_start=0.2", "aqn.sigma_end=0.00010000001", "aqn.schedule=linear", "aqn.stages=5", "aqn.target=linear"),
    *("aqn.noise=relative", "aqn.layers=inverse", "srdd.metric=sqnr", "srdd.direction=robust", "srdd.tokens=64"),
    *("srdd.format=nvfp4", "lora.rank=8", "lora.alpha=4", "lora.dropout=0.1", 'lora.targets=["q_proj"]'),
)


def described(experiment: Experiment, profile: Profile | None = None) -> str:
    return settings_in_words(experiment, profile).line


@pytest.mark.parametrize("family", families())
def test_no_two_experiments_of_a_family_look_alike(family: str) -> None:
    for a, b in combinations(map(load_experiment, families()[family]), 2):
        assert described(a) != described(b), (a.id, b.id)
        assert a.title != b.title, (a.id, b.id)


def test_every_changed_setting_shows() -> None:
    noisy = load_experiment("E9b")
    adapted = load_experiment("E12")
    shown: dict[str, str] = {}
    for change in CHANGES:
        (experiment,), _ = with_overrides(
            [adapted if change.startswith("lora") else noisy], load_profile("tiny"), [change]
        )
        text = described(experiment)
        assert text not in (described(noisy), described(adapted)), change
        assert text not in shown.values(), change
        shown[change] = text


def test_one_kept_layer_is_singular() -> None:
    for keep, words in (("[3]", "high precision: layer 3 "), ("[0,3]", "high precision: layers 0, 3 ")):
        change = [f"hardware.precision.keep={keep}"]
        (kept,), _ = with_overrides([load_experiment("quickstart-mxfp4")], load_profile("tiny"), change)
        assert words in described(kept)


def test_defaults_are_not_named() -> None:
    plain = Experiment.model_validate({"id": "a", "algorithm": {"name": "GRPO"}})
    assert described(plain) == "GRPO · 1 epoch · ratio replayed"
    own = Experiment.model_validate({"id": "a", "algorithm": {"name": "mine", "group_size": 4}})
    assert described(own) == "mine · 1 epoch · ratio replayed · algorithm.group_size 4"


def test_of_a_correction_only_what_is_set_is_named() -> None:
    words = settings_in_words(load_experiment("mismatch-fp8-icepop"), None).other
    assert words.endswith("algorithm.correction.rollout_is token, algorithm.correction.rollout_is_threshold [0.5, 5]")
    assert "bypass" not in words
