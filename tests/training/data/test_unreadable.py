"""`UnreadableImages` counts and names the images that cannot be read, and says what to do."""

from __future__ import annotations

import pytest

from keras_coatnet.training.data.unreadable import UnreadableImages


def test_an_image_counts_once():
    unreadable = UnreadableImages(limit=1)
    for _ in range(3):
        unreadable.add("a", "truncated")
    assert unreadable.names == ["a"]
    assert unreadable.reasons == {"a": "truncated"}
    assert unreadable.error is None


def test_more_images_than_the_limit_raise_an_error():
    unreadable = UnreadableImages(limit=1)
    unreadable.add("a", "truncated")
    with pytest.raises(ValueError, match=r"2 images .* limit of 1: a \(truncated\), b \(empty\)"):
        unreadable.add("b", "empty")
    with pytest.raises(ValueError, match="2 images"):
        unreadable.add("a", "truncated")


def test_the_error_names_the_limit_for_the_command_line_and_for_python():
    unreadable = UnreadableImages(limit=0)
    with pytest.raises(ValueError) as caught:
        unreadable.add("a", "empty")
    for option in ("`--unreadable-limit` on the command line", "`limit` of `UnreadableImages`"):
        assert option in str(caught.value)


def test_the_error_of_a_batch_does_not_advise_a_higher_limit():
    with pytest.raises(ValueError, match="No image of a batch of 8 can be read") as caught:
        UnreadableImages(limit=9).refuse_batch(8)
    assert str(caught.value).endswith("Repair or remove them.")


def test_the_error_lists_only_the_last_names():
    unreadable = UnreadableImages(limit=30)
    with pytest.raises(ValueError, match="30.jpg .* and 21 more"):
        for index in range(31):
            unreadable.add(f"{index}.jpg", "empty")


@pytest.mark.parametrize("limit", [-1, 1.5, True])
def test_wrong_limits_raise_an_error(limit):
    with pytest.raises(ValueError, match="limit"):
        UnreadableImages(limit)
