"""Finding, extending and overriding experiments."""

import pytest

from roundoff.config import ConfigError
from roundoff.experiments import (
    experiment_ids,
    families,
    families_named,
    load_experiment,
    load_profile,
    profile_names,
    select,
    with_overrides,
)


def test_every_packaged_file_is_valid_and_every_baseline_exists():
    for name in experiment_ids():
        experiment = load_experiment(name)
        assert experiment.id == name
        assert experiment.title
        assert experiment.baseline is None or experiment.baseline in experiment_ids()
    for name in profile_names():
        assert load_profile(name).name == name


def test_quickstart_compares_remedy_and_damage():
    assert set(families()["quickstart"]) >= {
        "quickstart-clean",
        "quickstart-noise",
        "quickstart-noise-aqn",
        "quickstart-mxfp4",
    }
    aqn = load_experiment("quickstart-noise-aqn")
    assert aqn.hardware == load_experiment("quickstart-noise").hardware
    assert aqn.baseline == "quickstart-noise"


def test_a_family_and_one_of_its_members_are_run_once():
    names = [e.id for e in select(["quickstart", "quickstart-clean"])]
    assert len(names) == len(set(names))


def test_everything_and_families_can_be_selected():
    assert [e.id for e in select([], everything=True)] == list(experiment_ids())
    assert [e.id for e in select(["E9b"], everything=True)][:2] == ["E9b", experiment_ids()[0]]
    assert families_named(["lora"]) == ["lora"]
    with pytest.raises(ConfigError, match="there is no family 'lorra'; did you mean 'lora'"):
        families_named(["lorra"])
    with pytest.raises(ConfigError, match="name an experiment, a family"):
        select([])


def test_own_file_extends_a_packaged_experiment(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "quickstart-noise"\n[hardware.matmul_noise]\nrelative_std = 0.2\n')
    mine, noise = load_experiment(str(path)), load_experiment("quickstart-noise")
    assert mine.id == "mine"
    assert mine.baseline == noise.baseline
    assert mine.hardware.matmul_noise.relative_std == 0.2
    assert mine.algorithm == noise.algorithm


def test_own_file_extends_another_file_beside_it(tmp_path):
    (tmp_path / "base.toml").write_text('epochs = 3\n[algorithm]\nname = "DAPO"\n')
    (tmp_path / "top.toml").write_text('extends = "base"\n[algorithm]\ngroup_size = 4\n')
    top = load_experiment(str(tmp_path / "top.toml"))
    assert (top.epochs, top.algorithm.name, top.algorithm.group_size, top.algorithm.clip_high) == (3, "DAPO", 4, 0.28)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("epochs = ", "is not TOML"),
        ('extends = "nowhere"', "extends 'nowhere', which does not exist"),
        ("extends = 3", "extends must be the name"),
        ('extends = "loop"', "extends itself"),
        ('epochs = 2\n[algorithm]\nname="GRPO"\nclip = 1\n', "algorithm.clip is not a setting"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, expected):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    (tmp_path / "loop.toml").write_text('extends = "bad"')
    with pytest.raises(ConfigError, match=expected):
        load_experiment(str(path))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ConfigError, match="there is no experiment 'quickstart-nois'; did you mean 'quickstart-noise'"):
        select(["quickstart-nois"])
    with pytest.raises(ConfigError, match="there is no profile 'tinny'; did you mean 'tiny'"):
        load_profile("tinny")
    with pytest.raises(ConfigError, match=r"there is no file none\.toml"):
        select(["none.toml"])


def test_a_profile_for_an_experiment_and_the_reverse_are_said_to_be_that_in_one_line(tmp_path):
    experiment, profile = tmp_path / "experiment.toml", tmp_path / "profile.toml"
    experiment.write_text('extends = "quickstart-clean"')
    profile.write_text('extends = "profiles/tiny"')
    for name in ("tiny", str(profile)):
        with pytest.raises(ConfigError) as refused:
            load_experiment(name)
        assert str(refused.value) == f"{name} is a profile, not an experiment: give it as --profile {name}"
    for name in ("quickstart-clean", str(experiment)):
        with pytest.raises(ConfigError) as refused:
            load_profile(name)
        assert str(refused.value).startswith(f"{name} is an experiment, not a profile: ")
        assert "\n" not in str(refused.value)


def test_override_renames_what_it_changes_and_leaves_the_rest():
    experiments = select(["quickstart"])
    changed, profile = with_overrides(experiments, load_profile("tiny"), ["aqn.sigma_start=0.02"])
    ids = {e.id for e in changed}
    assert "quickstart-noise-aqn+sigma_start=0.02" in ids
    assert {"quickstart-clean", "quickstart-noise"} <= ids  # no [aqn]: same runs as before
    assert profile == load_profile("tiny")


