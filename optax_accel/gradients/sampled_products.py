r"""Sampled tensor operations: products of matrices and convolutions from a part of their terms.

A matrix product is a sum of outer products, :math:`C = A B = \sum_i A_{:,i} B_{i,:}`, and a
convolution one over input channels.  Here only some of the terms are computed, those
that are large or are drawn because they are (``optax_accel.gradients.sampled_terms``), with the
weights :math:`w_i = \|A_{:,i}\| \|B_{i,:}\|`, Frobenius norms.  ``"top_k"`` is deterministic and
biased, with :math:`\|\tilde C - C\|_F \le \sum_{i \notin S} w_i`; ``"crs"`` and ``"bernoulli"`` are
unbiased, with the mean squared errors :math:`((\sum_i w_i)^2 - \|C\|_F^2) / k` and
:math:`\sum_i w_i^2 (1 - q_i) / q_i`.

Three places can be sampled.  ``"forward"``: the product, through whose chosen terms alone the
derivative goes: with S the chosen indices and D their scales, :math:`\tilde C = A_S D B_S`,
:math:`dA_S = dC\, B_S^\top D`, :math:`dB_S = D A_S^\top dC`, and zero elsewhere; the probabilities
have no derivative.  ``"backward"``: the product is exact; :math:`dA = dC\, B^\top` is sampled over
outputs and :math:`dB = A^\top dC` over examples.  ``"forward_only"``: the product is sampled, its
derivative is that of the exact one.

Adelman, Levy, Hakimi, Silberstein, `Faster neural network training with approximate tensor
operations <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021; authors' code
``acsl-technion/approx`` at ``fd3350a``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_accel.gradients._bilinear import convolution, dot
from optax_accel.gradients.sampled_terms import (
    Count,
    Ratio,
    Sampling,
    SamplingMethod,
    Scores,
    Uniform,
    Where,
)


def sampled_matmul(
    a: chex.Array,
    b: chex.Array,
    key: chex.PRNGKey | int | None = None,
    *,
    ratio: Ratio | None = None,
    num_samples: Count | None = None,
    min_samples: Count = 10,
    method: SamplingMethod = "top_k",
    where: Where = "forward",
    uniform: Uniform = "1/n",
    scores: Scores = "both",
    norm_rows: int | None = None,
) -> jax.Array:
    """The matrix product ``a @ b`` from a part of its terms.

    Args:
      a: ``(..., n)``, one row for each example.
      b: ``(n, p)``, the weights.
      key: PRNG key or integer seed; needed where something is drawn at random, a new one at each
        step, such as ``jax.random.fold_in(key, step)``.
      ratio: share of the terms that are computed, in (0, 1]; give it or ``num_samples``. 1 is the
        exact product. With ``where="backward"`` a pair: for the gradient with
        respect to ``a`` and for that with respect to ``b``, also of ``num_samples`` and
        ``min_samples``.
      num_samples: number of the terms that are computed, at least 1, in place of a share; n or more
        of them are the exact product. ``None`` (default): as ``ratio`` says.
      min_samples: the fewest terms that a ``ratio`` stands for, at least 1; 10 (default) as in the
        authors' code.
      method: ``"top_k"`` (default) computes the largest terms, deterministically and with a bias;
        ``"crs"`` draws terms with replacement and ``"bernoulli"`` each by itself, both unbiased.
      where: ``"forward"`` (default) computes the product from the chosen terms, and the gradients
        of these alone. ``"backward"`` computes the product exactly and samples its gradients,
        that of ``a`` over outputs and that of ``b`` over examples. ``"forward_only"``
        samples the product, but not its gradients. All have a derivative rule of their own, for
        reverse mode.
      uniform: what is mixed into the probabilities of draws, with a share of 0.1: ``"1/n"``
        (default), as in the authors' code, ``"k/n"``, which keeps the mean number of Bernoulli's
        terms, or ``None`` for nothing.
      scores: whose norms are the weights of the terms. ``"both"`` (default): of both factors;
        ``"weights"``: of ``b`` alone, so that devices with different examples choose the same
        terms, and only the rows of the gradient that belong to these are summed over devices.
      norm_rows: number of consecutive rows and columns, from a random one on, by which norms are
        estimated, at least 1; 10 in the authors' code. ``None`` (default): all.

    Returns:
      The product, ``(..., p)``, in the dtype of ``a @ b``.

    Raises:
      ValueError: an argument outside its range, both or neither of ``ratio`` and ``num_samples``, a
        pair or ``scores="weights"`` that does not go with ``where``, or shapes that do not fit.
      TypeError: something is drawn at random, and there is no ``key``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> a = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
      >>> b = jnp.array([[1.0, 1.0], [2.0, 0.0], [1.0, -1.0]])
      >>> oa.sampled_matmul(a, b, num_samples=2).tolist()  # without the first term
      [[4.0, 0.0], [5.0, -3.0]]
      >>> jax.grad(lambda b: oa.sampled_matmul(a, b, num_samples=2).sum())(b).tolist()
      [[0.0, 0.0], [3.0, 3.0], [3.0, 3.0]]

    References:
      Adelman et al., `Faster neural network training with approximate tensor operations
      <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
    """
    sampling = Sampling.checked(
        ratio=ratio,
        num_samples=num_samples,
        min_samples=min_samples,
        method=method,
        where=where,
        uniform=uniform,
        scores=scores,
        norm_rows=norm_rows,
    )
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.ndim < 1 or b.ndim != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"sampled_matmul multiplies (..., n) by (n, p); got the shapes {a.shape} and {b.shape}."
        )
    dtype = jnp.result_type(a, b)
    a, b = a.astype(dtype), b.astype(dtype)
    return dot(a, b, (((a.ndim - 1,), (0,)), ((), ())), sampling=sampling, key=key)


def sampled_conv(
    lhs: chex.Array,
    rhs: chex.Array,
    key: chex.PRNGKey | int | None = None,
    *,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    dimension_numbers: Any = None,
    ratio: Ratio | None = None,
    num_samples: Count | None = None,
    min_samples: Count = 10,
    method: SamplingMethod = "top_k",
    where: Where = "forward",
    uniform: Uniform = "1/n",
    scores: Scores = "both",
    norm_rows: int | None = None,
    **arguments: Any,
) -> jax.Array:
    """A convolution from a part of its input channels.

    Args:
      lhs: the images, as ``dimension_numbers`` says.
      rhs: the kernel, the weights.
      key: PRNG key or integer seed; needed where something is drawn at random, a new one at each
        step, such as ``jax.random.fold_in(key, step)``.
      window_strides: strides, one for each spatial axis.
      padding: ``"SAME"``, ``"VALID"`` or a pair of numbers for each spatial axis.
      dimension_numbers: the layout of images, kernel and result, such as
        ``("NHWC", "HWIO", "NHWC")``; ``None`` (default) stands for ``("NCHW", "OIHW", "NCHW")``.
      ratio: share of the terms that are computed, in (0, 1]; give it or ``num_samples``. 1 is the
        exact product. With ``where="backward"`` a pair: for the gradient with
        respect to ``lhs`` and for that with respect to ``rhs``, also of ``num_samples`` and
        ``min_samples``.
      num_samples: number of the terms that are computed, at least 1, in place of a share; n or more
        of them are the exact product. ``None`` (default): as ``ratio`` says.
      min_samples: the fewest terms that a ``ratio`` stands for, at least 1; 10 (default) as in the
        authors' code.
      method: ``"top_k"`` (default) computes the largest terms, deterministically and with a bias;
        ``"crs"`` draws terms with replacement and ``"bernoulli"`` each by itself, both unbiased.
      where: ``"forward"`` (default) computes the convolution from the chosen terms, and the
        gradients of these alone. ``"backward"`` computes the convolution exactly and samples its
        gradients, that of ``lhs`` over outputs and that of ``rhs`` over examples.
        ``"forward_only"`` samples the convolution, but not its gradients. All have a derivative
        rule of their own, for reverse mode.
      uniform: what is mixed into the probabilities of draws, with a share of 0.1: ``"1/n"``
        (default), as in the authors' code, ``"k/n"``, which keeps the mean number of Bernoulli's
        terms, or ``None`` for nothing.
      scores: whose norms are the weights of the terms. ``"both"`` (default): of both factors;
        ``"weights"``: of ``rhs`` alone, so that devices with different examples choose the same
        terms, and only the rows of the gradient that belong to these are summed over devices.
      norm_rows: number of consecutive rows and columns, from a random one on, by which norms are
        estimated, at least 1; 10 in the authors' code. ``None`` (default): all.
      **arguments: further arguments of ``jax.lax.conv_general_dilated`` by name: dilations,
        ``precision`` and ``preferred_element_type``; groups must be 1.

    Returns:
      The convolution, as ``jax.lax.conv_general_dilated`` lays it out.

    Raises:
      ValueError: an argument outside its range, both or neither of ``ratio`` and ``num_samples``, a
        pair or ``scores="weights"`` that does not go with ``where``, or groups.
      TypeError: something is drawn at random, and there is no ``key``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> images, kernel = jnp.ones((1, 8, 5, 5)), jnp.ones((2, 8, 3, 3))
      >>> result = oa.sampled_conv(
      ...     images, kernel, window_strides=(1, 1), padding="VALID", num_samples=4
      ... )
      >>> result.shape, float(result[0, 0, 0, 0])  # four of eight channels, nine pixels each
      ((1, 2, 3, 3), 36.0)

    References:
      Adelman et al., `Faster neural network training with approximate tensor operations
      <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
    """
    sampling = Sampling.checked(
        ratio=ratio,
        num_samples=num_samples,
        min_samples=min_samples,
        method=method,
        where=where,
        uniform=uniform,
        scores=scores,
        norm_rows=norm_rows,
    )
    return convolution(
        jnp.asarray(lhs),
        jnp.asarray(rhs),
        window_strides,
        padding,
        sampling=sampling,
        key=key,
        dimension_numbers=dimension_numbers,
        **arguments,
    )


def sampled_dot_general(
    ratio: Ratio | None = None,
    *,
    num_samples: Count | None = None,
    min_samples: Count = 10,
    method: SamplingMethod = "top_k",
    where: Where = "forward",
    uniform: Uniform = "1/n",
    scores: Scores = "both",
    norm_rows: int | None = None,
    rngs: Any = None,
) -> Any:
    """A product for the argument ``dot_general`` of Flax's layers, from a part of its terms.

    It behaves like dropout: ``model.train()`` and ``model.eval()`` switch it on and off, exact in
    evaluation, and its keys come from a random stream whose count is part of the model's state, so
    that each step draws anew where that state is carried from step to step.

    Args:
      ratio: share of the terms that are computed, in (0, 1]; give it or ``num_samples``. 1 is the
        exact product. With ``where="backward"`` a pair: for the gradient with
        respect to the inputs and for that with respect to the kernel, also of ``num_samples`` and
        ``min_samples``.
      num_samples: number of the terms that are computed, at least 1, in place of a share; n or more
        of them are the exact product. ``None`` (default): as ``ratio`` says.
      min_samples: the fewest terms that a ``ratio`` stands for, at least 1; 10 (default) as in the
        authors' code.
      method: ``"top_k"`` (default) computes the largest terms, deterministically and with a bias;
        ``"crs"`` draws terms with replacement and ``"bernoulli"`` each by itself, both unbiased.
      where: ``"forward"`` (default) computes the product from the chosen terms, and the gradients
        of these alone. ``"backward"`` computes the product exactly and samples its gradients,
        that of the inputs over outputs and that of the kernel over examples. ``"forward_only"``
        samples the product, but not its gradients. All have a derivative rule of their own, for
        reverse mode.
      uniform: what is mixed into the probabilities of draws, with a share of 0.1: ``"1/n"``
        (default), as in the authors' code, ``"k/n"``, which keeps the mean number of Bernoulli's
        terms, or ``None`` for nothing.
      scores: whose norms are the weights of the terms. ``"both"`` (default): of both factors;
        ``"weights"``: of the kernel alone, so that devices with different examples choose the same
        terms, and only the rows of the gradient that belong to these are summed over devices.
      norm_rows: number of consecutive rows and columns, from a random one on, by which norms are
        estimated, at least 1; 10 in the authors' code. ``None`` (default): all.
      rngs: ``nnx.Rngs`` or ``nnx.RngStream`` of which the keys of draws come, from the stream
        ``"sampling"`` or the default one; needed where something is drawn at random. ``None``
        (default): nothing is drawn.

    Returns:
      A Flax NNX module to call like ``jax.lax.dot_general``.

    Raises:
      ImportError: Flax is not installed.
      ValueError: an argument outside its range, both or neither of ``ratio`` and ``num_samples``, a
        pair or ``scores="weights"`` that does not go with ``where``.
      TypeError: something is drawn at random, and there is no ``rngs``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import optax_accel as oa
      >>> product = oa.sampled_dot_general(0.5, min_samples=1)
      >>> layer = nnx.Linear(4, 3, dot_general=product, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[1.0, 0.0, 2.0, 0.0]])
      >>> bool(jnp.allclose(layer(x), x @ layer.kernel[...]))  # terms of zeros are left out
      True

    References:
      Adelman et al., `Faster neural network training with approximate tensor operations
      <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
    """
    sampling = Sampling.checked(
        ratio=ratio,
        num_samples=num_samples,
        min_samples=min_samples,
        method=method,
        where=where,
        uniform=uniform,
        scores=scores,
        norm_rows=norm_rows,
    )
    from optax_accel.gradients._flax_products import SampledProduct

    return SampledProduct("dot_general", sampling, rngs)


def sampled_conv_general_dilated(
    ratio: Ratio | None = None,
    *,
    num_samples: Count | None = None,
    min_samples: Count = 10,
    method: SamplingMethod = "top_k",
    where: Where = "forward",
    uniform: Uniform = "1/n",
    scores: Scores = "both",
    norm_rows: int | None = None,
    rngs: Any = None,
) -> Any:
    """A convolution for the argument of that name of Flax's layers, from a part of the channels.

    It behaves like dropout: ``model.train()`` and ``model.eval()`` switch it on and off, exact in
    evaluation, and its keys come from a random stream whose count is part of the model's state, so
    that each step draws anew where that state is carried from step to step.

    Args:
      ratio: share of the terms that are computed, in (0, 1]; give it or ``num_samples``. 1 is the
        exact product. With ``where="backward"`` a pair: for the gradient with
        respect to the images and for that with respect to the kernel, also of ``num_samples`` and
        ``min_samples``.
      num_samples: number of the terms that are computed, at least 1, in place of a share; n or more
        of them are the exact product. ``None`` (default): as ``ratio`` says.
      min_samples: the fewest terms that a ``ratio`` stands for, at least 1; 10 (default) as in the
        authors' code.
      method: ``"top_k"`` (default) computes the largest terms, deterministically and with a bias;
        ``"crs"`` draws terms with replacement and ``"bernoulli"`` each by itself, both unbiased.
      where: ``"forward"`` (default) computes the convolution from the chosen terms, and the
        gradients of these alone. ``"backward"`` computes the convolution exactly and samples its
        gradients, that of the images over outputs and that of the kernel over examples.
        ``"forward_only"`` samples the convolution, but not its gradients. All have a derivative
        rule of their own, for reverse mode.
      uniform: what is mixed into the probabilities of draws, with a share of 0.1: ``"1/n"``
        (default), as in the authors' code, ``"k/n"``, which keeps the mean number of Bernoulli's
        terms, or ``None`` for nothing.
      scores: whose norms are the weights of the terms. ``"both"`` (default): of both factors;
        ``"weights"``: of the kernel alone, so that devices with different examples choose the same
        terms, and only the rows of the gradient that belong to these are summed over devices.
      norm_rows: number of consecutive rows and columns, from a random one on, by which norms are
        estimated, at least 1; 10 in the authors' code. ``None`` (default): all.
      rngs: ``nnx.Rngs`` or ``nnx.RngStream`` of which the keys of draws come, from the stream
        ``"sampling"`` or the default one; needed where something is drawn at random. ``None``
        (default): nothing is drawn.

    Returns:
      A Flax NNX module to call like ``jax.lax.conv_general_dilated``.

    Raises:
      ImportError: Flax is not installed.
      ValueError: an argument outside its range, both or neither of ``ratio`` and ``num_samples``, a
        pair or ``scores="weights"`` that does not go with ``where``.
      TypeError: something is drawn at random, and there is no ``rngs``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import optax_accel as oa
      >>> product = oa.sampled_conv_general_dilated(0.5, min_samples=1)
      >>> layer = nnx.Conv(4, 3, (3, 3), conv_general_dilated=product, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 8, 4))).shape
      (2, 8, 8, 3)

    References:
      Adelman et al., `Faster neural network training with approximate tensor operations
      <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
    """
    sampling = Sampling.checked(
        ratio=ratio,
        num_samples=num_samples,
        min_samples=min_samples,
        method=method,
        where=where,
        uniform=uniform,
        scores=scores,
        norm_rows=norm_rows,
    )
    from optax_accel.gradients._flax_products import SampledProduct

    return SampledProduct("conv_general_dilated", sampling, rngs)
