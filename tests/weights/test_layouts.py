"""The names in the tables of the file readers are those of the described network."""

import pytest

from keras_coatnet.architectures import ARCHITECTURES
from keras_coatnet.weights import kecam_layout, timm_layout

# Not in the tables: one layer computes q, k and v in both layouts, and bias tables are mirrored.
ATTENTION = {f"attention/{name}" for name in ("query", "key", "value", "position")}


def described(layer, *names):
    """Sublayers with variables, of the blocks of a kind or of stem and head."""
    found = set()
    for name in names:
        config = ARCHITECTURES[name]
        parts = [config.stem(), config.head()] if layer is None else config.blocks()
        for part in parts:
            if layer in (None, getattr(part, "layer", None)):
                found |= {sublayer.name for sublayer in part.sublayers if sublayer.name}
    return found


TIMM = tuple(name for name in ARCHITECTURES if "_rw_" in name or name.endswith("_224"))


@pytest.mark.parametrize(
    ("table", "layer", "rest"),
    [
        (timm_layout._MBCONV, "MBConv", set()),
        (timm_layout._CONVNEXT, "ConvNeXtBlock", set()),
        (timm_layout._TRANSFORMER, "TransformerBlock", ATTENTION),
        (timm_layout._OUTSIDE_BLOCKS, None, set()),
    ],
    ids=["mbconv", "convnext", "transformer", "outside"],
)
def test_timm_s_tables_name_every_sublayer(table, layer, rest):
    assert {*table.values(), *rest} == described(layer, *TIMM)


def test_the_tables_of_kecam_name_every_sublayer():
    inside = described("MBConv", "kecam_coatnet0") | described("TransformerBlock", "kecam_coatnet0")
    assert {*kecam_layout._IN_BLOCKS.values(), *ATTENTION} == inside
    assert set(kecam_layout._OUTSIDE_BLOCKS.values()) == described(None, "kecam_coatnet0")
