"""Each process of verl computes on the hardware of its phases.

The processes run here without verl and vLLM: stand-ins take the place of the few names that roundoff's modules import
from them. Where verl is installed, `test_plugin.py` runs the engine and the server inside it instead.
"""

import asyncio
import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import roundoff
from roundoff.config import PHASES, ConfigError
from roundoff.hardware import install, installed
from roundoff.models.load import load_model
from roundoff.numerics.quantize import quantize
from roundoff.numerics.rng import Key
from roundoff.plugins.verl.settings import VARIABLE, PluginSettings, check, from_environment
from roundoff.sampling.sampler import sample

alone = pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl itself is here")
TINY = str(Path(roundoff.__file__).parent / "models" / "tiny")
THREE = {
    "rollout": {"precision": {"weight": "nvfp4"}, "matmul_noise": {"relative_std": 0.05}},
    "training": {"precision": {"weight": "hif8", "gradient": "mxfp4"}},
    "evaluation": {"precision": {"weight": "mxfp4", "activation": "mxfp4"}},
}


@dataclass
class TokenOutput:
    """verl's class of this name, as far as the server uses it."""

    token_ids: list[int]
    log_probs: list[float]
    stop_reason: str
    extra_fields: dict = field(default_factory=dict)


class Engine:
    """What roundoff's engine asks of verl's."""

    _qat_enabled = use_ulysses_sp = pad_to_length = use_remove_padding = False
    rank = 0

    def __init__(self, *, forward_only=False):
        self.engine_config = SimpleNamespace(forward_only=forward_only)

    def _build_module(self):
        return load_model("tiny").model


class WorkerExtension:
    """verl's extension of vLLM's worker, which loads weights into the model by vLLM's names."""

    def update_weights_from_ipc(self, weights):
        self._update_weights(weights, None, False)

    def _update_weights(self, weights, peft_config, base_sync_done):
        with torch.no_grad():
            self.model_runner.model.load(dict(weights))


class LinearBase(nn.Module):
    """vLLM's base class of Linear layers."""


class UnquantizedLinearMethod:
    """vLLM's method for a weight without a format."""

    def apply(self, layer, x, bias):
        return functional.linear(x, layer.weight, bias)


STANDINS = {
    "verl.workers.rollout.replica": {"TokenOutput": TokenOutput},
    "verl.workers.rollout.vllm_rollout.utils": {"vLLMColocateWorkerExtension": WorkerExtension},
    "verl.workers.engine.base": {"EngineRegistry": None},
    "verl.workers.engine.fsdp.transformer_impl": {"FSDPEngineWithLMHead": Engine},
    "verl.utils.tensordict_utils": {},
    "vllm.model_executor.layers.linear": {"LinearBase": LinearBase},
}


@pytest.fixture
def imported(monkeypatch):
    """Imports a module of the plugin that needs verl, in a process with these settings."""
    for name, content in STANDINS.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ModuleType(".".join(parts[:end]))
            package.__path__ = []
            if package.__name__ not in sys.modules or end == len(parts):
                monkeypatch.setitem(sys.modules, package.__name__, package)
        vars(sys.modules[name]).update(content)
    names = []

    def load(module, settings):
        monkeypatch.setenv(VARIABLE, settings.model_dump_json(exclude_none=True))
        names.append(f"roundoff.plugins.verl.{module}")
        return importlib.import_module(names[-1])

    yield load
    for name in names:
        sys.modules.pop(name, None)
        vars(sys.modules["roundoff.plugins.verl"]).pop(name.rpartition(".")[2], None)


@alone
@pytest.mark.parametrize("forward_only", [False, True])
def test_actor_and_reference_compute_on_the_hardware_of_training(imported, forward_only):
    settings = PluginSettings(hardware=THREE, ratio="recomputed")
    engine = imported("engine", settings).RoundoffEngine(forward_only=forward_only)
    model = engine._build_module()
    assert installed(model).hardware == settings.hardware.of("training")
    report = engine.roundoff_report()
    assert (report["phase"], report["hardware"], report["modules"]) == ("training", "weight hif8", 42)
    assert (report["attention_layers"], report["fingerprint"]) == (0, settings.fingerprint)
    assert report["role"] == ("reference" if forward_only else "actor")


