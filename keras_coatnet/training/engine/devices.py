"""Where a run computes: the choice of devices, and the engine that goes with it.

TPUs: the strategy `"tpu"` follows TensorFlow's documentation, and was never run. Three things stand
in its way. This package needs TensorFlow 2.21, and the package `tensorflow-tpu` ends at 2.20; the
input pipeline calls Python (`tf.py_function`), which the hosts of a TPU slice cannot do for another
machine; and no test covers it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from keras_coatnet.arguments import whole_number
from keras_coatnet.training.choices import JAX_STRATEGIES, TENSORFLOW_STRATEGIES
from keras_coatnet.training.data.gpus import keep_tensorflow_off_gpus

if TYPE_CHECKING:
    from keras_coatnet.config import CoAtNetConfig
    from keras_coatnet.model import CoAtNetModel
    from keras_coatnet.training.engine.base import Engine, StepConfig
    from keras_coatnet.training.engine.jax import Distribution
    from keras_coatnet.training.engine.optimizer import AdamW


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run. `choose_devices` makes it.

    Attributes:
        strategy: a `tf.distribute.Strategy` on TensorFlow; on JAX a `keras.distribution`'s
            `DataParallel` or `ModelParallel`, or None for one device.
        replicas: over how many devices a batch is split.
        in_cluster: whether some of the devices belong to other machines or processes.
        is_chief: whether this process writes the run's files.
    """

    strategy: Any
    replicas: int
    in_cluster: bool = False
    is_chief: bool = True


