"""A small anchor-free detector, its loss and the boxes that it finds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from models import _common

STRIDE = 8
# Of small objects in the pictures of 64 x 64 pixels for which this network is made; COCO's 32 x 32
# belongs to pictures ten times as wide.
SMALL_AREA = 12.0**2


class DetectorOutputs(TypedDict):
    """What a detector says of each cell of 8 x 8 pixels.

    Attributes:
        classes: Logits (N, height / 8, width / 8, classes + 1); the last one is that of no object.
        distances: Distances (N, height / 8, width / 8, 4) from the middle of the cell to the left,
            upper, right and lower side of the object's box, in units of 8 pixels.
    """

    classes: jax.Array
    distances: jax.Array


class Detector(nnx.Module):
    """A small anchor-free detector: a class and a box for each cell of 8 x 8 pixels.

    Three convolutions of stride 2, then `depth` of stride 1, all 3x3 and with relu; of the map of
    stride 8 two 1x1 convolutions make the class (softmax, with one more for "no object") and the
    distances to the four sides of the box, as in FCOS without its centerness and its pyramid.

    Example:
        >>> import jax.numpy as jnp
        >>> model = Detector(input_shape=(64, 64, 1), num_classes=10, width=4)
        >>> outputs = model(jnp.ones((2, 64, 64, 1)))
        >>> outputs["classes"].shape, outputs["distances"].shape
        ((2, 8, 8, 11), (2, 8, 8, 4))

    Args:
        input_shape: (height, width, channels) of one example; height and width multiples of 8.
        num_classes: Number of classes of objects.
        width: Channels of the first convolution; the next two have twice and four times as many.
        depth: Number of convolutions on the map of stride 8; default: 2.
        norm: Normalization in front of each relu: "batch", "layer", "group", "instance" or None,
            the default.
        dtype: Type of the computation; default: that of inputs and parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Tian et al., `FCOS: Fully Convolutional One-Stage Object Detection
        <https://arxiv.org/abs/1904.01355>`_, 2019, section 3. The sizes are ours.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 16,
        depth: int = 2,
        norm: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if depth < 0 or width < 1:
            raise ValueError(f"width must be at least 1 and depth 0, got {width} and {depth}")
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("Detector", self.input_shape, STRIDE)
        layers = _common.Layers(norm=norm, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        widths = [self.input_shape[2], width, 2 * width, *[4 * width] * (1 + depth)]
        self.convs = nnx.List(
            layers.conv(fan_in, fan_out, strides=2 if i < 3 else 1)
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nnx.List(layers.norm(fan_out) for fan_out in widths[1:])
        # A detector starts by saying "nothing here": most cells are empty (FCOS, as RetinaNet).
        start = jnp.zeros(num_classes + 1).at[-1].set(4.0)
        self.classes = layers.conv(
            4 * width,
            num_classes + 1,
            size=1,
            use_bias=True,
            bias_init=lambda key, shape, dtype=jnp.float32, out_sharding=None: start.astype(dtype),
        )
        self.distances = layers.conv(4 * width, 4, size=1, use_bias=True)

    def __call__(self, x: jax.Array) -> DetectorOutputs:
        """Classes and boxes of all cells, at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return {
            "classes": _common.as_logits(self.classes(x)),
            "distances": _common.as_logits(self.distances(x)),
        }


class Targets(NamedTuple):
    """What the outputs should be.

    Attributes:
        classes: Of each cell, int32 (N, h, w); that of no object is the number of classes.
        distances: (N, h, w, 4) in units of 8 pixels; 0 where there is no object.
        areas: Areas of the objects in square pixels (N, h, w); 0 where there is none.
    """

    classes: jax.Array
    distances: jax.Array
    areas: jax.Array

    @property
    def positive(self) -> jax.Array:
        """1 for cells with an object, 0 for others, float32 (N, h, w)."""
        return (self.areas > 0).astype(jnp.float32)


def targets(outputs: DetectorOutputs, y: jax.Array) -> Targets:
    """The object that each cell has to find.

    A cell belongs to the objects whose box has the middle of the cell inside, as in FCOS (section
    3.1), and to those whose own middle lies in the cell, so that no object is too small to be
    found; of several objects the one with the smallest area, as in FCOS.

    Args:
        outputs: Those of a `Detector`, for their shape.
        y: Boxes (N, boxes, 5): class, left, top, right, bottom in pixels; class -1 is no box.

    Returns:
        The targets.
    """
    height, width = outputs["distances"].shape[1:3]
    none = outputs["classes"].shape[-1] - 1
    down, across = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    middle = STRIDE * (jnp.stack([across, down], axis=-1).astype(y.dtype) + 0.5)  # (h, w, 2)
    low, high = y[:, None, None, :, 1:3], y[:, None, None, :, 3:5]  # (N, 1, 1, boxes, 2)
    middle = middle[None, :, :, None]
    inside = jnp.all((low < middle) & (middle < high), axis=-1)
    offset = (low + high) / 2 - middle
    own = jnp.all((offset >= -STRIDE / 2) & (offset < STRIDE / 2), axis=-1)
    is_box = y[:, None, None, :, 0] >= 0
    area = jnp.prod(high - low, axis=-1)
    area = jnp.where((inside | own) & is_box, area, jnp.inf)  # (N, h, w, boxes)
    best = jnp.argmin(area, axis=-1)
    area = jnp.min(area, axis=-1)
    found = jnp.isfinite(area)
    boxes = jnp.take_along_axis(y[:, None, None], best[..., None, None], axis=3)[..., 0, :]
    distances = jnp.concatenate(
        [middle[..., 0, :] - boxes[..., 1:3], boxes[..., 3:5] - middle[..., 0, :]], axis=-1
    )
    return Targets(
        jnp.where(found, boxes[..., 0].astype(jnp.int32), none),
        jnp.where(found[..., None], distances / STRIDE, 0),
        jnp.where(found, area, 0),
    )


class CellLosses(NamedTuple):
    """The losses of all cells, each (N, h, w).

    Attributes:
        classes: Cross-entropy.
        boxes: Smooth L1 of the four distances, with a threshold of 1, 0 where there is no object.
        targets: What they are measured against.
    """

    classes: jax.Array
    boxes: jax.Array
    targets: Targets


def cell_losses(outputs: DetectorOutputs, y: jax.Array) -> CellLosses:
    """The two losses of each cell.

    Args:
        outputs: Those of a `Detector`.
        y: Boxes, as in `targets`.

    Returns:
        The losses.
    """
    aim = targets(outputs, y)
    classes = optax.softmax_cross_entropy_with_integer_labels(outputs["classes"], aim.classes)
    boxes = optax.huber_loss(outputs["distances"], aim.distances, delta=1.0)
    return CellLosses(classes, jnp.sum(boxes, axis=-1) * aim.positive, aim)


def detection_loss(outputs: DetectorOutputs, y: jax.Array) -> jax.Array:
    """The loss of each picture: of classes and boxes, over its number of cells with an object.

    It is that of FCOS (equation 2) with softmax and smooth L1, but divided by the picture's own
    number of such cells instead of the batch's, so that a batch's loss is the mean over its
    pictures.

    Args:
        outputs: Those of a `Detector`.
        y: Boxes, as in `targets`.

    Returns:
        Losses (N,).
    """
    losses = cell_losses(outputs, y)
    number = jnp.maximum(jnp.sum(losses.targets.positive, axis=(1, 2)), 1)
    return jnp.sum(losses.classes + losses.boxes, axis=(1, 2)) / number


def small_and_all(losses: jax.Array, aim: Targets) -> tuple[jax.Array, jax.Array]:
    """The loss of small objects and that of all, means over the pictures.

    Args:
        losses: One of the losses of `CellLosses`.
        aim: Its targets.

    Returns:
        Two scalars; the share of small objects is the first over the second.
    """
    losses = losses * aim.positive
    small = jnp.where(aim.areas < SMALL_AREA, losses, 0)
    return jnp.sum(small) / len(losses), jnp.sum(losses) / len(losses)


def detections(
    outputs: DetectorOutputs, overlap: float = 0.5, threshold: float = 0.01
) -> jax.Array:
    """The boxes that a detector finds, one for each cell, without duplicates.

    A box has the class of the largest probability besides "no object", which is its score. Of two
    boxes of one class whose intersection over union is above `overlap`, only the one with the
    higher score is left (greedy non-maximum suppression); the score of the other becomes 0.

    Args:
        outputs: Those of a `Detector`.
        overlap: The highest overlap of two boxes of a class; default: 0.5, as in Faster R-CNN's
            code.
        threshold: Lower scores become 0; default: 0.01.

    Returns:
        Rows (N, cells, 6): class, left, top, right, bottom in pixels, score, the highest first.
    """
    count, height, width, _ = outputs["classes"].shape
    probabilities = jax.nn.softmax(outputs["classes"], axis=-1)[..., :-1]
    score, label = jnp.max(probabilities, axis=-1), jnp.argmax(probabilities, axis=-1)
    down, across = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    middle = jnp.stack([across, down], axis=-1).astype(score.dtype)[None] + 0.5
    distances = outputs["distances"]
    box = jnp.concatenate([middle - distances[..., :2], middle + distances[..., 2:]], axis=-1)
    sides = STRIDE * jnp.array([width, height, width, height], box.dtype)
    box = jnp.clip(STRIDE * box, 0, sides[None, None, None])
    rows = jnp.concatenate([label[..., None].astype(box.dtype), box, score[..., None]], axis=-1)
    rows = rows.reshape(count, height * width, 6)
    order = jnp.argsort(rows[..., 5], axis=1, descending=True)
    rows = jnp.take_along_axis(rows, order[..., None], axis=1)
    alike = (rows[:, :, None, 0] == rows[:, None, :, 0]) & (
        _intersection_over_union(rows[..., 1:5]) > overlap
    )

    def keep(i: jax.Array, kept: jax.Array) -> jax.Array:
        # A box goes if one with a higher score that is kept is like it.
        higher = jnp.arange(kept.shape[1])[None] < i
        beaten = jnp.any(alike[:, i] & kept & higher, axis=1)
        return kept.at[:, i].set(~beaten)

    cells = rows.shape[1]
    kept = jax.lax.fori_loop(0, cells, keep, jnp.ones((count, cells), bool))
    return rows.at[..., 5].multiply(kept & (rows[..., 5] >= threshold))


def _intersection_over_union(boxes: jax.Array) -> jax.Array:
    """Of all pairs of boxes (N, boxes, 4): (N, boxes, boxes); 0 for boxes without area."""
    low = jnp.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = jnp.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    both = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    area = jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)
    either = area[:, :, None] + area[:, None, :] - both
    return jnp.where(either > 0, both / jnp.where(either > 0, either, 1), 0)
