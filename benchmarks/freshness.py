"""What the check for writes that torch does not count costs: its time against that of the pass it stands before."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.hardware import DECODED, TRAINED, decoding_step, training_step
from benchmarks.timing import medians, verdict
from roundoff.config import Hardware, Precision
from roundoff.hardware import install
from roundoff.models.load import load_model

W4A16 = Hardware(precision=Precision(weight="mxfp4"))
GOAL = 0.01
LARGER = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def check_alone(model: torch.nn.Module, ids: torch.Tensor) -> dict[int, float]:
    """Milliseconds of one check, by tokens in the pass, on a model whose Q(W) is cached."""
    found = install(model, W4A16, seed=0)
    with torch.no_grad():
        model(ids)
    check = found.runtime.freshness.check_all
    return {tokens: medians({"check": lambda n=tokens: check(n)}, 201)["check"] for tokens in (1, 256, 2048)}


def row(name: str, pass_ms: float, check_ms: float) -> None:
    print(f"{name:52} {pass_ms:9.2f} ms {1e3 * check_ms:9.1f} us  {100 * check_ms / pass_ms:6.2f} %", end="")
    print(verdict(check_ms / pass_ms, GOAL)[6:])


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'W4A16 (mxfp4), one thread':52} {'pass':>12} {'check':>12}   share")
    tiny = load_model("tiny").model
    cost = check_alone(tiny, torch.ones(1, 8, dtype=torch.int64))
    step = medians({"step": decoding_step(W4A16)}, 41)["step"]
    row(f"tiny, decoding step of {DECODED[0]} rollouts", step, cost[256])
    step = medians({"step": training_step(W4A16)}, 21)["step"]
    row(f"tiny, training step of {TRAINED[0]} x {TRAINED[1]} tokens", step, cost[256])
    model = LlamaForCausalLM(LlamaConfig(**LARGER, num_hidden_layers=6, vocab_size=4096)).requires_grad_(False).eval()
    cost = check_alone(model, torch.ones(1, 8, dtype=torch.int64))
    for count, tokens in ((1, 1), (256, 256), (2048, 2048)):
        ids = torch.ones(1 if count == 1 else count // 32, 1 if count == 1 else 32, dtype=torch.int64)
        with torch.no_grad():
            step = medians({"step": lambda ids=ids: model(ids, use_cache=False)}, 9)["step"]
        row(f"6 layers of SmolLM2-135M's shape, pass of {count} tokens", step, cost[tokens])


if __name__ == "__main__":
    main()
