"""Sampling rollouts from a model, with a key-value cache, under any hardware.

Here: the sampler, the batch that is being decoded, the cache, a fused decode step for small models on a CPU, captured
steps over static buffers for CUDA, the `Rollouts` that training reads, and the diagnosis of rollouts that ended at a
number that is not finite. Not here: the log-probabilities that training differentiates (`roundoff.models.logprobs`),
rewards (`roundoff.tasks`) and scores (`roundoff.evaluation`).

Doors: `sampler.sample`, `sampler.check_sampling`, `rollouts.Rollouts`, `rollouts.concatenate`,
`diagnosis.first_nonfinite`, `diagnosis.nonfinite_parameters`, `diagnosis.finite_sums` and `diagnosis.nonfinite_among`.
"""
