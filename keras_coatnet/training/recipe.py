"""A training run's choices: one frozen dataclass, each field with its help text beside it.

Nothing here imports Keras or TensorFlow, as the command line prints and checks recipes without.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from keras_coatnet.architectures import architectures, find_architecture
from keras_coatnet.arguments import MAX_NUMBER, as_python, check_fields, choice, number
from keras_coatnet.config import CoAtNetConfig
from keras_coatnet.files import whole_file
from keras_coatnet.images import CROP_MODES, ImageSettings
from keras_coatnet.paths import check_local
from keras_coatnet.training.choices import (
    CROPS,
    DTYPE_POLICIES,
    FREEZES,
    LABELINGS,
    LOSSES,
    NAN_POLICIES,
    SCHEDULES,
)

if TYPE_CHECKING:
    from keras_coatnet.training.engine.base import StepConfig


def _field(default: Any, help: str, choices: tuple | None = None, decides: bool = True) -> Any:
    """A field: its help text on the command line, and whether it decides a run's result."""
    metadata = {"help": help, "choices": choices, "decides": decides}
    return dataclasses.field(default=default, metadata=metadata)


def _running(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A field that may change when an interrupted run goes on."""
    return _field(default, help, choices, decides=False)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All choices of a training run. The paper's recipes are in `named_recipes.py`.

    Fields with a list of choices take one of them. The learning rates are those for this recipe's
    batch size; see `replace` for what another batch size does.

    Most fields decide the result of a run, and must stay the same when an interrupted run goes on.
    The others (their metadata has `"decides": False`) say how the run is carried out, and may
    change then: where the data are, limits, log, checkpoints, evaluations, and how the work is
    divided to fit into memory.

    Raises:
        ValueError: a field has a value of another type, or out of its range.

    Example:
        >>> Recipe(model="coatnet0", epochs=3, batch_size=64).replace(batch_size=32).learning_rate
        0.0005
    """

    # What is trained on what.
    name: str = _running("custom", "name of the run")
    model: str = _field("coatnet0", "an architecture's name, or a JSON file of a CoAtNetConfig")
    weights: str | None = _field(None, "weights to start from: a checkpoint's name, or a file")
    data: str | None = _running(None, "a folder of images, or a tensorflow-datasets name")
    train_split: str | None = _running(None, "the sub-folder or split to train on")
    validation_split: str | None = _running(None, "the sub-folder or split to evaluate on")
    classes: str = _field(
        "present",
        "classes of folders named by WordNet ids: those present, or all of ImageNet",
        LABELINGS,
    )
    image_size: int = _field(224, "height and width of the images, in pixels")
    seed: int = _field(0, "seed of initial weights, order of images, augmentation and dropping")

    # How long, and how fast.
    epochs: int = _field(300, "passes over the training images")
    batch_size: int = _field(4096, "images in a step, over all devices")
    learning_rate: float = _field(1e-3, "highest learning rate, for this batch size")
    minimum_learning_rate: float = _field(1e-5, "last learning rate, for this batch size")
    schedule: str = _field("cosine", "how the learning rate falls from highest to last", SCHEDULES)
    warmup: float = _field(0.0, "share of all steps in which the learning rate rises from zero")
    weight_decay: float = _field(0.05, "AdamW's decoupled decay; none for biases, norms, tables")
    beta_1: float = _field(0.9, "AdamW's decay rate for the mean of the gradients")
    beta_2: float = _field(0.999, "AdamW's decay rate for the mean of their squares")
    epsilon: float = _field(1e-8, "AdamW's constant against division by zero")
    global_clipnorm: float | None = _field(
        1.0, "largest global norm of the gradients; none: no clipping"
    )
    ema_momentum: float | None = _field(
        None, "momentum of the moving average of the weights; none: no average"
    )
    layer_decay: float = _field(1.0, "factor on the learning rate for each block below the head")

    # Against overfitting.
    loss: str = _field("softmax", "cross-entropy over all classes, or of each class", LOSSES)
    label_smoothing: float = _field(0.1, "share of a label that is spread over all classes")
    stochastic_depth: float = _field(0.0, "rate at which the last block is dropped")
    crop: str = _field("random_resized", "how training images are cropped", CROPS)
    crop_area: float = _field(0.08, "smallest share of an image's area that a random crop keeps")
    flip: bool = _field(True, "mirror half of the training images left to right")
    randaugment_num_ops: int = _field(0, "RandAugment's operations for each image; 0: none")
    randaugment_magnitude: float = _field(0.0, "RandAugment's strength, from 0 to 30")
    mixup: float = _field(0.0, "alpha of mixup; 0: none")
    cutmix: float = _field(0.0, "alpha of CutMix; 0: none")

    # For networks that have weights already.
    freeze: str = _field("none", "freeze the stem and the stages up to this one", FREEZES)
    freeze_batch_norm: bool = _field(False, "freeze every BatchNorm and its moving statistics")

    # Evaluation.
    crop_pct: float = _field(0.875, "share of an image's side that evaluation keeps")
    crop_mode: str = _field(
        "center", "evaluate the middle of an image, or all of it made square", CROP_MODES
    )
    interpolation: str = _field("bicubic", "how evaluation resizes", ("bilinear", "bicubic"))
    held_out: float = _field(
        0.2,
        "of data without validation split: share to evaluate on, or a number of images, at least 2",
    )
    positive: str | None = _running(
        None, "of two classes, the one for which precision, recall and F1 are given"
    )
    evaluation_epochs: int = _running(1, "epochs between two evaluations")

    # What the machine needs. With another `gradient_accumulation_steps`, BatchNorm takes its
    # statistics from chunks of another size, and other blocks are dropped at random; all else
    # differs by rounding.
    dtype_policy: str = _field("float32", "Keras's dtype policy for the layers", DTYPE_POLICIES)
    gradient_accumulation_steps: int = _running(
        1, "chunks in which a device computes its share of a batch; BatchNorm sees one at a time"
    )
    remat: bool = _running(False, "compute blocks again in the backward pass, to save memory")

    # What happens when something goes wrong.
    on_nan: str = _running(
        "stop", "if the loss is not finite: stop, or go back and skip the batch", NAN_POLICIES
    )
    unreadable_limit: int = _running(10, "images that may be unreadable before the run stops")
    checkpoint_steps: int = _running(1000, "steps between two checkpoints, besides one an epoch")
    keep_checkpoints: int = _running(3, "checkpoints that are kept, at least 2")
    log_steps: int = _running(50, "steps between two rows of the log")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(self, field)
            if field.metadata["choices"]:
                choice(field.name, getattr(self, field.name), field.metadata["choices"])
        for names, lowest, highest, what in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is None:
                    continue
                if not lowest <= value <= highest or math.isinf(value):
                    raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}")
        for name in ("mixup", "cutmix"):  # the ranges of `Augmentation`
            value = getattr(self, name)
            if value != 0 and not 0.01 <= value <= 100:
                raise ValueError(
                    f"`{name}` must be 0 (none), or 0.01 to 100. Received: {name}={value!r}"
                )
        if self.minimum_learning_rate > self.learning_rate:
            raise ValueError(
                "`minimum_learning_rate` must not be above `learning_rate`. Received: "
                f"{self.minimum_learning_rate} > {self.learning_rate}"
            )
        if self.held_out >= 1 and (self.held_out < 2 or self.held_out % 1):
            raise ValueError(
                "`held_out` must be a share above 0 and below 1, or a whole number of images, "
                f"at least 2. Received: held_out={self.held_out!r}"
            )
        if self.keep_checkpoints < 2:
            raise ValueError(
                "`keep_checkpoints` must be at least 2, so that there is one to fall back to. "
                f"Received: keep_checkpoints={self.keep_checkpoints}"
            )

    def replace(self, **changes: Any) -> Recipe:
        """A recipe with other values.

        Another `batch_size` changes both learning rates in proportion (the linear rule of Goyal et
        al., 2017), unless the changes name them. Another `learning_rate` changes the minimum in
        proportion. Another number of epochs leaves the rates alone: schedule and warm-up are shares
        of the run.

        Args:
            **changes: fields and their new values.

        Returns:
            A `Recipe`.

        Raises:
            ValueError: there is no such field, or its value is out of range.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ValueError(
                f"A recipe has no {', '.join(map(repr, unknown))}. It has: "
                f"{', '.join(sorted(known))}"
            )
        checked = dataclasses.replace(self, **{"minimum_learning_rate": 0.0, **changes})
        factor = checked.batch_size / self.batch_size
        if "learning_rate" in changes:
            factor = checked.learning_rate / self.learning_rate
        rates = {
            name: getattr(self, name) * factor
            for name in ("learning_rate", "minimum_learning_rate")
        }
        return dataclasses.replace(self, **{**rates, **changes})

    def changed_fields(self, other: Recipe, decides: bool) -> list[str]:
        """Names of the fields that differ between two recipes.

        Args:
            other: the recipe to compare with.
            decides: True: fields that decide a run's result. False: fields that may change when
                a run goes on.

        Returns:
            The names, in the order of the fields.

        Example:
            >>> Recipe(seed=1, log_steps=10).changed_fields(Recipe(), decides=False)
            ['log_steps']
        """
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.metadata["decides"] == decides
            and getattr(self, field.name) != getattr(other, field.name)
        ]

    def steps_per_epoch(self, examples: int) -> int:
        """How many full batches a data set has.

        Args:
            examples: how many images the data set has.

        Returns:
            Steps, at least 1.

        Raises:
            ValueError: there are fewer images than a batch needs.
        """
        if examples < self.batch_size:
            raise ValueError(
                f"There are {examples} training images, fewer than a batch of {self.batch_size}. "
                "Choose a smaller batch."
            )
        return examples // self.batch_size

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of the warm-up in a run of `total_steps`."""
        return math.ceil(self.warmup * total_steps)

    def architecture(self) -> CoAtNetConfig:
        """The network's configuration, with this recipe's image size and stochastic depth.

        Raises:
            ValueError: there is no such architecture, or the file does not hold one.
        """
        check_local(self.model, "model")
        path = pathlib.Path(self.model)
        if path.suffix == ".json":
            config = _read_json(path, CoAtNetConfig, "a CoAtNetConfig")
        elif self.model in architectures():
            config = find_architecture(self.model)
        else:
            raise ValueError(
                "`model` must be the path of a .json file, or one of: "
                f"{', '.join(architectures())}. Received: model={self.model!r}"
            )
        return config.replace(stochastic_depth=self.stochastic_depth, input_size=self.image_size)

    def step_config(self) -> StepConfig:
        """What the engine's training step computes."""
        from keras_coatnet.training.engine.base import StepConfig

        return StepConfig(
            batch_size=self.batch_size,
            loss=self.loss,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            global_clipnorm=self.global_clipnorm,
            ema_momentum=self.ema_momentum,
        )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, by mixup or CutMix."""
        return self.mixup > 0 or self.cutmix > 0

    def data_options(self) -> dict[str, Any]:
        """Arguments of `open_datasets`: which images are read."""
        names = ("train_split", "validation_split", "held_out", "classes", "seed")
        return {name: getattr(self, name) for name in names}

    def image_settings(self) -> ImageSettings:
        """How evaluation reads images."""
        return ImageSettings(
            self.image_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the recipe to a JSON file. A failure leaves no partial file."""
        check_local(path, "path")
        with whole_file(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Reads a recipe from a JSON file.

        Args:
            path: a file that `save` wrote, or one written by hand. Fields that it leaves out have
                their defaults.

        Returns:
            A `Recipe`.

        Raises:
            ValueError: there is no such file, it cannot be read, or it does not hold a recipe.
        """
        check_local(path, "path")
        return _read_json(pathlib.Path(path), cls, "a recipe")

    def describe(self) -> str:
        """The fields as text, one to a line."""
        width = max(len(field.name) for field in dataclasses.fields(self))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.to_dict().items())


_T = TypeVar("_T")

_MAX_JSON = 1 << 20  # bytes
_KINDS = typing.get_type_hints(Recipe)
_LARGEST = 0.9 * MAX_NUMBER  # of the numbers that the optimizer takes
_RANGES = (
    (("image_size",), 32, 4096, "from 32 to 4096 pixels"),
    (
        (
            "epochs",
            "batch_size",
            "gradient_accumulation_steps",
            "evaluation_epochs",
            "checkpoint_steps",
            "log_steps",
        ),
        1,
        math.inf,
        "at least 1",
    ),
    (("minimum_learning_rate", "weight_decay"), 0, _LARGEST, f"from 0 to {_LARGEST:g}"),
    (
        ("learning_rate", "epsilon", "global_clipnorm"),
        1e-30,
        _LARGEST,
        f"above 0 and at most {_LARGEST:g}",
    ),
    (("beta_1", "beta_2", "ema_momentum"), 0, 1 - 1e-9, "at least 0 and below 1"),
    (("stochastic_depth",), 0, 0.999, "at least 0 and below 1"),
    (("label_smoothing",), 0, 1 - 1e-9, "at least 0 and below 1"),
    (("warmup",), 0, 1, "from 0 to 1"),
    (("layer_decay", "crop_area", "crop_pct"), 1e-6, 1, "above 0 and at most 1"),
    (("held_out",), 1e-6, math.inf, "above 0"),
    (("unreadable_limit",), 0, math.inf, "at least 0"),
    (("seed",), 0, 2**32 - 1, f"from 0 to {2**32 - 1}"),
    (("randaugment_num_ops",), 0, 16, "from 0 to 16"),
    (("randaugment_magnitude",), 0, 30, "from 0 to 30"),
)


def _check_type(recipe: Recipe, field: dataclasses.Field) -> None:
    """Checks a field's type. An int becomes a float where a float is expected."""
    value, expected = as_python(getattr(recipe, field.name)), _KINDS[field.name]
    kinds = typing.get_args(expected) or (expected,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(number(field.name, value))
    object.__setattr__(recipe, field.name, value)
    is_bool_for_number = isinstance(value, bool) and bool not in kinds
    if not isinstance(value, kinds) or is_bool_for_number:
        raise ValueError(
            f"`{field.name}` must be {field.type.replace('|', 'or')}. "
            f"Received: {field.name}={value!r}"
        )


def _read_json(path: pathlib.Path, kind: type[_T], what: str) -> _T:
    """Returns a dataclass whose fields are in a JSON file.

    Raises:
        ValueError: there is no such file, it cannot be read, or `kind` refuses its content.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise ValueError(f"it has {size} bytes, and at most {_MAX_JSON} are read")
        fields = json.loads(path.read_text("utf-8"))
        check_fields(fields, kind)
        return kind(**fields)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path} does not hold {what}: it is nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold {what}: {error}") from error
