"""Train a CoAtNet with a loop that is written out: on one device, or on all GPUs of a machine.

    python examples/train_loop.py DATA --output runs/loop

DATA is a folder of images, one sub-folder per class, or a data set that tensorflow-datasets has
prepared, such as imagenet2012. Start the same command again to go on from the last checkpoint.

finetune.py, with `model.fit`, is shorter. `keras-coatnet train` has the paper's recipes, and knows
what to do when a disk is full or a loss is not a number. This script is for what neither has an
option for: copy it, and change it.
"""
# ruff: noqa: E402 - arguments are read before the imports that take seconds.

import argparse
import os
import sys
import time
from pathlib import Path

CLIP_NORM = 1.0  # largest global norm of the gradients
EMA_MOMENTUM = 0.999  # of the moving average of the weights
LOG_STEPS = 10


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    add, default = parser.add_argument, "(default: %(default)s)"
    add("data", metavar="DATA", help="a folder, or a data set's name")
    add("--output", default="runs/loop", help=f"checkpoints and final weights {default}")
    add("--model", default="coatnet0", help=f"name of an architecture {default}")
    add("--weights", help="a checkpoint or a file to start from (default: random weights)")
    add("--image-size", type=int, default=224, help=f"height and width {default}")
    add("--batch-size", type=int, default=64, help=f"images in one step, on all devices {default}")
    add("--epochs", type=int, default=100, help=f"passes over the images {default}")
    add("--learning-rate", type=float, default=1e-3, help=f"its peak, after a warm-up {default}")
    add("--dtype-policy", default="float32", help=f"float32 or mixed_bfloat16 {default}")
    return parser.parse_args()


def fail(error):
    """Ends the script with one line on the error stream and exit status 1."""
    print(f"train_loop.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    os._exit(1)  # sys.exit would wait for threads of TensorFlow that still read images


if __name__ == "__main__":
    args = parse_arguments()

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import tensorflow as tf

import keras_coatnet
from keras_coatnet.training import (
    AdamW,
    Augmentation,
    UnreadableImages,
    WarmUpSchedule,
    evaluation_dataset,
    open_datasets,
    training_dataset,
)

# Random crops and flips, and these; mixup and CutMix are there, too.
AUGMENTATION = Augmentation(randaugment_num_ops=2, randaugment_magnitude=9)
UNREADABLE = UnreadableImages(limit=10)  # images that are left out; more of them end the run


def train(args, strategy):
    """Trains on the devices of a `tf.distribute` strategy."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(args.dtype_policy)
    replicas = strategy.num_replicas_in_sync
    train_source, test_source = open_datasets(args.data)
    steps_per_epoch = train_source.count // args.batch_size
    last_step = args.epochs * steps_per_epoch
    if last_step < 1:
        raise ValueError(f"{train_source.count} images and {args.epochs} epochs give no step")
    common = {
        "size": args.image_size,
        "global_batch_size": args.batch_size,
        "unreadable": UNREADABLE,
    }

    def train_batches(step):
        """All batches from a step on: shuffled, augmented, without an end."""
        return strategy.distribute_datasets_from_function(
            lambda context: training_dataset(
                train_source,
                augmentation=AUGMENTATION,
                label_smoothing=0.1,
                seed=0,
                start_step=step,
                replicas=replicas,
                local_replicas=replicas,
                **common,
            )
        )

    def fill_up(images, labels):
        """Adds images without a label, so that the last batch has a part for each replica, too."""
        missing = args.batch_size - tf.shape(images)[0]
        images = tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])
        return images, tf.pad(labels, [[0, missing], [0, 0]])

    test_dataset = evaluation_dataset(
        test_source, crop_pct=0.95, interpolation="bicubic", **common
    ).map(fill_up)
    test_batches = strategy.experimental_distribute_dataset(test_dataset)

    def make_model():
        return keras_coatnet.CoAtNet(
            args.model,
            weights=args.weights,
            input_shape=(args.image_size, args.image_size, 3),
            classes=len(train_source.classes),
            classifier_activation=None,
            stochastic_depth=0.1,
        )

    # Variables made in this scope have a copy on each device, and BatchNorm layers built in it take
    # their statistics over the global batch.
    with strategy.scope():
        model, average = make_model(), make_model()
        average.set_weights(model.get_weights())
        learning_rate = WarmUpSchedule(args.learning_rate, 0.0, last_step, last_step // 20)
        optimizer = AdamW(learning_rate, weight_decay=0.05, gradients_are_summed=True)
        optimizer.build(model.trainable_variables)

    def update(images, labels):
        """What each replica does with its part of a batch."""
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = keras.losses.categorical_crossentropy(labels, logits, from_logits=True)
            # Divided by the size of the global batch: summed over the replicas, it is the mean.
            loss = tf.reduce_sum(losses) / args.batch_size
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        # Summed before they are clipped, so that several devices do what one would. Keras's
        # optimizers clip first, and sum then; `gradients_are_summed` keeps this one from summing.
        replica = tf.distribute.get_replica_context()
        loss, *gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, [loss, *gradients])
        gradients, _ = tf.clip_by_global_norm(gradients, CLIP_NORM)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    def mix(old, new, share):
        old.assign(share * old + (1.0 - share) * new)

    @tf.function
    def train_step(images, labels):
        losses = strategy.run(update, args=(images, labels))
        steps = tf.cast(optimizer.iterations.value, "float32")
        share = tf.minimum(EMA_MOMENTUM, (1.0 + steps) / (10.0 + steps))  # small in the beginning
        for old, new in zip(average.weights, model.weights, strict=True):
            strategy.extended.update(old.value, mix, args=(new.value, share))
        return strategy.experimental_local_results(losses)[0]  # the same on all replicas

    def count_right(images, labels):
        """Returns how many images of its part a replica recognizes, and of how many."""
        logits = average(images, training=False)
        has_label = tf.reduce_any(labels > 0, axis=-1)
        is_right = has_label & (tf.argmax(logits, axis=-1) == tf.argmax(labels, axis=-1))
        return tf.math.count_nonzero([is_right, has_label], axis=-1)

    @tf.function
    def test_step(images, labels):
        return strategy.reduce("SUM", strategy.run(count_right, args=(images, labels)), axis=None)

    # The state of the run: weights, random generators, the optimizer's moments and step count.
    checkpoint = tf.train.Checkpoint(
        model=[v.value for v in model.variables],
        average=[v.value for v in average.variables],
        optimizer=[v.value for v in optimizer.variables],
    )
    checkpoints = tf.train.CheckpointManager(checkpoint, f"{args.output}/checkpoints", 3)
    checkpoints.restore_or_initialize()
    first_step = step = int(optimizer.iterations.numpy())
    started = time.perf_counter()
    batches = iter(train_batches(step))
    while step < last_step:
        loss = train_step(*next(batches))
        step += 1
        if step % LOG_STEPS == 0:
            speed = (step - first_step) * args.batch_size / (time.perf_counter() - started)
            print(f"step {step}/{last_step}  loss {loss:.6f}  {speed:.0f} images/s", flush=True)
        if step % steps_per_epoch == 0:
            checkpoints.save(step)
            right, count = sum(test_step(*batch) for batch in test_batches).numpy()
            print(f"epoch {step // steps_per_epoch}  accuracy {right / count:.2%}", flush=True)
    average.save_weights(Path(args.output) / "final.weights.h5")


if __name__ == "__main__":
    try:
        train(args, tf.distribute.MirroredStrategy())
    except (ValueError, OSError, ImportError, tf.errors.OpError) as error:
        fail(UNREADABLE.error or error)
