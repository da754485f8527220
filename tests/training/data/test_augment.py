"""RandAugment compared with Pillow, NumPy and published ranges; mixing compared with formulas."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from keras_coatnet.training.data.augment import Augmentation, flip, mix
from keras_coatnet.training.data.randaugment import DRAWS, OPERATIONS, randaugment

pytestmark = pytest.mark.tensorflow_only

LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
MIDDLE = tf.constant([0.5, 0.5])


def _photograph(height: int = 56, width: int = 84) -> np.ndarray:
    with Image.open(pathlib.Path(skimage.data.data_dir) / "coffee.png") as image:
        return np.array(image.convert("RGB").resize((width, height)))


def _images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dull = (_photograph() // 3 + 40).astype("uint8")
    dull[..., 2] = 77  # a constant channel, which AutoContrast and Equalize leave as it is
    return {
        "photograph": _photograph(),
        "noise": rng.integers(0, 256, (40, 30, 3)).astype("uint8"),
        "dull": dull,
        "black": np.zeros((8, 9, 3), "uint8"),
    }


IMAGES = _images()


def _apply(name, image, level, direction=1.0, point=MIDDLE) -> np.ndarray:
    found = OPERATIONS[name](tf.constant(image), level, tf.constant(direction), point)
    assert found.dtype == tf.uint8 and found.shape == image.shape
    return found.numpy()


def _enhance(kind):
    return lambda image, level: kind(image).enhance(0.1 + 1.8 * level)


PILLOW = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "Posterize": lambda image, level: image.point(
        [value & ~((1 << max(8 - int(level * 4), 0)) - 1) for value in range(256)] * 3
    ),
    "Solarize": lambda image, level: ImageOps.solarize(image, int(level * 256)),
    "SolarizeAdd": lambda image, level: image.point(
        [min(v + int(level * 110), 255) if v < 128 else v for v in range(256)] * 3
    ),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
}


@pytest.mark.parametrize("name", PILLOW)
def test_color_operations_match_pillow(name):
    for kind, image in IMAGES.items():
        for level in LEVELS:
            expected = np.array(PILLOW[name](Image.fromarray(image), level))
            found = _apply(name, image, level)
            if name == "AutoContrast":  # Pillow's rounding errors may end just below an integer
                assert ((found == expected) | (found == expected + 1)).all(), kind
                assert (found == expected).mean() > 0.9
            else:
                np.testing.assert_array_equal(found, expected, f"{kind} {level}")


def _moved(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """Takes each pixel from the one nearest to `matrix` @ (x, y, 1); gray outside the image."""
    height, width = image.shape[:2]
    result = np.full_like(image, 128)
    for y in range(height):
        for x in range(width):
            from_x, from_y = np.floor(np.array(matrix) @ [x, y, 1] + 0.5).astype(int)
            if 0 <= from_x < width and 0 <= from_y < height:
                result[y, x] = image[from_y, from_x]
    return result


def _matrices(height: int, width: int, level: float, direction: float) -> dict[str, list]:
    angle, x, y = direction * level * math.radians(30), (width - 1) / 2, (height - 1) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    shear = direction * level * 0.3
    right, down = (direction * math.floor(level * 100 * n / 224 + 0.5) for n in (width, height))
    return {
        "Rotate": [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]],
        "ShearX": [[1, shear, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [shear, 1, 0]],
        "TranslateX": [[1, 0, right], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, down]],
    }


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_geometric_operations_match_their_matrices(name):
    image = _photograph()
    for level, direction in [(0.0, 1.0), (0.5, 1.0), (1.5, -1.0), (2.0, 1.0)]:
        expected = _moved(image, _matrices(*image.shape[:2], level, direction)[name])
        differs = (_apply(name, image, level, direction) != expected).any(axis=-1)
        # Halfway between two pixels, float32 may round to the other one.
        assert differs.mean() < (0.02 if level else 1e-9), (name, level)


def test_rotation_is_about_the_center_in_both_directions():
    image = _photograph(32, 32)
    turned = {direction: _apply("Rotate", image, 3.0, direction) for direction in (-1.0, 1.0)}
    np.testing.assert_array_equal(turned[1.0], np.rot90(image, 1))
    np.testing.assert_array_equal(turned[-1.0], np.rot90(image, -1))


def test_cutout_is_a_gray_square_around_its_point():
    image = IMAGES["noise"].repeat(6, 0).repeat(6, 1)[:224, :112]
    image[image == 128] = 127
    for y, x in [(0.5, 0.5), (0.0, 0.0), (0.999, 0.3)]:
        found = _apply("Cutout", image, 1.5, point=tf.constant([y, x]))
        row, column = math.floor(y * 224), math.floor(x * 112)
        expected = image.copy()
        expected[max(row - 60, 0) : row + 60, max(column - 30, 0) : column + 30] = 128
        np.testing.assert_array_equal(found, expected)


def test_published_ranges_at_224():
    ramp = np.arange(224, dtype="uint8")[None, :, None].repeat(224, 0).repeat(3, 2)
    assert _apply("TranslateX", ramp, 1.0)[0, 0, 0] == 100  # 100 pixels at level 1
    assert _apply("TranslateY", ramp.transpose(1, 0, 2).copy(), 1.5)[0, 0, 0] == 150
    assert _apply("ShearX", ramp, 1.0)[100, 0, 0] == 30  # 0.3 pixels a row
    assert (_apply("Cutout", ramp, 1.0)[:, 112, 0] == 128).sum() == 80
    assert (_apply("Cutout", ramp + 10, 0.0) == ramp + 10).all()
    assert _apply("SolarizeAdd", ramp, 0.5)[0, 127, 0] == 127 + 55
    assert set(np.unique(_apply("Posterize", ramp, 0.5))) == {0, 64, 128, 192}  # two bits


@pytest.mark.slow
def test_ops_are_applied_in_order_in_a_graph():
    image = _photograph()
    names = list(OPERATIONS)
    for first, second in [("Rotate", "Equalize"), ("SolarizeAdd", "Sharpness"), ("Cutout",) * 2]:
        draws = np.array(
            [[(names.index(name) + 0.5) / 16, 0.2, 0.3, 0.6] for name in (first, second)], "float32"
        )
        point = tf.constant([0.3, 0.6])
        expected = _apply(second, _apply(first, image, 1.5, -1.0, point), 1.5, -1.0, point)
        data = tf.data.Dataset.from_tensors((image, draws))
        found = data.map(lambda image, draws: randaugment(image, draws, 15)).get_single_element()
        np.testing.assert_array_equal(found, expected)


def test_operations_are_those_of_the_reference_code_with_equal_probabilities():
    assert sorted(OPERATIONS) == sorted(
        "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast "
        "Brightness Sharpness ShearX ShearY TranslateX TranslateY Cutout".split()
    )
    image = IMAGES["noise"]
    edges = [np.float32(edge) for edge in (0.0, np.nextafter(1.0, 0.0, dtype="float32"))]
    for draw, name in zip(edges, ("AutoContrast", "SolarizeAdd"), strict=True):
        found = randaugment(tf.constant(image), tf.constant([[draw, 0.0, 0.0, 0.0]]), 15)
        np.testing.assert_array_equal(found, _apply(name, image, 1.5, -1.0))


def test_zero_ops_change_nothing_and_the_result_depends_only_on_the_draws():
    image = tf.constant(IMAGES["noise"])
    np.testing.assert_array_equal(randaugment(image, tf.zeros([0, DRAWS]), 15), image)
    draws = tf.random.stateless_uniform([2, DRAWS], seed=[3, 4])
    np.testing.assert_array_equal(randaugment(image, draws, 15), randaugment(image, draws, 15))


def test_flip_mirrors_for_draws_below_one_half():
    image = IMAGES["noise"]
    np.testing.assert_array_equal(flip(tf.constant(image), tf.constant(0.49)), image[:, ::-1])
    np.testing.assert_array_equal(flip(tf.constant(image), tf.constant(0.5)), image)


# --- Mixing ----------------------------------------------------------------------------------

SEED = tf.constant([5, 6], tf.int64)


def _batch(count: int = 64, classes: int = 64, side: tuple[int, int] = (12, 16)):
    """Noise, and a class of its own for each image, so that mixed labels show the shares."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, *side, 3)).astype("uint8")
    return tf.constant(images), tf.eye(count, classes)


