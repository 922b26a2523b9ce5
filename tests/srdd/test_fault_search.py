"""Every kind of fault is located, healthy models raise no alarm, and the checks agree with sums done by hand."""

import pytest
import torch
from torch import nn

from roundoff.config import Accumulator, ConfigError, Fault, Hardware, MatmulNoise, Precision
from roundoff.hardware import install
from roundoff.hardware.faults import install_fault
from roundoff.models.calibration import calibration_batches
from roundoff.models.load import load_model
from roundoff.numerics.rng import Key
from roundoff.srdd import checks, find_faults
from roundoff.tasks import TASKS
from tests.families import FAMILIES, build, every_family
from tests.srdd.damaged import plain_model, texts

KEY = Key.from_seed(0)
FAULTS = {
    "deadzone": ({"kind": "deadzone", "amount": 0.05}, "zero"),
    "saturation": ({"kind": "saturation", "amount": 0.3}, "tie"),
    "noise": ({"kind": "noise", "amount": 0.05}, "replay"),
    "rare noise": ({"kind": "noise", "amount": 0.05, "share": 0.01}, "replay"),
    "stuck": ({"kind": "stuck", "amount": 0.5, "share": 0.05}, "constant"),
    "random flips": ({"kind": "bitflip", "amount": 1.0, "share": 0.01}, "replay"),
    "mantissa bit": ({"kind": "bitflip", "amount": 1.0, "bit": 22}, None),
    "exponent bit": ({"kind": "bitflip", "amount": 1.0, "bit": 23}, None),
    "gain": ({"kind": "gain", "amount": 0.05}, None),
    "gain of a channel": ({"kind": "gain", "amount": 0.05, "share": 1e-6}, None),
}
"""Settings of each fault, and the check beside the algebraic ones that must notice it (None: none can)."""


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("module", ["self_attn.v_proj", "mlp.down_proj"])
def test_a_broken_linear_is_named_first(name, module):
    settings, expected = FAULTS[name]
    model = plain_model()
    install(model, Hardware(faults=(Fault(layer=2, module=module, **settings),)), seed=0)
    report = find_faults(model, texts())
    site = f"model.layers.2.{module}"
    assert report.suspect.site == site and report.suspect.layer == 2
    fired = {alarm.check for alarm in report.alarms if alarm.site == site}
    assert "checksum" in fired
    assert (fired - {"checksum"} >= {expected}) if expected else fired == {"checksum"}
    assert find_faults(model, texts(), stop_at_first=True).suspect.site == site


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_layer_output_is_named_first(name):
    settings, expected = FAULTS[name]
    model = plain_model()
    layer = model.model.layers[1]
    unit, calls, plain = install_fault(Fault(layer=1, **settings), 64, KEY), [], layer.forward

    def broken(*args, **kwargs):
        calls.append(None)
        return unit.apply(plain(*args, **kwargs), KEY.fold(len(calls)), None)

    layer.forward = broken
    report = find_faults(model, texts())
    assert report.suspect.site == "model.layers.1"
    fired = {alarm.check for alarm in report.alarms if alarm.site == "model.layers.1"}
    assert fired >= ({"residual", expected} if expected else {"residual"})


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healthy_families_raise_no_alarm(family, dtype):
    report = find_faults(build(family).to(dtype), texts(count=4))
    assert report.alarms == ()
    assert len(report.checked) >= 2
    assert not any("recognized" in line or "identity" in line for line in report.unchecked)


def test_twenty_healthy_scans_of_tiny_raise_no_alarm():
    loaded, task = load_model("tiny"), TASKS["arithmetic"]({"train_problems": 200, "test_problems": 1})
    prompts = [problem.prompt for problem in task.train()]
    batches = calibration_batches(loaded.tokenizer, prompts, max_tokens=1200, batches=20)
    assert len(batches) == 20
    assert [find_faults(loaded.model, [batch]).alarms for batch in batches] == [()] * 20


def test_a_quantized_machine_is_healthy_and_its_faults_are_found():
    precision = Precision(weight="mxfp4", activation="mxfp4")
    model = plain_model()
    install(model, Hardware(precision=precision), seed=0)
    assert find_faults(model, texts()).alarms == ()
    model = plain_model()
    fault = Fault(kind="gain", layer=3, module="mlp.gate_proj", amount=0.01)
    install(model, Hardware(precision=precision, faults=(fault,)), seed=0)
    assert find_faults(model, texts()).suspect.site == "model.layers.3.mlp.gate_proj"


def test_a_weight_that_makes_infinities_is_named_and_what_follows_is_not():
    model = plain_model()
    plain = model.model.layers[1].mlp.up_proj.forward
    model.model.layers[1].mlp.up_proj.forward = lambda x: plain(x) * torch.inf
    report = find_faults(model, texts())
    assert report.suspect.site == "model.layers.1.mlp.up_proj"
    assert [a.site for a in report.alarms if a.check == "nonfinite"] == ["model.layers.1.mlp.up_proj"]


def test_an_unusual_residual_is_unchecked_instead_of_an_alarm():
    model = plain_model()
    for layer in model.model.layers:
        plain = layer.forward
        layer.forward = lambda *args, _plain=plain, **kwargs: _plain(*args, **kwargs) * 0.5
    report = find_faults(model, texts())
    assert report.alarms == ()
    assert any(line.startswith("residual identity") for line in report.unchecked)


def test_dead_channels_and_equal_tokens_are_not_faults():
    model = plain_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:10] = 0.0
    assert find_faults(model, texts()).alarms == ()
    same = [{"input_ids": torch.full((2, 9), 5), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}]
    assert [a for a in find_faults(model, same).alarms if a.check == "constant" and "v_proj" in a.site] == []


