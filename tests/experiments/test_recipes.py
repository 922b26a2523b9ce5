"""Recipes of hardware by name, and files that extend several others."""

import pytest

from roundoff.actions import show
from roundoff.actions.named_hardware import load_hardware
from roundoff.config import ConfigError, Hardware, MatmulNoise, Precision
from roundoff.experiments import experiment_ids, load_experiment, load_recipe, recipe_names
from tests.program import roundoff


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_hardware_and_no_experiment(name):
    hardware = load_recipe(name).hardware
    assert load_recipe(name).title and not hardware.changes_nothing and load_hardware(name) == hardware
    assert name not in experiment_ids()
    with pytest.raises(ConfigError, match=f"{name} is a recipe of hardware"):
        load_experiment(name)
    assert show.products(hardware) in show.recipe(name)


def test_a_format_is_no_experiment():
    with pytest.raises(ConfigError, match="nvfp4:te is a number format: set"):
        load_experiment("nvfp4:te")


def test_hardware_of_no_known_name_says_how_to_spell_a_format():
    with pytest.raises(ConfigError, match=r"element/block/scale, such as 'e2m1/16/e8m0:ceil'.* but is 'e2m1/24'"):
        load_hardware("e2m1/24")


def test_an_experiment_extends_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = ["quickstart-noise", "nvfp4-training"]\n[hardware.precision]\nkeep = [3]\n')
    mine, base = load_experiment(str(path)), load_experiment("quickstart-noise")
    assert mine.hardware.precision == load_recipe("nvfp4-training").hardware.precision.model_copy(update={"keep": (3,)})
    assert mine.hardware.matmul_noise == base.hardware.matmul_noise
    assert (mine.id, mine.family, mine.baseline, mine.algorithm) == (
        "mine",
        "quickstart",
        base.baseline,
        base.algorithm,
    )


def test_the_later_of_two_bases_wins(tmp_path):
    (tmp_path / "a.toml").write_text(
        'extends = "quickstart-clean"\nepochs = 2\n[hardware.precision]\nweight = "int4"\n'
    )
    (tmp_path / "b.toml").write_text('extends = ["a", "hif4"]\n')
    (tmp_path / "c.toml").write_text('extends = ["hif4", "a"]\n')
    b, c = (load_experiment(str(tmp_path / f"{name}.toml")) for name in "bc")
    assert (b.hardware.precision.weight, c.hardware.precision.weight, b.epochs, c.epochs) == ("hif4", "int4", 2, 2)


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ('["quickstart-clean", "nvfp4-traning"]', "did you mean 'recipes/nvfp4-training'"),
        ('["quickstart-clean", 3]', "extends must be the name"),
        ('["mine"]', "does not exist"),
        ("{ a = 1 }", "extends must be the name"),
    ],
)
def test_bases_that_cannot_be_extended(tmp_path, extends, said):
    (tmp_path / "mine.toml").write_text(f"extends = {extends}\n")
    with pytest.raises(ConfigError, match=said):
        load_experiment(str(tmp_path / "mine.toml"))


def test_the_products_of_a_linear():
    assert show.products(Hardware()) == "# products of a Linear: plain arithmetic\n"
    noisy = Hardware(precision=Precision(weight="mxfp4"), matmul_noise=MatmulNoise(relative_std=0.05, forward=False))
    assert show.products(noisy).splitlines()[1:] == [
        "y  = x . W [mxfp4 along in_features]",
        "dX = dY . W [mxfp4 along in_features]  + 5 % noise",
        "dW = dY . x  + 5 % noise",
    ]
    gradient = Hardware(precision=Precision(weight="mxfp4", gradient="hif8", hadamard="dw"))
    assert show.products(gradient).splitlines()[2:] == [
        "dX = dY [hif8] . W [mxfp4 along out_features]",
        "dW = dY [hif8, Hadamard] . x [Hadamard]",
    ]


def test_the_products_of_attention():
    noise = MatmulNoise(relative_std=0.05)
    hardware = Hardware(precision=Precision(kv_cache="mxfp4", attention="int8"), matmul_noise=noise)
    assert show.products(hardware).splitlines()[4:] == [
        "# products of attention: operands, and the axis along which their rows and blocks lie",
        "scores = Q [int8 along the head] . K [cache mxfp4, then int8 along the head]  + 5 % noise",
        "output = P [int8 along the keys] . V [cache mxfp4, then int8 along the head]  + 5 % noise",
    ]
    assert show.products(Hardware(precision=Precision(attention="hif8"))).splitlines() == [
        "# products of a Linear: plain arithmetic",
        "# products of attention: operands, and the axis along which their rows and blocks lie",
        "scores = Q [hif8] . K [hif8]",
        "output = P [hif8] . V [hif8]",
    ]
    once = Hardware(precision=Precision(kv_cache="int8", attention="int8"))
    assert "K [cache int8 along the head]" in show.products(once)
    assert "attention" not in show.products(Hardware(matmul_noise=noise))


def test_show_prints_the_products(tmp_path):
    shown = roundoff("show", "quickstart-mxfp4", "--no-layers", cwd=tmp_path).stdout
    assert "y  = x [mxfp4 along in_features] . W [mxfp4 along in_features]" in shown


def test_phases_and_rules_have_products_of_their_own():
    settings = Hardware.model_validate(
        {
            "precision": {"weight": "mxfp4"},
            "training": {"precision": {"weight": "bf16"}},
            "rules": [{"match": ["*.o_proj"], "precision": "none", "matmul_noise": {"relative_std": 0.02}}],
        }
    )
    assert show.products(settings).splitlines() == [
        "# rollout and evaluation",
        "# products of a Linear: operands, and the axis along which their blocks lie",
        "y  = x . W [mxfp4 along in_features]",
        "",
        "# in modules that match *.o_proj: precision none matmul_noise.relative_std 0.02",
        "# products of a Linear: operands, and the axis along which their blocks lie",
        "y  = x . W  + 2 % noise",
        "",
        "# training",
        "# products of a Linear: operands, and the axis along which their blocks lie",
        "y  = x . W [bf16]",
        "dX = dY . W [bf16]",
        "dW = dY . x",
        "",
        "# in modules that match *.o_proj: precision none matmul_noise.relative_std 0.02",
        "# products of a Linear: operands, and the axis along which their blocks lie",
        "y  = x . W  + 2 % noise",
        "dX = dY . W  + 2 % noise",
        "dW = dY . x  + 2 % noise",
    ]


def test_a_recipe_brings_its_remedies(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = ["quickstart-clean", "qerl"]\n')
    mine = load_experiment(str(path))
    assert (mine.lora.rank, mine.aqn.sigma_start, mine.hardware.precision.weight) == (32, 0.01, "nvfp4")
    assert "sigma_end = 0.0005" in show.recipe("qerl")