def _pairs(values) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, "float64")
    return values[0::2], values[1::2]


def _shares(labels) -> np.ndarray:
    """The share that the first image of each pair keeps; also checks the labels' form."""
    labels = np.asarray(labels, "float64")
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    own = np.diag(labels)
    partner = labels[np.arange(len(labels)), np.arange(len(labels)) ^ 1]
    np.testing.assert_allclose(own + partner, 1, atol=1e-6)
    np.testing.assert_allclose(own[0::2], own[1::2], atol=1e-6)
    return own[0::2]


def test_mixup_blends_images_and_labels_with_the_same_shares():
    images, labels = _batch()
    mixed, mixed_labels = mix(images, labels, Augmentation(mixup=0.8), SEED, tf.constant(0), 64)
    share = _shares(mixed_labels)[:, None, None, None]
    first, second = _pairs(images)
    mixed_first, mixed_second = _pairs(mixed)
    np.testing.assert_allclose(mixed_first, share * first + (1 - share) * second, atol=1e-3)
    np.testing.assert_allclose(mixed_second, share * second + (1 - share) * first, atol=1e-3)
    assert mixed.dtype == tf.float32


def test_cutmix_exchanges_a_box_and_mixes_labels_by_its_area():
    images, labels = _batch()
    mixed, mixed_labels = mix(images, labels, Augmentation(cutmix=1.0), SEED, tf.constant(0), 64)
    share = _shares(mixed_labels)
    first, second = _pairs(images)
    is_box = [
        (one != other).any(axis=-1) for one, other in zip(_pairs(mixed)[0], first, strict=True)
    ]
    for index, inside in enumerate(is_box):
        rows, columns = inside.any(axis=1), inside.any(axis=0)
        np.testing.assert_array_equal(inside, rows[:, None] & columns[None])
        for edge in (rows, columns):
            assert (np.diff(edge.astype(int)) > 0).sum() <= 1  # one piece
        np.testing.assert_array_equal(_pairs(mixed)[0][index][inside], second[index][inside])
        np.testing.assert_array_equal(_pairs(mixed)[1][index][inside], first[index][inside])
        np.testing.assert_array_equal(_pairs(mixed)[1][index][~inside], second[index][~inside])
        assert abs(1 - inside.mean() - share[index]) < 1e-6
    assert 0.1 < np.mean(is_box) < 0.6


