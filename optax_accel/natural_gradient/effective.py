r"""Weights of layers that are computed from parameters: sums of them, and products of two.

A weight that is linear in each of its parameters leaves the Kronecker structure of the layer's
curvature intact.  With inputs x and gradients g of a layer whose weight is W + s L R (a low-rank
adapter; Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021), the gradients of an example
are

.. math::
  x\, g^\top \text{ of } W, \qquad
  x\, (s R g)^\top \text{ of } L, \qquad
  (L^\top x)\, (s g)^\top \text{ of } R,

as those of layers with the weights W, L and R; one of L and R may also be fixed, a frozen matrix.
So a sum or a product counts as one more parameter while it is followed through the program, and its
uses are then those of its terms or factors.

Of another function of parameters, :math:`w = f(\theta)` with the Jacobian J (weight normalization),
the factors belong to w, and with the matrix C that they stand for the natural gradient is

.. math::
  (J^\top C J)^+ \nabla_\theta = J^+\, C^{-1} (J^\top)^+ \nabla_\theta ,

which holds where J has full row rank.  Damping is that of w.  J is the derivative of the user's own
function; its pseudoinverse is applied by iteration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from optax_accel.natural_gradient.layers import Use
from optax_accel.natural_gradient.layouts import Ops, Shape, View, simplified


class Sum(NamedTuple):
    """A sum of parameters, or of what is computed from them.

    Attributes:
      terms: each with its sign; they repeat nothing.
    """

    terms: tuple[tuple[View, int], ...]


class Product(NamedTuple):
    """A matrix product of two parameters, or of what is computed from them, or of one and data.

    Attributes:
      shape: of the value.
      left: the factor on the left, which repeats nothing; None if it is no parameter.
      right: the one on the right; not both are None.
      left_ops: from the factor's parameter to a matrix.
      right_ops: likewise.
      left_matrix: the number of the factor's value, and operations from it to the matrix.
      right_matrix: likewise.
      reason: what is said of the parameters where no layer takes the product as a whole.
    """

    shape: Shape
    left: View | None
    right: View | None
    left_ops: Ops
    right_ops: Ops
    left_matrix: tuple[int, Ops]
    right_matrix: tuple[int, Ops]
    reason: str


class Computed(NamedTuple):
    """Another function of parameters: a normalized weight, for instance.

    Attributes:
      views: of the parameters, or of what is computed from them.
      number: of the value.
      reason: what is said of the parameters where no layer takes it.
    """

    views: tuple[View, ...]
    number: int
    reason: str


Weight: TypeAlias = Sum | Product | Computed


def views_of(weight: Weight) -> list[View]:
    """What a weight is computed from."""
    if isinstance(weight, Sum):
        return [view for view, _ in weight.terms]
    if isinstance(weight, Product):
        return [view for view in (weight.left, weight.right) if view is not None]
    return list(weight.views)


def expand(use: Use, weight: Weight) -> Iterator[Use]:
    """The uses of the terms or factors that a use of the weight is; none if there is no such."""
    if isinstance(weight, Sum):
        for view, sign in weight.terms:
            whole = view.order(*((i,) for i in range(len(view.axes))))
            yield dataclasses.replace(
                use,
                leaf=view.leaf,
                ops=(*whole, *use.ops),
                scales=(*use.scales, *_scale(view)),
                sign=sign * use.sign,
            )
        return
    if use.kind not in ("dense", "convolution") or use.stacked or isinstance(weight, Computed):
        return
    plain = (("reshape", (weight.left_ops[-1][1][0], weight.right_ops[-1][1][1])),)
    turn = ("transpose", (1, 0))
    own = simplified(use.ops, weight.shape)
    left, right = weight.left_matrix, weight.right_matrix
    if own == simplified(plain, weight.shape):
        first, last = (weight.left, weight.left_ops), (weight.right, weight.right_ops)
    elif own == simplified((*plain, turn), weight.shape):  # (L R)^T = R^T L^T
        first = weight.right, (*weight.right_ops, turn, _shape_after(weight.right_ops))
        last = weight.left, (*weight.left_ops, turn, _shape_after(weight.left_ops))
        left, right = (right[0], (*right[1], turn)), (left[0], (*left[1], turn))
    else:
        return
    for (factor, ops), is_first in ((first, True), (last, False)):
        if factor is None:
            continue
        # The value of the other factor has its own scale in it.
        own_use = dataclasses.replace(
            use, leaf=factor.leaf, ops=ops, scales=(*use.scales, *_scale(factor))
        )
        if is_first:
            yield dataclasses.replace(own_use, right=(*use.right, right))
        else:
            yield dataclasses.replace(own_use, left=(*use.left, left))


def _scale(view: View) -> tuple[int, ...]:
    return () if view.coefficient is None else (view.coefficient,)


def _shape_after(ops: Ops) -> tuple[str, Shape]:
    """The shape of a transposed matrix, as the operation that blocks read it from."""
    rows, columns = ops[-1][1]
    return "reshape", (columns, rows)
