"""A checkpoint learns your own pictures; the result is reloaded, tried and exported for serving.

    python examples/finetune.py FOLDER

FOLDER has a sub-folder of JPEG or PNG pictures for each class, of which a fifth is held out; or the
two parts, FOLDER/train/<class>/... and FOLDER/val/<class>/.... The checkpoint, a CoAtNet-0 of 110
MB, is downloaded at the first use. `python -m keras_coatnet models` lists the others.

Hardware: one GPU of 8 GB, or patience: --freeze stage2 keeps the stem and the two stages of
convolutions as they are, which halves the work. Accuracy hangs on the pictures; a few hundred a
class usually pass 90% in a few epochs. The recipe is this package's own: small learning rates,
smaller ones towards the stem, and a moving average of the weights.

For a loop of your own with `model.fit`, see `quickstart.py --images FOLDER`.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow, Keras and the package are imported where they are used, so that --help is quick.


def main(arguments=None):
    """Trains; then reloads, tries and exports what came of it."""
    args = read_arguments(arguments)
    from keras_coatnet.training import Stopped, TrainingError

    try:
        result = finetune(args)
        model, found = reload(result.folder)
        export(model, result.folder / "saved_model")
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except TrainingError as error:
        fail(error, status=1)
    except Stopped as stopped:
        fail(stopped, status=stopped.exit_status)
    print(f"\n{found.per_class_table()}\n\n{result.summary()}\n")
    print(f"Reloaded weights: {found.top1:.2%} of the held-out pictures are right")
    print(f"For a server that knows TensorFlow alone: {result.folder / 'saved_model'}")


def finetune(args):
    """Runs the recipe `transfer`, or goes on with a run of it that was interrupted."""
    from keras_coatnet.training import find_recipe, train

    # All fields: `python -m keras_coatnet train transfer --dry-run`.
    recipe = find_recipe("transfer", args.model).replace(
        data=args.folder,
        weights=args.weights,
        image_size=args.size,
        batch=args.batch,
        epochs=args.epochs,
        freeze=args.freeze,
        freeze_batch_norm=args.freeze != "none",
    )
    return train(recipe, args.output)


def reload(folder):
    """Builds the network anew from a run's files, and evaluates it on the held-out pictures.

    Any other model could be evaluated so.
    """
    import keras_coatnet
    from keras_coatnet.training import Recipe, evaluate, open_sources

    recipe = Recipe.load(folder / "recipe.json")
    # The file knows the input's size and the number of classes. A network that has a function of
    # its own is CoAtNet0(weights=...) and so on.
    model = keras_coatnet.CoAtNet(recipe.architecture(), weights=folder / "final.weights.h5")
    _, held_out = open_sources(recipe.data, held_out=recipe.held_out, seed=recipe.seed)
    return model, evaluate(model, held_out, recipe.picture_settings())


def export(model, folder):
    """Writes a SavedModel, which runs without Keras: raw pixels in, probabilities out.

    In Python: `loaded = tf.saved_model.load(folder)`, then `loaded.serve(pixels)`. classes.txt has
    the names of the classes, in the order of the probabilities.
    """
    model.export(folder, verbose=False)


def read_arguments(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(f"{message} (see --help)")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the pictures, a sub-folder for each class")
    path = {"type": pathlib.Path, "metavar": "DIR"}
    add("--output", **path, default="runs/finetuned", help="default: %(default)s")
    add("--model", default="coatnet_0_rw_224", help="a name or .json file; default: %(default)s")
    text = "a checkpoint's name, or a file; default: %(default)s"
    add("--weights", default="coatnet_0_rw_224.sw_in1k", help=text)
    add("--size", type=int, default=224, help="height and width; default: %(default)s")
    add("--batch", type=int, default=32, help="pictures a step; default: %(default)s")
    add("--epochs", type=int, default=20, help="default: %(default)s")
    text = "none, stem, or stage1 to stage4: what keeps its weights; default: %(default)s"
    add("--freeze", default="none", help=text)
    return parser.parse_args(arguments)


def fail(message, status=2):
    """Ends the script with one line on the error stream."""
    print(f"finetune.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
