"""The scan on models whose damaged layer is known."""

import json

import pytest
import torch
from torch import nn

from roundoff.config import Accumulator, ConfigError, Hardware, MatmulNoise, Precision
from roundoff.formats.table import FORMATS
from roundoff.hardware import install, uninstall
from roundoff.models.calibration import calibration_batches, read_batches, text_kl
from roundoff.models.load import load_model
from roundoff.numerics.rng import Key
from roundoff.srdd import METRICS, frontier, resolve_keep, scan
from roundoff.srdd.exact import divergence
from tests.families import build, every_family
from tests.srdd.damaged import LAYERS, plain_model, texts, with_outliers

NOISE = Hardware(matmul_noise=MatmulNoise(relative_std=0.05))
WEIGHTS = Hardware(precision=Precision(weight="mxfp4"))
ACTIVATIONS = Hardware(precision=Precision(activation="mxfp4"))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_layer_with_outliers_ranks_first(layer):
    found = scan(with_outliers(layer), texts(), "mxfp4", exact=True)
    for metric in ("gradient", "deadzone_ratio", "exact"):
        assert found.most_sensitive(1, metric) == (layer,), metric
    plain = scan(plain_model(), texts(), "mxfp4").values("shadow")  # relative to the residual stream, small in layer 0
    risen = {i: value / plain[i] for i, value in found.values("shadow").items()}
    assert max(risen, key=lambda i: risen[i]) == layer
    inputs = {row.name: row.deadzone_ratio for row in found.linears}
    worst = sorted(inputs, key=lambda name: inputs[name])[-5:]
    readers = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    assert set(worst) == {f"model.layers.{layer}.{name}_proj" for name in readers}
    assert found.rank_by == "gradient"
    assert found.multipliers("targeted") == {i: float(i == layer) for i in range(LAYERS)}


def test_exact_is_the_kl_of_a_model_installed_on_that_layer_alone():
    model, batches = plain_model(), texts()
    found = scan(model, batches, "mxfp4", gradient=False, exact=True)
    read = read_batches(batches, torch.device("cpu"))
    for layer in (0, 2):
        hardware = Hardware(
            precision=Precision(weight="mxfp4", activation="mxfp4", keep=tuple(i for i in range(LAYERS) if i != layer))
        )
        sums, counts = [], []
        with torch.no_grad():
            clean = [model(**batch.inputs()).logits for batch in read]
            install(model, hardware, seed=0)
            for batch, logits in zip(read, clean, strict=True):
                sums += text_kl(logits, model(**batch.inputs()).logits, batch.mask)
                counts += [float(v) for v in batch.mask.sum(1)]
            uninstall(model)
        expected = divergence(sums, counts)
        row = found.layers[layer]
        assert (row.exact, row.exact_se) == (pytest.approx(expected.kl), pytest.approx(expected.se))


def test_half_the_gradient_score_predicts_the_exact_kl():
    # To second order in the error; 1 % noise is small, 2 x 96 tokens leave about 20 % of sampling error.
    hardware = Hardware(matmul_noise=MatmulNoise(relative_std=0.01))
    found = scan(plain_model(), texts(), hardware, exact=True, label_draws=32)
    for row in found.layers:
        assert 0.6 < row.gradient / 2 / row.exact < 1.6


def test_the_model_is_left_as_it_was():
    model = plain_model().train()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    inputs = texts()[0]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    model.train()
    scan(model, texts(), NOISE, exact=True)
    assert model.training and model.model.layers[0].training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, logits)


def test_the_clean_pass_of_a_failed_scan_is_restored():
    model = plain_model()
    broken = [{"input_ids": torch.full((2, 4), 10_000), "attention_mask": torch.ones(2, 4)}]
    with pytest.raises(IndexError):
        scan(model, broken, "mxfp4")
    assert all(p.requires_grad for p in model.parameters())
    assert scan(model, texts(), "mxfp4").tokens == 192


def test_padding_changes_nothing():
    # Other shapes sum in another order, and a rounding of the input may cross a quantization step.
    plain, padded = (scan(plain_model(), texts(pad=pad), "mxfp4", exact=True) for pad in (0, 5))
    assert plain.tokens == padded.tokens
    for metric in METRICS:
        for a, b in zip(plain.values(metric).values(), padded.values(metric).values(), strict=True):
            assert a == pytest.approx(b, rel=0.03), metric


