"""Remote addresses are refused where a local folder would be made of them."""

import pathlib

import pytest

import keras_coatnet
from keras_coatnet.paths import check_local


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "S3://bucket", "https://host/x.keras", pathlib.Path("gs://bucket")]
)
def test_addresses_are_refused(path):
    with pytest.raises(ValueError, match="`output` must be a path on this machine.*Received: out"):
        check_local(path, "output")


@pytest.mark.parametrize(
    "path", [None, "runs/gs", "/data/a:b", "C:/runs", "./gs:/run", pathlib.Path("a"), "cifar10:3.0"]
)
def test_paths_are_not(path):
    check_local(path, "output")


def test_weights_at_an_address_are_refused_and_names_are_not(tiny):
    for weights in ("gs://bucket/a.weights.h5", "gs://bucket/a", pathlib.Path("s3://b/a.h5")):
        with pytest.raises(ValueError, match="`weights` must be a path on this machine"):
            keras_coatnet.CoAtNet(tiny, weights=weights)
    with pytest.raises(ValueError, match="belong to the architecture 'coatnet_3_rw_224'"):
        keras_coatnet.CoAtNet(tiny, weights="hf://timm/coatnet_3_rw_224.sw_in12k")
