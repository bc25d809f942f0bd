r"""The terms of a sampled sum: how many are computed, which, and what they are multiplied by.

With the weights :math:`w_i` of n terms and k of them to choose:

- ``"top_k"``: the k terms of the largest weights, as they are.
- ``"crs"``: k draws with replacement, of probabilities :math:`p_i = w_i / \sum_j w_j`, each divided
  by :math:`k p_i` (column-row sampling; Drineas et al., 2006).
- ``"bernoulli"``: each term by itself with the probability
  :math:`q_i = \min(1, k w_i / \sum_j w_j)`, divided by it.

Adelman, Levy, Hakimi, Silberstein, `Faster neural network training with approximate tensor
operations <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.  Selection, order of operations and
defaults are those of the authors' code, ``acsl-technion/approx`` at ``fd3350a``, but for what
static shapes ask for, which is our reading: the number of terms does not shrink where weights are
zero, and a Bernoulli draw has room for :math:`k + 4 \sqrt{k (1 - k / n)}` terms, four standard
deviations more than it has in the mean.  What is drawn beyond that is dropped at random and
counted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_choice, check_integer, check_number
from optax_accel._random import as_key

SamplingMethod = Literal["top_k", "crs", "bernoulli"]
Where = Literal["forward", "backward", "forward_only"]
Uniform = Literal["1/n", "k/n"] | None
Scores = Literal["both", "weights"]
# Under other names than `float`, so that no schedule is injected: they decide shapes.
Ratio: TypeAlias = float | tuple[float, float]
Count: TypeAlias = int | tuple[int, int]
_UNIFORM_SHARE = 0.1  # of the probabilities, in the authors' code


class SampledTerms(NamedTuple):
    """The terms of a sum that are computed.

    Attributes:
      indices: different indices of terms, int32 of shape ``(size,)``, in increasing order.
      scales: what each of these terms is multiplied by, float32 or wider, ``(size,)``; 0 for a term
        that only fills up the shape. ``None`` for ``"top_k"``, which scales nothing.
      num_dropped: how many drawn terms did not fit into ``size``; int32 scalar.
    """

    indices: jax.Array
    scales: jax.Array | None
    num_dropped: jax.Array


def sample_terms(
    weights: chex.Array,
    key: chex.PRNGKey | int | None = None,
    *,
    num_samples: int,
    method: SamplingMethod = "top_k",
    uniform: Uniform = "1/n",
) -> SampledTerms:
    r"""Chooses terms of a sum by their weights.

    Args:
      weights: at least 0, shape ``(n,)``; where all of them are 0, all terms count alike.
      key: PRNG key or integer seed; not used by ``"top_k"``, required by the others.
      num_samples: how many terms to choose, k: from 1 to n. Of ``"bernoulli"`` their mean number,
        of ``"crs"`` the number of draws, of which several may hit one term.
      method: ``"top_k"`` (default) takes the largest weights, ``"crs"`` draws with replacement,
        ``"bernoulli"`` draws each term by itself.
      uniform: what is mixed into the probabilities, so that none is tiny. ``"1/n"`` (default), as
        in the authors' code: ``0.9 p + 0.1 / n``, by which Bernoulli draws have fewer than k terms
        in the mean, 0.9 k + 0.1. ``"k/n"`` is our reading: ``0.9 q + 0.1 k / n`` keeps k where no
        probability reaches 1; for ``"crs"``, whose probabilities sum to 1, it is the same as
        ``"1/n"``. ``None`` mixes nothing, as in the paper's text.

    Returns:
      The terms.

    Raises:
      ValueError: ``num_samples`` is not between 1 and n, ``weights`` have not one axis, or an
        argument is not one of the allowed words.
      TypeError: ``method`` draws, and there is no ``key``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> oa.sample_terms(jnp.array([1.0, 4.0, 3.0]), num_samples=2).indices.tolist()
      [1, 2]
      >>> terms = oa.sample_terms(jnp.ones(8), 0, num_samples=4, method="bernoulli", uniform=None)
      >>> sorted(set(terms.scales.tolist()))  # 1 / 0.5, or a place that is not taken
      [0.0, 2.0]
    """
    check_choice("method", method, ("top_k", "crs", "bernoulli"))
    if uniform is not None:
        check_choice("uniform", uniform, ("1/n", "k/n"))
    weights = jnp.asarray(weights)
    if weights.ndim != 1:
        raise ValueError(f"`weights` must have one axis, got the shape {weights.shape}.")
    n, k = len(weights), num_samples
    check_integer("num_samples", k, 1)
    if k > n:
        raise ValueError(f"`num_samples` must be at most the number of weights, {n}, got {k}.")
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    if method == "top_k":
        indices = jnp.sort(lax.top_k(weights, k)[1])
        return SampledTerms(indices, None, jnp.zeros((), jnp.int32))
    if key is None:
        raise TypeError(f"method={method!r} draws terms at random: give it a `key`.")
    draw = _draw_crs if method == "crs" else _draw_bernoulli
    return draw(weights, as_key(key), k, uniform)


def _shares(weights: jax.Array) -> jax.Array:
    total = jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 1 / len(weights))


def _draw_crs(weights: jax.Array, key: jax.Array, k: int, uniform: Uniform) -> SampledTerms:
    n, p = len(weights), _shares(weights)
    if uniform is not None:
        p = (1 - _UNIFORM_SHARE) * p + _UNIFORM_SHARE / n
    cumulative = jnp.cumsum(p)
    points = jax.random.uniform(key, (k,), p.dtype) * cumulative[-1]
    # Rounding may put a point at the very end.
    draws = jnp.minimum(jnp.searchsorted(cumulative, points, side="right"), n - 1)
    hits = jnp.zeros(n, jnp.int32).at[draws].add(1)
    # One place for each term that was hit: repeated draws are one term with a larger scale.
    indices = jnp.sort(lax.top_k(jnp.minimum(hits, 1), k)[1])
    scales = jnp.where(hits > 0, hits.astype(p.dtype) / (k * jnp.where(hits > 0, p, 1)), 0)
    return SampledTerms(indices, scales[indices], jnp.zeros((), jnp.int32))


def _draw_bernoulli(weights: jax.Array, key: jax.Array, k: int, uniform: Uniform) -> SampledTerms:
    n = len(weights)
    q = jnp.minimum(k * _shares(weights), 1)
    if uniform is not None:
        floor = 1 / n if uniform == "1/n" else k / n
        q = (1 - _UNIFORM_SHARE) * q + _UNIFORM_SHARE * floor
    # Below 1 for the terms that are drawn, and there uniform, whatever their q: of too many drawn
    # ones the largest are dropped.
    level = jax.random.uniform(key, (n,), q.dtype) / jnp.where(q > 0, q, 1)
    level = jnp.where(q > 0, level, jnp.inf)
    drawn = level < 1
    size = bernoulli_size(k, n)
    indices = jnp.sort(lax.top_k(-level, size)[1])
    scales = jnp.where(drawn, 1 / jnp.where(drawn, q, 1), 0)
    num_dropped = jnp.maximum(jnp.sum(drawn, dtype=jnp.int32) - size, 0)
    return SampledTerms(indices, scales[indices], num_dropped)


def bernoulli_size(k: int, n: int) -> int:
    """How many of n terms a Bernoulli draw of k in the mean has room for."""
    return min(n, math.ceil(k + 4 * math.sqrt(k * (1 - k / n))))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How products are sampled: the arguments that all functions of this module share.

    Attributes:
      ratio: share of the terms; of a backward product with respect to a and with respect to b.
      num_samples: their number, in place of the share.
      min_samples: the fewest terms.
      method: how they are chosen.
      where: which products are sampled.
      uniform: what is mixed into probabilities.
      scores: whose norms are the weights of the terms.
      norm_rows: from how many rows and columns norms are estimated; None for all.
    """

    ratio: tuple[float, float] | None
    num_samples: tuple[int, int] | None
    min_samples: tuple[int, int]
    method: SamplingMethod
    where: Where
    uniform: Uniform
    scores: Scores
    norm_rows: int | None

    @classmethod
    def checked(
        cls,
        *,
        ratio: Ratio | None,
        num_samples: Count | None,
        min_samples: Count,
        where: Where,
        **others: Any,
    ) -> Sampling:
        """Checks the arguments as a person gives them."""
        check_choice("where", where, ("forward", "backward", "forward_only"))
        check_choice("method", others["method"], ("top_k", "crs", "bernoulli"))
        check_choice("scores", others["scores"], ("both", "weights"))
        if others["uniform"] is not None:
            check_choice("uniform", others["uniform"], ("1/n", "k/n"))
        if others["norm_rows"] is not None:
            check_integer("norm_rows", others["norm_rows"], 1)
        if others["scores"] == "weights" and where == "backward":
            raise ValueError(
                "scores='weights' gives all devices the same terms of forward products; the terms "
                "of backward products are outputs and examples. Use where='forward', or "
                "scores='both'."
            )
        if (ratio is None) == (num_samples is None):
            raise ValueError(
                "Give either `ratio`, a share of the terms in (0, 1], or `num_samples`, their "
                f"number; got ratio={ratio!r} and num_samples={num_samples!r}."
            )
        shares = None if ratio is None else _pair("ratio", ratio, where)
        counts = None if num_samples is None else _pair("num_samples", num_samples, where)
        fewest = _pair("min_samples", min_samples, where)
        for share in shares or ():
            if isinstance(share, jax.Array):
                raise TypeError(
                    "`ratio` decides shapes and must be a Python number, got an array. Under "
                    "optax.inject_hyperparams use optax_accel.inject_hyperparams, which keeps "
                    "static arguments as they are."
                )
            check_number("ratio", share, 0, 1, open_low=True)
        for name, pair in (("num_samples", counts or ()), ("min_samples", fewest)):
            for count in pair:
                check_integer(name, count, 1)
        return cls(shares, counts, fewest, where=where, **others)

    @property
    def needs_key(self) -> bool:
        """Whether anything is drawn."""
        return self.method != "top_k" or self.norm_rows is not None

    def count(self, n: int, product: int = 0) -> int:
        """How many of n terms are chosen; n of them is the exact product.

        Args:
          n: the number of terms.
          product: 1 for the backward product with respect to b, else 0.
        """
        if self.num_samples is not None:
            return min(self.num_samples[product], n)
        assert self.ratio is not None
        wanted = math.floor(self.ratio[product] * n * (1 + 1e-12))  # 0.29 * 100 is below 29
        return min(max(wanted, self.min_samples[product]), n)

    def terms(self, weights: jax.Array, key: jax.Array | None, k: int) -> SampledTerms:
        """Chooses k terms."""
        return sample_terms(weights, key, num_samples=k, method=self.method, uniform=self.uniform)


def _pair(name: str, value: Any, where: Where) -> tuple[Any, Any]:
    if not isinstance(value, tuple):
        return value, value
    if len(value) != 2 or where != "backward":
        raise ValueError(
            f"`{name}` may be a pair only with where='backward', (of the gradient with respect to "
            f"a, of that with respect to b); got {value!r} with where={where!r}."
        )
    return value
