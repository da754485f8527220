"""A layer that marks the start of a network in a graph, and says which network it is."""

from __future__ import annotations

import json
from typing import Any

import keras

from keras_coatnet.layers.base import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class NetworkIdentity(keras.layers.Identity):
    """Returns its input unchanged, and holds the identity of the network that follows.

    Keras clones a functional model layer by layer, and can put layers of one model into the graph
    of another. Both lose the attributes of the model, but keep the configuration of each layer.

    Args:
        identity: `Identity.to_dict()` of the model that the layer was made for.
        **kwargs: `keras.layers.Layer`'s own arguments.

    Input and output shape: any.

    Example:
        >>> NetworkIdentity({"channels": 3})(keras.ops.ones((2, 7, 5, 3))).shape == (2, 7, 5, 3)
        True
    """

    def __init__(self, identity: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # As JSON, because Keras would replace a dictionary in an attribute by a tracking wrapper.
        self._identity = json.dumps(identity)

    @property
    def identity(self) -> dict[str, Any]:
        """The argument `identity`."""
        return json.loads(self._identity)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "identity": self.identity}
