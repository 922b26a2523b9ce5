"""What each value of `algorithm.ratio` asks of a training step: the one table that all of roundoff reads.

The importance ratio of a token is exp(new - old), the log-probabilities being those of the update's pass and of a
policy before the update. The values differ in where "old" comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class RatioRule:
    """How one value of `algorithm.ratio` obtains the old log-probabilities."""

    compares: bool = True
    """Whether old log-probabilities are used at all; otherwise the ratio is held at 1."""
    replays_noise: bool = False
    """Whether the old pass draws the hardware's noise under the key of the update's pass."""
    corrects_rollouts: bool = False
    """Whether truncated importance weights correct the difference between the rollout and the old pass."""
    takes_rollouts: bool = False
    """Whether the rollouts' own log-probabilities are the old ones (`correction.bypass_mode`)."""
    splits_batches: bool = False
    """Whether each minibatch is sampled as a batch of its own, so that every update has rollouts of its own policy."""

    def needs_old_pass(self, *, first_minibatch: bool, optimizer_epochs: int) -> bool:
        """Whether a pass before the update must compute the old log-probabilities of a minibatch.

        The first minibatch of a step meets the weights of the old policy. Under replayed noise its own
        log-probabilities are therefore the old ones, bit for bit, unless the batch is passed over several times.
        """
        if not self.compares or self.takes_rollouts:
            return False
        return not (self.replays_noise and first_minibatch and optimizer_epochs == 1)


RATIOS: Mapping[str, RatioRule] = MappingProxyType(
    {
        "replayed": RatioRule(replays_noise=True),
        "recomputed": RatioRule(),
        "rollout": RatioRule(corrects_rollouts=True),
        "one": RatioRule(compares=False, splits_batches=True),
    }
)
"""The rule of each value of `algorithm.ratio`."""
