"""A low-rank approximation of a positive semidefinite operator, and its inverse."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import check_integer, check_number
from optax_accel._numerics import divided, max_norm, power_of_two
from optax_accel._random import as_key
from optax_accel.curvature import blocks
from optax_accel.curvature._vectors import check_vector
from optax_accel.curvature.estimates import (
    Operator,
    block_product,
    orthonormal_rows,
    random_block,
)


class NystromApproximation(NamedTuple):
    r"""The operator :math:`U \Lambda U^\top`, an approximation from below.

    It is a function of a vector itself, and a pytree, so that jitted functions can take it.

    Attributes:
      eigenvalues: the diagonal of :math:`\Lambda`, ``(rank,)``, descending and not negative.
      basis: the rows of :math:`U^\top`, orthonormal, leaves ``(rank, *shape)``.
      num_products: products with the operator that it took, int32 scalar.
    """

    eigenvalues: jax.Array
    basis: chex.ArrayTree
    num_products: jax.Array

    def __call__(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        """The product of the approximation with a vector.

        Args:
          vector: a pytree like the vectors of the operator.

        Returns:
          The product, like the vector.

        Raises:
          ValueError: the vector has another structure or other shapes.
        """
        return _in_basis(self.basis, self.eigenvalues, vector)

    def inverse(self, damping: chex.Numeric) -> Operator:
        r"""A preconditioner for the damped operator, its inverse where it is well approximated.

        :math:`(\lambda_r + \delta) U (\Lambda + \delta I)^{-1} U^\top + (I - U U^\top)`, with the
        smallest eigenvalue :math:`\lambda_r` that was found.

        Args:
          damping: what the operator is damped by, above 0.

        Returns:
          A function of a vector, for ``inverse_product(preconditioner=)``.

        Raises:
          ValueError: the damping is not positive.

        References:
          Frangella, Tropp, Udell, `Randomized Nyström preconditioning
          <https://arxiv.org/abs/2110.02820>`_, 2023, section 5.
        """
        check_number("damping", damping, 0, open_low=True)
        smallest = self.eigenvalues[-1]
        change = (smallest + damping) / (self.eigenvalues + damping) - 1

        def precondition(vector: chex.ArrayTree) -> chex.ArrayTree:
            inside = _in_basis(self.basis, change, vector)
            return jax.tree.map(jnp.add, vector, inside)

        return precondition


def nystrom(
    operator: Operator, rank: int, *, key: chex.PRNGKey, like: chex.ArrayTree = None
) -> NystromApproximation:
    r"""A randomized Nyström approximation of a positive semidefinite operator, from one block.

    :math:`A \Omega (\Omega^\top A \Omega)^{+} (A \Omega)^\top` for a random orthonormal
    :math:`\Omega`, stabilized by a shift of a few rounding errors that is taken away at the end.
    It takes ``rank`` products, all of them at once. For an operator that may be indefinite, as a
    Hessian is, use the Gauss-Newton matrix or a Fisher matrix, or damp it.

    Args:
      operator: a symmetric positive semidefinite operator: a
        :class:`~optax_accel.curvature.CurvatureOperator` or a function of a pytree.
      rank: number of eigenpairs, and of products; at most the dimension, the number of parameters
        that the operator acts on.
      key: PRNG key of the random block, or an integer seed.
      like: structure, shapes and dtypes of the vectors; default: the operator's own.

    Returns:
      The approximation, with ``.inverse(damping)`` as a preconditioner. Inside ``jit`` its numbers
      are nan where the operator was found to be indefinite.

    Raises:
      ValueError: ``rank`` is less than 1 or above the dimension, or, outside of ``jit``, the
        operator is not positive semidefinite or gives numbers that are not finite.
      TypeError: ``like`` is missing, or ``rank`` is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import inverse_product, nystrom
      >>> diagonal = jnp.concatenate([jnp.array([900.0, 400.0, 100.0]), jnp.full(97, 0.001)])
      >>> operator = lambda v: diagonal * v
      >>> approximation = nystrom(operator, 8, key=jax.random.key(0), like=diagonal)
      >>> bool(jnp.allclose(approximation.eigenvalues[:3], diagonal[:3], rtol=0.01))
      True
      >>> preconditioner = approximation.inverse(damping=0.1)
      >>> found = inverse_product(
      ...     operator, jnp.ones(100), damping=0.1, preconditioner=preconditioner)
      >>> bool(found.converged), int(found.num_products) <= 5
      (True, True)

    References:
      Frangella, Tropp, Udell, `Randomized Nyström preconditioning
      <https://arxiv.org/abs/2110.02820>`_, 2023, algorithm 2.1.
    """
    check_integer("rank", rank, 1)
    product, like = block_product(operator, like)
    if rank > (dimension := blocks.dimension(like)):
        raise ValueError(
            f"nystrom: `rank` must be at most {dimension}, the number of rows of the operator, got "
            f"{rank}."
        )
    test = orthonormal_rows(random_block(as_key(key), like, rank, "gaussian"))
    eigenvalues, basis = _from_sketch(test, product(test))
    if not isinstance(eigenvalues, jax.core.Tracer) and not jnp.isfinite(eigenvalues).all():
        raise ValueError(
            "nystrom: the operator is not positive semidefinite, or gives numbers that are not "
            "finite. Take curvature.gauss_newton or curvature.fisher in place of a Hessian, or "
            "add damping: lambda v: jax.tree.map(lambda a, x: a + damping * x, operator(v), v)."
        )
    return NystromApproximation(eigenvalues, basis, jnp.asarray(rank, jnp.int32))


@jax.jit
def _from_sketch(test: chex.ArrayTree, image: chex.ArrayTree) -> tuple[jax.Array, chex.ArrayTree]:
    """Eigenvalues and eigenvectors from the images of an orthonormal block.

    The paper takes the singular values of the whole image; we take those of the small matrix that
    is left of it in an orthonormal basis, so that the parameters are contracted leaf by leaf.
    """
    # Entries are about 1 in these units: their squares neither overflow nor underflow.
    unit = power_of_two(max_norm(image))
    image = divided(image, unit)
    gram = blocks.inner(image, image)
    num = gram.shape[0]
    eps = jnp.finfo(gram.dtype).eps
    # The paper's shift is the distance between numbers near the Frobenius norm, times the root of
    # the dimension in its code; ours allows for the rounding of the inner products, too.
    shift = 3 * num**0.5 * eps * jnp.sqrt(jnp.trace(gram))
    shifted = jax.tree.map(lambda y, t: y + shift.astype(y.dtype) * t, image, test)
    core = blocks.inner(test, shifted)
    factor = jnp.linalg.cholesky((core + core.T) / 2)
    basis = orthonormal_rows(shifted)
    within = blocks.inner(basis, shifted)  # the shifted image is `within.T` times the basis
    scaled = jax.scipy.linalg.solve_triangular(factor, within.T, lower=True)
    _, values, vectors = jnp.linalg.svd(scaled, full_matrices=False)
    eigenvalues = jnp.maximum(values**2 - shift, 0)
    zero = jnp.sqrt(jnp.trace(gram)) == 0  # whose factor of zero pivots is not finite
    eigenvalues = jnp.where(zero, 0, eigenvalues)
    vectors = jnp.where(zero, jnp.eye(num, dtype=vectors.dtype), vectors)
    basis = jax.tree.map(lambda b, t: jnp.where(zero, t, b), basis, test)
    return unit.astype(eigenvalues.dtype) * eigenvalues, blocks.combine(vectors, basis)


@jax.jit
def _in_basis(basis: chex.ArrayTree, factors: jax.Array, vector: chex.ArrayTree) -> chex.ArrayTree:
    row = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), basis)
    check_vector("nystrom", row, vector)
    coefficients = blocks.inner(basis, blocks.as_block(vector))[:, 0]
    combined = blocks.combine(factors * coefficients, basis)
    return jax.tree.map(lambda c, v: c.astype(v.dtype), combined, vector)
