"""How a token is chosen from probabilities, on numbers worked out by hand."""

import pytest
import torch

from roundoff.sampling.choice import SamplingSettings, choose


def chosen(probabilities, uniforms, **changes):
    settings = SamplingSettings(
        **{"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | changes, end_tokens=(), pad_token=0
    )
    logits = torch.tensor(probabilities).log().expand(len(uniforms), -1)
    tokens, logprobs = choose(logits, torch.tensor(uniforms), settings)
    return tokens.tolist(), logprobs.exp()


def test_a_token_is_drawn_by_inverse_transform():
    # Cumulative 0.2, 0.2, 0.7, 1.0; a token of probability 0 is never chosen, not even at u = 0.2 or the largest u.
    uniforms = [0.0, 0.19, 0.2001, 0.69, 0.71, 1 - 2**-24]
    tokens, probabilities = chosen([0.2, 0.0, 0.5, 0.3], uniforms)
    assert tokens == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(probabilities, torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]))
    assert chosen([0.5, 0.5, 0.0], [1 - 2**-24])[0] == [1]


def test_top_k_and_top_p_cut_before_the_draw_but_not_the_log_probability():
    p = [0.1, 0.4, 0.2, 0.3]
    # Top 2: tokens 1 and 3, of 4/7 and 3/7 of what is left: the boundary is at 0.571.
    assert chosen(p, [0.0, 0.57, 0.58, 0.99], top_k=2)[0] == [1, 1, 3, 3]
    # Top-p 0.5: token 1 holds 0.4, so token 3 is needed: the same set. Top-p 0.39: token 1 alone.
    assert chosen(p, [0.0, 0.57, 0.58, 0.99], top_p=0.5)[0] == [1, 1, 3, 3]
    assert chosen(p, [0.0, 0.99], top_p=0.39)[0] == [1, 1]
    # Top-k first, then top-p of what is left: of 4/9, 3/9, 2/9 the first two hold 7/9 >= 0.7.
    assert chosen(p, [0.0, 0.571, 0.572, 0.99], top_k=3, top_p=0.7)[0] == [1, 1, 3, 3]
    assert chosen(p, [0.99], top_k=1)[1].item() == pytest.approx(0.4)
