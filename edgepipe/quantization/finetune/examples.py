"""What is trained on: checked inputs and labels, in an order and with changes that a seed gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError, did_you_mean
from edgepipe.quantization.finetune.settings import FinetuneSettings
from edgepipe.quantization.graph import Array, dims, name_of

#: Images are moved by up to this share of their size, mirrored at the edge.
SHIFT = 1 / 8


@dataclass(frozen=True)
class Examples:
    """``inputs``: name → [N, …] as the model takes them; ``labels``: [N] classes (int64) or
    [N, …] wanted outputs (float32), or None."""

    inputs: dict[str, Array]
    labels: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @classmethod
    def of(
        cls,
        graph: ir.Graph,
        inputs: Mapping[str, Array] | Array,
        labels: Array | None,
        settings: FinetuneSettings,
    ) -> Examples:
        """Check what a user gives. Raises UserError naming input or label, and what would work."""
        values = [v for v in graph.inputs if v.name not in graph.initializers]
        if not isinstance(inputs, Mapping):
            if len(values) != 1:
                names = ", ".join(name_of(v) for v in values)
                raise UserError("the model has several inputs", where="data", fix=f"name {names}")
            inputs = {name_of(values[0]): inputs}
        for name in inputs:
            if name not in [v.name for v in values]:
                fix = did_you_mean(name, [name_of(v) for v in values])
                raise UserError(f"'{name}' is not an input of the model", where="data", fix=fix)
        checked = {name_of(v): _checked(v, inputs) for v in values}
        counts = {name: len(array) for name, array in checked.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"inputs differ in number: {counts}", where="data")
        found = cls(checked, _labels(graph, labels, next(iter(counts.values())), settings))
        if settings.augmentation != "none":
            for name, array in checked.items():
                if array.ndim != 4 or array.dtype != np.float32:
                    raise UserError(
                        f"augmentation '{settings.augmentation}' is for images [N, C, H, W]",
                        where=f"input '{name}'",
                        fix="use augmentation='none'",
                    )
        return found

    def samples(self) -> Iterator[dict[str, Array]]:
        """Inputs of single runs, for calibration."""
        for index in range(len(self)):
            yield {name: array[index : index + 1] for name, array in self.inputs.items()}

    def batch(self, step: int, settings: FinetuneSettings) -> tuple[dict[str, Array], Array | None]:
        """Inputs and labels of training step ``step``, a function of it and the seed alone."""
        size = min(settings.batch, len(self))
        epoch, place = divmod(step, steps_per_epoch(len(self), settings))
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self))
        chosen = order[place * size : (place + 1) * size]
        inputs = {name: array[chosen] for name, array in self.inputs.items()}
        if settings.augmentation != "none":
            generator = np.random.default_rng([settings.seed, step, 1])
            shift = settings.augmentation == "shift_flip"
            inputs = {name: augment(x, generator, shift) for name, x in inputs.items()}
        return inputs, None if self.labels is None else self.labels[chosen]


def steps_per_epoch(count: int, settings: FinetuneSettings) -> int:
    """Whole batches; the rest of an epoch's order is left out, and is another one each time."""
    return max(1, count // settings.batch)


def augment(x: Array, generator: np.random.Generator, shift: bool) -> Array:
    """Images [N, C, H, W], half of them mirrored, and moved where ``shift``."""
    flips = generator.random(len(x)) < 0.5
    x = np.where(flips[:, None, None, None], x[..., ::-1], x)
    if not shift:
        return x
    height, width = x.shape[2:]
    reach = [min(int(size * SHIFT), size - 1) for size in (height, width)]
    padded = np.pad(x, [(0, 0), (0, 0), *((r, r) for r in reach)], mode="reflect")
    corners = np.stack([generator.integers(0, 2 * r + 1, len(x)) for r in reach], 1)
    return np.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
    )


def _checked(value: ir.Value, inputs: Mapping[str, Array]) -> Array:
    name, shape, dtype = name_of(value), dims(value), value.dtype
    where = f"input '{name}'"
    if name not in inputs:
        raise UserError("it is missing in the data", where=where)
    array = np.asarray(inputs[name])
    assert shape is not None and dtype is not None
    if array.ndim != len(shape) or array.shape[1:] != shape[1:]:
        wanted = ["N", *shape[1:]]
        text = ", ".join(map(str, wanted))
        raise UserError(f"its shape is {list(array.shape)}, not [{text}]", where=where)
    if not len(array):
        raise UserError("there are no examples", where=where)
    if not np.can_cast(array.dtype, dtype.numpy(), "same_kind"):
        raise UserError(f"it is {array.dtype}, the model takes {dtype.numpy()}", where=where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError("it has values that are NaN or infinite", where=where)
    return np.ascontiguousarray(array, dtype.numpy())


def _labels(
    graph: ir.Graph, labels: Array | None, count: int, settings: FinetuneSettings
) -> Array | None:
    shape = dims(graph.outputs[0])
    classes = settings.loss == "cross_entropy"
    if classes and (shape is None or len(shape) != 2):
        raise UserError(
            f"cross entropy is for logits [N, classes]; output '{graph.outputs[0].name}' is "
            f"{None if shape is None else list(shape)}",
            where="loss",
            fix="use loss='squared_error'",
        )
    if labels is None:
        if settings.distillation < 1.0:
            raise UserError(
                "there are no labels", where="data", fix="give them, or use distillation=1"
            )
        return None
    array = np.asarray(labels)
    if len(array) != count:
        raise UserError(f"{len(array)} labels for {count} examples", where="labels")
    assert shape is not None
    if not classes:
        if array.shape[1:] != shape[1:]:
            raise UserError(
                f"their shape is {list(array.shape)}, the output's {list(shape)}", where="labels"
            )
        return np.ascontiguousarray(array, np.float32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"they are {array.dtype} {list(array.shape)}", where="labels", fix="give [N] integers"
        )
    if array.min() < 0 or array.max() >= shape[1]:
        raise UserError(
            f"they reach from {array.min()} to {array.max()}; the model has {shape[1]} classes",
            where="labels",
        )
    return array.astype(np.int64)
