"""Where a network begins, marked in the graph, with what must not get lost when it is copied."""

from __future__ import annotations

import json
from typing import Any

import keras

from keras_coatnet.layers.base import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class NetworkIdentity(keras.layers.Identity):
    """Passes its input on unchanged, and holds which network follows.

    Keras clones a functional model layer by layer, and puts layers of one model into the graph of
    another. Attributes of the model do not survive that; the configuration of a layer does.

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
        # Keras wraps dictionaries that it finds in attributes; JSON text it leaves alone.
        self._identity = json.dumps(identity)

    @property
    def identity(self) -> dict[str, Any]:
        """The identity, as it was given."""
        return json.loads(self._identity)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "identity": self.identity}
