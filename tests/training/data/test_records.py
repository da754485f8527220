"""The message about a wrong label is found in TensorFlow's error."""

from __future__ import annotations

import pytest
import tensorflow as tf

from keras_coatnet.training.data.records import LABEL_ERROR, find_label_error

pytestmark = pytest.mark.tensorflow_only


@pytest.mark.parametrize("parallel", [None, 2])
def test_a_label_error_is_found_if_the_name_has_brackets(parallel):
    text = "Expected one label from 0 to 9 for cats [old]/1.jpg. Received: 12"

    def check(number: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([tf.debugging.Assert(number < 2, [LABEL_ERROR + text])]):
            return tf.identity(number)

    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        list(tf.data.Dataset.range(4).map(check, num_parallel_calls=parallel).prefetch(1))
    assert find_label_error(caught.value) == text


def test_other_errors_are_not_label_errors():
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        tf.debugging.Assert(False, ["Expected one label"])
    assert find_label_error(caught.value) is None
