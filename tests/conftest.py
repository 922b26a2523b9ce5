"""What every test run does first, the order of the tests, and fixtures that several test modules share."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import random
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start; before torch is imported

import jaxtyping
import pytest
import torch

from roundoff.config import Profile
from roundoff.experiments import load_profile
from roundoff.numerics.backend import BuildError, build
from tests.shapes import CALLS
from tests.small_models import make_tokenizer

FORKING = ("tests/launch/test_local.py", "tests/launch/test_survival.py", "tests/commands/test_cli.py")
"""Tests that make runs in processes of their own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order-seed", type=int, metavar="N", help="run the tests in a random order; the same number, the same order"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before xdist starts its workers, so that no test waits for the compiler."""
    torch.set_num_threads(1)  # for fixtures of a module, too
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(BuildError):
            build()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("order_seed")
    if seed is not None:
        random.Random(seed).shuffle(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    with skipped_without_compiler():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    with skipped_without_compiler():
        return (yield)


@contextlib.contextmanager
def skipped_without_compiler() -> Iterator[None]:
    """What must have compiled kernels is skipped on a machine that has no compiler; one that fails is no excuse."""
    try:
        yield
    except BuildError as error:
        if str(error).startswith("no C++ compiler found"):
            pytest.skip(str(error))
        raise


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server that runs are forked from: it imports torch for seconds, here while other tests run."""
    if sys.platform != "win32" and any(item.nodeid.startswith(FORKING) for item in session.items):
        multiprocessing.set_forkserver_preload(["roundoff.training.loop"])  # as `roundoff.launch.local` does
        multiprocessing.forkserver.ensure_running()


@pytest.hookimpl(optionalhook=True)  # a hook of xdist, which plain pytest does without
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: the cores that this process may use; xdist would count those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: results do not depend on the machine's cores, and test processes do not fight over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def first_calls():
    """The first calls of each test have their shapes checked."""
    CALLS.clear()


@pytest.fixture
def unchecked_shapes():
    """Shapes in signatures are not checked: for tests of what the code itself says of a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
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
