"""Learning is right: against PyTorch step by step, and in what small networks reach."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import keras_coatnet
from keras_coatnet.training import (
    AdamW,
    Recipe,
    WarmUpSchedule,
    evaluate,
    find_recipe,
    open_datasets,
    remat,
    train,
)
from keras_coatnet.training.engine import devices
from keras_coatnet.training.engine.base import Engine
from keras_coatnet.training.run.checkpoints import CheckpointFolder
from keras_coatnet.training.transfer import freeze, layer_rate_scales
from tests import helpers, timm_models
from tests.training import tars
from tests.training.digits import DIGITS, SMALL, save_config, write_digits

pytestmark = pytest.mark.tensorflow_only

STEPS, BATCH = 20, 8


# --- The same steps under PyTorch --------------------------------------------------------------


TORCH = Recipe(
    batch_size=BATCH,
    epochs=STEPS,
    learning_rate=1e-3,
    minimum_learning_rate=1e-5,
    warmup=0.25,
    weight_decay=0.05,
    global_clipnorm=1.0,
)


def torch_run(model: Any, batches: list[tuple[np.ndarray, np.ndarray]], recipe: Recipe) -> list:
    """Losses of timm's model, trained by PyTorch's own parts: (loss, gradient norm) a step."""
    import torch

    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        is_spared = parameter.ndim == 1 or name.endswith("relative_position_bias_table")
        (spared if is_spared else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": spared, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(recipe.beta_1, recipe.beta_2),
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
    )
    warmup, total = recipe.warmup_steps(len(batches)), len(batches)
    lowest = recipe.minimum_learning_rate / recipe.learning_rate

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        cosine = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        return lowest + (1 - lowest) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    found = []
    for images, labels in batches:
        images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        loss = torch.nn.functional.cross_entropy(model(images), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.global_clipnorm)
        optimizer.step()
        schedule.step()
        found.append((float(loss.detach()), float(norm)))
    return found


def make_engine(make_model: Callable[[], keras.Model], recipe: Recipe, steps: int) -> Engine:
    """The engine with which `train` would train this model for so many steps."""
    schedule = WarmUpSchedule(
        recipe.learning_rate,
        recipe.minimum_learning_rate,
        steps,
        recipe.warmup_steps(steps),
        recipe.schedule,
    )

    def make_optimizer(model: keras.Model) -> AdamW:
        return AdamW(
            schedule,
            weight_decay=recipe.weight_decay,
            rate_scales=layer_rate_scales(model, recipe.layer_decay),
            gradients_are_summed=True,
            beta_1=recipe.beta_1,
            beta_2=recipe.beta_2,
            epsilon=recipe.epsilon,
        )

    chosen = devices.choose_devices(recipe.model, "one_device")
    return devices.make_engine(chosen, make_model, make_optimizer, recipe.step_config())


def our_run(engine: Engine, batches: list[tuple[np.ndarray, np.ndarray]]) -> list:
    """Loss and gradient norm of each step of the engine, on these batches."""
    import tensorflow as tf

    images, labels = (np.stack(part) for part in zip(*batches, strict=True))
    parts = engine.config.gradient_accumulation_steps

    def dataset(first: int, own: int) -> tf.data.Dataset:
        whole = tf.data.Dataset.from_tensor_slices((images, labels)).unbatch()
        return whole.batch(engine.config.batch_size // parts)

    iterator = engine.iterate(parts, dataset)
    steps = [engine.train_step(iterator) for _ in batches]
    return [(float(loss), float(norm)) for loss, norm in steps]


def make_batches(size: int, classes: int, steps: int = STEPS) -> list:
    """Batches that come again every four steps, so that there is something to learn."""
    random = np.random.default_rng(0)
    different = [
        (
            timm_models.images(BATCH, size, seed=seed),
            random.dirichlet(np.full(classes, 0.1), BATCH).astype("float32"),
        )
        for seed in range(4)
    ]
    return [different[step % 4] for step in range(steps)]


@pytest.mark.slow
def test_twenty_steps_are_pytorch_s(tmp_path):
    """The losses of timm's coatnet_0_224, reduced, trained by PyTorch, agree with ours to 1e-3.

    Measured: 6e-5 at most. It is epsilon's place: Keras adds it to the root of the mean square,
    PyTorch to that root after the correction for the first steps. In float64 the difference stays,
    and with an epsilon of 1e-12 there only 6e-7 of it is left.
    """
    import torch

    torch.manual_seed(0)
    theirs, config = timm_models.reduced("coatnet_0_224", img_size=64)
    path = timm_models.save(theirs, tmp_path / "model.safetensors")
    batches = make_batches(64, timm_models.CLASSES)

    def make_model() -> keras.Model:
        return keras_coatnet.CoAtNet(
            config, weights=path, include_preprocessing=False, classifier_activation=None
        )

    engine = make_engine(make_model, TORCH, STEPS)
    ours, expected = our_run(engine, batches), torch_run(theirs, batches, TORCH)
    print(f"\n{'step':>4} {'torch':>9} {'ours':>9} {'difference':>10}")
    for step, ((right, _), (found, _)) in enumerate(zip(expected, ours, strict=True), 1):
        print(f"{step:4} {right:9.6f} {found:9.6f} {abs(right - found):10.1e}")
    (losses, norms), (their_losses, their_norms) = (np.transpose(x) for x in (ours, expected))
    np.testing.assert_allclose(losses, their_losses, atol=5e-4)
    np.testing.assert_allclose(norms, their_norms, rtol=5e-3)
    assert norms.max() > TORCH.global_clipnorm  # gradients were clipped
    assert losses[-4:].mean() < losses[:4].mean() - 0.2  # the four batches were learnt


# --- What a small network reaches ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.xdist_group("digits")  # with those that use what it made
def test_digits_to_ninety_nine_percent(digits_run):
    print(digits_run.summary())
    assert digits_run.evaluation.count == 359  # a fifth of each class
    assert digits_run.evaluation.top1 >= 0.99


@pytest.mark.slow
def test_transfer_beats_scratch_at_equal_steps(tmp_path):
    """From dark digits on white to other, bright ones on black, eight of each to learn from.

    It is the first steps in which weights that know something are ahead: given twice as many, so
    small a network learns so simple images from random weights as well.
    """
    small = save_config(SMALL, tmp_path / "small.json")
    old = write_digits(tmp_path / "old", range(10), slice(100), negative=True)
    before = DIGITS.replace(model=small, data=str(old), held_out=0.1, epochs=6)
    weights = train(before, tmp_path / "before").folder / "final.weights.h5"
    new = tmp_path / "new"
    write_digits(new / "train", range(5, 10), slice(100, 108))
    write_digits(new / "val", range(5, 10), slice(108, None))
    options = ("image_size", "flip", "crop_area", "crop_pct", "evaluation_epochs")
    recipe = find_recipe("transfer", small).replace(
        data=str(new),
        epochs=30,
        batch_size=20,
        learning_rate=1e-3,
        randaugment_num_ops=0,
        **{name: getattr(DIGITS, name) for name in options},
    )
    transferred = train(recipe.replace(weights=str(weights)), tmp_path / "transferred")
    scratch = train(recipe, tmp_path / "scratch")
    for result in (transferred, scratch):
        print(result.summary())
        assert (result.figures["steps"], result.evaluation.count) == (60, 356)
    # Measured 0.74 and 0.36 on one processor, 0.63 and 0.44 on another: rounding decides that much
    # of so short a training. 356 images tell shares apart that differ by 0.1.
    assert transferred.evaluation.top1 >= scratch.evaluation.top1 + 0.1
    assert transferred.evaluation.loss <= 0.8 * scratch.evaluation.loss  # measured: 0.77, 1.19


# --- What is frozen, averaged, slowed down, or computed in another way --------------------------

SMALLEST = keras_coatnet.CoAtNetConfig(
    widths=(8, 16, 24),
    depths=(1, 1, 1),
    layout=("C", "C", "T"),
    stem_width=8,
    head_dim=8,
    batch_norm_momentum=0.9,
)
FEW = Recipe(
    image_size=32,
    epochs=2,
    batch_size=8,
    learning_rate=3e-3,
    minimum_learning_rate=3e-5,
    stochastic_depth=0.2,
    ema_momentum=0.9,
)


@pytest.fixture
def few(tmp_path) -> Recipe:
    """A recipe for a few flat images."""
    folder = tars.write_classes(tmp_path / "images", {"a": 20, "b": 20, "c": 20})
    return FEW.replace(model=save_config(SMALLEST, tmp_path / "smallest.json"), data=str(folder))


def values_of(weights: pathlib.Path) -> dict[str, np.ndarray]:
    model = keras_coatnet.CoAtNet(SMALLEST, weights=weights, classifier_activation=None)
    return {variable.path: variable.numpy() for variable in model.weights}


@pytest.mark.slow
@pytest.mark.parametrize("up_to", ["stage1", "stage2"])
def test_frozen_variables_do_not_change_by_a_bit(up_to, few, tmp_path):
    keras.utils.set_random_seed(1)
    start = keras_coatnet.CoAtNet(SMALLEST, weights=None, input_shape=(32, 32, 3), classes=3)
    helpers.randomize(start)
    start.save_weights(tmp_path / "start.weights.h5")
    recipe = few.replace(
        weights=str(tmp_path / "start.weights.h5"), freeze=up_to, freeze_batch_norm=True
    )
    result = train(recipe, tmp_path / "run")
    before = values_of(tmp_path / "start.weights.h5")
    after = values_of(result.folder / "final.weights.h5")
    same = {path for path, value in before.items() if np.array_equal(after[path], value)}
    frozen = {path for path in before if path.startswith(("stem", "stage1"))}
    second = {path for path in before if path.startswith("stage2")}
    norms = {path for path in second if "norm" in path}  # of MBConv, BatchNorm all of them
    assert norms and frozen and second > norms
    assert same == (frozen | second if up_to == "stage2" else frozen | norms)


@pytest.mark.slow
def test_evaluation_and_final_weights_are_those_of_the_average(few, tmp_path):
    result = train(few, tmp_path / "run")
    model = keras_coatnet.CoAtNet(SMALLEST, weights=result.folder / "final.weights.h5")
    _, held_out = open_datasets(few.data, held_out=few.held_out, seed=few.seed)
    found = evaluate(model, held_out, few.image_settings())
    assert found.loss == pytest.approx(result.evaluation.loss, abs=1e-5)
    np.testing.assert_array_equal(found.confusion, result.evaluation.confusion)

    arrays = CheckpointFolder(result.folder / "checkpoints", 3).newest().arrays
    for number, variable in enumerate(model.weights):
        average = arrays[f"average/{number:05d}"]
        np.testing.assert_array_equal(variable.numpy(), average)
        assert not np.array_equal(average, arrays[f"model/{variable.path}"])

    # The last weights evaluate to something else, so that the above tells the two apart.
    for variable in model.weights:
        variable.assign(arrays[f"model/{variable.path}"])
    assert abs(evaluate(model, held_out, few.image_settings()).loss - found.loss) > 1e-4


def engine_of(recipe: Recipe, steps: int = 6) -> Engine:
    """An engine with a small network, the same one each time."""
    keras.utils.set_random_seed(0)

    def make_model() -> keras.Model:
        model = keras_coatnet.CoAtNet(
            SMALLEST,
            input_shape=(32, 32, 3),
            classes=4,
            include_preprocessing=False,
            classifier_activation=None,
            stochastic_depth=recipe.stochastic_depth,
        )
        if recipe.remat:
            remat(model)
        freeze(model, recipe.freeze, recipe.freeze_batch_norm)
        return model

    return make_engine(make_model, recipe, steps)


def losses_of(recipe: Recipe) -> np.ndarray:
    return np.array([loss for loss, _ in our_run(engine_of(recipe), make_batches(32, 4, 6))])


@pytest.mark.slow
def test_the_average_is_a_plain_loop():
    engine = engine_of(FEW.replace(ema_momentum=0.5))
    expected = [variable.numpy().astype("float64") for variable in engine.model.weights]
    for step, batch in enumerate(make_batches(32, 4, 6), 1):
        our_run(engine, [batch])
        share = min(0.5, (1 + step) / (10 + step))
        values = [variable.numpy() for variable in engine.model.weights]
        expected = [
            share * old + (1 - share) * new for old, new in zip(expected, values, strict=True)
        ]
    state = engine.state()
    for number, average in enumerate(expected):
        np.testing.assert_allclose(state[f"average/{number:05d}"], average, atol=1e-5)


@pytest.mark.slow
def test_layer_decay_makes_lower_layers_move_less():
    """AdamW's first update is the rate times a sign or so, whatever the gradient's size."""
    engines = [engine_of(FEW.replace(layer_decay=decay, weight_decay=0.0)) for decay in (1.0, 0.5)]
    moves = []
    for engine in engines:
        before = [variable.numpy() for variable in engine.model.trainable_variables]
        our_run(engine, make_batches(32, 4, 1))
        after = [variable.numpy() for variable in engine.model.trainable_variables]
        moves.append([np.linalg.norm(a - b) for a, b in zip(after, before, strict=True)])
    blocks = {"stem": 4, "stage1": 3, "stage2": 2, "stage3": 1}
    for variable, whole, part in zip(engines[0].model.trainable_variables, *moves, strict=True):
        depth = next((d for name, d in blocks.items() if variable.path.startswith(name)), 0)
        assert part == pytest.approx(whole * 0.5**depth, rel=1e-2), variable.path


@pytest.mark.slow
def test_accumulated_parts_are_the_whole_batch():
    """Exactly so where BatchNorm does not look at its part of the batch alone."""
    frozen = FEW.replace(freeze_batch_norm=True, stochastic_depth=0.0)
    whole, parts = losses_of(frozen), losses_of(frozen.replace(gradient_accumulation_steps=2))
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert abs(whole - whole[0]).max() > 0.01  # it is not the same step again and again


@pytest.mark.slow
def test_rematerialization_gives_the_same_losses():
    """Stochastic depth included: what was dropped is dropped again in the second computation."""
    dropping = FEW.replace(stochastic_depth=0.5)
    plain, twice = losses_of(dropping), losses_of(dropping.replace(remat=True))
    np.testing.assert_allclose(twice, plain, atol=1e-5)
    assert abs(plain - plain[0]).max() > 0.01
