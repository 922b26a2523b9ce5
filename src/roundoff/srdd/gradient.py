"""The gradient score: the loss on labels that the model itself draws, differentiated at every layer's output.

Let e_t be the error that the hardware adds to a layer's output at token t, and g_t the gradient of the summed loss
there. With labels drawn from the model's own distribution, the expectation of (sum_t g_t . e_t)^2 is e^T F e, where F
is the Fisher information, and KL(clean || perturbed) = e^T F e / 2 up to third order in e. If the errors of different
tokens are independent, this is half of sum_t (g_t . e_t)^2. One backward pass thus predicts the exact KL of all layers
at once, instead of one forward pass for each. Labels from the calibration text itself (`labels = "text"`) need no draw,
but they measure how surprising the text is as much as how sensitive the model is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from roundoff.models.calibration import CHUNK_TOKENS, Calibration
from roundoff.numerics.rng import Key, uniform


def drawn_labels(
    logits: Float[Tensor, "tokens vocabulary"], key: Key, rows: Int[Tensor, " tokens"]
) -> Int[Tensor, " tokens"]:
    """Labels drawn from softmax(logits), keyed by the tokens' row ids `rows`."""
    draws = uniform(key, (len(rows), 1), rows=rows, device=logits.device)
    labels = []
    for part, u in zip(torch.split(logits, CHUNK_TOKENS), torch.split(draws, CHUNK_TOKENS), strict=True):
        edges = torch.softmax(part.float(), dim=-1, dtype=torch.float64).cumsum(-1)
        labels.append(torch.searchsorted(edges, u.double() * edges[:, -1:]).squeeze(-1))
    return torch.cat(labels).clamp(max=logits.shape[-1] - 1)


def summed_loss(
    logits: Float[Tensor, "texts columns vocabulary"], batch: Calibration, key: Key | None
) -> Float[Tensor, ""]:
    """Cross-entropy summed over tokens, in nats.

    With a key, the labels are drawn under it, and every token counts. Without one, they are the text's own next tokens,
    and the tokens that have a successor count.
    """
    if key is None:
        counted = batch.mask[:, :-1] & batch.mask[:, 1:]
        return F.cross_entropy(logits[:, :-1][counted].float(), batch.tokens[:, 1:][counted], reduction="sum")
    token_logits = logits[batch.mask]
    labels = drawn_labels(token_logits.detach(), key, batch.rows()[batch.mask])
    return F.cross_entropy(token_logits.float(), labels, reduction="sum")


def layer_gradients(
    hidden: list[Float[Tensor, "texts columns hidden"]], loss: Float[Tensor, ""], *, keep_graph: bool
) -> list[Float[Tensor, "texts columns hidden"]]:
    """Gradients of the loss at each layer's output; `keep_graph` allows another backward pass."""
    return list(torch.autograd.grad(loss, hidden, retain_graph=keep_graph))


def token_scores(
    gradient: Float[Tensor, "texts columns hidden"],
    error: Float[Tensor, "texts columns hidden"],
    mask: Bool[Tensor, "texts columns"],
) -> Float[Tensor, " tokens"]:
    """(g_t . e_t)^2 of each token that is not padding, float64."""
    product = (gradient[mask].double() * error[mask].double()).sum(-1)
    return product.square()
