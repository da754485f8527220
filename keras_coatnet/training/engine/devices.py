"""One choice of where a run computes, and the engine that goes with it.

TPUs: the strategy `"tpu"` is written down as TensorFlow's documentation has it, and was never run.
Three things stand in its way. This package asks for TensorFlow 2.21, and the package
`tensorflow-tpu` ends at 2.20; the input pipeline calls Python (`tf.py_function`), which the hosts
of a TPU slice cannot do for another machine; and no test covers it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import keras

from keras_coatnet.model import CoAtNetModel
from keras_coatnet.training.data.gpus import keep_tensorflow_off_gpus
from keras_coatnet.training.engine.optimizer import AdamW
from keras_coatnet.training.recipe import Recipe

TENSORFLOW_STRATEGIES = ("one_device", "mirrored", "multi_worker", "tpu")
JAX_STRATEGIES = ("one_device", "data_parallel", "model_parallel")


def choose_devices(recipe: Recipe, strategy: str = "auto", devices: int | None = None) -> Any:
    """Chooses where to compute. To be called before TensorFlow computes anything.

    Processes of a cluster can find each other only at the start, so this comes first in a run.

    Args:
        recipe: what is computed.
        strategy: one of these.

            - `"auto"`: what there is: a cluster if TF_CONFIG names one, a TPU if TPU_NAME does, all
              GPUs if there are several, else one device.
            - `"one_device"`: the first GPU, or the CPU.
            - `"mirrored"`: the GPUs of this machine, or logical devices of its CPU (TensorFlow).
            - `"multi_worker"`: the same command on each machine, with a TF_CONFIG of its own; the
              output folder is one that all of them see (TensorFlow).
            - `"tpu"`: the TPU that TPU_NAME names, or the one of this machine (TensorFlow).
              Untested, and not expected to work yet; see this module's description.
            - `"data_parallel"`: all devices, each with the whole network (JAX).
            - `"model_parallel"`: all devices, each with a part of it (JAX): for CoAtNet6 and 7.
        devices: how many of this machine's devices; None: all. With `"model_parallel"`: among how
            many the network is divided; None: all.

    Returns:
        What `make_engine` takes.

    Raises:
        ValueError: there is no such strategy here, or there are fewer devices.
    """
    backend = keras.backend.backend()
    offered = {"tensorflow": TENSORFLOW_STRATEGIES, "jax": JAX_STRATEGIES}.get(backend)
    if offered is None:
        raise ValueError(
            f"Training runs on the backends tensorflow and jax. KERAS_BACKEND is {backend!r}."
        )
    if strategy not in ("auto", *offered):
        raise ValueError(
            f"On the backend {backend} the strategy must be one of "
            f"{', '.join(map(repr, ('auto', *offered)))}. Received: strategy={strategy!r}"
        )
    if devices is not None and devices < 1:
        raise ValueError(f"`devices` must be at least 1. Received: devices={devices}")
    keep_tensorflow_off_gpus()
    if backend == "jax":
        return _jax_distribution(strategy, devices, recipe)
    return _tensorflow_strategy(strategy, devices)


def in_cluster(chosen: Any) -> bool:
    """Whether what `choose_devices` returned has devices of other machines or processes."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    elsewhere = (tf.distribute.MultiWorkerMirroredStrategy, tf.distribute.TPUStrategy)
    return isinstance(chosen, elsewhere)


