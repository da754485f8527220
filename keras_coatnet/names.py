"""The names of a network's layers.

Files of weights refer to them, so released names must not change. The names of the layers inside a
block are in `config.py`, with their sizes.
"""

from __future__ import annotations

import re

PREPROCESSING = "preprocessing"
# The layer that holds the network's identity.
NETWORK = "network"

STEM_PAD = "stem_pad"
STEM_CONV1 = "stem_conv1"
STEM_NORM = "stem_norm"
STEM_ACTIVATION = "stem_activation"
STEM_CONV2 = "stem_conv2"

FINAL_NORM = "norm"
AVG_POOL = "avg_pool"
MAX_POOL = "max_pool"
HIDDEN = "hidden"
CLASSIFIER = "predictions"

STEM = (STEM_PAD, STEM_CONV1, STEM_NORM, STEM_ACTIVATION, STEM_CONV2)
AFTER_BLOCKS = (FINAL_NORM, AVG_POOL, MAX_POOL, HIDDEN, CLASSIFIER)
AROUND_BLOCKS = (PREPROCESSING, NETWORK, *STEM, *AFTER_BLOCKS)

# What follows a block's name in the name of its last layer: nothing, or a part of a fused block.
BLOCK_ENDS = ("", "_add", "_ffn_add")


def block_name(stage: int | str, index: int | str) -> str:
    """Returns the name of a block's layer.

    Args:
        stage: the block's stage, from 1.
        index: the block's place within the stage, from 1.

    Returns:
        The name.

    Example:
        >>> block_name(3, 2)
        'stage3_block2'
    """
    return f"stage{stage}_block{index}"


def stage_of(layer: str) -> int | None:
    """Returns the stage that a layer belongs to.

    Args:
        layer: the layer's name.

    Returns:
        0 for the stem, 1 and up for the blocks, None for all other layers.

    Example:
        >>> stage_of("stem_conv1"), stage_of("stage3_block2"), stage_of("predictions")
        (0, 3, None)
    """
    if layer in STEM:
        return 0
    found = re.match(r"stage(\d+)_block\d", layer)
    return int(found[1]) if found else None
