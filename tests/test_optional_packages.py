import sys

import pytest

from roundoff.config import ConfigError
from roundoff.optional_packages import require


def test_an_installed_module_is_returned():
    assert require("json", "any") is sys.modules["json"]


def test_a_missing_module_names_the_extra():
    with pytest.raises(ConfigError, match=r"no_such_package is not installed: pip install 'roundoff\[wandb\]'"):
        require("no_such_package", "wandb")


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("half_installed", "any")
