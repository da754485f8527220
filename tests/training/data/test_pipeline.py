"""The pipeline's batches are the same when shared or resumed; unreadable images are replaced."""

from __future__ import annotations

import dataclasses
import io
import pathlib

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image

from keras_coatnet.images import load_image
from keras_coatnet.training.data.augment import Augmentation
from keras_coatnet.training.data.datasets import ImageDataset, open_dataset
from keras_coatnet.training.data.pipeline import (
    evaluation_dataset,
    padded_evaluation_dataset,
    training_dataset,
)
from keras_coatnet.training.data.shard import Shard
from keras_coatnet.training.data.unreadable import UnreadableImages

pytestmark = pytest.mark.tensorflow_only

SKIMAGE = pathlib.Path(skimage.data.data_dir)
CLASSES = ("cat", "coffee", "rocket")
COUNT, BATCH = 22, 8  # two steps in an epoch, six examples left over
FULL = Augmentation(randaugment_num_ops=1, randaugment_magnitude=15, mixup=0.8, cutmix=1.0)
PLAIN = Augmentation(crop="whole", flip=False)


def _encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _photograph(name: str = "coffee.png", size: tuple[int, int] = (120, 90)) -> Image.Image:
    with Image.open(SKIMAGE / name) as image:
        return image.convert("RGB").resize(size)


def _contents(count: int = COUNT) -> list[bytes]:
    """Small photographs with different rotations and shades; every fourth is a PNG."""
    contents = []
    for index in range(count):
        image = _photograph(("chelsea.png", "coffee.png", "rocket.jpg")[index % 3])
        image = image.rotate(15 * index).point(lambda v, index=index: max(v - 5 * index, 0))
        contents.append(_encode(image, "PNG" if index % 4 == 3 else "JPEG"))
    return contents


WHOLE = _contents()


def _source(contents: list[bytes] | None = None, calls: list | None = None) -> ImageDataset:
    contents = list(WHOLE if contents is None else contents)

    def examples(seed: int | None, start: int, shard: Shard | None = None) -> tf.data.Dataset:
        if calls is not None:
            calls.append((seed, start))
        order = np.arange(len(contents))
        if seed is not None:
            np.random.default_rng(seed).shuffle(order)
        order = order[start:]
        dataset = tf.data.Dataset.from_tensor_slices(
            {
                "image": [contents[index] for index in order],
                "label": order.astype("int64") % len(CLASSES),
                "name": [f"{index}.jpg" for index in order],
            }
        )
        return dataset if shard is None else shard.filter(dataset, start)

    return ImageDataset("small, train", len(contents), CLASSES, examples)


def _training(source: ImageDataset | None = None, **changes) -> tf.data.Dataset:
    options = {
        "size": (48, 40),
        "augmentation": FULL,
        "label_smoothing": 0.1,
        "global_batch_size": BATCH,
        "seed": 7,
        "unreadable": UnreadableImages(0),
        **changes,
    }
    return training_dataset(_source() if source is None else source, **options)


def _unshuffled(source: ImageDataset) -> ImageDataset:
    """The same data set, in the order on disk for every seed."""
    return dataclasses.replace(
        source, examples=lambda seed, *others: source.examples(None, *others)
    )


def _unshuffled_training(
    augmentation: Augmentation, contents: list[bytes] | None = None, **changes
) -> tf.data.Dataset:
    return _training(_unshuffled(_source(contents)), augmentation=augmentation, **changes)


def _take(dataset: tf.data.Dataset, count: int) -> list[tuple[np.ndarray, ...]]:
    return [tuple(map(np.asarray, batch)) for batch in dataset.take(count)]


def _assert_equal(found, expected) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for values, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(values, wanted)


def _joined(chunks: list[tuple], count: int) -> list[tuple]:
    """Joins each `count` consecutive chunks to a batch."""
    groups = [chunks[first : first + count] for first in range(0, len(chunks), count)]
    return [tuple(np.concatenate(parts) for parts in zip(*group, strict=True)) for group in groups]


