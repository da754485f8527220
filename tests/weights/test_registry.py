"""The registry has complete data, and names find the right checkpoints."""

import dataclasses
import re

import pytest

from keras_coatnet.weights import registry
from keras_coatnet.weights.registry import CHECKPOINTS, SIZES, checkpoints, find

TIMM = [c for c in CHECKPOINTS.values() if c.source == "timm"]
KECAM = [c for c in CHECKPOINTS.values() if c.source == "keras_cv_attention_models"]


def test_lists_the_eighteen_in_order():
    names = checkpoints()
    assert isinstance(names, tuple)
    assert len(names) == len(set(names)) == 18
    assert names[0] == "coatnet_0_rw_224.sw_in1k"
    assert names[-2:] == ("kecam_coatnet0_224", "kecam_coatnet0_160")
    assert names[-3] == "coatnext_nano_rw_224.sw_in1k"
    assert len(TIMM) == 16 and len(KECAM) == 2


@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=lambda c: c.name)
def test_every_entry_is_complete_and_plausible(checkpoint):
    assert checkpoint.filename.endswith((".safetensors", ".h5"))
    assert checkpoint.url.startswith("https://") and checkpoint.url.endswith(checkpoint.filename)
    assert checkpoint.classes in (1000, 11821)
    assert checkpoint.input_size in (160, 224, 384)
    assert isinstance(checkpoint.mean, tuple) and len(checkpoint.mean) == 3
    assert isinstance(checkpoint.std, tuple) and all(0 < value < 1 for value in checkpoint.std)
    assert 0 < checkpoint.crop_pct <= 1 and checkpoint.crop_mode in ("center", "squash")
    assert checkpoint.sha256 is None or re.fullmatch("[0-9a-f]{64}", checkpoint.sha256)
    assert checkpoint.md5 is None or re.fullmatch("[0-9a-f]{32}", checkpoint.md5)
    # Each accuracy has a source. Accuracies are on ImageNet-1k, so only for its 1000 classes.
    assert (checkpoint.top1 is None) == (checkpoint.measured_by is None)
    assert (checkpoint.top1 is None) == (checkpoint.classes != 1000)
    # float32: four bytes for each parameter, plus buffers and a header; megabytes were rounded.
    assert checkpoint.size is None or 0.99 < checkpoint.size / (4 * checkpoint.parameters) < 1.02


@pytest.mark.parametrize("checkpoint", TIMM, ids=lambda c: c.name)
def test_timm_entries_point_to_one_revision_of_their_repository(checkpoint):
    assert checkpoint.repo == "timm/" + checkpoint.name
    assert checkpoint.name.startswith(checkpoint.architecture + ".")
    assert checkpoint.filename == "model.safetensors"
    assert checkpoint.url == (
        f"https://huggingface.co/{checkpoint.repo}/resolve/"
        f"{checkpoint.revision or 'main'}/model.safetensors"
    )


@pytest.mark.parametrize("checkpoint", KECAM, ids=lambda c: c.name)
def test_kecam_entries_have_an_address_and_a_hash(checkpoint):
    assert checkpoint.repo is None and checkpoint.md5
    assert checkpoint.architecture == "kecam_coatnet0"
    assert str(checkpoint.input_size) in checkpoint.filename


def test_a_checkpoint_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHECKPOINTS["kecam_coatnet0_224"].url = "http://elsewhere"


@pytest.mark.parametrize(
    "size, word, name",
    [
        ("coatnet0", "imagenet", "coatnet_0_rw_224.sw_in1k"),
        ("coatnet1", "imagenet", "coatnet_1_rw_224.sw_in1k"),
        ("coatnet1", "imagenet12k_ft", "coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k"),
        ("coatnet1", "imagenet12k", "coatnet_rmlp_1_rw2_224.sw_in12k"),
        ("coatnet2", "imagenet", "coatnet_2_rw_224.sw_in12k_ft_in1k"),
        ("coatnet2", "imagenet12k_ft", "coatnet_2_rw_224.sw_in12k_ft_in1k"),
        ("coatnet2", "imagenet12k", "coatnet_2_rw_224.sw_in12k"),
        ("coatnet3", "imagenet12k", "coatnet_3_rw_224.sw_in12k"),
        ("coatnet_nano", "imagenet", "coatnet_rmlp_nano_rw_224.sw_in1k"),
    ],
)
def test_words_mean_one_checkpoint_for_each_size(size, word, name):
    assert find(word, size).name == name


