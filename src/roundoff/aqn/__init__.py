"""AQN, Adaptive Quantization Noise: scheduled noise on the model's weights during rollouts (QeRL, arXiv:2510.11696).

Here: sigma at each step, multipliers per decoder layer, the noise itself, and the check before training. Not here: the
settings (`roundoff.config.AQN`), the damage per layer that multipliers come from (`roundoff.srdd`), and the loop that
applies the noise (`roundoff.training`).

Doors: `plan.AqnPlan`, `noise.aqn_noise`, `noise.aqn_targets`, `noise.is_aqn_active`,
`schedule.sigma_curve`, `multipliers.multipliers`, `multipliers.ranking`, `multipliers.check_mode`, `multipliers.MODES`,
`preflight.preflight`, and `preflight.rounded_away`.
"""
