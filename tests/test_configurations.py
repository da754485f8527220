"""Any configuration that is accepted builds, runs, counts right, saves and reloads."""

from __future__ import annotations

import json
import os

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_coatnet
from keras_coatnet import CoAtNetConfig
from tests.helpers import CHOICES

# More of them, and other ones each time: KERAS_COATNET_EXAMPLES=300 pytest tests/test_config...
EXAMPLES = os.environ.get("KERAS_COATNET_EXAMPLES")
few = settings(
    max_examples=int(EXAMPLES or 15),
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
HEAD = 8
widths = st.integers(1, 4).map(lambda heads: HEAD * heads)
small = st.integers(1, 3)
numbers = st.floats(1e-6, 1e-1)


@st.composite
def configurations(draw) -> CoAtNetConfig:
    kinds = ["C"] * draw(st.integers(0, 3)) + ["CT"] * draw(st.integers(0, 1))
    kinds += ["T"] * draw(st.integers(0 if kinds else 1, 2))
    pairs = [kind == "CT" for kind in kinds]
    depth = st.integers(1, 2)
    fields = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items()}
    booleans = ("stem_bias", "conv_prenorm_activation", "conv_bias", "attention_bias")
    booleans += ("transformer_shortcut_bias", "ffn_bias", "hidden_head")
    channels = draw(st.sampled_from([1, 3, 4]))
    stem = draw(st.one_of(widths, st.tuples(st.integers(1, 9), widths)))
    chosen = [draw(st.tuples(widths, widths) if pair else widths) for pair in pairs]
    if fields["conv_block"] == "convnext":
        fields["stride_on"] = draw(st.sampled_from(["depthwise", "pool"]))
        fields["conv_layer_scale"] = draw(st.one_of(st.none(), numbers))
        # Each width must be a multiple of the one before.
        stem = (draw(st.integers(1, 9)), HEAD)
        chosen = [(HEAD, 2 * HEAD) if pair else HEAD for pair in pairs]
    return CoAtNetConfig(
        widths=chosen,
        depths=[draw(st.tuples(depth, depth) if pair else depth) for pair in pairs],
        layout=kinds,
        stem_width=stem,
        head_dim=draw(st.sampled_from([1, 2, 4, HEAD])),
        expansion=draw(small),
        ffn_expansion=draw(small),
        squeeze_ratio=draw(st.sampled_from([1e-3, 0.1, 0.25, 1, 2.5])),
        relative_position_hidden_dim=draw(st.integers(1, 16)),
        batch_norm_epsilon=draw(numbers),
        batch_norm_momentum=draw(st.sampled_from([0, 0.5, 0.99])),
        transformer_norm_epsilon=draw(numbers),
        layer_scale=draw(st.one_of(st.none(), numbers)),
        stochastic_depth=draw(st.sampled_from([0, 0.3, 0.99])),
        input_size=draw(st.one_of(st.integers(32, 70), st.tuples(*[st.integers(32, 48)] * 2))),
        pixel_mean=[draw(st.floats(0, 1)) for _ in range(channels)],
        pixel_std=[draw(st.floats(0.1, 1)) for _ in range(channels)],
        **fields,
        **{name: draw(st.booleans()) for name in booleans},
    )


@pytest.mark.slow  # a network of each, built twice
@given(
    config=configurations(),
    classes=st.sampled_from([1, 2, 7]),
    channels=st.sampled_from([1, 3, 4]),
    include_top=st.booleans(),
    include_preprocessing=st.booleans(),
)
@few
def test_what_is_accepted_builds_runs_counts_saves_and_reloads(
    tmp_path_factory, config, classes, channels, include_top, include_preprocessing
):
    assert eval(repr(config)) == config
    assert CoAtNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    shape = (*config.input_sides, channels)
    options = {
        "include_top": include_top,
        "include_preprocessing": include_preprocessing,
        "input_shape": shape,
        "classes": classes,
    }
    model = keras_coatnet.CoAtNet(config, **options)
    counted = keras_coatnet.count_params(config, shape, classes, include_top)
    assert counted == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert keras_coatnet.count_flops(config, shape, classes=classes, include_top=include_top) > 0

    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255 if include_preprocessing else 1, (2, *shape)).astype("float32")
    for variable in model.trainable_variables:  # nothing is left at its first value
        variable.assign(variable + rng.normal(0, 0.05, variable.shape).astype("float32"))
    expected = keras.ops.convert_to_numpy(model(images, training=False))
    assert np.isfinite(expected).all()
    if include_top:
        assert expected.shape == (2, classes)
        np.testing.assert_allclose(expected.sum(1), 1, atol=1e-5)
    trained = keras.ops.convert_to_numpy(model(images, training=True))
    assert trained.shape == expected.shape and np.isfinite(trained).all()
    expected = keras.ops.convert_to_numpy(model(images, training=False))  # the norms have moved

    folder = tmp_path_factory.mktemp("saved")
    model.save_weights(folder / "model.weights.h5")
    model.save(folder / "model.keras")
    again = keras_coatnet.CoAtNet(config, weights=folder / "model.weights.h5", **options)
    whole = keras.saving.load_model(folder / "model.keras", compile=False)
    for other in (again, whole):
        assert other.architecture == model.architecture
        found = keras.ops.convert_to_numpy(other(images, training=False))
        np.testing.assert_array_equal(found, expected)
