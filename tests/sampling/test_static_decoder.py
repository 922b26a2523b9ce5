"""Decoding in static buffers with captured steps, for which a recorder stands in: rollouts, captures, refusals."""

import copy
import logging
import pickle

import pytest
import torch

from roundoff.aqn.noise import aqn_noise
from roundoff.config import AQN, Fault, Hardware, LoRA, MatmulNoise, Precision
from roundoff.hardware import hardware_off, hardware_phase, install
from roundoff.models.logprobs import token_logprobs
from roundoff.models.lora import attach
from roundoff.numerics.backend import use_backend
from roundoff.numerics.rng import Key
from roundoff.sampling import static_decoder
from roundoff.sampling.static_buffers import Buffers, bucket, rounded_columns, vacancies
from tests.families import build
from tests.pretend_device import pretended, waits
from tests.pretend_graphs import RecordedGraphs
from tests.small_models import KEY, PROMPTS, ROUNDING, draw, make, same

W4A16 = Hardware(precision=Precision(weight="mxfp4"))
TOKENS = 36


@pytest.fixture(autouse=True)
def _in_torch():
    with use_backend("torch"):  # the recorder sees torch's operations, not the kernels'; nor is there a fused pass
        yield


@pytest.fixture
def graphs(monkeypatch):
    """Makes models decode in static buffers, and records their steps."""
    found = RecordedGraphs()
    monkeypatch.setattr(static_decoder, "graphs_for", lambda device: found)
    return found


def both(monkeypatch, model, tokenizer, **changes):
    """Rollouts in static buffers, and by the path that every device can take."""
    settings = {"max_new_tokens": TOKENS} | changes
    static = draw(model, tokenizer, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(static_decoder.StaticDecoder, "of", lambda model: None)
        return static, draw(model, tokenizer, **settings)


def decoder_of(model):
    return model.__dict__[static_decoder.MARK]


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({}, {"group_size": 1, "temperature": 0.0}),
        ({}, {"top_p": 0.8, "top_k": 5, "max_rows": 7, "temperature": 0.9}),
        ({"kind": "llama"}, {"prompts": PROMPTS[:1], "group_size": 1}),
        (WINDOW, {"prompts": PROMPTS[:2]}),
        ({}, {"max_new_tokens": 1}),
    ],
)
def test_rollouts_are_those_of_the_eager_path(monkeypatch, tokenizer, graphs, changes, settings):
    static, eager = both(monkeypatch, make(**changes), tokenizer, **settings)
    same(static, eager)
    assert torch.equal(static.truncated, eager.truncated)
    assert torch.equal(static.rows, eager.rows)
    assert bool(graphs.replays) == (settings.get("max_new_tokens") != 1)


def test_each_size_is_captured_once_and_replayed_from_then_on(tokenizer, graphs):
    model = make()
    rollouts = draw(model, tokenizer, max_new_tokens=TOKENS)
    left = int((rollouts.lengths > 32).sum())  # of 20: 32 rows at first, fewer after 16 and 32 tokens
    sizes = {(bucket(int((rollouts.lengths > t).sum())), rounded_columns(6 + t)) for t in (0, 16, 32)}
    assert left
    (captured,) = decoder_of(model).captured.values()
    assert set(captured) == sizes
    assert len(graphs.captures) == len(decoder_of(model).verified) == sum(c is not None for c in captured.values())
    count, replays = len(graphs.captures), len(graphs.replays)
    again = draw(model, tokenizer, max_new_tokens=TOKENS)
    same(again, rollouts)
    draw(model, tokenizer, max_new_tokens=TOKENS - 1)
    assert len(decoder_of(model).captured) == 1  # a shorter limit needs no other graphs
    assert len(graphs.captures) - count <= 1  # a size with too few tokens for a capture in the first call
    assert len(graphs.replays) - replays >= TOKENS - 4


