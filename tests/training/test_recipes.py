"""Recipes: the paper's table, value by value, and what changes when one is changed."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

import keras_coatnet
from keras_coatnet.cli import main
from keras_coatnet.training.named_recipes import FAMILIES, find_recipe, recipes
from keras_coatnet.training.recipe import Recipe

# Table 10 of the paper, typed again from it: a row for each recipe, a column for each field.
PAPER = {
    "in1k_pretrain": dict(
        epochs=300,
        batch_size=4096,
        image_size=224,
        randaugment_num_ops=2,
        randaugment_magnitude=15,
        mixup=0.8,
        loss="softmax",
        label_smoothing=0.1,
        learning_rate=1e-3,
        minimum_learning_rate=1e-5,
        schedule="cosine",
        weight_decay=0.05,
        global_clipnorm=1.0,
        ema_momentum=None,
        crop_mode="center",
    ),
    "in1k_finetune": dict(
        epochs=30,
        batch_size=512,
        randaugment_num_ops=2,
        mixup=0.8,
        loss="softmax",
        label_smoothing=0.1,
        learning_rate=5e-5,
        minimum_learning_rate=5e-5,
        schedule="constant",
        warmup=0,
        weight_decay=1e-8,
        global_clipnorm=1.0,
        ema_momentum=0.9999,
        crop_mode="squash",
    ),
    "in21k_pretrain": dict(
        epochs=90,
        batch_size=4096,
        image_size=224,
        randaugment_num_ops=0,
        mixup=0,
        loss="sigmoid",
        label_smoothing=1e-4,
        learning_rate=1e-3,
        minimum_learning_rate=1e-5,
        schedule="linear",
        weight_decay=0.01,
        global_clipnorm=1.0,
        ema_momentum=None,
    ),
    "in21k_pretrain_150": dict(
        epochs=150,
        batch_size=4096,
        randaugment_num_ops=2,
        randaugment_magnitude=5,
        schedule="linear",
    ),
    "in21k_finetune": dict(
        epochs=30,
        batch_size=1024,
        randaugment_num_ops=0,
        mixup=0,
        loss="softmax",
        label_smoothing=0.1,
        learning_rate=5e-5,
        schedule="constant",
        weight_decay=1e-8,
        ema_momentum=0.9999,
    ),
    "in21k_finetune_150": dict(batch_size=1024, randaugment_num_ops=2, randaugment_magnitude=5),
    "jft_pretrain": dict(
        epochs=14,
        batch_size=4096,
        image_size=224,
        randaugment_num_ops=2,
        randaugment_magnitude=5,
        mixup=0,
        loss="sigmoid",
        label_smoothing=1e-4,
        minimum_learning_rate=1e-5,
        schedule="linear",
        weight_decay=0.01,
        global_clipnorm=1.0,
        ema_momentum=None,
    ),
    "jft_finetune": dict(
        epochs=30,
        batch_size=512,
        randaugment_num_ops=2,
        randaugment_magnitude=5,
        mixup=0,
        loss="softmax",
        label_smoothing=0.1,
        learning_rate=5e-5,
        schedule="constant",
        weight_decay=1e-8,
        global_clipnorm=1.0,
        ema_momentum=0.9999,
    ),
}
DEPTHS = {
    "in1k_pretrain": {"coatnet0": 0.2, "coatnet1": 0.3, "coatnet2": 0.5, "coatnet3": 0.7},
    "in1k_finetune": {"coatnet0_dw": 0.2, "coatnet1_dw": 0.3, "coatnet2": 0.5, "coatnet3": 0.7},
    "in21k_pretrain": {"coatnet2": 0.3, "coatnet3": 0.5, "coatnet4": 0.7},
    "in21k_finetune": {"coatnet2": 0.3, "coatnet3": 0.5, "coatnet4": 0.7},
    "jft_pretrain": {"coatnet3": 0.0, "coatnet4": 0.1, "coatnet5": 0.0},
    "jft_finetune": {"coatnet3": 0.1, "coatnet4": 0.3, "coatnet5": 0.2},
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_are_the_papers(name):
    for model in FAMILIES[name].models:
        recipe = find_recipe(name, model)
        for field, value in PAPER[name].items():
            assert getattr(recipe, field) == value, (name, model, field)


@pytest.mark.parametrize("name", DEPTHS)
def test_stochastic_depth_is_each_models_own(name):
    for model, rate in DEPTHS[name].items():
        recipe = find_recipe(name, model)
        assert recipe.stochastic_depth == rate
        assert recipe.architecture().stochastic_depth == rate


@pytest.mark.parametrize("name", ["in21k_pretrain", "in21k_pretrain_150", "jft_pretrain"])
def test_what_has_no_validation_part_holds_out_as_many_as_imagenet_1k_has(name):
    for model in FAMILIES[name].models:
        assert find_recipe(name, model).held_out == 50_000


def test_a_number_held_out_is_whole():
    assert Recipe(held_out=500).held_out == 500
    for wrong in (1.5, 2.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="held_out"):
            Recipe(held_out=wrong)


def test_values_that_one_model_has_alone():
    assert find_recipe("in1k_finetune", "coatnet3").randaugment_magnitude == 20
    assert find_recipe("in1k_finetune", "coatnet2").randaugment_magnitude == 15
    rates = [find_recipe("jft_pretrain", f"coatnet{size}").learning_rate for size in (3, 4, 5)]
    assert rates == [1e-3, 5e-4, 5e-4]


def test_warm_ups_have_the_papers_length():
    recipe = find_recipe("in1k_pretrain")
    total = recipe.epochs * recipe.steps_per_epoch(1_281_167)
    assert recipe.warmup_steps(total) == pytest.approx(10_000, abs=30)
    recipe = find_recipe("in21k_pretrain")
    assert recipe.warmup_steps(90 * 1000) == 5 * 1000
    recipe = find_recipe("jft_pretrain")
    total = recipe.epochs * recipe.steps_per_epoch(300_000_000)
    assert recipe.warmup_steps(total) == pytest.approx(20_000, abs=30)


@pytest.mark.parametrize("name", recipes())
def test_recipes_say_what_they_need(name):
    family = FAMILIES[name]
    for word in ("    keras-coatnet train", "Hardware:", "Expected", "Source:"):
        assert word in family.about
    for model in family.models or keras_coatnet.architectures():
        assert find_recipe(name, model).architecture() is not None


@pytest.mark.parametrize("name", recipes())
def test_recipes_command_lines_are_understood(name):
    """The command in a recipe's text, tried without running it."""
    from keras_coatnet import cli

    words = FAMILIES[name].about.partition("\n\n")[2].partition("\n\n")[0]
    command = words.replace("\\\n", " ").split()
    assert command[0] == "keras-coatnet"
    assert cli.main([*command[1:], "--dry-run"]) == 0


