"""How often sampling waits for its device, and that asking less often changes no rollout."""

import math

import pytest
import torch

from roundoff.config import Hardware, MatmulNoise, Precision
from roundoff.hardware import install
from roundoff.models.logprobs import token_logprobs
from roundoff.numerics.backend import use_backend
from roundoff.sampling.sampler import ASK_EVERY
from tests.pretend_device import pretended, side, waits
from tests.small_models import PROMPTS, draw, make, same


@pytest.mark.parametrize(
    "hardware",
    [
        None,
        Hardware(precision=Precision(weight="mxfp4", activation="mxfp8_e4m3")),
        Hardware(matmul_noise=MatmulNoise(relative_std=0.05)),
    ],
)
def test_forty_tokens_wait_four_times(tokenizer, hardware):
    with pretended() as device:
        model = make(num_hidden_layers=1, intermediate_size=32)
        weight = model.lm_head.weight
        model.lm_head = torch.nn.Linear(*weight.T.shape, bias=True)
        model.lm_head.load_state_dict({"weight": weight, "bias": torch.tensor([-1e4, -1e4, *[0.0] * 14])})  # no end
        model.to(device)
        if hardware is not None:
            install(model, hardware, seed=0)
        with waits() as waited:
            rollouts = draw(model, tokenizer, ["1=", "9="], group_size=1, max_new_tokens=40)
    assert rollouts.response_mask.shape[1] == 40
    assert len(waited) <= math.ceil(40 / ASK_EVERY) + 1, waited
    assert all(side(tensor) in ("cpu", None) for tensor in (rollouts.tokens, rollouts.logprobs, rollouts.rows))


@pytest.mark.parametrize("hardware", [None, Hardware(matmul_noise=MatmulNoise(relative_std=0.05))])
@pytest.mark.parametrize("changes", [{"max_rows": 4}, {"group_size": 1, "temperature": 0}])
def test_rollouts_are_those_of_a_cpu_that_is_asked_after_every_token(tokenizer, hardware, changes):
    changes = {"max_new_tokens": 20, "prompts": PROMPTS[:3], "group_size": 2} | changes
    models = make(num_hidden_layers=1), make(num_hidden_layers=1)
    for model in models if hardware is not None else ():
        install(model, hardware, seed=0)
    with use_backend("torch"):
        expected = draw(models[0], tokenizer, **changes)
    assert len(set(expected.lengths.tolist())) > 1  # rollouts end at different times
    with pretended() as device:
        found = draw(models[1].to(device), tokenizer, **changes)
    same(found, expected)
    assert torch.equal(found.truncated, expected.truncated)
    assert torch.equal(found.nonfinite, expected.nonfinite)
    assert torch.equal(found.rows, expected.rows)


@pytest.mark.parametrize("chunk", [None, 3])  # in chunks, torch computes them again in a part that is not watched
def test_log_probabilities_of_tokens_in_host_memory_do_not_wait(tokenizer, chunk):
    with pretended() as device:
        model = make().to(device)
        rollouts = draw(model, tokenizer)
        arguments = rollouts.attention_mask, rollouts.response_mask.shape[1]
        token_logprobs(model, rollouts.tokens, *arguments, temperature=1.0, chunk=chunk)  # looks at the output layer
        with waits(refused=True), torch.set_grad_enabled(chunk is None):
            logprobs, entropy = token_logprobs(model, rollouts.tokens, *arguments, temperature=1.0, chunk=chunk)
            if chunk is None:
                (logprobs.sum() + entropy.sum()).backward()
        there = rollouts.tokens.to(device)
        with waits() as waited:
            again, _ = token_logprobs(model, there, *arguments, temperature=1.0, chunk=chunk)
        assert [line.split()[0] for line in waited] == ["cpu"]
        assert side(logprobs) == side(again) == "cuda"
        assert torch.equal(logprobs.detach().cpu(), again.detach().cpu())
