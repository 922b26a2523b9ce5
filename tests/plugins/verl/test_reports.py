"""A run in which one process lacks the hardware must not go on."""

import copy

import pytest

from roundoff.config import ConfigError
from roundoff.plugins.verl.reports import check_reports
from roundoff.plugins.verl.settings import PluginSettings

SETTINGS = PluginSettings(hardware={"matmul_noise": {"relative_std": 0.1}})
MARK = SETTINGS.fingerprint
GOOD = {
    "engines": [[{"role": "actor", "fingerprint": MARK}, {"role": "reference", "fingerprint": MARK}]] * 2,
    "rollouts": [{"fingerprint": MARK}, None],
}


def test_reports_of_the_same_hardware_are_accepted():
    check_reports(GOOD, SETTINGS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("engines", 1), [], "worker 1 has no engine"),
        (("engines", 0, 1, "fingerprint"), "0" * 16, "the reference of worker 0"),
        (("engines", 1, 0), {"role": "actor", "fingerprint": None, "engine": "FSDPEngine"}, "worker 1 .FSDPEngine."),
        (("rollouts", 0, "fingerprint"), "", "rollout server 0"),
        (("rollouts",), [], "no actor or no rollout server"),
        (("engines",), [], "no actor or no rollout server"),
    ],
)
def test_a_process_without_the_hardware_is_named(path, value, message):
    reports = copy.deepcopy(GOOD)
    inner = reports
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        check_reports(reports, SETTINGS)