@pytest.fixture(scope="module")
def reference() -> list[tuple]:
    """Five steps, in three epochs, of a run with all augmentation."""
    return _take(_training(), 5)


# --- Training --------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_have_the_documented_shapes_and_types(reference):
    spec = _training().element_spec
    assert spec[0] == tf.TensorSpec((BATCH, 48, 40, 3), tf.float32)
    assert spec[1] == tf.TensorSpec((BATCH, len(CLASSES)), tf.float32)
    for images, labels in reference:
        assert images.shape == (BATCH, 48, 40, 3) and images.dtype == np.float32
        assert images.min() >= 0 and 100 < images.max() <= 255
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
        assert labels.min() >= 0.1 / 3 - 1e-6


@pytest.mark.slow
def test_batches_depend_only_on_the_seed(reference):
    _assert_equal(_take(_training(), 5), reference)
    other = _take(_training(seed=8), 1)
    assert (other[0][0] != reference[0][0]).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_resumed_run_gets_the_same_batches(reference, start):
    _assert_equal(_take(_training(start_step=start), 5 - start), reference[start:])


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_share_the_same_global_batches(reference, replicas):
    chunks = _take(_training(replicas=replicas, local_replicas=replicas), 5 * replicas)
    assert chunks[0][0].shape[0] == BATCH // replicas
    _assert_equal(_joined(chunks, replicas), reference)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 3])
def test_workers_share_the_same_global_batches(reference, start):
    """Four replicas on two workers, from the start and resumed."""
    workers = [
        _take(_training(replicas=4, first_replica=f, local_replicas=2, start_step=start), 4)
        for f in (0, 2)
    ]
    chunks = [workers[w][2 * step + k] for step in range(2) for w in (0, 1) for k in (0, 1)]
    _assert_equal(_joined(chunks, 4), reference[start : start + 2])


@pytest.mark.slow
def test_images_of_other_workers_are_not_decoded():
    source = _source([b"broken"] * 4 + WHOLE[:4])  # unshuffled, so the broken ones are of worker 0
    unshuffled = _unshuffled(source)
    unreadable = UnreadableImages(0)
    options = {"augmentation": PLAIN, "replicas": 2, "unreadable": unreadable}
    dataset = _training(unshuffled, first_replica=1, **options)
    assert len(_take(dataset, 3)) == 3 and unreadable.names == []
    with pytest.raises(tf.errors.OpError):
        _take(_training(unshuffled, **options), 1)


@pytest.mark.slow
def test_gradient_accumulation_takes_the_parts_of_a_global_batch_in_order(reference):
    """What all workers compute at the same time is one part, for any number of workers."""
    workers = [_take(_training(parts=2, replicas=2, first_replica=worker), 6) for worker in (0, 1)]
    chunks = [workers[worker][pass_] for pass_ in range(6) for worker in (0, 1)]
    assert chunks[0][0].shape[0] == BATCH // 4
    _assert_equal(_joined(chunks, 4), reference[:3])


