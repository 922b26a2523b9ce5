"""Messages between ranks: they arrive as they were sent, and no message can run code."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch

from roundoff.config import ConfigError
from roundoff.numerics.rng import Key
from roundoff.parallel.messages import HEAD, MessageError, decode, encode
from roundoff.runs.checkpoint import Checkpoint, DamagedCheckpointError
from roundoff.runs.record import Status
from tests.thread_ranks import on_ranks

SOURCE = Path(__file__).parents[2] / "src" / "roundoff"
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
PICKLING = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "read_pickle", "to_pickle"),
}


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        -0.1,
        "a\ud800 b",
        [1, (2.5, None), {"x": [True], 3: "y"}],
        Path("a/b"),
        {"list": 1},  # the keys of the format itself
        Key(3),
        Status("complete", 2, 2, "r", 1.5, "now", ("w",), 3),
    ],
)
def test_what_arrives_is_what_was_sent(value):
    again = decode(encode(value))
    assert again == value
    assert type(again) is type(value)


def test_numbers_that_are_not_finite_arrive():
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode([math.inf, -math.inf])) == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_arrive_bit_for_bit(dtype, shape):
    tensor = torch.arange(6).view(2, 3).to(dtype) if shape == (2, 3) else torch.ones(shape, dtype=dtype)
    again = decode(encode({"t": tensor, "turned": tensor.T if tensor.ndim == 2 else tensor}))
    assert (again["t"].dtype, again["t"].shape) == (dtype, tensor.shape)
    assert torch.equal(again["t"], tensor)
    assert torch.equal(again["turned"], tensor.T if tensor.ndim == 2 else tensor)


def test_tensors_that_share_memory_arrive_as_two():
    whole = torch.arange(6.0)
    again = decode(encode(Checkpoint(1, {"m": {"a": whole[:4], "b": whole[2:]}}, {"position": 1}, ())))
    assert torch.equal(again.tensors["m"]["b"], whole[2:])


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", Key, len, 1j])
def test_a_value_of_any_other_kind_is_refused(value):
    with pytest.raises(MessageError, match="cannot be sent to another rank"):
        encode(value)


@pytest.mark.parametrize(
    "error", [DamagedCheckpointError("no"), ConfigError("no"), OSError(28, "No space left", "here"), KeyError("x")]
)
def test_an_error_arrives_as_what_it_is(error):
    again = decode(encode(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_an_error_that_cannot_be_made_again_arrives_as_a_runtime_error_in_its_words():
    again = decode(encode(json.JSONDecodeError("bad", "doc", 1)))
    assert type(again) is RuntimeError
    assert str(again).startswith("JSONDecodeError: bad")


@pytest.mark.parametrize(
    "content",
    [
        {"dataclass": ["subprocess", "Popen", {"args": "touch owned"}]},
        {"dataclass": ["roundoff.parallel.messages", "encode", {"value": 1}]},
        {"dataclass": ["roundoff.parallel.messages", "importlib.import_module", {"name": "this"}]},
        {"error": ["builtins", "eval", ["1/0"]]},
        {"error": ["os", "system", ["touch owned"]]},
        {"error": ["builtins", "SystemExit", []]},
    ],
)
def test_a_message_that_names_anything_else_is_refused(content):
    head = json.dumps(content).encode()
    with pytest.raises(MessageError, match="no other is received"):
        decode(len(head).to_bytes(HEAD, "little") + head)


def test_a_value_that_one_rank_cannot_send_is_an_error_on_all_ranks():
    def work(ranks):
        with pytest.raises(MessageError, match=r"rank 1: a builtins\.object cannot be sent"):
            ranks.gather(object() if ranks.index == 1 else 1)

    on_ranks(2, work)


def pickling(tree: ast.AST) -> list[str]:
    """Every import and call with which a pickle could be read or written."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in PICKLES else []
            found += [alias.name for alias in node.names if alias.name in PICKLING]
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found += [node.attr] if node.attr in PICKLING or (owner, node.attr) in TORCH else []
        elif isinstance(node, ast.keyword):
            constant = node.value.value if isinstance(node.value, ast.Constant) else None
            found += [node.arg] if (node.arg, constant) in FLAGS else []
    return found


TORCH = {("torch", "load"), ("torch", "save")}
FLAGS = {("weights_only", False), ("allow_pickle", True), ("trust_remote_code", True)}


def test_no_pickle_is_read_or_written_anywhere():
    found = {
        str(path.relative_to(SOURCE)): pickling(ast.parse(path.read_text("utf-8"))) for path in SOURCE.rglob("*.py")
    }
    assert len(found) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from shelve import open", "import joblib.externals", "torch.load(f)", "torch.save(x, f)"),
        *("dist.all_gather_object(a, b)", "from torch.distributed import broadcast_object_list"),
        *("load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "pd.read_pickle(f)"),
    ],
)
def test_the_search_finds_calls_that_read_or_write_a_pickle(code):
    assert pickling(ast.parse(code)) != []