def test_another_batch_scales_both_rates():
    recipe = find_recipe("in1k_pretrain").replace(batch_size=1024)
    assert recipe.learning_rate == pytest.approx(2.5e-4)
    assert recipe.minimum_learning_rate == pytest.approx(2.5e-6)
    assert (
        find_recipe("in1k_pretrain").replace(batch_size=1024, learning_rate=1e-3).learning_rate
        == 1e-3
    )


def test_another_peak_takes_the_minimum_along():
    recipe = find_recipe("in1k_pretrain").replace(learning_rate=2e-3)
    assert recipe.minimum_learning_rate == pytest.approx(2e-5)
    recipe = find_recipe("in1k_finetune").replace(learning_rate=1e-5, batch_size=64)
    assert recipe.minimum_learning_rate == recipe.learning_rate == 1e-5


def test_another_length_keeps_the_rates_and_the_share_of_the_warm_up():
    recipe = find_recipe("in1k_pretrain")
    short = recipe.replace(epochs=30)
    assert short.learning_rate == recipe.learning_rate
    assert short.warmup_steps(1000) == recipe.warmup_steps(1000) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch": -1},
        {"batch": True},
        {"image_size": 16},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"learning_rate": 1e38},
        {"learning_rate": float("nan")},
        {"learning_rate": "fast"},
        {"minimum_learning_rate": 1.0},
        {"schedule": "exponential"},
        {"warmup": 1.5},
        {"label_smoothing": -0.1},
        {"label_smoothing": 1.0},
        {"mixup": 0.001},
        {"mixup": 200.0},
        {"cutmix": -1.0},
        {"cutmix": 101.0},
        {"randaugment_num_ops": 17},
        {"weight_decay": float("inf")},
        {"stochastic_depth": 1.0},
        {"ema_momentum": 1.0},
        {"beta_2": 1.0},
        {"global_clipnorm": 0.0},
        {"loss": "hinge"},
        {"freeze": "stage5"},
        {"dtype_policy": "float16"},
        {"on_nan": "ignore"},
        {"keep_checkpoints": 1},
        {"seed": 2**32},
        {"randaugment_magnitude": 31},
        {"held_out": 1.0},
        {"flip": 1},
        {"epochz": 3},
    ],
)
def test_nonsense_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        find_recipe("in1k_pretrain").replace(**changes)