@pytest.mark.parametrize("name", [n for n in sorted(FORMATS) if ":" not in n])
def test_every_format_can_be_scanned(name):
    found = scan(plain_model(2), texts(count=2), Hardware.model_construct(**_fields(name)))
    assert set(found.metric_names()) == set(METRICS) - {"exact"}
    assert all(0 <= value < 1.5 for value in found.values("energy_error").values())


def _fields(name):
    precision = Precision.model_construct(weight=name, activation=name, keep=())
    return {**{k: getattr(Hardware(), k) for k in Hardware.model_fields}, "precision": precision}


@pytest.mark.parametrize(
    ("hardware", "absent"),
    [
        (WEIGHTS, {"energy_error", "deadzone_ratio", "saturation_ratio", "relative_error", "sqnr", "exact"}),
        (ACTIVATIONS, {"weight_error", "exact"}),
        (NOISE, set(METRICS) - {"gradient", "shadow"}),
    ],
)
def test_a_metric_that_the_hardware_does_not_touch_is_absent(hardware, absent):
    found = scan(plain_model(2), texts(count=2), hardware)
    assert set(found.metric_names()) == set(METRICS) - absent
    with pytest.raises(ConfigError, match="was not measured by this scan"):
        found.values(sorted(absent)[0])


@every_family
def test_every_family_can_be_scanned(family):
    for hardware in ("mxfp4", NOISE):
        found = scan(build(family), texts(count=2), hardware, exact=True)
        assert [row.layer for row in found.layers] == [0, 1]
        assert all(row.exact > 0 and row.gradient > 0 and row.shadow > 0 for row in found.layers)


def test_noise_is_the_same_at_every_scan_and_follows_the_seed():
    first, again, other = (scan(plain_model(), texts(), NOISE, seed=seed).damage() for seed in (0, 0, 1))
    assert first == again != other


def test_halves_are_compared_and_a_poor_agreement_is_warned_about():
    found = scan(plain_model(), texts(count=1, length=2), NOISE)
    assert found.agreement() is not None
    even = scan(with_outliers(2), texts(), "mxfp4")
    assert even.agreement("deadzone_ratio") == pytest.approx(1.0, abs=0.21)
    single = scan(plain_model(), [{k: v[:1] for k, v in texts()[0].items()}], "mxfp4")
    assert single.halves == () and "one text" in single.warnings()[0]
    one_batch = scan(plain_model(), texts()[:1], "mxfp4")
    assert len(one_batch.halves) == 2


def test_keep_is_resolved_and_installs():
    model = with_outliers(2)
    found = scan(model, texts(), "mxfp4")
    hardware = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4", keep="srdd:1"))
    resolved = resolve_keep(hardware, found)
    assert resolved.precision.keep == (2,)
    assert resolve_keep(resolved, found) is resolved
    assert {entry.layer for entry in install(model, resolved, seed=0).entries} == {0, 1, 3}
    with pytest.raises(ConfigError, match="keeps more layers than the model has"):
        resolve_keep(Hardware(precision=Precision(weight="mxfp4", keep="srdd:9")), found)
    with pytest.raises(ConfigError, match="does nothing without a format"):
        unchecked = Precision.model_construct(weight=None, activation=None, keep="srdd:1")
        resolve_keep(NOISE.model_copy(update={"precision": unchecked}), found)


def test_a_layer_that_is_kept_has_no_accumulator_in_the_frontier_either():
    model = with_outliers(1)
    hardware = Hardware(precision=Precision(weight="mxfp4", activation="mxfp4"), accumulator=Accumulator(bits=3))
    points = frontier(model, texts(), scan(model, texts(), hardware), [0, LAYERS])
    assert points[0].divergence.kl > 0 and points[1].divergence.kl == 0.0


def test_a_cache_alone_can_be_scanned_and_layers_kept_from_it():
    model = plain_model()
    hardware = Hardware(precision=Precision(kv_cache="mxfp4", keep="srdd:1"))
    found = scan(model, texts(), hardware)
    assert all(metrics.shadow > 0 for metrics in found.layers)
    (kept,) = resolve_keep(hardware, found).precision.keep
    points = frontier(model, texts(), found, [0, 1, LAYERS])
    assert points[1].kept == (kept,)
    assert points[0].divergence.kl > points[1].divergence.kl > points[2].divergence.kl == 0.0


def test_the_frontier_falls_to_zero():
    model = with_outliers(1)
    found = scan(model, texts(), "mxfp4")
    points = frontier(model, texts(), found, [0, 1, LAYERS])
    assert [p.k for p in points] == [0, 1, LAYERS]
    assert points[1].kept == (1,)
    assert points[0].divergence.kl > points[1].divergence.kl > points[2].divergence.kl == 0.0
    with pytest.raises(ConfigError, match="a frontier needs a format"):
        frontier(model, texts(), scan(model, texts(), NOISE), [0])


