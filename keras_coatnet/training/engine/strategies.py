"""TensorFlow's strategies by name, and what they say of their processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import tensorflow as tf

from keras_coatnet.training.engine.devices import check_one_device

# The types of the tasks that train.
_JOBS = ("chief", "worker")


def choose_strategy(name: str, count: int | None) -> tf.distribute.Strategy:
    """Makes a strategy.

    Args:
        name: `"auto"`, `"one_device"`, `"mirrored"`, `"multi_worker"` or `"tpu"`, see
            `devices.choose_devices`.
        count: how many of this machine's devices; None: all.

    Returns:
        The strategy.

    Raises:
        ValueError: there are fewer devices, the strategy uses all of them, or
            TF_CONFIG describes no cluster.
    """
    gpus = len(tf.config.list_physical_devices("GPU"))
    if name == "auto":
        name = _what_there_is(gpus, count)
    if name in ("tpu", "multi_worker"):
        if count is not None:
            raise ValueError(
                f"The strategy {name!r} uses all devices of each machine. Leave `devices` out. "
                f"Received: devices={count}"
            )
        return _tpu_strategy() if name == "tpu" else _multi_worker_strategy()
    if name == "one_device":
        check_one_device(count)
        # TensorFlow's default is the CPU, and reads a data set without the iterator of several
        # devices. That one has a tuner, which sleeps on for up to a minute when the iterator ends.
        return tf.distribute.OneDeviceStrategy("GPU:0") if gpus else tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(_gpus(gpus, count) if gpus else _cpus(count or 1))


def _what_there_is(gpus: int, count: int | None) -> str:
    if os.environ.get("TF_CONFIG") and _cluster_size() > 1:
        return "multi_worker"
    if os.environ.get("TPU_NAME"):
        return "tpu"
    return "mirrored" if gpus > 1 or (count or 1) > 1 else "one_device"


def _gpus(found: int, count: int | None) -> list[str]:
    if (count or 1) > found:
        raise ValueError(f"There are {found} GPUs. Received: devices={count}")
    return [f"GPU:{index}" for index in range(count or found)]


def _cpus(count: int) -> list[str]:
    """Logical devices that the CPU was divided into."""
    if len(tf.config.list_logical_devices("CPU")) < count:
        raise ValueError(
            f"There is no GPU, and the CPU is not divided into {count} logical devices. Call "
            "divide_cpu before TensorFlow does anything else, as the command line does."
        )
    return [f"CPU:{index}" for index in range(count)]


def _tpu_strategy() -> tf.distribute.Strategy:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(os.environ.get("TPU_NAME", ""))
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _multi_worker_strategy() -> tf.distribute.Strategy:
    _cluster_size()
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (RuntimeError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The processes that TF_CONFIG names cannot reach each other: {reason}. Received: "
            f"TF_CONFIG={os.environ['TF_CONFIG']}"
        ) from error


def _cluster_size() -> int:
    """How many processes of TF_CONFIG train.

    Raises:
        ValueError: it describes no cluster, or this process is not one of them.
    """
    variable = os.environ.get("TF_CONFIG")
    try:
        described = json.loads(variable or "")
        cluster, task = described["cluster"], described["task"]
        if task["type"] in _JOBS and 0 <= int(task["index"]) < len(cluster[task["type"]]):
            return _count_training(cluster)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(
        "TF_CONFIG must describe a cluster, and this process's task in it, such as "
        '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": '
        f"0}}}}. Tasks of other types than chief and worker do not train. Received: "
        f"TF_CONFIG={variable!r}"
    )


def _count_training(cluster: Mapping[str, Sequence[str]]) -> int:
    """How many processes of a cluster train: servers and evaluators do not."""
    return sum(len(cluster.get(job, ())) for job in _JOBS)


def in_cluster(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy has devices of other machines or processes."""
    elsewhere = (tf.distribute.MultiWorkerMirroredStrategy, tf.distribute.TPUStrategy)
    return isinstance(strategy, elsewhere)


def count_processes(strategy: tf.distribute.Strategy) -> int:
    """How many processes a strategy joins."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    return _count_training(strategy.cluster_resolver.cluster_spec().as_dict())


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the files of a run: one process of a cluster does."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    resolver = strategy.cluster_resolver
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "chief" or (not has_chief and resolver.task_id in (0, None))