def choose_devices(
    architecture: str | CoAtNetConfig, strategy: str = "auto", devices: int | None = None
) -> Devices:
    """Chooses where to compute. Call it before TensorFlow computes anything.

    The processes of a cluster can only find each other at the start, so this comes first in a run.

    Args:
        architecture: the network that will be trained: a name or a `CoAtNetConfig`. Only
            `"model_parallel"` uses it.
        strategy: one of these.

            - `"auto"`: a cluster if TF_CONFIG names one, a TPU if TPU_NAME does, all GPUs if there
              are several, else one device.
            - `"one_device"`: the first GPU, or the CPU.
            - `"mirrored"`: the GPUs of this machine, or logical devices of its CPU (TensorFlow).
            - `"multi_worker"`: several processes, which run the same command, each with a TF_CONFIG
              of its own. The output folder is one that all of them see (TensorFlow).
            - `"tpu"`: the TPU that TPU_NAME names, or the one of this machine (TensorFlow).
              Untested, and not expected to work yet; see this module's description.
            - `"data_parallel"`: all devices, each with the whole network (JAX).
            - `"model_parallel"`: all devices, each with a part of the network (JAX): for CoAtNet6
              and CoAtNet7.
        devices: how many of this machine's devices; None: all. With `"model_parallel"`: over how
            many devices the network is split; None: all. A cluster and a TPU use all, and
            `"one_device"` uses one.

    Returns:
        The devices, for `make_engine`.

    Raises:
        ValueError: the backend has no such strategy, it does not use that number of devices, or
            there are fewer.
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
    if devices is not None:
        devices = whole_number("devices", devices)
    keep_tensorflow_off_gpus()
    if backend == "jax":
        return _jax_devices(architecture, strategy, devices)
    return _tensorflow_devices(strategy, devices)


def _tensorflow_devices(name: str, count: int | None) -> Devices:
    from keras_coatnet.training.engine import strategies

    strategy = strategies.choose_strategy(name, count)
    return Devices(
        strategy,
        replicas=strategy.num_replicas_in_sync,
        in_cluster=strategies.in_cluster(strategy),
        is_chief=strategies.is_chief(strategy),
    )


def _jax_devices(architecture: str | CoAtNetConfig, strategy: str, count: int | None) -> Devices:
    from keras_coatnet.training.engine.jax import data_replicas

    distribution = _jax_distribution(architecture, strategy, count)
    return Devices(distribution, replicas=data_replicas(distribution))


def _jax_distribution(
    architecture: str | CoAtNetConfig, strategy: str, count: int | None
) -> Distribution | None:
    from keras_coatnet.training.engine import sharding

    if strategy == "one_device":
        check_one_device(count)
        return None
    found = keras.distribution.list_devices()
    if (count or 1) > len(found):
        raise ValueError(f"JAX sees {len(found)} devices. Received: devices={count}")
    if strategy == "model_parallel":
        parts = count or len(found)
        if len(found) % parts:
            raise ValueError(
                f"JAX sees {len(found)} devices, which cannot form groups of {parts}. Received: "
                f"devices={count}"
            )
        return sharding.model_parallel((len(found) // parts, parts), architecture)
    several = (count or len(found)) > 1
    if strategy == "data_parallel" or (strategy == "auto" and several):
        return sharding.data_parallel(found[:count])
    return None


def check_one_device(count: int | None) -> None:
    """Checks that a run on one device was not asked for on several.

    Args:
        count: the number of devices that was asked for, or None.

    Raises:
        ValueError: it is another number than one.
    """
    if count not in (None, 1):
        raise ValueError(
            "The strategy 'one_device' uses one device. Choose another strategy, or leave "
            f"`devices` out. Received: devices={count}"
        )


def divide_cpu(count: int) -> None:
    """Divides the CPU into logical devices for TensorFlow, where there is no GPU.

    It makes nothing faster. It shows what several devices would compute.

    Args:
        count: into how many.

    Raises:
        ValueError: TensorFlow has started already.
    """
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:
        raise ValueError(f"The CPU can be divided only at the start: {error}") from error


def make_engine(
    devices: Devices,
    make_model: Callable[[], CoAtNetModel],
    make_optimizer: Callable[[CoAtNetModel], AdamW],
    config: StepConfig,
) -> Engine:
    """Makes the engine that trains on the devices that were chosen.

    Args:
        devices: what `choose_devices` returned.
        make_model: builds the model.
        make_optimizer: builds the optimizer for a model.
        config: what a step computes.

    Returns:
        A `TensorFlowEngine` or a `JaxEngine`.

    Raises:
        ValueError: the devices do not divide the batch.
    """
    check_batch(devices, config)
    if keras.backend.backend() == "jax":
        from keras_coatnet.training.engine.jax import JaxEngine

        return JaxEngine(devices.strategy, make_model, make_optimizer, config)
    from keras_coatnet.training.engine.tensorflow import TensorFlowEngine

    return TensorFlowEngine(devices.strategy, make_model, make_optimizer, config)


def check_batch(devices: Devices, config: StepConfig, in_pairs: bool = False) -> None:
    """Checks that a batch can be divided among the devices, and into its chunks.

    Args:
        devices: what `choose_devices` returned.
        config: what a step computes.
        in_pairs: whether images are mixed in pairs, by mixup or CutMix.

    Raises:
        ValueError: it cannot, or images are mixed in pairs and a chunk has an odd number of them.
    """
    batch_size, steps = config.batch_size, config.gradient_accumulation_steps
    if batch_size % (devices.replicas * steps):
        parts = f"{devices.replicas} device{'s' if devices.replicas > 1 else ''}"
        if steps > 1:
            parts += f" times gradient_accumulation_steps={steps}"
        raise ValueError(
            f"A batch of {batch_size} cannot be divided among {parts}. Choose a batch that is a "
            f"multiple of {devices.replicas * steps}."
        )
    # JAX mixes the images of a chunk before it splits the chunk over the devices.
    mixed_apart = steps * (1 if keras.backend.backend() == "jax" else devices.replicas)
    if in_pairs and batch_size // mixed_apart % 2:
        raise ValueError(
            f"mixup and CutMix take images in pairs, and a batch of {batch_size} in {mixed_apart} "
            f"parts has {batch_size // mixed_apart} in each. Choose a batch that is a multiple of "
            f"{2 * mixed_apart}, another `gradient_accumulation_steps`, or no mixing."
        )