@alone
def test_an_engine_whose_training_is_plain_has_no_hardware(imported):
    engine = imported(
        "engine", PluginSettings(hardware={"rollout": THREE["rollout"]}, ratio="recomputed")
    ).RoundoffEngine()
    assert installed(engine._build_module()) is None
    report = engine.roundoff_report()
    assert (report["hardware"], report["modules"]) == ("none (plain arithmetic)", 0)


@alone
@pytest.mark.parametrize(("phase", "refused"), [("training", True), ("rollout", False)])
def test_packed_sequences_are_refused_for_noise_on_attention_in_training(imported, phase, refused):
    settings = PluginSettings(
        hardware={"precision": {"weight": "mxfp4"}, phase: {"matmul_noise": {"relative_std": 0.1}}}, ratio="recomputed"
    )
    engine = imported("engine", settings).RoundoffEngine()
    engine.use_remove_padding = True
    if refused:
        with pytest.raises(ConfigError, match="use_remove_padding=False"):
            engine._build_module()
    else:
        engine._build_module()


def sampled_alone(phase, settings, count, number, temperature):
    """What a model on the hardware of one phase alone answers in the server's batch of this number."""
    loaded = load_model(TINY, dtype=torch.float32)
    install(loaded.model, settings.hardware.of(phase), seed=settings.seed)
    prompts = [loaded.tokenizer("8+9=")["input_ids"]] * count
    key = Key.from_seed(settings.seed).fold("verl rollout", 0).fold(number)
    rollouts = sample(
        loaded.model, loaded.tokenizer, prompts, group_size=1, max_new_tokens=8, temperature=temperature, key=key
    )
    return [rollouts.logprobs[n][rollouts.response_mask[n]].tolist() for n in range(count)]


@alone
def test_a_rollout_server_answers_on_the_hardware_of_rollouts_and_of_evaluation(imported):
    settings = PluginSettings(hardware=THREE, ratio="recomputed", seed=3)
    server = imported("cpu_server", settings).RolloutServer(TINY, "float32", replica_rank=0, response_length=8)
    prompt = server.loaded.tokenizer("8+9=")["input_ids"]
    state = {name: tensor.clone() for name, tensor in server.loaded.model.state_dict().items()}

    async def batch(count, temperature):
        asked = {"temperature": temperature, "top_p": 1.0, "top_k": -1}
        answers = await asyncio.gather(*[server.generate(str(n), prompt, asked) for n in range(count)])
        return [answer.log_probs for answer in answers]

    async def session():
        await server.collective_rpc("roundoff_announce", args=(1, 0.0))
        await server.update_weights(state, 0)
        found = [await batch(4, 1.0)]
        await server.collective_rpc("roundoff_evaluation", args=(True,))
        found.append(await batch(2, 0.0))
        await server.collective_rpc("roundoff_evaluation", args=(False,))
        found.append(await batch(3, 1.0))
        return found, await server.collective_rpc("roundoff_report", args=("",))

    found, report = asyncio.run(session())
    assert found == [
        sampled_alone("rollout", settings, 4, 1, 1.0),
        sampled_alone("evaluation", settings, 2, 2, 0.0),
        sampled_alone("rollout", settings, 3, 3, 1.0),
    ]
    assert found[1] != sampled_alone("training", settings, 2, 2, 0.0)
    assert (report["phase"], report["hardware"]) == ("rollout", "weight nvfp4, matmul noise 0.05")
    assert (report["modules"], report["attention_layers"]) == (42, 6)
    evaluation = report["evaluation"]
    assert (evaluation["hardware"], evaluation["attention_layers"]) == ("weight mxfp4, activation mxfp4", 0)
    assert report["answered"] == {"rollout, no AQN": 7, "evaluation, no AQN": 2}


@alone
def test_a_server_whose_phases_are_plain_has_no_hardware(imported):
    settings = PluginSettings(hardware={"training": THREE["training"]})
    server = imported("cpu_server", settings).RolloutServer(TINY, "float32", replica_rank=0, response_length=8)
    assert server.hardware is None
    assert server.roundoff_report("")["hardware"] == "none (plain arithmetic)"