def test_declared_noise_is_refused():
    model = plain_model()
    install(model, Hardware(matmul_noise=MatmulNoise(relative_std=0.05)), seed=0)
    with pytest.raises(ConfigError, match="declared noise cannot be told from a fault"):
        find_faults(model, texts())
    with pytest.raises(ConfigError, match="no decoder layers"):
        find_faults(nn.ModuleDict({"head": nn.Linear(4, 4)}), texts())


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        (Hardware(matmul_noise=MatmulNoise(gain_std=0.01)), "matmul_noise is installed: declared noise"),
        (Hardware(matmul_noise=MatmulNoise(adc_bits=8)), "matmul_noise is installed: declared noise"),
        (Hardware(accumulator=Accumulator(bits=13)), "accumulator is installed: the error of its sums"),
    ],
)
def test_other_declared_errors_are_refused(hardware, said):
    model = plain_model()
    install(model, hardware, seed=0)
    with pytest.raises(ConfigError, match=said):
        find_faults(model, texts())


def test_hooks_are_removed():
    model = plain_model()
    find_faults(model, texts(), stop_at_first=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_statistics_by_hand():
    y = torch.tensor([[0.0, 2.0, -2.0, 2.0], [1.0, 0.0, 3.0, -1.0]])
    live = torch.tensor([True, True, True, False])
    assert checks.zero_share(y, live) == pytest.approx(2 / 6)
    assert checks.tie_share(y) == 0.5  # three elements of size 2 in the first token
    many = torch.stack([torch.arange(8.0), torch.full((8,), 3.0), torch.full((8,), 4.0)], dim=1)
    assert checks.constant_channels(many, torch.tensor([True, True, False])).tolist() == [False, True, False]
    assert not checks.constant_channels(many[:7], torch.tensor([True, True, True])).any()


def test_checksum_in_rounding_units():
    # y = x W^T exactly, W = [[1, 2], [3, 4]], x = (1, 1): y = (3, 7). An error of 1/2 in the second output moves the
    # checksum under r by r_2 / 2. Its unit is u sqrt(r_1^2 (9 + 2 * 5) + r_2^2 (7.5^2 + 2 * 25)), u = 2^-24:
    # u sqrt(125.25) for r = (1, 1), and never more than the error under r = (0, 1), u sqrt(106.25).
    weight, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(1, 2)
    assert checks.checksum_excess(x, weight, None, torch.tensor([[3.0, 7.0]]), KEY) == 0.0
    off = checks.checksum_excess(x, weight, None, torch.tensor([[3.0, 7.5]]), KEY)
    assert off * (1 + 1e-9) >= 0.5 / (2.0**-24 * 125.25**0.5) and off <= 0.5 / (2.0**-24 * 106.25**0.5)
    biased = checks.checksum_excess(x, weight, torch.tensor([1.0, -1.0]), torch.tensor([[4.0, 6.0]]), KEY)
    assert biased == 0.0


def test_residual_bound_is_that_of_two_roundings():
    h, a, m = (torch.randn(50, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = (h + a) + m
    assert checks.residual_excess(h, [a, m], out) <= 1.0
    wrong = out.clone()
    wrong[7, 3] *= 1 + 1e-5
    assert checks.residual_excess(h, [a, m], wrong) > 1.0


def test_same_bits_sees_signs_of_zero_and_equal_nans():
    assert checks.same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not checks.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert sorted(FAMILIES)


def spoil(model, name):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[70 if "embed" in name else 3] = float("nan")


@pytest.mark.parametrize("hardware", [None, Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"))])
@pytest.mark.parametrize(
    ("name", "site", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj", "of the weight is NaN"),
        ("model.layers.1.mlp.up_proj.bias", "model.layers.1.mlp.up_proj", "outputs are NaN or Inf, from finite inputs"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj", "no checked site produced"),
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj", "no checked site produced"),
        ("model.norm.weight", "lm_head", "no checked site produced"),
    ],
)
def test_a_nan_in_memory_is_named_and_what_follows_is_not_reported_as_checked(name, site, said, hardware):
    model = plain_model()
    if name.endswith("bias"):
        up = model.model.layers[1].mlp.up_proj
        up.bias = nn.Parameter(torch.zeros(up.out_features))
    spoil(model, name)
    if hardware is not None:
        install(model, hardware, seed=0)
    report = find_faults(model, texts())
    assert (report.suspect.check, report.suspect.site) == ("nonfinite", site) and said in report.suspect.detail
    tied = ["lm_head"] if "embed" in name else []  # the same weight
    assert [alarm.site for alarm in report.alarms if alarm.check == "nonfinite"] == [site, *tied]
    if name != "model.embed_tokens.weight":
        assert "model.layers.0" in report.checked
    if site != "lm_head" and not tied:
        assert "lm_head" not in report.checked
        assert any("the input is not finite" in line for line in report.unchecked)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-40), (torch.float32, 1e-44), (torch.bfloat16, 1e-38), (torch.float16, 1e-6)]
)
def test_products_below_the_normal_numbers_are_neither_faults_nor_checked(dtype, scale):
    model = build()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(scale)
    report = find_faults(model.to(dtype), texts()[:1])
    assert report.alarms == ()
    site = "model.layers.0.mlp.up_proj"
    assert any(line.startswith(f"{site}: its products are below") for line in report.unchecked)
    assert site not in report.checked and "model.layers.1.mlp.up_proj" in report.checked