def test_with_mixup_and_cutmix_each_pair_gets_either_with_equal_probability():
    images, labels = _batch(512, 512, (8, 8))
    both = Augmentation(mixup=0.8, cutmix=1.0)
    mixed, mixed_labels = mix(images, labels, both, SEED, tf.constant(0), 512)
    share = _shares(mixed_labels)[:, None, None, None]
    first, second = _pairs(images)
    blended = share * first + (1 - share) * second
    is_blend = np.abs(_pairs(mixed)[0] - blended).max(axis=(1, 2, 3)) < 1e-3
    from_one = (_pairs(mixed)[0] == first) | (_pairs(mixed)[0] == second)
    assert (is_blend | from_one.all(axis=(1, 2, 3))).all()
    assert 0.4 < is_blend.mean() < 0.6  # 256 pairs: 0.1 is three standard deviations


@pytest.mark.parametrize("alpha", [0.2, 0.8, 5.0])
def test_shares_have_the_beta_distribution(alpha):
    labels = tf.one_hot(tf.range(4000) % 2, 2)
    images = tf.zeros([4000, 1, 1, 3], tf.uint8)
    _, mixed = mix(images, labels, Augmentation(mixup=alpha), SEED, tf.constant(0), 4000)
    share = np.asarray(mixed)[0::2, 0]
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 4 * math.sqrt(variance / 2000)
    assert abs(share.var() / variance - 1) < 0.15


