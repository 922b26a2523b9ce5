"""Fixtures that several test modules share."""

import jaxtyping
import pytest
import torch

from roundoff.config import Profile
from roundoff.experiments import load_profile
from tests.small_models import make_tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: results do not depend on the machine's cores, and test processes do not fight over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked_shapes():
    """Shapes in signatures are not checked: for tests of what the code itself says of a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def small() -> Profile:
    """Two steps on the embedded model in about a second: 16 training problems, 32 test problems."""
    profile = load_profile("tiny")
    settings = {**profile.task.settings, "train_problems": 16, "test_problems": 32}
    training = profile.training.model_copy(update={"prompts_per_step": 8, "checkpoint_every": 1, "evaluate_every": 5})
    return profile.model_copy(
        update={
            "name": "small",
            "task": profile.task.model_copy(update={"settings": settings}),
            "training": training,
        }
    )


@pytest.fixture(scope="module")
def tokenizer():
    """That of the small random models."""
    return make_tokenizer()
