"""The variants that a sweep runs, their names, and their baselines."""

import pytest

from roundoff.config import ConfigError
from roundoff.experiments import load_profile, select, variants


def ids(names, *assignments):
    return [(e.id, p.name) for e, p in variants(select(names), load_profile("tiny"), assignments)]


def test_each_value_is_run_beside_the_declared_baseline():
    found = variants(select(["E5b"]), load_profile("tiny"), ["aqn.sigma_start=0.02,0.1"])
    assert [(e.id, e.baseline, e.title) for e, _ in found] == [
        ("E5", "Baseline", "5 % matmul noise"),
        ("E5b+sigma_start=0.02", "E5", "5 % matmul noise, AQN 0.05 to 0.0005 (sigma_start=0.02)"),
        ("E5b+sigma_start=0.1", "E5", "5 % matmul noise, AQN 0.05 to 0.0005 (sigma_start=0.1)"),
    ]
    assert [e.aqn.sigma_start for e, _ in found[1:]] == [0.02, 0.1]


def test_two_settings_are_crossed():
    found = ids(["E5b"], "aqn.sigma_start=0.02,0.1", "aqn.stages=5,20")
    assert len(found) == 1 + 4
    assert ("E5b+sigma_start=0.1,stages=5", "tiny") in found


def test_the_declared_value_is_the_declared_experiment():
    assert ids(["E5b"], "aqn.sigma_start=0.05,0.1") == [
        ("E5", "tiny"),
        ("E5b", "tiny"),
        ("E5b+sigma_start=0.1", "tiny"),
    ]


def test_a_named_baseline_varies_too_and_one_that_is_not_named_stays():
    assert ids(["E5", "E5b"], "epochs=1,3")[1:4] == [
        ("E5+epochs=1", "tiny"),
        ("E5b+epochs=1", "tiny"),
        ("E5+epochs=3", "tiny"),
    ]
    found = variants(select(["E5", "E5b"]), load_profile("tiny"), ["epochs=1,3"])
    assert {e.id: e.baseline for e, _ in found}["E5b+epochs=3"] == "E5+epochs=3"


def test_a_setting_of_the_profile_names_the_profile_and_runs_the_baseline_under_each():
    found = variants(select(["E5b"]), load_profile("tiny"), ["profile.training.learning_rate=1e-5,2e-5"])
    assert [(e.id, p.name, p.training.learning_rate) for e, p in found] == [
        ("E5", "tiny+learning_rate=1e-05", 1e-5),
        ("E5b", "tiny+learning_rate=1e-05", 1e-5),
        ("E5", "tiny+learning_rate=2e-05", 2e-5),
        ("E5b", "tiny+learning_rate=2e-05", 2e-5),
    ]
    assert found[0][0].title == "5 % matmul noise (learning_rate=1e-5)"


def test_titles_name_what_varies_and_not_what_all_have_in_common():
    found = variants(select(["E5b"]), load_profile("tiny"), ["aqn.sigma_start=0.02,0.1", "aqn.stages=5"])
    assert [e.title for e, _ in found] == [
        "5 % matmul noise",
        "5 % matmul noise, AQN 0.05 to 0.0005 (sigma_start=0.02)",
        "5 % matmul noise, AQN 0.05 to 0.0005 (sigma_start=0.1)",
    ]
    assert found[1][0].id == "E5b+sigma_start=0.02,stages=5"


def test_commas_in_brackets_and_quotes_belong_to_a_value():
    found = variants(select(["E3a"]), load_profile("tiny"), ["hardware.precision.keep=[0,1],[2], 'srdd:2'"])
    assert [e.hardware.precision.keep for e, _ in found if e.id.startswith("E3a")] == [(0, 1), (2,), "srdd:2"]


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["aqn.sigma_start=0.1"], "needs a setting with several values"),
        (["aqn.sigma_start=0.1,0.1"], "give each value once"),
        (["aqn.sigma_start=0.1,"], "leave none empty"),
        (["aqn.sigma_start=0.1,5x"], "sigma_start"),
        (["aqn.sigma_stat=0.1,0.2"], "did you mean 'sigma_start'"),
        (["lora.rank=2,4"], "changes nothing"),
    ],
)
def test_impossible_sweeps_are_refused(assignments, expected):
    with pytest.raises(ConfigError, match=expected):
        ids(["E5b"], *assignments)
