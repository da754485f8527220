"""One contender of `speed.py`, in a process of its own: it is told what to time, and answers.

    python benchmarks/contenders.py NAME MODEL SIZE BATCH MODE

The first line it prints is JSON: versions, seconds to build and to run once. Then, for each line
that it reads ("20": twenty runs), the milliseconds of one run, the median of them; and at the end
the peak of its memory. It imports nothing but what the contender needs, so that the libraries of
others may live in other environments.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

CLASSES = 1000
# What others call the same network, or one of like operations.
TIMM = {"coatnet0": "coatnet_0_224", "coatnet1": "coatnet_1_224"}
TIMM |= {"coatnet2": "coatnet_2_224", "coatnet3": "coatnet_3_224", "coatnet4": "coatnet_4_224"}
KECAM = {f"coatnet{n}": f"CoAtNet{n}" for n in range(5)}
LIKE = {
    "convnext": {
        "coatnet0": "ConvNeXtTiny",
        "coatnet1": "ConvNeXtSmall",
        "coatnet2": "ConvNeXtBase",
    },
    "efficientnetv2": {
        "coatnet0": "EfficientNetV2B3",
        "coatnet1": "EfficientNetV2S",
        "coatnet2": "EfficientNetV2M",
    },
}


def images(batch: int, size: int) -> np.ndarray:
    """(batch, size, size, 3), float32, raw pixels."""
    return np.random.default_rng(0).uniform(0, 255, (batch, size, size, 3)).astype("float32")


def labels(batch: int) -> np.ndarray:
    """(batch, classes), float32, one-hot."""
    return np.eye(CLASSES, dtype="float32")[np.arange(batch) * 7 % CLASSES]


# --- Keras on TensorFlow -----------------------------------------------------------------------


def _tensorflow_inference(model, size: int, batch: int) -> Callable[[], None]:
    import tensorflow as tf

    function = tf.function(lambda x: model(x, training=False), autograph=False)
    x = tf.constant(images(batch, size))
    return lambda: function(x).numpy()


def ours(
    model: str,
    size: int,
    batch: int,
    mode: str,
    policy: str,
    fused: bool = False,
    rematerialized: bool = False,
) -> Callable[[], None]:
    """Ours as it is built, or fused; or its training step, as it is or with less kept."""
    import keras

    import keras_coatnet
    from keras_coatnet.training import remat

    keras.config.set_dtype_policy(policy)

    def make() -> keras.Model:
        network = keras_coatnet.CoAtNet(
            model, input_shape=(size, size, 3), classifier_activation=None
        )
        if rematerialized:
            remat(network)
        return network

    if mode == "train":
        return _ours_training(make, size, batch)
    network = keras_coatnet.fuse(make()) if fused else make()
    return _tensorflow_inference(network, size, batch)


def ours_elsewhere(model: str, size: int, batch: int, mode: str, backend: str) -> Callable:
    """Ours fused, for inference, under another backend of Keras."""
    if mode != "infer":
        raise ValueError(f"Under {backend} inference alone is timed here, not {mode!r}.")
    os.environ["KERAS_BACKEND"] = backend
    import keras_coatnet

    options = {"input_shape": (size, size, 3), "classifier_activation": None}
    network = keras_coatnet.fuse(keras_coatnet.CoAtNet(model, **options))
    if backend == "torch":
        import torch

        x = torch.from_numpy(images(batch, size))

        def run() -> None:
            with torch.inference_mode():
                network(x, training=False)

        return run
    import jax

    x = jax.numpy.asarray(images(batch, size))
    groups = network.trainable_variables, network.non_trainable_variables
    weights = [[variable.value for variable in group] for group in groups]
    function = jax.jit(lambda weights, x: network.stateless_call(*weights, x, training=False)[0])
    return lambda: function(weights, x).block_until_ready()


def _ours_training(make: Callable, size: int, batch: int) -> Callable[[], None]:
    import tensorflow as tf

    from keras_coatnet.training.engine.base import StepConfig
    from keras_coatnet.training.engine.optimizer import AdamW
    from keras_coatnet.training.engine.tensorflow import TensorFlowEngine

    engine = TensorFlowEngine(
        tf.distribute.get_strategy(),
        make,
        lambda network: AdamW(1e-4, weight_decay=0.05, gradients_are_summed=True),
        StepConfig(batch_size=batch, global_clipnorm=1.0),
    )
    data = tf.data.Dataset.from_tensors((images(batch, size), labels(batch))).cache().repeat()
    batches = engine.iterate(1, lambda first, own: data)
    return lambda: float(engine.train_step(batches)[0])


def keras_application(name: str, size: int, batch: int, mode: str) -> Callable[[], None]:
    """A network of keras.applications."""
    import keras

    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )
    if mode == "train":
        return _keras_training(keras, model, size, batch)
    return _tensorflow_inference(model, size, batch)


def kecam(name: str, size: int, batch: int, mode: str) -> Callable[[], None]:
    """keras_cv_attention_models, on its own TensorFlow."""
    import keras_cv_attention_models as library
    from tensorflow import keras

    model = getattr(library.coatnet, name)(
        pretrained=None, input_shape=(size, size, 3), classifier_activation=None
    )
    if mode == "train":
        return _keras_training(keras, model, size, batch)
    return _tensorflow_inference(model, size, batch)


def _keras_training(keras, model, size: int, batch: int) -> Callable[[], None]:
    import tensorflow as tf

    model.compile(
        keras.optimizers.AdamW(1e-4, weight_decay=0.05, global_clipnorm=1.0),
        keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    x, y = tf.constant(images(batch, size)), tf.constant(labels(batch))
    return lambda: model.train_on_batch(x, y)


# --- timm ----------------------------------------------------------------------------------------


def timm(
    model: str, size: int, batch: int, mode: str, compiled: bool, last: bool, half: bool
) -> Callable[[], None]:
    """timm, eager or compiled, in either layout, in float32 or bfloat16 autocast."""
    import torch

    from tests.timm_models import import_timm

    network = import_timm().create_model(TIMM[model], img_size=size)
    form = torch.channels_last if last else torch.contiguous_format
    network = network.to(memory_format=form)
    x = torch.from_numpy(images(batch, size).transpose(0, 3, 1, 2) / 127.5 - 1).float()
    x = x.contiguous(memory_format=form)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=half)
    if mode == "train":
        network.train()
        forward = torch.compile(network) if compiled else network
        return _timm_training(forward, x, torch.from_numpy(labels(batch)), precision)
    network.eval()
    forward = torch.compile(network) if compiled else network

    def run() -> None:
        with torch.inference_mode(), precision:
            forward(x)

    return run


def _timm_training(network, x, y, precision) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=0.05)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = torch.nn.functional.cross_entropy(network(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return run


# --- The floor -----------------------------------------------------------------------------------


def matmul(size: int, half: bool) -> Callable[[], None]:
    """A product of two square matrices: the rate that all others are held against."""
    import tensorflow as tf

    kind = tf.bfloat16 if half else tf.float32
    a, b = (tf.cast(tf.random.normal((size, size)), kind) for _ in range(2))
    function = tf.function(lambda: tf.matmul(a, b))
    return lambda: function().numpy()


CONTENDERS: dict[str, Callable[[str, int, int, str], Callable[[], None]]] = {
    "ours": lambda m, s, b, mode: ours(m, s, b, mode, "float32"),
    "ours fused": lambda m, s, b, mode: ours(m, s, b, mode, "float32", fused=True),
    "ours bf16": lambda m, s, b, mode: ours(m, s, b, mode, "mixed_bfloat16"),
    "ours fused bf16": lambda m, s, b, mode: ours(m, s, b, mode, "mixed_bfloat16", fused=True),
    "ours rematerialized": lambda m, s, b, mode: ours(
        m, s, b, mode, "float32", rematerialized=True
    ),
    "ours bf16 rematerialized": lambda m, s, b, mode: ours(
        m, s, b, mode, "mixed_bfloat16", rematerialized=True
    ),
    "ours fused torch": lambda m, s, b, mode: ours_elsewhere(m, s, b, mode, "torch"),
    "ours fused jax": lambda m, s, b, mode: ours_elsewhere(m, s, b, mode, "jax"),
    "timm": lambda m, s, b, mode: timm(m, s, b, mode, False, False, False),
    "timm last": lambda m, s, b, mode: timm(m, s, b, mode, False, True, False),
    "timm compiled": lambda m, s, b, mode: timm(m, s, b, mode, True, False, False),
    "timm compiled last": lambda m, s, b, mode: timm(m, s, b, mode, True, True, False),
    "timm bf16": lambda m, s, b, mode: timm(m, s, b, mode, False, False, True),
    "timm last bf16": lambda m, s, b, mode: timm(m, s, b, mode, False, True, True),
    "timm compiled bf16": lambda m, s, b, mode: timm(m, s, b, mode, True, False, True),
    "kecam": lambda m, s, b, mode: kecam(KECAM[m], s, b, mode),
    "ConvNeXt": lambda m, s, b, mode: keras_application(LIKE["convnext"][m], s, b, mode),
    "EfficientNetV2": lambda m, s, b, mode: keras_application(
        LIKE["efficientnetv2"][m], s, b, mode
    ),
    "matmul": lambda m, s, b, mode: matmul(2048, half=False),
    "matmul bf16": lambda m, s, b, mode: matmul(2048, half=True),
}


def _versions() -> dict[str, str]:
    names = ("tensorflow", "keras", "torch", "timm", "keras_cv_attention_models", "numpy")
    return {n: sys.modules[n].__version__ for n in names if n in sys.modules}


def _peak_memory() -> int:
    """Megabytes of this process at its largest."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    return 0


def main(name: str, model: str, size: str, batch: str, mode: str) -> None:
    """Builds a contender, and times it as often as it is told to."""
    started = time.perf_counter()
    run = CONTENDERS[name](model, int(size), int(batch), mode)
    built = time.perf_counter()
    run()
    first = time.perf_counter()
    run()
    ready = {"versions": _versions(), "build_s": built - started, "first_s": first - built}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
        print(statistics.median(times), flush=True)
    print(_peak_memory(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
