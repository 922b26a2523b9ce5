"""The gradient score: the loss of labels that the model itself draws, differentiated at every layer's output.

Let e_t be the error that the hardware adds to a layer's output at token t and g_t the gradient of the summed loss
there.
With labels drawn from the model's own distribution, the expectation of (sum_t g_t . e_t)^2 is e^T F e with F Fisher's
information, and KL(clean || perturbed) = e^T F e / 2 up to third order in e. If the errors of different tokens are
independent, this is half of sum_t (g_t . e_t)^2: a forecast of the exact KL from one backward pass for all layers at
once, instead of one forward pass for each. Labels of the calibration text itself (`labels = "text"`) need no draw, but
say how surprising the text is as much as how sensitive the model is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from roundoff.models.calibration import Calibration
from roundoff.numerics.rng import Key, uniform

CHUNK_TOKENS = 256
"""Tokens whose softmax is held at once."""


def drawn_labels(logits: Tensor, key: Key, rows: Tensor) -> Tensor:
    """Labels [T] drawn from softmax(logits) for logits [T, V], keyed by the tokens' row ids [T]."""
    draws = uniform(key, (len(rows), 1), rows=rows, device=logits.device)
    labels = []
    for some, u in zip(torch.split(logits, CHUNK_TOKENS), torch.split(draws, CHUNK_TOKENS), strict=True):
        edges = torch.softmax(some.float(), dim=-1, dtype=torch.float64).cumsum(-1)
        labels.append(torch.searchsorted(edges, u.double() * edges[:, -1:]).squeeze(-1))
    return torch.cat(labels).clamp(max=logits.shape[-1] - 1)


def summed_loss(logits: Tensor, batch: Calibration, key: Key | None) -> Tensor:
    """Cross-entropy summed over tokens (nats): of drawn labels, or without a key of the text's own next tokens.

    `logits` [N, S, V]; with a key every token counts, without one those that have a successor.
    """
    if key is None:
        seen = batch.mask[:, :-1] & batch.mask[:, 1:]
        return F.cross_entropy(logits[:, :-1][seen].float(), batch.tokens[:, 1:][seen], reduction="sum")
    chosen = logits[batch.mask]
    labels = drawn_labels(chosen.detach(), key, batch.rows()[batch.mask])
    return F.cross_entropy(chosen.float(), labels, reduction="sum")


def layer_gradients(hidden: list[Tensor], loss: Tensor, *, keep_graph: bool) -> list[Tensor]:
    """Gradients of the loss at each layer's output [N, S, D]."""
    return list(torch.autograd.grad(loss, hidden, retain_graph=keep_graph))


def token_scores(gradient: Tensor, error: Tensor, mask: Tensor) -> Tensor:
    """(g_t . e_t)^2 of each token, [T] float64, for gradients and errors [N, S, D] and a mask [N, S]."""
    product = (gradient[mask].double() * error[mask].double()).sum(-1)
    return product.square()
