r"""Train a CoAtNet on ImageNet as the paper did, in Python.

    python examples/train_imagenet.py --data-dir DIR

trains the paper's CoAtNet-0 for 300 epochs at 224 pixels. DIR/downloads/manual must hold
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from https://image-net.org; they are prepared
for tensorflow-datasets first, which takes a while, once. The paper's second part follows:

    python examples/train_imagenet.py --data-dir DIR --recipe in1k_finetune \
        --weights runs/imagenet/final.weights.h5 --output runs/imagenet_384

Hardware: about one day of an A100's computing (worked out at 40% of its bfloat16 peak, not
measured). The batch is 4,096 pictures over all devices. Where that is too much, --accumulate 8
computes each device's share in eight parts; or --batch 512 makes both learning rates an eighth.

Expected top-1 of CoAtNet-0: 81.6 at 224 pixels, 83.9 after the second part at 384.
Source: Dai et al., 2021, "CoAtNet: Marrying Convolution and Attention for All Data Sizes", table 4
(accuracy) and table 10 (the recipe). Both are the paper's figures, not measurements of ours.

The same command goes on with a run that was interrupted. `python -m keras_coatnet train` does all
this too, with every field of a recipe as an option; this script is the place to change more.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow, Keras and the package are imported where they are used, so that --help is quick.


def main(arguments=None):
    """Trains, and prints what came of it."""
    args = read_arguments(arguments)
    from keras_coatnet.training import Stopped, TrainingError, find_recipe, train

    try:
        # A recipe is data. All that is changed by name here could be changed in a file: see
        # `Recipe.save` and `--recipe FILE.json`.
        recipe = find_recipe(args.recipe, args.model)
        changes = {"batch": args.batch, "accumulate": args.accumulate, "weights": args.weights}
        recipe = recipe.replace(**{name: value for name, value in changes.items() if value})
        print(recipe.describe(), flush=True)
        result = train(recipe, args.output, data_dir=args.data_dir, strategy=args.strategy)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except TrainingError as error:  # the loss is not a number, or too many pictures are unreadable
        fail(error, status=1)
    except Stopped as stopped:  # Ctrl-C, or SIGTERM as a cluster sends it: all is saved
        fail(stopped, status=stopped.exit_status)

    print(result.evaluation.per_class_table(limit=10))  # the ten worst
    print(f"\n{result.summary()}")


def read_arguments(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(f"{message} (see --help)")
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="tensorflow-datasets' folder; default: its own")
    add("--output", metavar="DIR", default="runs/imagenet", help="default: %(default)s")
    add("--recipe", default="in1k_pretrain", help="a name or a .json file; default: %(default)s")
    add("--model", metavar="NAME", help="coatnet0 (the recipe's first), coatnet1_dw, ...")
    add("--weights", metavar="WEIGHTS", help="start from these, a file or a checkpoint's name")
    add("--batch", type=int, help="pictures a step, over all devices; default: the recipe's")
    add("--accumulate", type=int, help="parts in which a device computes its share; default: 1")
    text = "auto (all GPUs), one_device, mirrored or multi_worker; default: %(default)s"
    add("--strategy", default="auto", help=text)
    return parser.parse_args(arguments)


def fail(message, status=2):
    """Ends the script with one line on the error stream."""
    print(f"train_imagenet.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