@pytest.mark.parametrize(
    "options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}]
)
def test_chunks_are_mixed_like_the_whole_batch(options):
    images, labels = _batch()
    whole = mix(images, labels, Augmentation(**options), SEED, tf.constant(0), 64)
    for first in range(0, 64, 16):
        part = slice(first, first + 16)
        chunk = mix(
            images[part], labels[part], Augmentation(**options), SEED, tf.constant(first), 64
        )
        for found, expected in zip(chunk, whole, strict=True):
            np.testing.assert_array_equal(found, expected[part])


def test_the_smallest_alpha_gives_finite_shares_close_to_0_or_1():
    images, labels = _batch()
    mixed, mixed_labels = mix(images, labels, Augmentation(mixup=0.01), SEED, tf.constant(0), 64)
    assert np.isfinite(mixed).all()
    share = _shares(mixed_labels)
    assert ((share < 0.01) | (share > 0.99)).mean() > 0.8
    assert 5 < (share > 0.5).sum() < 27


# --- Settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"crop": "middle"}, "'random_resized', 'center', 'whole'. Received: crop='middle'"),
        ({"area": (0.0, 1.0)}, "area"),
        ({"area": (0.5, 0.4)}, "area"),
        ({"area": (0.5, 1.1)}, "area"),
        ({"area": (0.5,)}, "area.*two numbers"),
        ({"aspect": (0.0, 1.0)}, "aspect"),
        ({"center_ratio": 0.0}, "center_ratio"),
        ({"flip": 1}, "flip"),
        ({"randaugment_num_ops": -1}, "randaugment_num_ops"),
        ({"randaugment_num_ops": 1.5}, "randaugment_num_ops"),
        (
            {"randaugment_magnitude": 31},
            "at most 30. Received: randaugment_magnitude=31",
        ),
        ({"mixup": -0.1}, "mixup"),
        ({"mixup": 0.001}, "mixup.*0.01 to 100"),
        ({"cutmix": float("nan")}, "cutmix"),
        ({"crop": ["whole"]}, "`crop` must be one of 'random_resized'"),
        ({"area": 0.5}, "`area` must be two numbers.*area=0.5"),
        ({"area": ("a", 1)}, "`area` must be two numbers"),
        ({"area": "ab"}, "`area` must be two numbers"),
        ({"aspect": None}, "`aspect` must be two numbers"),
        ({"aspect": (True, 2)}, "`aspect` must be two numbers"),
        ({"center_ratio": "a"}, "`center_ratio` must be a number above 0 and at most 1"),
        ({"randaugment_magnitude": None}, "`randaugment_magnitude` must be a number"),
        ({"mixup": "a"}, "`mixup` must be.*mixup='a'"),
        ({"mixup": True}, "`mixup`"),
    ],
)
def test_wrong_settings_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**wrong)


def test_numpy_numbers_are_converted_to_python_numbers():
    numpys = Augmentation(
        area=tuple(np.array([0.25, 1.0], "float32")),
        aspect=[np.float64(0.5), np.int64(2)],
        center_ratio=np.float32(0.5),
        flip=np.bool_(False),
        randaugment_num_ops=np.int64(2),
        randaugment_magnitude=np.float32(15),
        mixup=np.float32(0.5),
    )
    plain = Augmentation("random_resized", (0.25, 1.0), (0.5, 2), 0.5, False, 2, 15.0, 0.5)
    assert repr(numpys) == repr(plain)


def test_lists_of_a_saved_recipe_become_tuples():
    assert Augmentation(area=[0.2, 1.0]) == Augmentation(area=(0.2, 1.0))
    assert not Augmentation().mixes and Augmentation(cutmix=1.0).mixes