def is_chief(chosen: Any) -> bool:
    """Whether this process writes the files of a run on what `choose_devices` returned."""
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    if not isinstance(chosen, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    resolver = chosen.cluster_resolver
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "chief" or (not has_chief and resolver.task_id in (0, None))


def make_engine(
    chosen: Any,
    make_model: Callable[[], CoAtNetModel],
    make_optimizer: Callable[[CoAtNetModel], AdamW],
    recipe: Recipe,
) -> Any:
    """Makes the engine that trains on the devices that were chosen.

    Args:
        chosen: what `choose_devices` returned.
        make_model: builds the model.
        make_optimizer: builds the optimizer for a model.
        recipe: what is computed.

    Returns:
        A `TensorFlowEngine` or a `JaxEngine`.

    Raises:
        ValueError: the devices do not divide the batch.
    """
    check_batch(chosen, recipe)
    if keras.backend.backend() == "jax":
        from keras_coatnet.training.engine.jax import JaxEngine

        return JaxEngine(chosen, make_model, make_optimizer, recipe)
    from keras_coatnet.training.engine.tensorflow import TensorFlowEngine

    return TensorFlowEngine(chosen, make_model, make_optimizer, recipe)


def count_replicas(chosen: Any) -> int:
    """Over how many devices what `choose_devices` returned splits a batch."""
    if keras.backend.backend() == "jax":
        return _jax_replicas(chosen)
    return chosen.num_replicas_in_sync


def check_batch(chosen: Any, recipe: Recipe) -> None:
    """Checks that a batch can be divided among the devices, and their parts.

    Args:
        chosen: what `choose_devices` returned.
        recipe: what is computed.

    Raises:
        ValueError: it cannot, or images are mixed in pairs and a part has an odd number of them.
    """
    replicas = count_replicas(chosen)
    if recipe.batch_size % (replicas * recipe.gradient_accumulation_steps):
        parts = f"{replicas} devices" if replicas > 1 else "1 device"
        if recipe.gradient_accumulation_steps > 1:
            parts += f" times gradient_accumulation_steps={recipe.gradient_accumulation_steps}"
        raise ValueError(
            f"A batch of {recipe.batch_size} cannot be divided among {parts}. Choose a batch that is a "
            f"multiple of {replicas * recipe.gradient_accumulation_steps}."
        )
    # JAX splits a part further after its images were mixed.
    separate = recipe.gradient_accumulation_steps * (
        1 if keras.backend.backend() == "jax" else replicas
    )
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size // separate % 2:
        raise ValueError(
            f"mixup and CutMix take images in pairs, and a batch of {recipe.batch_size} in {separate} "
            f"parts has {recipe.batch_size // separate} in each. Choose a batch that is a multiple of "
            f"{2 * separate}, another `gradient_accumulation_steps`, or no mixing."
        )


# --- TensorFlow ------------------------------------------------------------------------------


def _tensorflow_strategy(strategy: str, devices: int | None) -> Any:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if strategy == "auto":
        if os.environ.get("TF_CONFIG") and _cluster_size() > 1:
            strategy = "multi_worker"
        elif os.environ.get("TPU_NAME"):
            strategy = "tpu"
        else:
            strategy = "mirrored" if len(gpus) > 1 or (devices or 1) > 1 else "one_device"
    if strategy == "tpu":
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(os.environ.get("TPU_NAME", ""))
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    if strategy == "multi_worker":
        return _multi_worker_strategy(tf)
    if strategy == "one_device":
        if devices not in (None, 1):
            raise ValueError(f"The strategy 'one_device' takes one. Received: devices={devices}")
        return tf.distribute.OneDeviceStrategy("GPU:0" if gpus else "CPU:0")
    if not gpus:
        return tf.distribute.MirroredStrategy(_logical_cpus(tf, devices or 1))
    if (devices or 1) > len(gpus):
        raise ValueError(f"There are {len(gpus)} GPUs. Received: devices={devices}")
    return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(devices or len(gpus))])


def _cluster_size() -> int:
    """How many processes TF_CONFIG names.

    Raises:
        ValueError: it names none, or this process is not one of them.
    """
    variable = os.environ.get("TF_CONFIG")
    try:
        described = json.loads(variable or "")
        cluster, task = described["cluster"], described["task"]
        if 0 <= int(task["index"]) < len(cluster[task["type"]]):
            return sum(map(len, cluster.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(
        "The strategy 'multi_worker' needs the environment variable TF_CONFIG, such as "
        '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": '
        f"0}}}}, where the task is one of the cluster's. Received: TF_CONFIG={variable!r}"
    )


def _multi_worker_strategy(tf: Any) -> Any:
    _cluster_size()
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (RuntimeError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The processes that TF_CONFIG names cannot reach each other: {reason}. Received: "
            f"TF_CONFIG={os.environ['TF_CONFIG']}"
        ) from error


def _logical_cpus(tf: Any, count: int) -> list[str]:
    """Devices that a CPU is divided into: for tests of what several devices compute."""
    if len(tf.config.list_logical_devices("CPU")) < count:
        raise ValueError(
            f"There is no GPU, and the CPU is not divided into {count} logical devices. Call "
            "divide_cpu before TensorFlow does anything else, as the command line does."
        )
    return [f"CPU:{i}" for i in range(count)]


def divide_cpu(count: int) -> None:
    """Divides a CPU into logical devices, where there is no GPU.

    It computes no faster; it shows what several devices compute.

    Args:
        count: into how many.

    Raises:
        ValueError: TensorFlow has started already.
    """
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return
    (cpu, *_) = tf.config.list_physical_devices("CPU")
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:
        raise ValueError(f"The CPU can be divided only at the start: {error}") from error


# --- JAX ---------------------------------------------------------------------------------------


def _jax_distribution(strategy: str, devices: int | None, recipe: Recipe) -> Any:
    from keras_coatnet.training.engine import sharding

    found = keras.distribution.list_devices()
    if (devices or 1) > len(found):
        raise ValueError(f"JAX sees {len(found)} devices. Received: devices={devices}")
    if strategy == "model_parallel":
        parts = devices or len(found)
        if len(found) % parts:
            raise ValueError(
                f"JAX sees {len(found)} devices, which cannot form groups of {parts}. Received: "
                f"devices={devices}"
            )
        return sharding.model_parallel((len(found) // parts, parts), recipe.architecture())
    several = (devices or len(found)) > 1
    if strategy == "data_parallel" or (strategy == "auto" and several):
        return sharding.data_parallel(found[:devices])
    return None


def _jax_replicas(distribution: Any) -> int:
    from keras_coatnet.training.engine.jax import data_replicas

    return data_replicas(distribution)
