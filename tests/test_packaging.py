"""A wheel holds every data file of the package, not only its modules."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "roundoff"
BUILT = {".py", ".pyc", ".so"}


def test_package_data_names_every_data_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["roundoff"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in BUILT}
    assert len(files) > 100
    assert sorted(str(path.relative_to(PACKAGE)) for path in files - packed) == []
