"""One contender of `speed.py`, in a process of its own: it is told what to time, and answers.

    python benchmarks/contenders.py NAME MODEL SIZE BATCH MODE

It answers as keras_coatnet.benchmarking.process.serve says. It imports nothing but what the
contender needs, so that the libraries of others may live in other environments.

What runs in another runtime is written by a process before it, once for all batches of a run: into
the folder that the environment variable BENCHMARK_EXPORTS names, or a temporary one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

import keras_coatnet_command

keras_coatnet_command.defer_package()  # what is not ours is to be timed without Keras

from keras_coatnet.benchmarking import worker
from keras_coatnet.benchmarking.process import serve
from keras_coatnet.exporting.formats import FORMATS
from keras_coatnet.exporting.telemetry import turn_off_telemetry

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


def ours_elsewhere(
    model: str,
    size: int,
    batch: int,
    mode: str,
    backend: str,
    policy: str = "float32",
    fused: bool = True,
) -> Callable[[], object]:
    """Ours under another backend of Keras: on its GPU, if it has one."""
    os.environ["KERAS_BACKEND"] = backend
    import keras

    import keras_coatnet

    keras.config.set_dtype_policy(policy)
    options = {"input_shape": (size, size, 3), "classifier_activation": None}
    network = keras_coatnet.CoAtNet(model, **options)
    if fused:
        network = keras_coatnet.fuse(network)
    if backend == "torch":
        return _torch_inference(network, size, batch)
    import jax

    x = jax.numpy.asarray(images(batch, size))
    if mode == "train":
        return _jax_training(network, x, jax.numpy.asarray(labels(batch)))
    groups = network.trainable_variables, network.non_trainable_variables
    weights = [[variable.value for variable in group] for group in groups]
    function = jax.jit(lambda weights, x: network.stateless_call(*weights, x, training=False)[0])
    return lambda: function(weights, x).block_until_ready()


def _torch_inference(network, size: int, batch: int) -> Callable[[], None]:
    import torch

    x = torch.from_numpy(images(batch, size)).to(network.weights[0].value.device)

    def run() -> None:
        with torch.inference_mode():
            network(x, training=False)
        _wait(torch)

    return run


def _jax_training(network, x, y) -> Callable[[], object]:
    """A training step as in Keras's guide to hand-written loops on JAX."""
    import jax
    import keras

    optimizer = keras.optimizers.AdamW(1e-4, weight_decay=0.05, global_clipnorm=1.0)
    optimizer.build(network.trainable_variables)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)

    def losses(trainable: list, others: list, x, y) -> tuple:
        logits, others = network.stateless_call(trainable, others, x, training=True)
        return loss(y, logits), others

    def step(state: tuple, x, y) -> tuple:
        trainable, others, slots = state
        gradient = jax.value_and_grad(losses, has_aux=True)
        (value, others), gradients = gradient(trainable, others, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return value, (trainable, others, slots)

    groups = network.trainable_variables, network.non_trainable_variables, optimizer.variables
    state = tuple([variable.value for variable in group] for group in groups)
    compiled = jax.jit(step, donate_argnums=0)

    def run() -> None:
        nonlocal state
        value, state = compiled(state, x, y)
        value.block_until_ready()

    return run


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
    """timm, eager or compiled, in either layout, in float32 or bfloat16, on a GPU if there is one.

    bfloat16 is autocast, but on a GPU's inference the weights' own, as in timm's benchmark.
    """
    import torch

    from tests.timm_models import import_timm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = import_timm().create_model(TIMM[model], img_size=size)
    form = torch.channels_last if last else torch.contiguous_format
    network = network.to(device, memory_format=form)
    x = torch.from_numpy(images(batch, size).transpose(0, 3, 1, 2) / 127.5 - 1).float()
    x = x.to(device).contiguous(memory_format=form)
    precision = torch.autocast(device, torch.bfloat16, enabled=half)
    if mode == "train":
        network.train()
        forward = torch.compile(network) if compiled else network
        y = torch.from_numpy(labels(batch)).to(device)
        return _timm_training(forward, x, y, precision)
    network.eval()
    if half and device == "cuda":
        network, x = network.to(torch.bfloat16), x.to(torch.bfloat16)
        precision = contextlib.nullcontext()
    forward = torch.compile(network) if compiled else network

    def run() -> None:
        with torch.inference_mode(), precision:
            forward(x)
        _wait(torch)

    return run


def _timm_training(network, x, y, precision) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(
        network.parameters(), 1e-4, weight_decay=0.05, fused=x.device.type == "cuda"
    )

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = torch.nn.functional.cross_entropy(network(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        _wait(torch)

    return run


def _wait(torch) -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- Other runtimes ------------------------------------------------------------------------------

# The CoAtNet of a task, written by a process that ends before the runtime is timed.
_WRITE_OURS = """
import sys
import numpy as np
import keras_coatnet
model, size, path, quantize = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] or None
network = keras_coatnet.CoAtNet(model, input_shape=(size, size, 3), classifier_activation=None)
images = np.random.default_rng(1).uniform(0, 255, (16, size, size, 3)).astype("float32")
keras_coatnet.export(network, path, quantize=quantize, images=images, tolerance=10.0)
"""
_WRITE_TIMM = """
import os, sys
import torch
from tests.timm_models import import_timm
name, size, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
network = import_timm().create_model(name, img_size=size).eval()
torch.onnx.export(
    network, torch.zeros(2, 3, size, size), path + ".part", input_names=["images"],
    dynamic_axes={"images": {0: "batch"}}, opset_version=17,
    dynamo=False,  # True needs onnxscript
)
os.replace(path + ".part", path)
"""


@functools.cache
def _exports() -> str:
    """The folder of what is written; a temporary one where none is named."""
    named = os.environ.get("BENCHMARK_EXPORTS")
    if named:
        return named
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _written(program: str, name: str, *arguments: object) -> str:
    """Has a program write a file, unless it stands there; its path."""
    path = pathlib.Path(_exports(), name)
    if not path.exists():
        words = [*map(str, arguments[:2]), str(path), *map(str, arguments[2:])]
        root = str(pathlib.Path(__file__).resolve().parents[1])
        subprocess.run(
            [sys.executable, "-c", program, *words],
            env={**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": root},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return str(path)


def exported(
    model: str, size: int, batch: int, suffix: str, quantize: str = ""
) -> Callable[[], None]:
    """Ours, exported, in its runtime."""
    name = f"{model}-{size}-{quantize or 'float32'}{suffix}"
    path = _written(_WRITE_OURS, name, model, size, quantize)
    format = next(each.name for each in FORMATS.values() if each.suffix == suffix)
    return functools.partial(worker.run_exported(format, path), batch)


def openvino(path: str, size: int, batch: int, channels_first: bool, half: bool) -> Callable:
    """A file in OpenVINO, in float32 or bfloat16."""
    turn_off_telemetry()
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    x = images(batch, size)
    if channels_first:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2) / 127.5 - 1)
    return lambda: compiled([x])[0]


def ours_openvino_bf16(model: str, size: int, batch: int) -> Callable[[], None]:
    """Ours in OpenVINO's bfloat16, which `load_exported` does not use."""
    path = _written(_WRITE_OURS, f"{model}-{size}-float32.xml", model, size, "")
    return openvino(path, size, batch, channels_first=False, half=True)


def timm_elsewhere(
    model: str, size: int, batch: int, runtime: str, half: bool = False
) -> Callable[[], None]:
    """Timm's network in ONNX Runtime or OpenVINO, by PyTorch's own exporter."""
    path = _written(_WRITE_TIMM, f"timm-{model}-{size}.onnx", TIMM[model], size)
    if runtime == "openvino":
        return openvino(path, size, batch, channels_first=True, half=half)
    turn_off_telemetry()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.ascontiguousarray(images(batch, size).transpose(0, 3, 1, 2) / 127.5 - 1)
    return lambda: session.run(None, {"images": x})


# --- The floor -----------------------------------------------------------------------------------


def matmul_bf16(side: int = 2048) -> Callable[[], None]:
    """A product of two square matrices in bfloat16, on a GPU if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))

    def run() -> None:
        torch.matmul(a, b)
        _wait(torch)

    return run


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
    "ours fused torch bf16": lambda m, s, b, mode: ours_elsewhere(
        m, s, b, mode, "torch", "mixed_bfloat16"
    ),
    "ours fused jax": lambda m, s, b, mode: ours_elsewhere(m, s, b, mode, "jax"),
    "ours fused jax bf16": lambda m, s, b, mode: ours_elsewhere(
        m, s, b, mode, "jax", "mixed_bfloat16"
    ),
    "ours jax bf16": lambda m, s, b, mode: ours_elsewhere(
        m, s, b, mode, "jax", "mixed_bfloat16", fused=False
    ),
    "timm": lambda m, s, b, mode: timm(m, s, b, mode, False, False, False),
    "timm last": lambda m, s, b, mode: timm(m, s, b, mode, False, True, False),
    "timm compiled": lambda m, s, b, mode: timm(m, s, b, mode, True, False, False),
    "timm compiled last": lambda m, s, b, mode: timm(m, s, b, mode, True, True, False),
    "timm bf16": lambda m, s, b, mode: timm(m, s, b, mode, False, False, True),
    "timm last bf16": lambda m, s, b, mode: timm(m, s, b, mode, False, True, True),
    "timm compiled last bf16": lambda m, s, b, mode: timm(m, s, b, mode, True, True, True),
    "timm compiled bf16": lambda m, s, b, mode: timm(m, s, b, mode, True, False, True),
    "kecam": lambda m, s, b, mode: kecam(KECAM[m], s, b, mode),
    "ConvNeXt": lambda m, s, b, mode: keras_application(LIKE["convnext"][m], s, b, mode),
    "EfficientNetV2": lambda m, s, b, mode: keras_application(
        LIKE["efficientnetv2"][m], s, b, mode
    ),
    "ours litert": lambda m, s, b, mode: exported(m, s, b, ".tflite"),
    "ours litert int8": lambda m, s, b, mode: exported(m, s, b, ".tflite", "int8"),
    "ours litert dynamic int8": lambda m, s, b, mode: exported(m, s, b, ".tflite", "dynamic_int8"),
    "ours onnx": lambda m, s, b, mode: exported(m, s, b, ".onnx"),
    "ours onnx int8": lambda m, s, b, mode: exported(m, s, b, ".onnx", "int8"),
    "ours onnx dynamic int8": lambda m, s, b, mode: exported(m, s, b, ".onnx", "dynamic_int8"),
    "ours openvino": lambda m, s, b, mode: exported(m, s, b, ".xml"),
    "ours openvino bf16": lambda m, s, b, mode: ours_openvino_bf16(m, s, b),
    "ours openvino int8": lambda m, s, b, mode: exported(m, s, b, ".xml", "int8"),
    "ours saved_model": lambda m, s, b, mode: exported(m, s, b, ""),
    "timm onnx": lambda m, s, b, mode: timm_elsewhere(m, s, b, "onnx"),
    "timm openvino": lambda m, s, b, mode: timm_elsewhere(m, s, b, "openvino"),
    "timm openvino bf16": lambda m, s, b, mode: timm_elsewhere(m, s, b, "openvino", half=True),
    "matmul bf16": lambda m, s, b, mode: matmul_bf16(),
    "matmul bf16 8192": lambda m, s, b, mode: matmul_bf16(8192),
}

# Those of which the best rate is the floor, by library.
FLOORS = {f"matmul {library}": library for library in worker.PRODUCT_LIBRARIES}
CONTENDERS |= {
    name: lambda m, s, b, mode, library=library: worker.matrix_product(library)
    for name, library in FLOORS.items()
}

# A fused or exported network cannot be trained.
INFERENCE_ONLY = {
    name
    for name in CONTENDERS
    if any(word in name for word in ("fused", "litert", "onnx", "openvino", "saved_model"))
}


def check(name: str, mode: str) -> None:
    """Refuses what would be timed as something else than it is called."""
    if name not in CONTENDERS:
        raise ValueError(f"there is no contender {name!r}, but {', '.join(CONTENDERS)}")
    if mode == "train" and name in INFERENCE_ONLY:
        raise ValueError(f"{name!r} cannot be trained: it is for inference alone")


VERSIONS = (
    *("tensorflow", "keras", "torch", "timm", "keras_cv_attention_models", "numpy", "jax"),
    *("ai_edge_litert", "onnxruntime", "openvino"),
)


def main(name: str, model: str, size: str, batch: str, mode: str) -> None:
    """Builds a contender, and times it as often as it is told to."""
    check(name, mode)
    serve(lambda: CONTENDERS[name](model, int(size), int(batch), mode), VERSIONS)


if __name__ == "__main__":
    main(*sys.argv[1:])
