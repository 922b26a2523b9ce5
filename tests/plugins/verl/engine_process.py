"""One process, one rank of verl's FSDP2 engine with the plugin; prints what the tests check as JSON. Run by them."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import verl  # noqa: F401 (activates the plugin)
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry

import roundoff
from roundoff.config import ConfigError
from roundoff.numerics.quantize import quantize
from roundoff.plugins.verl.engine import STEP

TEXTS = ("37-12+5=25>30", "12+30=42", "8+9=17", "40-41=-1")
WEIGHT = "model.layers.0.mlp.up_proj"


def build(**options):
    """The engine that verl builds for an actor, ready to train."""
    model = HFModelConfig(
        path=str(Path(roundoff.__file__).parent / "models" / "tiny"),
        use_remove_padding=options.get("use_remove_padding", False),
        override_config={"attn_implementation": "sdpa"},
    )
    settings = FSDPEngineConfig(
        strategy="fsdp2", use_torch_compile=False, use_dynamic_bsz=False, mixed_precision={"param_dtype": "fp32"}
    )
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=settings,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine, model.tokenizer


def batch(tokenizer, step, micro):
    sequences = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]

    def nested(parts):
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    tensors = {
        "input_ids": nested(sequences),
        "position_ids": nested([torch.arange(len(s)) for s in sequences]),
        "loss_mask": nested([torch.ones(len(s), dtype=torch.long) for s in sequences]),
    }
    others = {
        "temperature": 1.0,
        "use_remove_padding": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": micro,
        "pad_token_id": 0,
    }
    return tu.get_tensordict(tensors, non_tensor_dict=others | ({} if step is None else {STEP: step}))


def logprobs(engine, tokenizer, step, micro=4):
    """Log-probabilities of every token but the last of each sequence, which predicts nothing."""
    with engine.eval_mode():
        output = engine.infer_batch(batch(tokenizer, step, micro))
    return torch.cat([part[:-1] for part in output["model_output"]["log_probs"].unbind()])


def loss(model_output, data, dp_group=None):
    return -model_output["log_probs"].values().mean(), {}


def largest(a, b):
    return float((a - b).abs().max())


def whole(engine):
    """Every parameter as a whole tensor, by name."""
    parts, _ = engine.get_per_tensor_param()
    return {name: tensor.detach().clone() for name, tensor in parts}


def main():
    dist.init_process_group("cpu:gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[1]}")
    if os.environ.get("PACKED"):
        try:
            build(use_remove_padding=True)
        except ConfigError as error:
            print("RESULT", json.dumps(str(error)))
        return
    engine, tokenizer = build()
    first = logprobs(engine, tokenizer, 1)
    result = {
        "report": engine.roundoff_report(),
        "again": largest(first, logprobs(engine, tokenizer, 1)),
        "other micro-batches": largest(first, logprobs(engine, tokenizer, 1, micro=2)),
        "other step": largest(first, logprobs(engine, tokenizer, 2)),
    }
    before = whole(engine)
    seen = []

    def remember(model_output, data, dp_group=None):
        seen.append(model_output["log_probs"].detach())
        return loss(model_output, data)

    with engine.train_mode():
        output = engine.train_batch(batch(tokenizer, 1, 4), remember)
    stored = engine.module.get_submodule(WEIGHT).hardware_state.stored
    forgotten = not stored.is_cached
    new = torch.cat([part[:-1] for part in seen[0].unbind()])
    after = whole(engine)
    logprobs(engine, tokenizer, 2)
    fmt = stored.format
    result |= {
        "gradient norm": output["metrics"]["grad_norm"],
        "old against new": largest(first, new),
        "moved": [name for name in after if not torch.equal(before[name], after[name])],
        "names": list(after),
        "quantized weights are forgotten after the step": forgotten,
        "quantized is fresh": fmt is None or torch.equal(stored._cached, quantize(after[f"{WEIGHT}.weight"], fmt)),
        "quantized is stale": fmt is not None
        and torch.equal(stored._cached, quantize(before[f"{WEIGHT}.weight"], fmt)),
    }
    try:
        logprobs(engine, tokenizer, None)
    except ConfigError as error:
        result["without a step"] = str(error)
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
