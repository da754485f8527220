"""Where the time of a network goes, by kind of layer, on TensorFlow's CPU.

    python benchmarks/breakdown.py --contenders ours "ours fused" --batch-size 8

TensorFlow's profiler records each operation of some runs; operations run one after the other, so
that their times add up to the whole. An operation belongs to the kind of layer that its name or its
type tells; what none of them tells is "other". Shown are milliseconds of one run, and their share.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import contenders

# The first that an operation ("layer/layer/name:Type") matches. What the runtime fuses into a
# product (bias, norm, GELU) counts as the product. A loop that XLA compiled has no layer, and is an
# activation or its gradient: nothing else is compiled.
KINDS = {
    "stem convolutions": r"stem.*:.*Conv2D",
    "depthwise convolutions": r":.*DepthwiseConv2d",
    "squeeze-and-excitation": r"squeeze_excite",
    "products of attention": r":.*BatchMatMul",
    "1x1 convolutions and dense layers": r":.*(MatMul|Conv2D|BiasAdd)",
    "norms": r"norm|:.*BatchNorm",
    "softmax, bias, transposes of attention": r"attention_\d+/",
    "activations": r"^[^:/]*fusion|Gelu|Erf|activation",
    "pooling and striding": r":.*Pool|StridedSlice",
    "optimizer": r"adam|clip|:.*Assign|:Resource",
    "residual sums": r":Add",
}
# Events that are not operations, or hold others.
HELD = re.compile(r"::|^(<lambda>|Eager|TFE_|FunctionRun|Threadpool|Memory|end: )")


def kind_of(event: str) -> str | None:
    """The kind of layer of an operation; None for an event that is not one."""
    if HELD.search(event) or not re.search(r"[:/]|fusion$", event):
        return None
    return next((kind for kind, form in KINDS.items() if re.search(form, event)), "other")


def _events(folder: str) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of all that the profiler recorded."""
    # TensorFlow has no public name for the form of its own profiles.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    space.ParseFromString(path.read_bytes())
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                yield plane.event_metadata[event.metadata_id].name, event.duration_ps / 1e9


def breakdown(run: Callable[[], None], runs: int) -> dict[str, float]:
    """Milliseconds of one run for each kind of layer, the most first."""
    import tensorflow as tf

    run(), run()
    with tempfile.TemporaryDirectory() as folder:
        # At this level the profiler tells the names of operations, not their types alone.
        options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=3)
        with tf.profiler.experimental.Profile(folder, options):
            for _ in range(runs):
                run()
        times: dict[str, float] = collections.defaultdict(float)
        for event, milliseconds in _events(folder):
            kind = kind_of(event)
            if kind is not None:
                times[kind] += milliseconds / runs
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def main() -> None:
    """Profiles contenders of `speed.py`, and prints a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    ours = [name for name in contenders.CONTENDERS if name.startswith("ours")]
    add("--contenders", nargs="+", choices=ours, default=["ours", "ours fused"])
    add("--model", default="coatnet0")
    add("--size", type=int, default=224)
    add("--batch-size", type=int, default=8)
    add("--mode", choices=("infer", "train"), default="infer")
    add("--runs", type=int, default=5)
    add("--json", metavar="FILE")
    args = parser.parse_args()
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    found = {}
    for name in args.contenders:
        run = contenders.CONTENDERS[name](args.model, args.size, args.batch_size, args.mode)
        found[name] = breakdown(run, args.runs)
        whole = sum(found[name].values())
        print(f"\n{name}: {args.model} {args.mode} batch {args.batch_size}, {whole:.1f} ms")
        for kind, milliseconds in found[name].items():
            print(f"  {kind:40} {milliseconds:8.1f} {milliseconds / whole:6.1%}", flush=True)
    if args.json:
        described = {**vars(args), "found": found}
        pathlib.Path(args.json).write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
