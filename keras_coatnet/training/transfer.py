"""Training a network that has weights already: which layers learn, and how fast."""

from __future__ import annotations

import keras

from keras_coatnet.arguments import boolean, choice, number
from keras_coatnet.model import CoAtNetModel
from keras_coatnet.names import stage_of
from keras_coatnet.training.choices import FREEZES


def layer_rate_scales(model: CoAtNetModel, decay: float) -> dict[str, float]:
    """Layer-wise decay of the learning rate, as in BEiT: lower layers learn more slowly.

    Args:
        model: the network.
        decay: factor from one block to the one below it, above 0.

    Returns:
        The factor for each layer's name: 1 for the head, `decay` for the last block, and so on
        down to the stem. `AdamW` takes it as `rate_scales`.

    Raises:
        ValueError: `decay` is not a number above 0, or the model is fused or not a whole CoAtNet.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> layer_rate_scales(model, 0.5)["stage3_block2"]
        0.25
    """
    decay = number("decay", decay, above=0)
    _check_not_fused(model)
    if model.architecture is None:
        raise ValueError(
            f"`model` must be one whole CoAtNet. Received: {model.name!r}, which has other layers. "
            "Use the CoAtNet alone."
        )
    blocks = [block.name for block in model.architecture.blocks()]
    depths = {name: depth for depth, name in enumerate(reversed(blocks), start=1)}
    for layer in model.layers:
        if stage_of(layer.name) == 0:
            depths[layer.name] = len(blocks) + 1
    return {layer.name: decay ** depths.get(layer.name, 0) for layer in model.layers}


def freeze(model: CoAtNetModel, up_to: str, batch_norm: bool) -> None:
    """Freezes the lower part of a network, its BatchNorm layers, or both.

    A frozen BatchNorm keeps its moving statistics too, as everywhere in Keras.

    Args:
        model: the network.
        up_to: `"none"`, `"stem"`, or `"stage1"` to `"stage4"`: the last part that is frozen. All
            below it is frozen with it.
        batch_norm: whether to freeze every BatchNorm layer, in all parts.

    Raises:
        ValueError: `up_to` is none of these, `batch_norm` is not a boolean, or the model is fused.

    Example:
        >>> from keras_coatnet import CoAtNet, CoAtNetConfig
        >>> config = CoAtNetConfig((32, 64, 128, 256), depths=(1, 1, 2, 1), stem_width=16)
        >>> model = CoAtNet(config, input_shape=(64, 64, 3), classes=10)
        >>> freeze(model, "stage4", batch_norm=False)
        >>> sorted({v.path.split("/")[0] for v in model.trainable_variables})
        ['hidden', 'norm', 'predictions']
    """
    last_stage = FREEZES.index(choice("up_to", up_to, FREEZES)) - 1  # the stem is stage 0
    batch_norm = boolean("batch_norm", batch_norm)
    _check_not_fused(model)
    for layer in model.layers:
        stage = stage_of(layer.name)
        if stage is not None and stage <= last_stage:
            layer.trainable = False
    if batch_norm:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False


def _check_not_fused(model: CoAtNetModel) -> None:
    if getattr(model, "fused", False):  # a plain model of a CoAtNet's layers has no such attribute
        raise ValueError(
            f"A fused model is for inference: it has no BatchNorm, and other layers. Train the "
            f"model before `fuse`. Received a fused model: {model.name!r}"
        )