def test_columns_beyond_the_first_graph_go_on_in_a_longer_one(monkeypatch, tokenizer, graphs):
    monkeypatch.setattr(static_decoder, "rounded_columns", lambda count: -(-count // 8) * 8)
    model = make()
    static, eager = both(monkeypatch, model, tokenizer)
    same(static, eager)
    (captured,) = decoder_of(model).captured.values()
    # A prompt of 8 columns, and up to 35 fed tokens behind it
    assert sorted({columns for _, columns in captured}) == [16, 24, 32, 40, 48]


def test_phases_have_graphs_of_their_own(monkeypatch, tokenizer, graphs):
    model = make()
    phases = {"rollout": {"precision": {"activation": "int4"}}, "evaluation": {"precision": {"activation": "int8"}}}
    install(model, Hardware.model_validate({"precision": {"weight": "mxfp4"}, **phases}), seed=0)
    for _ in range(2):
        rollouts, eager = both(monkeypatch, model, tokenizer)
        same(rollouts, eager)
        with hardware_phase(model, "evaluation"):
            scored, eager = both(monkeypatch, model, tokenizer)
        same(scored, eager)
        assert scored.texts != rollouts.texts
    assert len(decoder_of(model).captured) == 2


def test_weights_that_change_in_place_need_no_new_graph(monkeypatch, tokenizer, graphs):
    model = make()
    install(model, W4A16, seed=0)
    adapters = attach(model, LoRA(rank=2), Key.from_seed(0))
    first, _ = both(monkeypatch, model, tokenizer)
    both(monkeypatch, model, tokenizer)  # captures what the first call had too few tokens for
    count = len(graphs.captures)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
        for parameter in model.parameters():  # the base, too: Q(W) is computed again where it is
            parameter.mul_(1.25)
    changed, eager = both(monkeypatch, model, tokenizer)
    same(changed, eager)
    assert changed.texts != first.texts
    with aqn_noise(model, 0.3, None, Key.from_seed(1), AQN(sigma_start=0.3, sigma_end=0.1)):
        noisy, eager = both(monkeypatch, model, tokenizer)
    same(noisy, eager)
    assert noisy.texts != changed.texts
    quiet, _ = both(monkeypatch, model, tokenizer)
    same(quiet, changed)
    assert len(graphs.captures) - count <= 2  # for sizes that rollouts of other lengths reach
    assert len(decoder_of(model).captured) == 1
    assert adapters.modules


def test_what_does_not_change_in_place_is_captured_anew(monkeypatch, tokenizer, graphs):
    model = make()
    install(model, W4A16, seed=0)
    deployed, eager = both(monkeypatch, model, tokenizer)
    same(deployed, eager)
    with hardware_off(model):
        clean, eager = both(monkeypatch, model, tokenizer)
    same(clean, eager)
    assert clean.texts != deployed.texts
    assert len(decoder_of(model).captured) == 2
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)  # in another place
    moved, eager = both(monkeypatch, model, tokenizer)
    same(moved, eager)
    assert moved.texts != deployed.texts
    greedy, eager = both(monkeypatch, model, tokenizer, temperature=0.0)
    same(greedy, eager)
    assert len(decoder_of(model).captured) == static_decoder.KEPT_STAMPS


@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(matmul_noise=MatmulNoise(relative_std=0.05)),
        Hardware(faults=(Fault(kind="noise", layer=0, amount=0.1, share=0.5),)),
    ],
)
def test_noise_is_captured_under_the_keys_of_each_rollout(monkeypatch, tokenizer, graphs, hardware):
    model = make(num_hidden_layers=1, intermediate_size=32)
    install(model, hardware, seed=0)
    settings = {"prompts": ["12+7=", "9="], "group_size": 2, "max_new_tokens": 6}
    with pretended() as device:  # on a CPU the noise looks at its arguments
        model.to(device)
        static, eager = both(monkeypatch, model, tokenizer, **settings)
        same(static, eager)
        count = len(graphs.captures)
        assert count
        other, _ = both(monkeypatch, model, tokenizer, key=KEY.fold("other"), **settings)
        assert len(graphs.captures) > count
        assert len(decoder_of(model).captured) == 2
        with torch.no_grad():
            replayed, _ = token_logprobs(
                model, other.tokens, other.attention_mask, other.response_mask.shape[1],
                temperature=1.0, rows=other.rows, key=other.noise_key,
            )  # fmt: skip
    torch.testing.assert_close(replayed, other.logprobs, **ROUNDING)


def test_replays_wait_as_often_as_the_eager_path(tokenizer, graphs):
    with pretended() as device:
        model = make().to(device)
        draw(model, tokenizer, max_new_tokens=TOKENS)
        draw(model, tokenizer, max_new_tokens=TOKENS)
        with waits() as waited:
            draw(model, tokenizer, max_new_tokens=TOKENS)
    assert len(waited) <= 3, waited  # after 16 and 32 tokens, and at the end