def test_a_network_of_ones_own_gets_the_first_models_values():
    recipe = find_recipe("in1k_pretrain", "mine.json")
    assert recipe == find_recipe("in1k_pretrain", "coatnet0").replace(model="mine.json")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no recipe 'in1k'.*in1k_pretrain"):
        find_recipe("in1k")
    with pytest.raises(ValueError, match="'in1k_pretrain' has no values for the model 'coatnet4'"):
        find_recipe("in1k_pretrain", "coatnet4")
    with pytest.raises(ValueError, match="one of: coatnet0.*model='coatnet9'"):
        find_recipe("transfer", "coatnet9").architecture()
    with pytest.raises(ValueError, match="Received: name=None"):
        find_recipe(None)


def test_recipes_travel_through_files(tmp_path, tiny):
    recipe = find_recipe("jft_finetune", "coatnet5").replace(seed=7)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert find_recipe(str(tmp_path / "recipe.json"), "coatnet4").model == "coatnet4"
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.to_dict()))
    built = Recipe(model=str(tmp_path / "tiny.json"), image_size=64).architecture()
    assert built == tiny.replace(input_size=64)
    for text in ("{", '{"epochz": 1}', "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json"):
            Recipe.load(tmp_path / "bad.json")
        with pytest.raises(ValueError, match="bad.json"):
            Recipe(model=str(tmp_path / "bad.json")).architecture()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"epochz": 1, "epochs": 3}', r"Unknown: \['epochz'\].*Known: name, model"),
        ('{"epochs": "many"}', "`epochs` must be int"),
        ("[]", r"the fields of Recipe\. Received: \[\]"),
        (None, r"There is no file \S*recipe\.json\.$"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(path)
    assert "__init__" not in str(error.value)
    assert ("does not hold" in str(error.value)) == (text is not None)
    assert main(["train", str(path), "--dry-run"]) == 2
    assert "__init__" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"widths": [8], "depths": [1], "width": 3}',
            r"Unknown: \['width'\].*Known: widths",
        ),
        ('{"widths": [8]}', r"missing: \['depths'\]"),
        (None, r"There is no file \S*network\.json\.$"),
    ],
)
def test_a_file_that_is_no_network_says_why(tmp_path, text, message):
    path = tmp_path / "network.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe(model=str(path)).architecture()


def test_recipes_need_neither_keras_nor_tensorflow():
    """The command line lists and checks them within half a second, without the package's names."""
    code = (
        "import sys, types\n"
        "for name in ('keras_coatnet', 'keras_coatnet.training'):\n"
        "    package = sys.modules[name] = types.ModuleType(name)\n"
        "    package.__path__ = [name.replace('.', '/')]\n"
        "from keras_coatnet.training.named_recipes import find_recipe\n"
        "find_recipe('in1k_pretrain').architecture()\n"
        "print(sorted({'keras', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_field_says_what_it_is():
    for field in dataclasses.fields(Recipe):
        assert field.metadata["help"]


def test_whatever_a_recipe_allows_the_augmentation_allows():
    from keras_coatnet.training.data.augment import Augmentation

    for changes in (
        {"mixup": 0.01, "cutmix": 100.0},
        {"randaugment_num_ops": 16, "randaugment_magnitude": 30.0},
        {"crop_area": 1e-6},
    ):
        recipe = Recipe(**changes)
        Augmentation(
            area=(recipe.crop_area, 1.0),
            randaugment_num_ops=recipe.randaugment_num_ops,
            randaugment_magnitude=recipe.randaugment_magnitude,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )


def test_what_may_change_when_a_run_goes_on():
    free = Recipe(
        name="another",
        data="moved",
        train_split="Training",
        validation_split="Testing",
        positive="cat",
        evaluation_epochs=5,
        gradient_accumulation_steps=2,
        remat=True,
        on_nan="skip",
        unreadable_limit=50,
        checkpoint_steps=10,
        keep_checkpoints=5,
        log_steps=1,
    )
    names = free.changed_fields(Recipe(), decides=False)
    assert len(names) == 13 and free.changed_fields(Recipe(), decides=True) == []
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    assert [name for name, field in fields.items() if not field.metadata["decides"]] == names
    assert Recipe(seed=1, dtype_policy="mixed_bfloat16", batch_size=8).changed_fields(
        free, True
    ) == [
        "seed",
        "batch_size",
        "dtype_policy",
    ]


def test_the_command_line_says_what_may_change(capsys):
    from keras_coatnet import cli

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    deciding, _, running = capsys.readouterr().out.partition("may change when a run goes on")
    for field in dataclasses.fields(Recipe):
        if field.name not in ("name", "model", "weights", "data"):
            place = deciding if field.metadata["decides"] else running
            assert f"--{field.name.replace('_', '-')}" in place