def test_a_scan_is_plain_data():
    data = json.loads(json.dumps(scan(plain_model(2), texts(count=2), "nvfp4").to_json()))
    assert len(data["layers"]) == 2 and len(data["linears"]) == 14
    assert data["ranking"] and set(data["agreement"]) == set(data["metrics"])


def test_bad_input_names_the_alternatives():
    model = plain_model(2)
    with pytest.raises(ConfigError, match="did you mean 'mxfp4'"):
        scan(model, texts(), "mxfp5")
    with pytest.raises(ConfigError, match=r"rank_by must be one of .*did you mean 'gradient'"):
        scan(model, texts(), "mxfp4", rank_by="gradiant")
    with pytest.raises(ConfigError, match="holds no token"):
        scan(model, [], "mxfp4")
    with pytest.raises(ConfigError, match="holds no token"):
        scan(model, [{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3)}], "mxfp4")
    with pytest.raises(ConfigError, match="leaves every forward pass as it is"):
        scan(model, texts(), Hardware())
    with pytest.raises(ConfigError, match="leaves every forward pass as it is"):
        scan(model, texts(), Hardware(matmul_noise=MatmulNoise(relative_std=0.1, forward=False)))
    with pytest.raises(ConfigError, match=r"no decoder layers.*its parts: head"):
        scan(nn.ModuleDict({"head": nn.Linear(4, 4)}), texts(), "mxfp4")
    with pytest.raises(ConfigError, match="k must be in 1 to 2"):
        scan(model, texts(), "mxfp4").most_sensitive(3)
    with pytest.raises(ConfigError, match="label_draws must be at least 1"):
        scan(model, texts(), "mxfp4", label_draws=0)
    for batch in ({}, {"input_ids": torch.ones(5).long()}, {"input_ids": [[1, 2]]}):
        with pytest.raises(ConfigError, match=r"calibration batch 0 must hold tensors input_ids \[N, S\]"):
            scan(model, [batch], "mxfp4")
    with pytest.raises(ConfigError, match=r"input_ids \[2, 5\], attention_mask \[2, 4\]"):
        scan(model, [{"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 4)}], "mxfp4")
    install(model, WEIGHTS, seed=0)
    with pytest.raises(ConfigError, match="hardware is installed on this model"):
        scan(model, texts(), "mxfp4")


@pytest.mark.parametrize(
    ("hardware", "options", "reason"),
    [
        (WEIGHTS, {"rank_by": "exact"}, "exact=True"),
        (WEIGHTS, {"rank_by": "gradient", "gradient": False}, "gradient is off"),
        (WEIGHTS, {"rank_by": "sqnr"}, "no format of activations"),
        (ACTIVATIONS, {"rank_by": "weight_error"}, "no format of weights"),
    ],
)
def test_ranking_by_what_is_not_measured_is_refused_before_the_scan(hardware, options, reason):
    model = plain_model(2)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the scan has begun"))
    with pytest.raises(ConfigError, match=f"cannot rank by '{options['rank_by']}': .*{reason}"):
        scan(model, texts(), hardware, **options)


def test_a_score_that_is_not_finite_ranks_nothing():
    model = plain_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"shadow score is NaN or infinite in layers \[2, 3\]"):
        scan(model, texts(), "mxfp4", gradient=False)
    assert all(p.requires_grad for p in model.parameters())


def test_calibration_takes_whole_texts_up_to_the_limit():
    tokenizer = load_model("tiny").tokenizer
    batches = calibration_batches(tokenizer, ["1+2=", "", "34+5=", "6-7="], max_tokens=12, batches=2)
    # 4, 5 and 3 tokens (the limit cuts the last); texts alternate between the batches
    assert [batch["attention_mask"].sum().item() for batch in batches] == [7, 5]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    with pytest.raises(ConfigError, match="holds no token"):
        calibration_batches(tokenizer, ["", ""])


def test_drawn_labels_depend_on_the_seed_alone():
    first, second = (scan(plain_model(2), texts(count=2), "mxfp4", seed=3).damage() for _ in range(2))
    assert first == second
    assert Key.from_seed(3) != Key.from_seed(4)
    assert scan(plain_model(2), texts(count=2), "mxfp4", seed=4).damage() != first
