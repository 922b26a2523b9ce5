"""The training loop and everything that one step does: batch, rewards, advantages, loss, update, checkpoint.

What a rollout is and how it is sampled is in `roundoff.sampling`; the only scorer is `roundoff.evaluation`; what a run
writes to disk is in `roundoff.runs`. Many runs at a time are `roundoff.launch`.

Doors: `loop` (train), `preparation`, `session`, `checks`, `policy`, `before_first_step`, `loss`, `advantage`, `update`,
`mismatch`.
"""