def test_words_agree_with_the_number_of_classes():
    for words in SIZES.values():
        for word, name in words.items():
            assert CHECKPOINTS[name].classes == (11821 if word == "imagenet12k" else 1000)


@pytest.mark.parametrize("size", [None, "coatnet0", "coatnet_nano"])
@pytest.mark.parametrize("prefix", ["", "timm/", "hf://timm/"])
def test_names_are_found_with_and_without_their_account(prefix, size):
    for checkpoint in TIMM:
        assert find(prefix + checkpoint.name, size) is checkpoint


def test_kecam_names_have_no_account():
    assert find("kecam_coatnet0_160", None).input_size == 160
    for name in ("timm/kecam_coatnet0_160", "kecam/coatnet0_160_imagenet"):
        with pytest.raises(ValueError, match="Unknown weights"):
            find(name, None)


@pytest.mark.parametrize("word", ["imagenet", "imagenet12k", "imagenet12k_ft"])
def test_the_generic_constructor_needs_a_name(word):
    with pytest.raises(ValueError, match=f"'{word}'.*checkpoint's own name.*coatnet_0_rw_224"):
        find(word, None)


@pytest.mark.parametrize("size", ["coatnet4", "coatnet5", "coatnet6", "coatnet7"])
@pytest.mark.parametrize("weights", ["imagenet", "imagenet12k", "coatnet_3_rw_224.sw_in12k"])
def test_large_sizes_have_no_weights(size, weights):
    with pytest.raises(ValueError, match=f"Nobody published weights for {size}") as caught:
        find(weights, size)
    assert "weights=None" in str(caught.value) and "path" in str(caught.value)


def test_size_three_has_no_imagenet_and_the_error_names_its_words():
    for word in ("imagenet", "imagenet12k_ft"):
        with pytest.raises(ValueError, match=f"'{word}'.*coatnet3.*'imagenet12k'"):
            find(word, "coatnet3")


def test_size_zero_has_one_word_only():
    with pytest.raises(ValueError, match="'imagenet12k'.*coatnet0.*'imagenet'"):
        find("imagenet12k", "coatnet0")


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("coatnet_0_rw_224", "coatnet_0_rw_224.sw_in1k"),
        ("coatnet_2_rw_224.sw_in12k_ft_in1", "coatnet_2_rw_224.sw_in12k_ft_in1k"),
        ("hf://timm/coatnet_3_rw_224.sw_in1k", "coatnet_3_rw_224.sw_in12k"),
        ("kecam_coatnet0", "kecam_coatnet0_224"),
    ],
)
def test_an_unknown_name_gets_close_ones_and_the_list(typed, meant):
    with pytest.raises(ValueError) as caught:
        find(typed, None)
    message = str(caught.value)
    assert repr(typed) in message
    assert repr(meant) in message.split("Did you mean")[1].split("?")[0]
    assert all(name in message for name in checkpoints())


def test_an_unknown_word_gets_the_words_of_its_size():
    with pytest.raises(ValueError, match="Did you mean 'imagenet12k'"):
        find("imagenet21k", "coatnet1")


def test_a_name_like_no_other_gets_the_list_alone():
    with pytest.raises(ValueError) as caught:
        find("zzz", None)
    assert "Did you mean" not in str(caught.value) and checkpoints()[0] in str(caught.value)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="Unknown size 'coatnet9'.*coatnet0"):
        find("imagenet", "coatnet9")


def test_every_word_leads_to_an_entry():
    assert list(SIZES) == [f"coatnet{i}" for i in range(8)] + ["coatnet_nano"]
    assert {n for words in SIZES.values() for n in words.values()} <= set(CHECKPOINTS)


def test_the_module_needs_the_standard_library_only():
    source = registry.__loader__.get_source(registry.__name__)
    assert "keras." not in "\n".join(re.findall(r"^(?:import|from) .*$", source, re.M))
