"""The parts of a CoAtNet as Keras layers, each usable alone."""

from keras_coatnet.layers.attention import RelativeSelfAttention
from keras_coatnet.layers.convnext import ConvNeXtBlock
from keras_coatnet.layers.layer_scale import LayerScale
from keras_coatnet.layers.mbconv import MBConv
from keras_coatnet.layers.pooling import Downsample
from keras_coatnet.layers.relative_position import RelativePositionMLP, RelativePositionTable
from keras_coatnet.layers.squeeze_excite import SqueezeExcite
from keras_coatnet.layers.stochastic_depth import StochasticDepth
from keras_coatnet.layers.transformer import TransformerBlock

__all__ = [
    "ConvNeXtBlock",
    "Downsample",
    "LayerScale",
    "MBConv",
    "RelativePositionMLP",
    "RelativePositionTable",
    "RelativeSelfAttention",
    "SqueezeExcite",
    "StochasticDepth",
    "TransformerBlock",
]