class Linear(LinearBase):
    """One of vLLM's Linear layers."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x):
        return self.quant_method.apply(self, x)


class VllmModel(nn.Module):
    """An MLP as vLLM has it, with gate and up in one layer."""

    def __init__(self):
        super().__init__()
        mlp = nn.ModuleDict({"gate_up_proj": Linear(64, 64), "down_proj": Linear(32, 64)})
        self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])})

    def load(self, weights):
        mlp = self.model["layers"][0]["mlp"]
        parts = [weights[f"model.layers.0.mlp.{part}.weight"] for part in ("gate_proj", "up_proj")]
        mlp["gate_up_proj"].weight.copy_(torch.cat(parts))
        mlp["down_proj"].weight.copy_(weights["model.layers.0.mlp.down_proj.weight"])


def vllm_worker(imported, **settings):
    module = imported("vllm_worker", PluginSettings(hardware=settings, ratio="recomputed"))
    worker = module.HardwareWorker()
    config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=True))
    worker.model_runner = SimpleNamespace(model=VllmModel(), vllm_config=config)
    return worker


@alone
def test_a_worker_of_vllm_computes_each_phase(imported):
    worker = vllm_worker(
        imported,
        precision={"weight": "mxfp4"},
        rollout={
            "precision": {"activation": "nvfp4"},
            "rules": [{"match": ["up_proj"], "precision": {"weight": "int8"}}],
        },
        training={"precision": "none", "matmul_noise": {"relative_std": 0.1}},
        evaluation={"rules": [{"match": ["up_proj"], "precision": {"weight": "int8"}}]},
    )
    torch.manual_seed(0)
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    weights = {f"model.layers.0.mlp.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    worker.roundoff_announce(1, 0.0)
    worker.update_weights_from_ipc(list(weights.items()))
    layer = worker.model_runner.model.model["layers"][0]["mlp"]["gate_up_proj"]
    gate, up = (weights[f"model.layers.0.mlp.{name}.weight"] for name in ("gate_proj", "up_proj"))
    stored = torch.cat([quantize(gate, "mxfp4"), quantize(up, "int8")])
    x = torch.randn(5, 64)
    in_rollouts = functional.linear(quantize(x, "nvfp4", tensor_scale="row"), stored)
    assert torch.equal(layer(x), in_rollouts)
    worker.roundoff_evaluation(True)
    assert torch.equal(layer(x), functional.linear(x, stored))
    worker.roundoff_evaluation(False)
    assert torch.equal(layer(x), in_rollouts)


@alone
def test_a_worker_of_vllm_refuses_what_the_plan_refuses(imported):
    worker = vllm_worker(imported, precision={"weight": "mxfp4"}, evaluation={"precision": "none"})
    with pytest.raises(ConfigError, match="holds the quantized weights of one phase"):
        worker.roundoff_report("")


def test_settings_with_phases_survive_the_environment():
    for content in (
        THREE,
        {"rollout": {"precision": {"weight": "none"}, "rules": [{"match": ["o_proj"], "precision": "none"}]}},
    ):
        settings = PluginSettings(hardware=content, ratio="recomputed")
        again = from_environment({VARIABLE: settings.model_dump_json(exclude_none=True)})
        assert again == from_environment({VARIABLE: settings.model_dump_json()}) == settings
        assert again.fingerprint == settings.fingerprint
        assert [again.hardware.of(phase) for phase in PHASES] == [settings.hardware.of(phase) for phase in PHASES]
    assert (
        PluginSettings(hardware=THREE).fingerprint != PluginSettings(hardware=THREE | {"evaluation": None}).fingerprint
    )


def test_a_rollout_process_has_the_phases_of_rollouts_and_evaluation_alone():
    settings = PluginSettings(hardware=THREE, ratio="recomputed")
    found, whole = settings.rollout_hardware, settings.hardware
    assert found.of("rollout") == found.of("training") == whole.of("rollout")
    assert found.of("evaluation") == whole.of("evaluation")
    one = PluginSettings(hardware={"precision": {"weight": "mxfp4"}})
    assert one.rollout_hardware == one.hardware


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"hardware": {"rollout": {"matmul_noise": {"relative_std": 0.1}}}}, "ratio = 'replayed' means nothing here"),
        ({"hardware": THREE, "ratio": "replayed"}, "set ratio = 'recomputed'"),
        ({"hardware": {"evaluation": {"precision": {"weight": "mxfp4", "keep": "srdd:1"}}}}, "'srdd:1' needs a scan"),
        ({"hardware": {"precision": {"weight": "mxfp4"}, "lora": True}}, "hardware.lora = true is not available"),
    ],
)
def test_settings_that_no_process_can_carry_out_are_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        check(PluginSettings(**content))
