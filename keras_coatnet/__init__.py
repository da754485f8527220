"""CoAtNet (Dai et al., 2021) for Keras 3."""

from keras_coatnet import explain, layers
from keras_coatnet.applications import (
    CoAtNet,
    CoAtNet0,
    CoAtNet1,
    CoAtNet2,
    CoAtNet3,
    CoAtNet4,
    CoAtNet5,
    CoAtNet6,
    CoAtNet7,
    CoAtNetNano,
    preprocess_input,
)
from keras_coatnet.architectures import architectures
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.counting.operations import count_flops, count_params
from keras_coatnet.exporting.export import export
from keras_coatnet.exporting.loaded import load_exported
from keras_coatnet.features import feature_extractor, feature_pyramid
from keras_coatnet.fusion import fuse
from keras_coatnet.labels import decode_predictions
from keras_coatnet.model import CoAtNetModel
from keras_coatnet.version import __version__ as __version__
from keras_coatnet.weights.registry import checkpoints

__all__ = [
    "CoAtNet",
    "CoAtNet0",
    "CoAtNet1",
    "CoAtNet2",
    "CoAtNet3",
    "CoAtNet4",
    "CoAtNet5",
    "CoAtNet6",
    "CoAtNet7",
    "CoAtNetConfig",
    "CoAtNetModel",
    "CoAtNetNano",
    "architectures",
    "checkpoints",
    "count_flops",
    "count_params",
    "decode_predictions",
    "explain",
    "export",
    "feature_extractor",
    "feature_pyramid",
    "fuse",
    "layers",
    "load_exported",
    "preprocess_input",
]