def test_override_renames_the_baseline_with_it():
    experiments = select(["quickstart-clean", "quickstart-noise"])
    changed, _ = with_overrides(experiments, load_profile("tiny"), ["epochs=2"])
    assert [(e.id, e.baseline) for e in changed] == [
        ("quickstart-clean+epochs=2", None),
        ("quickstart-noise+epochs=2", "quickstart-clean+epochs=2"),
    ]


def test_override_of_the_profile():
    experiments, profile = with_overrides(
        select(["quickstart-clean"]), load_profile("tiny"), ["profile.training.evaluate_every=3"]
    )
    assert profile.training.evaluate_every == 3
    assert experiments == select(["quickstart-clean"])


def overridden(name, *assignments):
    (changed,), _ = with_overrides(select([name]), load_profile("tiny"), assignments)
    return changed


def test_long_values_are_cut_in_names_and_stay_distinct():
    experiment, profile = load_experiment("quickstart-clean"), load_profile("tiny")
    name = {}
    for last in "ab":
        text = f"profile.task.settings.train=/data/{'very-long-directory/' * 12}{last}.jsonl"
        task = "profile.task.name=gsm8k"
        (_,), scale = with_overrides([experiment], profile, [task, text])
        name[last] = scale.name
        assert len(scale.name.encode()) < 200
        assert scale.name.startswith("tiny+name=gsm8k,train=_data_very-long-directory_")
    assert name["a"] != name["b"]


def test_values_that_fit_together_are_checked_together():
    aqn = overridden("quickstart-noise-aqn", "aqn.sigma_end=0.2", "aqn.sigma_start=0.3").aqn  # 0.05 at first
    assert (aqn.sigma_start, aqn.sigma_end) == (0.3, 0.2)


def test_the_table_of_the_scan_comes_and_goes_with_what_needs_it():
    assert overridden("E9b", "aqn.layers=all").srdd is None
    assert overridden("E9b", "srdd.metric=gradient").srdd.metric == "gradient"
    aimed = overridden("E5b", "srdd.metric=shadow", "aqn.layers=targeted")
    assert (aimed.srdd.metric, aimed.aqn.layers) == ("shadow", "targeted")
    assert aimed.id == "E5b+layers=targeted,metric=shadow"
    assert overridden("E5b", "aqn.layers=targeted").srdd is None  # its defaults
    with pytest.raises(ConfigError, match="changes nothing"):
        overridden("E5b", "srdd.metric=shadow")


def test_another_algorithm_brings_its_defaults_under_what_the_experiment_sets():
    algorithm = overridden("quickstart-noise", "algorithm.name=DAPO").algorithm  # sets group_size = 8 itself
    assert (algorithm.dynamic_sampling, algorithm.clip_high, algorithm.kl_coefficient) == (True, 0.28, 0.0)
    assert algorithm.group_size == 8
    grpo = overridden("ratio-noise-one", "algorithm.name=DAPO", "algorithm.clip_high=0.4").algorithm
    assert (grpo.ratio, grpo.clip_high, grpo.dynamic_sampling) == ("one", 0.4, True)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("id=mine", "--set id: a changed experiment gets an id that names its changes"),
        ("aqn.sigma_stat=1", "aqn.sigma_stat is not a setting; did you mean 'sigma_start'"),
        ("lora.rank=3", "changes nothing"),
        ("epochs", "must read path.to.setting=value"),
        ("profile.trainin.x=1", "trainin is not a setting; did you mean 'training'"),
        ("hardware.matmul_noise.relative_std=5", "must be in"),
    ],
)
def test_wrong_overrides_are_refused(assignment, expected):
    with pytest.raises(ConfigError, match=expected):
        with_overrides(select(["quickstart"]), load_profile("tiny"), [assignment])


def test_a_file_belongs_to_the_family_of_what_it_extends(tmp_path):
    """Otherwise the report would separate it from its baseline, without a heading and outside the family's charts."""
    (tmp_path / "one.toml").write_text('extends = "quickstart-noise"\nepochs = 2\n')
    (tmp_path / "two.toml").write_text('extends = "one"\n[hardware.matmul_noise]\nrelative_std = 0.2\n')
    (tmp_path / "own.toml").write_text('extends = "one"\nfamily = "mine"\n')
    one, two, own = (load_experiment(str(tmp_path / f"{name}.toml")) for name in ("one", "two", "own"))
    assert (one.family, two.family, own.family) == ("quickstart", "quickstart", "mine")
    for experiment in (one, two, own):
        assert (experiment.baseline, experiment.epochs, experiment.title) == ("quickstart-clean", 2, "")
    (tmp_path / "alone.toml").write_text('[algorithm]\nname = "GRPO"\n')
    assert load_experiment(str(tmp_path / "alone.toml")).family == ""
