"""CoAtNet-1 on GasHisSDB: does a patch of gastric tissue show cancer?

    python examples/gashissdb.py --data-dir DIR

DIR/downloads/manual must hold GasHisSDB.zip, or the folder GasHisSDB that is in it, as linked from
https://gitee.com/neuhwm/GasHisSDB. Of its 33,284 patches of 160 x 160 pixels four fifths train a
CoAtNet-1 at 224 pixels for 30 epochs, from random weights, or from --weights.

Hardware: one GPU of 16 GB. Expected: what a later paper reports of its CoAtNet-1 on these data is
printed beside what came out here. The two do not compare to the last digit: that paper's split is
not published, and neither is its whole schedule. Split and recipe are our own; see
`keras_coatnet.training.data.builders.gashissdb`. In any random split, patches of one microscope
picture fall on both sides, so that none of these figures tells how well a new patient's picture is judged.

The same command goes on with a run that was interrupted.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow, Keras and the package are imported where they are used, so that --help is quick.

# In percent, of a CoAtNet-1 on the patches of 160 pixels, as that paper reports them.
PUBLISHED = {"accuracy": 98.74, "f1": 99.38, "precision": 99.97}


def main(arguments=None):
    """Trains, evaluates, and prints the figures beside the published ones."""
    args = read_arguments(arguments)
    from keras_coatnet.training import Stopped, TrainingError, find_recipe, train

    try:
        recipe = find_recipe("gashissdb").replace(weights=args.weights)
        changes = {name: getattr(args, name) for name in ("model", "epochs", "batch", "image_size")}
        recipe = recipe.replace(**{name: value for name, value in changes.items() if value})
        print(recipe.describe(), flush=True)
        result = train(recipe, args.output, data_dir=args.data_dir)
        found = evaluate_again(result.folder, recipe, args.data_dir)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except TrainingError as error:
        fail(error, status=1)
    except Stopped as stopped:
        fail(stopped, status=stopped.exit_status)
    print(f"\n{result.summary()}\n")
    print_comparison(found)


def evaluate_again(folder, recipe, data_dir):
    """Evaluates the weights that were saved, as `python -m keras_coatnet evaluate --run` does."""
    from keras_coatnet.inference import open_model
    from keras_coatnet.training import evaluate, open_source

    model, _ = open_model(folder / "final.weights.h5")
    source = open_source(recipe.data, "validation", data_dir=data_dir)
    found = evaluate(model, source, recipe.picture_settings(), positive=recipe.positive)
    found.save(folder / "evaluation")
    return found


def print_comparison(found):
    """Prints accuracy, F1 and precision; the last two are about the class "Abnormal"."""
    figures = found.figures()
    print(f"{found.count:,} held-out patches   ours   published")
    for name, published in PUBLISHED.items():
        print(f"{name:24} {100 * figures[name]:6.2f}      {published:6.2f}")
    print(
        "The published figures are their authors', of a split that is not published; ours are of a "
        "split of our own."
    )


def read_arguments(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(f"{message} (see --help)")
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="tensorflow-datasets' folder; default: its own")
    add("--output", metavar="DIR", default="runs/gashissdb", help="default: %(default)s")
    add("--weights", metavar="WEIGHTS", help="start from these, a file or a checkpoint's name")
    add("--model", metavar="NAME", help="another network: a name or a .json file")
    add("--epochs", type=int, help="passes over the pictures; default: the recipe's")
    add("--batch", type=int, help="pictures a step; default: the recipe's")
    add("--image-size", type=int, help="height and width; default: the recipe's")
    return parser.parse_args(arguments)


def fail(message, status=2):
    """Ends the script with one line on the error stream."""
    print(f"gashissdb.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
