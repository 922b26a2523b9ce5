"""SmolLM2-135M-Instruct, a real model: what random weights cannot show. `make real` leaves it in build/real/model."""

from pathlib import Path

import pytest
import torch

from roundoff.config import Hardware, LoRA, Precision
from roundoff.hardware import install
from roundoff.models.gradient_checkpointing import checkpointed
from roundoff.models.load import load_model
from roundoff.models.logprobs import token_logprobs
from roundoff.models.lora import attach
from roundoff.models.prompts import encode, text
from roundoff.numerics.rng import Key
from roundoff.sampling.sampler import sample
from roundoff.tasks import Message, Problem

DIRECTORY = Path(__file__).parents[2] / "build" / "real" / "model"
CAPITAL = Problem("a", "The capital of France is", "Paris", (Message("user", "What is the capital of France?"),))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DIRECTORY.is_dir(), reason="`make real` fetches the model that this test needs"),
]


@pytest.fixture
def loaded():
    return load_model(str(DIRECTORY))


def test_a_chat_model_is_asked_by_its_template_and_ends_its_turn(loaded):
    asked = text(loaded.tokenizer, CAPITAL)
    assert asked.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert encode(loaded.tokenizer, [CAPITAL])[0].count(loaded.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    rollouts = sample(
        loaded.model, loaded.tokenizer, [CAPITAL], group_size=1, max_new_tokens=24, temperature=0, key=Key.from_seed(0)
    )
    assert "Paris" in rollouts.texts[0]
    assert not rollouts.truncated[0]  # <|im_end|> ended it
    assert "<|im_end|>" not in rollouts.texts[0]


def test_mxfp4_weights_change_little_and_checkpointing_nothing(loaded):
    """The weights come from a 4-bit file; MXFP4 puts them on another grid."""
    model = loaded.model
    tokens = torch.tensor(encode(loaded.tokenizer, [CAPITAL]))
    mask = torch.ones_like(tokens)
    clean = token_logprobs(model, tokens, mask, 8, temperature=1.0)[0].detach()
    install(model, Hardware(precision=Precision(weight="mxfp4")), seed=0)
    attach(model, LoRA(rank=4), Key.from_seed(0))
    found = []
    for enabled in (False, True):
        model.zero_grad(set_to_none=True)
        with checkpointed(model, enabled):
            logprobs = token_logprobs(model, tokens, mask, 8, temperature=1.0)[0]
        logprobs.sum().backward()
        found.append((logprobs.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
    assert 0 < float((found[0][0] - clean).abs().mean()) < 1.0  # nats; the text is the template's own, almost certain
