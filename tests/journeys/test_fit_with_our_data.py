"""Fine-tuning with `model.fit` on a folder of images: what it says of the validation is true."""

from __future__ import annotations

import keras
import pytest

import keras_coatnet
from keras_coatnet.images import ImageSettings
from keras_coatnet.training import (
    AdamW,
    Augmentation,
    UnreadableImages,
    WarmUpSchedule,
    evaluate,
    evaluation_dataset,
    open_datasets,
    training_dataset,
)
from tests.training import tars

SIZE, BATCH, EPOCHS = 32, 8, 2
TINY = keras_coatnet.CoAtNetConfig((8, 16), (1, 1), layout=("C", "T"), stem_width=8, head_dim=8)


@pytest.fixture
def data(tmp_path):
    """Three classes, 19 images to validate with; one of them is no image, nor is another."""
    tars.write_classes(tmp_path / "train", {"ant": 9, "bee": 8, "cat": 8})
    tars.write_classes(tmp_path / "val", {"ant": 8, "bee": 6, "cat": 5}, first=100)
    for part in ("train", "val"):
        sorted((tmp_path / part / "bee").iterdir())[1].write_bytes(b"no image")
    return tmp_path


@pytest.mark.slow
def test_fit_validates_as_evaluate_does(data):
    train, validation = open_datasets(data)
    keras.utils.set_random_seed(0)
    model = keras_coatnet.CoAtNet(
        TINY, input_shape=(SIZE, SIZE, 3), classes=len(train.classes), stochastic_depth=0.1
    )
    steps = train.count // BATCH
    optimizer = AdamW(WarmUpSchedule(1e-3, 1e-5, EPOCHS * steps, 1), weight_decay=0.05)
    optimizer.exclude_from_weight_decay(var_names=["predictions"])
    model.compile(optimizer, keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
    settings = ImageSettings(SIZE, "bicubic", 0.875)
    unreadable = UnreadableImages(limit=2)
    batches = evaluation_dataset(
        validation,
        size=SIZE,
        crop_pct=0.875,
        interpolation="bicubic",
        global_batch_size=BATCH,
        unreadable=unreadable,
    )
    history = model.fit(
        training_dataset(
            train,
            size=SIZE,
            augmentation=Augmentation(mixup=0.2),
            label_smoothing=0.1,
            global_batch_size=BATCH,
            seed=0,
            unreadable=unreadable,
        ),
        steps_per_epoch=steps,
        epochs=EPOCHS,
        validation_data=batches,
        verbose=0,
    ).history

    found = evaluate(model, validation, settings, batch_size=BATCH)
    assert found.truths.tolist() == [8, 5, 5]
    assert history["val_loss"][-1] == pytest.approx(found.loss, rel=1e-5)
    assert history["val_accuracy"][-1] == pytest.approx(found.top1, abs=1e-6)
    assert model.evaluate(batches, verbose=0) == pytest.approx([found.loss, found.top1], rel=1e-5)
    assert len(unreadable.names) == 2 and all("bee" in name for name in unreadable.names)
    assert len(history["val_loss"]) == EPOCHS
