"""What a training step keeps in the memory of one device, for networks split over several.

No network is built or measured: the figures are computed from its configuration. See `--help`.

    python benchmarks/memory.py --architectures coatnet6 coatnet7 --devices 1 2 4
"""

from __future__ import annotations

import argparse

from keras_coatnet.counting import memory_per_device

COLUMNS = ("parameters", "gradients", "moments", "average", "copies", "activations")


def table(architectures: list[str], devices: list[int], **options) -> str:
    """Returns a Markdown table, in gigabytes: a row for each network and number of devices.

    Args:
        architectures: names of networks.
        devices: over how many devices one model is split.
        **options: further arguments of `memory_per_device`.
    """
    heads = ("network", "devices", *COLUMNS, "all", "all, rematerialized")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for architecture in architectures:
        for count in devices:
            memory = memory_per_device(architecture, (1, count), **options)
            parts = [getattr(memory, column) for column in COLUMNS]
            totals = [memory.total(), memory.total(remat=True)]
            sizes = (f"{value / 1e9:.1f}" for value in parts + totals)
            lines.append(f"| {architecture} | {count} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--architectures", nargs="+", default=["coatnet6", "coatnet7"], help="default: %(default)s")
    add("--devices", nargs="+", type=int, default=[1, 2, 4], help="that one model is split over")
    add("--image-size", type=int, default=224, help="default: %(default)s pixels")
    add("--batch-per-device", type=int, default=8, help="default: %(default)s images")
    add("--dtype-policy", default="mixed_bfloat16", help="default: %(default)s")
    add("--no-ema", action="store_true", help="no moving average of the weights")
    options = parser.parse_args()
    print(
        table(
            options.architectures,
            options.devices,
            input_shape=(options.image_size, options.image_size, 3),
            batch_per_device=options.batch_per_device,
            dtype_policy=options.dtype_policy,
            use_ema=not options.no_ema,
        )
    )


if __name__ == "__main__":
    main()
