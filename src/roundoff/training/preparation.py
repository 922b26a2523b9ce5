"""A session made ready: checks first, then the model is loaded, scanned where needed, and put on its hardware."""

from __future__ import annotations

from roundoff.aqn.plan import AqnPlan
from roundoff.aqn.schedule import sigma_curve
from roundoff.config import Experiment, Profile, learning_rate, steps_per_epoch, training_in_force
from roundoff.models.gradient_checkpointing import check_layers
from roundoff.numerics.rng import Key
from roundoff.parallel.ranks import ALONE, Ranks
from roundoff.runs.checkpoint import run_origin
from roundoff.sampling.sampler import check_sampling
from roundoff.srdd import LayerScan, experiment_scan, layer_multipliers
from roundoff.training.batch import PromptStream
from roundoff.training.checks import check_enough, check_prompts, check_settings, within_length
from roundoff.training.optimizer import MasterAdamW
from roundoff.training.policy import install_plain, load_plain, make_policy
from roundoff.training.session import Session


def prepare(
    experiment: Experiment, profile: Profile, seed: int, *, scan: LayerScan | None = None, ranks: Ranks = ALONE
) -> Session:
    """Check everything that can be checked, then load the model, scan it where needed, and install the hardware.

    Args:
        experiment: what is run.
        profile: how big.
        seed: of every random number of the run.
        scan: the SRDD scan that the run already rests on, if any; None scans where a setting asks for it.
        ranks: the processes that make the run together.

    Raises:
        ConfigError: naming the setting that cannot be used.
        ModelError: if the model cannot be loaded, or cannot be asked the task's problems.
    """
    task = check_settings(experiment, profile)
    algorithm, origin = experiment.algorithm, run_origin(experiment, profile, seed)
    written, training = profile.training, training_in_force(algorithm, profile.training)
    profile = profile.model_copy(update={"training": training})
    key = Key.from_seed(seed)
    loaded = load_plain(profile)
    train_problems, test_problems = task.train(), task.test()
    digest, lengths = check_prompts(loaded, (*train_problems, *test_problems))
    kept = within_length(lengths[: len(train_problems)], training)
    problems = [train_problems[i] for i in kept]
    check_enough(len(problems), "only {} training prompts are within max_prompt_tokens", algorithm, training)
    asked = [*lengths[len(train_problems) :], *(lengths[i] for i in kept)]
    check_sampling(loaded.model, loaded.tokenizer, asked, training.max_new_tokens)
    if scan is None and experiment.needs_scan:
        scan = experiment_scan(experiment, loaded, task, seed)
    policy = make_policy(experiment, loaded, seed, scan)
    if training.gradient_checkpointing:
        check_layers(policy.model)
    steps = steps_per_epoch(len(problems), algorithm, written)
    plan = aqn_plan(experiment, experiment.epochs * steps, steps, scan)
    reference = None
    if algorithm.kl_coefficient > 0 and policy.adapters is None:
        reference = load_plain(profile).model
        install_plain(experiment, reference, seed, scan)
        reference.requires_grad_(False)
    plan.check(policy.model)
    return Session(
        experiment,
        profile,
        key,
        policy,
        reference,
        task,
        PromptStream(problems, key.fold("data")),
        MasterAdamW(policy.trainable, learning_rate(experiment, profile), training),
        total_steps=experiment.epochs * steps,
        aqn=plan,
        scan=scan,
        problems=digest,
        origin=origin,
        ranks=ranks,
    )


def aqn_plan(experiment: Experiment, total_steps: int, steps_per_epoch: int, scan: LayerScan | None) -> AqnPlan:
    """AQN's sigma and multipliers at each step of a run.

    Raises:
        ConfigError: if sigma is 0 throughout, or the scan does not allow the mode that `aqn.layers` names.
    """
    if experiment.aqn is None:
        return AqnPlan.silent(total_steps)
    return AqnPlan(
        experiment.aqn,
        tuple(sigma_curve(total_steps, steps_per_epoch, experiment.aqn)),
        tuple(layer_multipliers(experiment, scan, step / total_steps) for step in range(total_steps)),
    )
