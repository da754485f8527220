"""The recipes that have a name: the six of the paper (table 10), transfer learning, GasHisSDB.

A `Family` is a column of the paper's table: the fields that all its models share, and those of each
model. Every accuracy here is reported by others, not measured by us. "A100-days" are computed, not
measured: three times the network's operations for each image (once forward, twice backward), at 40%
of the card's 312 TFLOP/s in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_coatnet.training.recipe import Recipe

_IMAGENET_1K = 1_281_167  # training images
_JFT_300M = 300_000_000


@dataclasses.dataclass(frozen=True)
class Family:
    """A recipe for several models.

    Attributes:
        name: its name on the command line.
        about: the command, the hardware it needs, the accuracy to expect, and the source.
        shared: fields of `Recipe` for all its models.
        models: by model, the fields for that model alone; None: the recipe is for any model.
    """

    name: str
    about: str
    shared: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]] | None

    def recipe(self, model: str | None = None) -> Recipe:
        """The recipe for a model.

        Args:
            model: one of `models`; or the path of a .json file of your own network, which gets the
                values of the first model; None: the first model, or `"coatnet0"`.

        Returns:
            A `Recipe`.

        Raises:
            ValueError: the family has no values for the model.
        """
        if self.models is None:
            return Recipe(name=self.name, model=model or "coatnet0", **self.shared)
        first = next(iter(self.models))
        model = model or first
        own = self.models[first] if model.endswith(".json") else self.models.get(model)
        if own is None:
            raise ValueError(
                f"The recipe {self.name!r} has no values for the model {model!r}. It names: "
                f"{', '.join(self.models)}. See `keras-coatnet train --list`."
            )
        return Recipe(name=self.name, model=model, **{**self.shared, **own})


def _depths(rates: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """A rate of stochastic depth for each model, in both variants, "" and "_dw"."""
    return {
        f"{model}{place}": {"stochastic_depth": rate}
        for place in ("", "_dw")
        for model, rate in rates.items()
    }


_IN1K_DEPTHS = {"coatnet0": 0.2, "coatnet1": 0.3, "coatnet2": 0.5, "coatnet3": 0.7}
_IN21K_DEPTHS = {"coatnet2": 0.3, "coatnet3": 0.5, "coatnet4": 0.7}

# Where the table says "center crop", evaluation takes the middle 87.5%; elsewhere it takes the
# whole image, made square. Training crops are Inception's in both. What the paper does not say
# (AdamW's betas and epsilon, which norm is clipped) has `Recipe`'s defaults.
_PRETRAINING = {
    "image_size": 224,
    "batch_size": 4096,
    "learning_rate": 1e-3,
    "minimum_learning_rate": 1e-5,
    "global_clipnorm": 1.0,
    "crop_pct": 0.875,
    "dtype_policy": "mixed_bfloat16",
}
# Data sets without a validation split are evaluated on as many images as ImageNet-1k has there.
_HELD_OUT = 50_000
_FINETUNING = {
    "image_size": 384,
    "epochs": 30,
    "learning_rate": 5e-5,
    "minimum_learning_rate": 5e-5,
    "schedule": "constant",
    "weight_decay": 1e-8,
    "global_clipnorm": 1.0,
    "ema_momentum": 0.9999,
    "loss": "softmax",
    "label_smoothing": 0.1,
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "dtype_policy": "mixed_bfloat16",
}

_IN21K_PRETRAINING = {
    **_PRETRAINING,
    "data": "imagenet21k",
    "schedule": "linear",
    "weight_decay": 0.01,
    "loss": "sigmoid",
    "label_smoothing": 1e-4,
    "held_out": _HELD_OUT,
}

_FAMILIES = (
    Family(
        "in1k_pretrain",
        """ImageNet-1k from random weights, 300 epochs at 224.

    keras-coatnet train in1k_pretrain --model coatnet0 --data-dir DIR --output runs/c0

    Hardware: 300 x 1.28M x 3 x 4.2G multiply-adds for CoAtNet0: 1 A100-day; 2, 4 and 8 for 1 to 3.
    Expected top-1 at 224 (paper, table 4): CoAtNet0 81.6, 1 83.3, 2 84.1, 3 84.5; with the stride
    on the depthwise convolution (coatnet0_dw ...) 82.0, 83.5, 84.1.
    Source: Dai et al. 2021, table 10, column "ImageNet-1K, pre-train".
    """,
        {
            **_PRETRAINING,
            "data": "imagenet2012",
            "epochs": 300,
            "schedule": "cosine",
            "warmup": 10_000 / (300 * _IMAGENET_1K / 4096),  # 10,000 steps
            "weight_decay": 0.05,
            "loss": "softmax",
            "label_smoothing": 0.1,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 15.0,
            "mixup": 0.8,
        },
        _depths(_IN1K_DEPTHS),
    ),
    Family(
        "in1k_finetune",
        """ImageNet-1k again at 384 (or --image-size 512), 30 epochs from `in1k_pretrain`'s weights.

    keras-coatnet train in1k_finetune --model coatnet0 \\
        --weights runs/c0/final.weights.h5 --data-dir DIR --output runs/c0_384

    Hardware: 30 x 1.28M x 3 x 13.4G multiply-adds for CoAtNet0: 0.3 A100-days; 2.3 for CoAtNet3.
    Expected top-1 at 384 (paper, table 4): CoAtNet0 83.9, 1 85.1, 2 85.7, 3 85.8; at 512: 2 85.9,
    3 86.0.
    Source: Dai et al. 2021, table 10, column "ImageNet-1K, fine-tune".
    """,
        {
            **_FINETUNING,
            "data": "imagenet2012",
            "batch_size": 512,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 15.0,
            "mixup": 0.8,
        },
        {
            model: {**own, **({"randaugment_magnitude": 20.0} if "coatnet3" in model else {})}
            for model, own in _depths(_IN1K_DEPTHS).items()
        },
    ),
    Family(
        "in21k_pretrain",
        """ImageNet-21k from random weights, 90 epochs at 224.

    keras-coatnet train in21k_pretrain --model coatnet2 --data DIR --output runs/c2_21k

    DIR is ImageNet-21k, prepared as a tensorflow-datasets data set. It cannot be downloaded.
    Hardware: 90 x 14.2M x 3 x 15.7G multiply-adds for CoAtNet2: 11 A100-days; 25 and 43 for 3, 4.
    Expected: after `in21k_finetune`, top-1 on ImageNet-1k at 224 / 384 / 512 (paper, table 5):
    CoAtNet2 87.1 / 87.1 / 87.3, 3 87.6 / 87.6 / 87.9, 4 - / 87.9 / 88.1.
    Source: Dai et al. 2021, table 10, column "ImageNet-21K, pre-train"; warm-up of 5 epochs.
    """,
        {**_IN21K_PRETRAINING, "epochs": 90, "warmup": 5 / 90},
        _depths(_IN21K_DEPTHS),
    ),
    Family(
        "in21k_pretrain_150",
        """ImageNet-21k from random weights, 150 epochs at 224 with RandAugment: CoAtNet4's best.

    keras-coatnet train in21k_pretrain_150 --data DIR --output runs/c4_21k

    Hardware: 150 x 14.2M x 3 x 60G multiply-adds: 71 A100-days.
    Expected: after `in21k_finetune_150`, top-1 on ImageNet-1k at 384 / 512 (paper): 88.4 / 88.56.
    Source: Dai et al. 2021, table 10, column "ImageNet-21K, pre-train", and table 5.
    """,
        {
            **_IN21K_PRETRAINING,
            "epochs": 150,
            "warmup": 5 / 150,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 5.0,
        },
        _depths({"coatnet4": 0.7}),
    ),
    Family(
        "in21k_finetune",
        """ImageNet-1k at 384 (or --image-size 512), 30 epochs from `in21k_pretrain`'s weights.

    keras-coatnet train in21k_finetune --model coatnet2 \\
        --weights runs/c2_21k/final.weights.h5 --data-dir DIR --output runs/c2_384

    Hardware: 30 x 1.28M x 3 x 50G multiply-adds for CoAtNet2: 1.1 A100-days; 2.3 and 4 for 3, 4.
    Expected top-1 at 224 / 384 / 512 (paper, table 5): CoAtNet2 87.1 / 87.1 / 87.3, 3 87.6 / 87.6 /
    87.9, 4 - / 87.9 / 88.1.
    Source: Dai et al. 2021, table 10, column "ImageNet-21K, fine-tune".
    """,
        {**_FINETUNING, "data": "imagenet2012", "batch_size": 1024},
        _depths(_IN21K_DEPTHS),
    ),
    Family(
        "in21k_finetune_150",
        """ImageNet-1k at 384 (or --image-size 512), 30 epochs from `in21k_pretrain_150`'s weights.

    keras-coatnet train in21k_finetune_150 --weights runs/c4_21k/final.weights.h5 \\
        --data-dir DIR --output runs/c4_384

    Hardware: 30 x 1.28M x 3 x 190G multiply-adds: 4 A100-days.
    Expected top-1 at 384 / 512 (paper, table 5): 88.4 / 88.56.
    Source: Dai et al. 2021, table 10, column "ImageNet-21K, fine-tune".
    """,
        {
            **_FINETUNING,
            "data": "imagenet2012",
            "batch_size": 1024,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 5.0,
        },
        _depths({"coatnet4": 0.7}),
    ),
    Family(
        "jft_pretrain",
        """JFT from random weights, 14 epochs at 224. JFT is not public: use a data set like it.

    keras-coatnet train jft_pretrain --model coatnet3 --data DIR --output runs/c3_jft

    DIR is a data set that tensorflow-datasets prepared.
    Hardware: 14 x 300M x 3 x 34.7G multiply-adds for CoAtNet3: 81 A100-days; 140 and 330 for 4, 5.
    Expected: after `jft_finetune`, top-1 on ImageNet-1k at 512 (paper): CoAtNet3 88.81, 4 89.11,
    5 89.77.
    Source: Dai et al. 2021, table 10, column "JFT, pre-train"; warm-up of 20,000 steps.
    """,
        {
            **_PRETRAINING,
            "epochs": 14,
            "schedule": "linear",
            "warmup": 20_000 / (14 * _JFT_300M / 4096),  # 20,000 steps
            "weight_decay": 0.01,
            "loss": "sigmoid",
            "label_smoothing": 1e-4,
            "held_out": _HELD_OUT,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 5.0,
        },
        {
            "coatnet3": {"stochastic_depth": 0.0, "learning_rate": 1e-3},
            "coatnet4": {"stochastic_depth": 0.1, "learning_rate": 5e-4},
            "coatnet5": {"stochastic_depth": 0.0, "learning_rate": 5e-4},
        },
    ),
    Family(
        "jft_finetune",
        """ImageNet-1k at 512 (or --image-size 384), 30 epochs from `jft_pretrain`'s weights.

    keras-coatnet train jft_finetune --model coatnet3 \\
        --weights runs/c3_jft/final.weights.h5 --data-dir DIR --output runs/c3_512

    Hardware: 30 x 1.28M x 3 x 203G multiply-adds for CoAtNet3: 4.3 A100-days; 8 and 17 for 4, 5.
    Expected top-1 (paper): CoAtNet3 88.52 at 384, 88.81 at 512; 4 89.11; 5 89.77.
    Source: Dai et al. 2021, table 10, column "JFT, fine-tune".
    """,
        {
            **_FINETUNING,
            "data": "imagenet2012",
            "image_size": 512,
            "batch_size": 512,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 5.0,
        },
        {
            "coatnet3": {"stochastic_depth": 0.1},
            "coatnet4": {"stochastic_depth": 0.3},
            "coatnet5": {"stochastic_depth": 0.2},
        },
    ),
    Family(
        "transfer",
        """Fine-tune a checkpoint on your own images: a folder with a sub-folder for each class.

    keras-coatnet train transfer --weights coatnet_0_rw_224.sw_in1k --data FOLDER \\
        --output runs/mine

    Hardware: one GPU of 8 GB, or patience; --freeze stage2 halves the work.
    Expected: depends on the images. A few hundred for each class often give 90% in a few epochs.
    Source: ours. Low learning rates, lower towards the stem, and a short average of the weights.
    """,
        {
            "image_size": 224,
            "epochs": 20,
            "batch_size": 32,
            "learning_rate": 2e-4,
            "minimum_learning_rate": 2e-6,
            "schedule": "cosine",
            "warmup": 0.1,
            "weight_decay": 0.05,
            "layer_decay": 0.85,
            "ema_momentum": 0.999,
            "stochastic_depth": 0.1,
            "label_smoothing": 0.1,
            "crop_area": 0.35,
            "randaugment_num_ops": 2,
            "randaugment_magnitude": 9.0,
            "crop_pct": 0.95,
        },
        None,
    ),
    Family(
        "gashissdb",
        """CoAtNet-1 on GasHisSDB: normal or abnormal patches of gastric tissue.

    keras-coatnet train gashissdb --data-dir DIR --output runs/gashissdb

    Hardware: one GPU of 16 GB; 160-pixel patches are resized to 224.
    Expected (a later paper reports for CoAtNet-1): accuracy 98.74, F1 99.38, precision 99.97.
    Source: ours, as theirs is not published in full. Tissue has no upright side, and its color is
    the stain's: flips, no RandAugment, mild crops.
    """,
        {
            "data": "gashissdb/160",
            "image_size": 224,
            "epochs": 30,
            "batch_size": 64,
            "learning_rate": 2e-4,
            "minimum_learning_rate": 2e-6,
            "schedule": "cosine",
            "warmup": 0.05,
            "weight_decay": 0.05,
            "ema_momentum": 0.9995,
            "stochastic_depth": 0.3,
            "label_smoothing": 0.05,
            "crop_area": 0.5,
            "crop_pct": 1.0,
            "positive": "Abnormal",
        },
        {"coatnet1": {}},
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}


def recipes() -> tuple[str, ...]:
    """The names of the recipes.

    Example:
        >>> recipes()[0]
        'in1k_pretrain'
    """
    return tuple(FAMILIES)


def find_recipe(name: str, model: str | None = None) -> Recipe:
    """Finds a recipe by its name, or reads it from a file.

    Args:
        name: one of `recipes()`, or the path of a JSON file that `Recipe.save` wrote.
        model: the model to train; None: the recipe's first.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: there is no such recipe, or it has no values for the model.

    Example:
        >>> find_recipe("in1k_pretrain", "coatnet2").stochastic_depth
        0.5
    """
    if not isinstance(name, str):
        raise ValueError(f"`name` must be a recipe's name or a path. Received: name={name!r}")
    if name.endswith(".json"):
        recipe = Recipe.load(name)
        return recipe if model is None else recipe.replace(model=model)
    if name not in FAMILIES:
        raise ValueError(
            f"There is no recipe {name!r}. There are: {', '.join(FAMILIES)}; or give the path of "
            "a recipe's .json file."
        )
    return FAMILIES[name].recipe(model)
