"""Imports go downwards only (design, section 2), and what must start fast does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "roundoff"
LEVELS = {
    **dict.fromkeys(("config", "errors", "extras", "stats"), 0),
    **dict.fromkeys(
        ("numerics", "algorithms", "tasks", "experiments", "run_dir", "run_record", "checkpoint", "trackers"), 1
    ),
    **dict.fromkeys(("clock", "health", "messages", "outcomes", "parallel", "provenance", "strict_json"), 1),
    **dict.fromkeys(("models", "hardware", "aqn", "srdd", "prompts", "sampler", "rollouts", "logprobs"), 2),
    **dict.fromkeys(("diagnosis", "masks", "kv_cache", "optimizer", "preflight", "rope"), 2),
    **dict.fromkeys(("packing", "fused_decoder", "decoding"), 2),
    **dict.fromkeys(("evaluate", "batch", "policy", "prerequisites", "session", "remedies", "run_log"), 3),
    **dict.fromkeys(("update", "train", "report"), 3),
    **dict.fromkeys(("scale", "show", "evaluation_command", "evaluation_subject", "export", "extension"), 4),
    **dict.fromkeys(("commands", "cli", "__main__"), 5),
}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "roundoff":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("roundoff.")}
    return names - {"__version__"}


def violations(files: dict[Path, str]) -> list[str]:
    found = []
    for path, text in files.items():
        here = part_of(path)
        for part in imported_parts(ast.parse(text)):
            if LEVELS[part] > LEVELS[here]:
                found.append(f"{here} (level {LEVELS[here]}) imports {part} (level {LEVELS[part]})")
    return found


def test_every_module_has_a_level_and_none_imports_upwards():
    files = {p: p.read_text("utf-8") for p in SOURCE.rglob("*.py") if part_of(p) != "__init__"}
    assert {part_of(p) for p in files} <= set(LEVELS)
    assert violations(files) == []


def test_an_upward_import_is_found():
    assert violations({SOURCE / "config.py": "from roundoff.train import train"}) == [
        "config (level 0) imports train (level 3)"
    ]


def test_no_file_is_over_350_lines():
    long = {
        str(p): n
        for p in SOURCE.rglob("*")
        if p.suffix in (".py", ".cpp", ".h") and (n := len(p.open().readlines())) > 350
    }
    assert long == {}


@pytest.mark.parametrize(
    "module", ["roundoff.cli", "roundoff.experiments", "roundoff.run_dir", "roundoff.report.render", "roundoff.stats"]
)
def test_starts_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_functions_even_after_their_module_was_imported():
    code = (
        "import roundoff.train, roundoff, types; from roundoff import evaluate, train;"
        "assert callable(train) and callable(evaluate), (train, evaluate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_imported():
    import roundoff

    for name in roundoff.__all__:
        assert getattr(roundoff, name) is not None