def test_a_rollout_that_is_not_finite_does_not_reach_others(monkeypatch, tokenizer, graphs):
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    static, eager = both(monkeypatch, model, tokenizer, prompts=["5=", "9=", "40-3-2=", "1+1="])
    assert 0 < int(static.nonfinite.sum()) < len(static)
    same(static, eager)
    assert torch.equal(static.nonfinite, eager.nonfinite)
    good, _ = both(monkeypatch, model, tokenizer, prompts=["1=", "2="], temperature=0.0, max_new_tokens=3)
    assert not good.nonfinite.any()  # although the buffers held NaN


def reason(caplog):
    (message,) = [record.getMessage() for record in caplog.records if "eagerly" in record.getMessage()]
    return message


def test_a_step_that_reads_a_value_is_decoded_eagerly_with_one_line(monkeypatch, tokenizer, graphs, caplog):
    model = make()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) * float(x.numel() > 0 and x.isfinite().all())
    with caplog.at_level(logging.WARNING, "roundoff"):
        for _ in range(2):
            static, eager = both(monkeypatch, model, tokenizer)
            same(static, eager)
    assert "when stream is capturing" in reason(caplog)
    assert not graphs.replays


def test_forward_hooks_are_called_for_every_token(monkeypatch, tokenizer, graphs, caplog):
    model, calls = make(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING, "roundoff"):
        rollouts = draw(model, tokenizer, max_new_tokens=TOKENS)
    assert len(calls) >= rollouts.response_mask.shape[1]
    assert "forward hooks" in reason(caplog)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: build("qwen3_moe"), "how many tokens each expert has"),
        (lambda: make(rope_parameters=DYNAMIC), "depends on the longest sequence"),
        (lambda: make(lm_head="elsewhere"), "spread over several devices"),
    ],
)
def test_models_whose_steps_cannot_be_captured_are_known_beforehand(graphs, caplog, model, why):
    made = model()
    if getattr(made.config, "lm_head", None):
        made.lm_head.to("meta")
    with caplog.at_level(logging.WARNING, "roundoff"):
        for _ in range(2):
            assert static_decoder.StaticDecoder.of(made) is None
    assert why in reason(caplog)


def test_a_number_that_a_graph_froze_is_noticed(monkeypatch, tokenizer, graphs, caplog):
    model, calls = make(), []
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x) * (calls.append(1) or len(calls))
    with caplog.at_level(logging.WARNING, "roundoff"):
        draw(model, tokenizer, max_new_tokens=TOKENS)
    assert "differs from an eager one" in reason(caplog)
    assert len(graphs.captures) == len(graphs.replays) == 1


def test_without_memory_for_the_buffers_rollouts_are_the_same(monkeypatch, tokenizer, graphs, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Buffers, "allocate", full)
    with caplog.at_level(logging.WARNING, "roundoff"):
        static, eager = both(monkeypatch, make(), tokenizer)
    same(static, eager)
    assert "out of memory" in reason(caplog)


def test_copies_of_a_model_have_no_graphs_and_release_frees_them(tokenizer, graphs):
    model = make()
    first = draw(model, tokenizer, max_new_tokens=TOKENS)
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301 (made on the line itself)
    for other in (copy.deepcopy(model), pickled):
        assert other.__dict__.get(static_decoder.MARK) is None
        same(draw(other, tokenizer, max_new_tokens=TOKENS), first)
    decoder_of(model).release()
    assert decoder_of(model).buffers is None
    same(draw(model, tokenizer, max_new_tokens=TOKENS), first)


def test_rows_that_run_move_into_the_places_of_those_that_ended():
    running = [True, False, False, True, True, False, True, False]
    assert vacancies(running, 4) == ([0, 4, 6, 3], [1, 2], [4, 6])
    assert [bucket(n) for n in (1, 2, 3, 8, 9, 512)] == [1, 2, 4, 8, 16, 512]
    assert [rounded_columns(n) for n in (1, 256, 257)] == [256, 256, 512]


def test_a_processor_without_graphs_decodes_as_before():
    assert static_decoder.graphs_for(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert static_decoder.graphs_for(torch.device("cuda")) is None