@pytest.fixture
def folder(tmp_path) -> ImageDataset:
    """The photographs in a folder of two classes."""
    for index, content in enumerate(WHOLE):
        place = tmp_path / CLASSES[index % 2]
        place.mkdir(exist_ok=True)
        (place / f"{index:02}.jpg").write_bytes(content)
    return open_dataset(tmp_path)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the image files in the order in which they are read."""
    names, read = [], tf.io.read_file

    def note(path: tf.Tensor) -> tf.Tensor:
        names.append(pathlib.Path(path.numpy().decode()).name)
        return path

    def read_and_note(path: tf.Tensor) -> tf.Tensor:
        return read(tf.ensure_shape(tf.py_function(note, [path], tf.string), []))

    monkeypatch.setattr(tf.io, "read_file", read_and_note)
    return names


@pytest.mark.slow
def test_a_worker_opens_only_the_files_of_its_own_images(folder, opened):
    # Unshuffled, as the pipeline prefetches examples of the next epochs.
    unshuffled = _unshuffled(folder)
    options = {"augmentation": PLAIN, "start_step": 1}
    whole = _take(_training(unshuffled, **options), 3)
    chunks, used = [], []
    for worker in (0, 1):
        opened.clear()
        own = {"replicas": 2, "first_replica": worker}
        chunks.append(_take(_training(unshuffled, **options, **own), 3))
        used.append(set(opened))
    _assert_equal(
        _joined([chunks[worker][step] for step in range(3) for worker in (0, 1)], 2), whole
    )
    assert min(map(len, used)) >= BATCH and not used[0] & used[1]


def test_a_worker_evaluates_only_the_files_of_its_own_images(folder, opened):
    whole = _evaluation(folder)
    assert len(opened) == COUNT
    chunks, used = [], []
    for worker in (0, 1):
        opened.clear()
        chunks.append(_evaluation(folder, replicas=2, first_replica=worker))
        used.append(sorted(opened))
    _assert_equal(
        _joined([chunks[worker][step] for step in range(3) for worker in (0, 1)], 2), whole
    )
    assert [len(names) for names in used] == [12, 10]  # of batches of 8, 8 and 6
    assert sorted(used[0] + used[1]) == sorted(f"{index:02}.jpg" for index in range(COUNT))


@pytest.mark.slow
def test_a_data_set_without_shards_cannot_be_shared():
    source = _source()
    alone = ImageDataset(
        "own data", COUNT, CLASSES, lambda seed, start: source.examples(seed, start)
    )
    assert len(_take(_training(alone), 1)) == 1
    for make in (_training, _evaluation):
        with pytest.raises(
            ValueError, match="own data, but its `examples` does not take a `Shard`"
        ):
            make(alone, replicas=2)


@pytest.mark.slow
def test_each_epoch_has_each_image_at_most_once_in_another_order():
    calls = []
    dataset = _training(_source(calls=calls), augmentation=PLAIN, label_smoothing=0.0)
    batches = _take(dataset, 6)
    seeds = [seed for seed, start in calls]
    assert len(set(seeds)) == len(seeds) >= 3 and all(start == 0 for _, start in calls)
    originals = [
        np.asarray(images[0])
        for images, _ in _take(_unshuffled_training(PLAIN, global_batch_size=1), COUNT)
    ]
    orders = []
    for epoch in range(3):
        images = np.concatenate([batch[0] for batch in batches[2 * epoch : 2 * epoch + 2]])
        labels = np.concatenate([batch[1] for batch in batches[2 * epoch : 2 * epoch + 2]])
        found = [
            next(i for i, one in enumerate(originals) if np.array_equal(one, image))
            for image in images
        ]
        assert len(set(found)) == len(found) == 16
        np.testing.assert_array_equal(labels.argmax(axis=1), np.array(found) % len(CLASSES))
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.slow
def test_a_resumed_run_passes_start_to_the_data_set():
    calls = []
    _take(_training(_source(calls=calls), augmentation=PLAIN, start_step=5), 1)
    seed, start = calls[0]
    assert start == BATCH
    calls.clear()
    _take(_training(_source(calls=calls), augmentation=PLAIN), 6)
    assert calls[2] == (seed, 0)  # the third epoch's order


@pytest.mark.slow
def test_label_smoothing_follows_the_published_formula():
    for smoothing in (0.1, 1e-4):
        _, labels = _take(_unshuffled_training(PLAIN, label_smoothing=smoothing), 1)[0]
        expected = np.eye(3)[np.arange(BATCH) % 3] * (1 - smoothing) + smoothing / 3
        np.testing.assert_allclose(labels, expected, atol=1e-6)


@pytest.mark.slow
def test_mixup_blends_neighbors_and_leaves_other_augmentation_unchanged():
    apart = Augmentation(randaugment_num_ops=1, randaugment_magnitude=5)
    together = Augmentation(randaugment_num_ops=1, randaugment_magnitude=5, mixup=0.8)
    images, labels = _take(_training(augmentation=apart, label_smoothing=0.0), 1)[0]
    mixed, mixed_labels = _take(_training(augmentation=together, label_smoothing=0.0), 1)[0]
    for index in range(BATCH):
        own, partner = images[index], images[index ^ 1]
        difference = (own - partner).astype("float64")
        share = ((mixed[index] - partner) * difference).sum() / (difference**2).sum()
        np.testing.assert_allclose(mixed[index], share * own + (1 - share) * partner, atol=1e-2)
        expected = share * labels[index] + (1 - share) * labels[index ^ 1]
        np.testing.assert_allclose(mixed_labels[index], expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_batch_size": 23}, "small, train has 22 examples, fewer than .* 23"),
        ({"replicas": 3}, "batch of 8 cannot be divided into 3 equal chunks. .* multiple of 3"),
        ({"replicas": 8, "local_replicas": 8}, "must be even. Received: 1"),
        ({"replicas": 2, "first_replica": 2}, "replicas, 0 to 1. Received: first_replica=2"),
        ({"replicas": 2, "first_replica": 1, "local_replicas": 2}, "local_replicas=2"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"start_step": -1}, "start_step"),
        ({"size": 0}, "size"),
        ({"global_batch_size": 0}, "global batch of 0"),
    ],
)
def test_wrong_arguments_raise_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        _training(**changes)


@pytest.mark.slow
def test_wrong_labels_and_elements_raise_an_error():
    source = _source()
    few = ImageDataset(source.name, source.count, CLASSES[:2], source.examples)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not among its 2 classes"):
        _take(_training(few, augmentation=PLAIN), 1)
    bare = ImageDataset(
        "bare", COUNT, CLASSES, lambda *_: source.examples(None, 0).map(lambda one: one["image"])
    )
    with pytest.raises(tf.errors.OpError, match="bare must have elements of"):
        _take(_training(bare, augmentation=PLAIN), 1)


# --- Crops -----------------------------------------------------------------------------------


def _ramp(width: int = 400, height: int = 300) -> Image.Image:
    """An image whose red is x and whose green is y, from 0 to 255."""
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype("uint8"))


def _boxes(augmentation: Augmentation, kind: str, count: int) -> np.ndarray:
    """(count, 4): left, right, top, bottom of the crops, as shares of the image's sides."""
    content = _encode(_ramp(), kind, **({"quality": 95} if kind == "JPEG" else {}))
    dataset = _unshuffled_training(augmentation, [content] * 8, size=48)
    images = np.concatenate([images for images, _ in _take(dataset, count // 8)]) / 255
    red, green = images[..., 0].mean(axis=1), images[..., 1].mean(axis=2)
    half = [(values[:, -1] - values[:, 0]) / 94 for values in (red, green)]  # of one pixel
    return np.stack(
        [red[:, 0] - half[0], red[:, -1] + half[0], green[:, 0] - half[1], green[:, -1] + half[1]],
        axis=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_random_crops_have_the_given_areas_and_aspect_ratios(kind):
    left, right, top, bottom = _boxes(Augmentation(flip=False, area=(0.2, 0.6)), kind, 320).T
    area = (right - left) * (bottom - top)
    aspect = (right - left) * 400 / ((bottom - top) * 300)
    assert 0.19 < area.min() < 0.23 and 0.55 < area.max() < 0.62
    assert abs(area.mean() - 0.39) < 0.03  # below 0.4, as the largest fit less often
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.37
    assert left.min() < 0.02 and right.max() > 0.98 and top.min() < 0.02 and bottom.max() > 0.98
    assert abs((left + right).mean() / 2 - 0.5) < 0.05


@pytest.mark.slow
def test_jpeg_and_png_have_the_same_crops():
    crop = Augmentation(area=(0.1, 1.0))
    np.testing.assert_allclose(_boxes(crop, "JPEG", 64), _boxes(crop, "PNG", 64), atol=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_center_crops_and_whole_images(kind):
    middle = _boxes(Augmentation(crop="center", flip=False, center_ratio=0.8), kind, 8)
    np.testing.assert_allclose(middle, [[0.2, 0.8, 0.1, 0.9]] * 8, atol=0.01)
    whole = _boxes(PLAIN, kind, 8)
    np.testing.assert_allclose(whole, [[0, 1, 0, 1]] * 8, atol=0.01)


@pytest.mark.slow
def test_the_center_is_taken_if_no_random_crop_fits():
    narrow = _encode(Image.new("RGB", (400, 4), "red").resize((400, 4)))
    dataset = _unshuffled_training(Augmentation(area=(0.9, 1.0)), [narrow] * 8, size=16)
    assert _take(dataset, 1)[0][0].shape == (8, 16, 16, 3)


@pytest.mark.slow
def test_half_of_the_images_are_flipped():
    content = _encode(_ramp())
    dataset = _unshuffled_training(Augmentation(crop="whole"), [content] * 8, size=16)
    images = np.concatenate([images for images, _ in _take(dataset, 25)])
    assert 70 < (images[:, 0, 0, 0] > 128).sum() < 130  # of 200: four standard deviations


@pytest.mark.slow
def test_decoding_at_a_smaller_size_is_close_to_resizing():
    """At a half and at an eighth, compared with Pillow's mean over the same boxes of pixels."""
    image = _photograph("astronaut.png", (400, 304))
    content = _encode(image, quality=95)
    with Image.open(io.BytesIO(content)) as decoded:
        for ratio, allowed in ((2, 1.0), (8, 0.7)):
            expected = np.array(decoded.reduce(ratio), "float64")
            dataset = _unshuffled_training(
                PLAIN, [content] * 2, size=expected.shape[:2], global_batch_size=2
            )
            images, _ = _take(dataset, 1)[0]
            assert np.abs(images[0] - expected).mean() < allowed  # neighbors differ by 10 to 20


# --- File formats and unreadable files ---------------------------------------------------------


def _kinds() -> dict[str, bytes]:
    image = _photograph()
    gray, ghost = image.convert("L"), image.convert("RGBA")
    ghost.putalpha(gray)
    deep = Image.fromarray(np.asarray(gray).astype("uint16") * 257)
    return {
        "gray.jpg": _encode(gray),
        "cmyk.jpg": _encode(image.convert("CMYK"), quality=95),
        "progressive.jpg": _encode(image, progressive=True),
        "longer.jpg": _encode(image) + b"more",
        "palette.png": _encode(image.convert("P"), "PNG"),
        "deep.png": _encode(deep, "PNG"),
        "ghost.png": _encode(ghost, "PNG"),
        "palette.bmp": _encode(image.convert("P"), "BMP"),
        "moving.gif": _encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "new.webp": _encode(image, "WEBP"),
        "really a png.jpg": _encode(image, "PNG"),
    }


@pytest.mark.slow
def test_every_file_format_gives_the_pixels_of_prediction(tmp_path):
    kinds = _kinds()
    dataset = _unshuffled_training(
        PLAIN, list(kinds.values()), size=(90, 120), global_batch_size=len(kinds)
    )
    images, _ = _take(dataset, 1)[0]
    for (name, content), found in zip(kinds.items(), images, strict=True):
        (tmp_path / name).write_bytes(content)
        expected = load_image(tmp_path / name, (90, 120), crop_pct=1.0)
        np.testing.assert_array_equal(found, expected, name)


def _unreadable_contents() -> dict[str, bytes]:
    large = _encode(_photograph("astronaut.png", (400, 300)), quality=95)
    png = _encode(_photograph(), "PNG")
    return {
        "cut.jpg": large[: len(large) // 2],
        "nearly whole.jpg": large[:-40],
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "cut.png": png[: len(png) // 2],
        "head only.jpg": large[:2] + large[-2:],
    }


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["whole", "random_resized"])
def test_unreadable_images_are_named_and_replaced_by_their_neighbors(crop):
    kinds = _unreadable_contents()
    contents = WHOLE[: 2 * len(kinds)]
    for index, content in enumerate(kinds.values()):
        contents[2 * index] = content
    options = {
        "augmentation": Augmentation(crop=crop, area=(0.08, 0.2)),
        "label_smoothing": 0.0,
        "global_batch_size": len(contents),
    }
    unreadable = UnreadableImages(len(kinds))
    found = _take(_unshuffled_training(contents=contents, unreadable=unreadable, **options), 3)
    expected = _take(_unshuffled_training(contents=WHOLE[: len(contents)], **options), 3)
    assert sorted(unreadable.names) == sorted(f"{2 * index}.jpg" for index in range(len(kinds)))
    assert unreadable.error is None
    reasons = [unreadable.reasons[f"{2 * index}.jpg"] for index in range(len(kinds))]
    for reason, word in zip(
        reasons, ["truncated", "truncated", "empty", "not an image", "truncated", ""], strict=True
    ):
        assert word in reason and len(reason) > 5
    # Of the two nearest, the one that the image would be mixed with.
    partners = np.arange(len(contents)) | 1
    for (images, labels), (whole, whole_labels) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(images[1::2], whole[1::2])
        np.testing.assert_array_equal(images, whole[partners])
        np.testing.assert_array_equal(labels, whole_labels[partners])


@pytest.mark.slow
def test_the_nearest_readable_image_is_the_replacement():
    contents = WHOLE[:8]
    for index in (2, 3, 4, 7):
        contents[index] = b"broken"
    unreadable = UnreadableImages(4)
    images, _ = _take(_unshuffled_training(PLAIN, contents, unreadable=unreadable), 1)[0]
    whole, _ = _take(_unshuffled_training(PLAIN, WHOLE[:8]), 1)[0]
    np.testing.assert_array_equal(images, whole[[0, 1, 1, 1, 5, 5, 6, 6]])


@pytest.mark.slow
def test_replicas_and_resumed_runs_replace_the_same_unreadable_images():
    contents = list(WHOLE)
    contents[3], contents[8] = b"", contents[8][:500]

    def run(**changes):
        return _training(_source(contents), unreadable=UnreadableImages(2), **changes)

    whole = _take(run(), 5)
    _assert_equal(_take(run(start_step=3), 2), whole[3:])
    _assert_equal(_joined(_take(run(replicas=2, local_replicas=2), 10), 2), whole)


@pytest.mark.slow
def test_too_many_unreadable_images_end_the_run_and_all_are_named():
    contents = list(WHOLE)
    for index in (1, 9, 15):
        contents[index] = contents[index][:300]
    unreadable = UnreadableImages(2)
    with pytest.raises(tf.errors.OpError):
        _take(_training(_source(contents), augmentation=PLAIN, unreadable=unreadable), 10)
    assert isinstance(unreadable.error, ValueError)
    assert "3 images cannot be read, more than the limit of 2" in str(unreadable.error)
    for name in ("1.jpg", "9.jpg", "15.jpg"):
        assert name in str(unreadable.error) and name in unreadable.names


@pytest.mark.slow
def test_a_batch_without_any_readable_image_ends_the_run():
    unreadable = UnreadableImages(100)
    with pytest.raises(tf.errors.OpError):
        _take(_training(_source([b""] * COUNT), augmentation=PLAIN, unreadable=unreadable), 1)
    assert "No image of a batch of 8 can be read" in str(unreadable.error)


# --- Evaluation ------------------------------------------------------------------------------


def _evaluation(source: ImageDataset | None = None, **changes) -> list[tuple]:
    options = {
        "size": (48, 40),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "global_batch_size": BATCH,
        "unreadable": UnreadableImages(0),
        **changes,
    }
    source = _source() if source is None else source
    return _take(padded_evaluation_dataset(source, **options), 100)


@pytest.mark.parametrize(
    "interpolation, ratio, mode", [("bicubic", 0.9, "center"), ("bilinear", 1.0, "squash")]
)
def test_evaluation_has_the_pixels_of_prediction_in_order(tmp_path, interpolation, ratio, mode):
    batches = _evaluation(interpolation=interpolation, crop_pct=ratio, crop_mode=mode)
    images, labels, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert len(batches) == 3 and images.shape == (24, 48, 40, 3)
    assert (images.dtype, labels.dtype, weights.dtype) == (np.float32, np.int64, np.float32)
    np.testing.assert_array_equal(weights, [1] * COUNT + [0, 0])
    np.testing.assert_array_equal(labels[:COUNT], np.arange(COUNT) % 3)
    for index, content in enumerate(WHOLE):
        (tmp_path / "image").write_bytes(content)
        expected = load_image(tmp_path / "image", (48, 40), interpolation, ratio, mode)
        np.testing.assert_array_equal(images[index], expected)


def test_evaluation_is_shared_by_replicas_and_workers():
    whole = _evaluation()
    chunks = _evaluation(replicas=4, local_replicas=4)
    assert len(chunks) == 12  # the last has only padding
    _assert_equal(_joined(chunks, 4), whole)
    workers = [_evaluation(replicas=2, first_replica=worker) for worker in (0, 1)]
    chunks = [workers[worker][step] for step in range(3) for worker in (0, 1)]
    _assert_equal(_joined(chunks, 2), whole)


def test_unreadable_images_have_no_weight_in_evaluation():
    contents = list(WHOLE)
    contents[2] = contents[2][:400]
    unreadable = UnreadableImages(1)
    found, whole = _evaluation(_source(contents), unreadable=unreadable), _evaluation()
    assert unreadable.names == ["2.jpg"]
    np.testing.assert_array_equal(found[0][2], [1, 1, 0, 1, 1, 1, 1, 1])
    assert (found[0][0][2] == 0).all()
    keep = [0, 1, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(found[0][0][keep], whole[0][0][keep])
    _assert_equal(found[1:], whole[1:])
    unreadable = UnreadableImages(0)
    with pytest.raises(tf.errors.OpError):
        _evaluation(_source(contents), unreadable=unreadable)
    assert "2.jpg" in str(unreadable.error)


def test_evaluation_dataset_has_each_readable_image_once_and_one_hot_labels():
    contents = list(WHOLE)
    contents[2] = contents[2][:400]
    options = {"size": (48, 40), "crop_pct": 0.9, "interpolation": "bicubic"}
    dataset = evaluation_dataset(
        _source(contents), **options, global_batch_size=BATCH, unreadable=UnreadableImages(1)
    )
    padded = [
        np.concatenate(part)
        for part in zip(
            *_evaluation(_source(contents), unreadable=UnreadableImages(1)), strict=True
        )
    ]
    images, labels, weights = padded
    for _ in range(2):  # it can be iterated again, as in each epoch of `fit`
        batches = _take(dataset, 100)
        assert [len(images) for images, _ in batches] == [8, 8, 5]
        assert [labels.dtype for _, labels in batches] == ["float32"] * 3
        _assert_equal(
            [[np.concatenate(part) for part in zip(*batches, strict=True)]],
            [(images[weights == 1], np.eye(3, dtype="float32")[labels[weights == 1]])],
        )


def test_a_multiple_of_the_batch_size_needs_no_padding():
    batches = _evaluation(_source(WHOLE[:16]))
    assert len(batches) == 2 and all((weights == 1).all() for *_, weights in batches)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"crop_mode": "border"}, "crop_mode"),
        ({"global_batch_size": 9, "replicas": 2}, "equal chunks"),
    ],
)
def test_wrong_evaluation_settings_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        _evaluation(**wrong)


@pytest.mark.slow
def test_datasets_are_deterministic_and_not_sharded_by_tf_distribute():
    for dataset in (
        _training(),
        *(
            make(
                _source(),
                size=32,
                crop_pct=1.0,
                interpolation="bilinear",
                global_batch_size=4,
                unreadable=UnreadableImages(0),
            )
            for make in (evaluation_dataset, padded_evaluation_dataset)
        ),
    ):
        options = dataset.options()
        policy = options.experimental_distribute.auto_shard_policy
        assert options.deterministic and policy == tf.data.experimental.AutoShardPolicy.OFF
        # The tuner would sleep on for seconds whenever an iterator ends.
        assert options.autotune.enabled is False
