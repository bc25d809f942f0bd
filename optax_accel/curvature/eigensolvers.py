"""Matrix-free eigensolvers for symmetric operators on pytrees.

:func:`lanczos` is the one to start with: it takes the fewest products from a cold start.
:func:`block_iteration` starts from a basis that is nearly right, multiplies a whole block at a time
and can filter with a Chebyshev polynomial; :func:`subspace_sweep` is its single step.
:func:`lobpcg` wraps JAX's own solver.  All but the last work leaf by leaf, so sharded parameters
stay sharded, and only small matrices leave the blocks.

Each solver runs in one of two loops.  ``loop="graph"`` builds a ``lax.while_loop``, so that it can
be part of a compiled function.  ``loop="host"`` is a Python loop around compiled pieces, for
products that cannot be traced (accumulated over a loader) or that XLA runs slowly inside loops
(convolutions on a CPU, jax#12868); give it a product that is compiled already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_choice, check_integer, check_number
from optax_accel.curvature import blocks

PyTree = Any
Order = Literal["algebraic", "magnitude"]
Loop = Literal["graph", "host"]

# Rounding: what is smaller than this many ulps of the largest entry seen counts as zero.
_ULPS = 10


class Eigenpairs(NamedTuple):
    """What an eigensolver found.

    Attributes:
      eigenvalues: Ritz values ``(k,)``, the leading one first.
      basis: orthonormal block of the Ritz vectors, leaves ``(k, *shape)``, in the same order.
      residual_norms: ``|A u - theta u|`` of each pair, ``(k,)``. A symmetric operator has an
        eigenvalue within this distance of the Ritz value.
      num_products: operator-vector products used; int32 scalar.
      converged: ``(k,)``, whether the estimated relative error of each eigenvalue is within the
        tolerance (without one: half of the dtype's digits, ``eps ** 0.5``).
      smallest: the smallest Ritz value seen, an estimate of the bottom of the spectrum; infinite if
        none was.
    """

    eigenvalues: jax.Array
    basis: PyTree
    residual_norms: jax.Array
    num_products: jax.Array
    converged: jax.Array
    smallest: jax.Array


def _no_pairs(like: PyTree) -> Eigenpairs:
    dtype = blocks.scalar_dtype(like)
    nothing = jnp.zeros((0,), dtype)
    return Eigenpairs(
        eigenvalues=nothing,
        basis=blocks.zeros(0, like),
        residual_norms=nothing,
        num_products=jnp.zeros((), jnp.int32),
        converged=jnp.zeros((0,), bool),
        smallest=jnp.asarray(jnp.inf, dtype),
    )


def _score(eigenvalues: jax.Array, order: Order) -> jax.Array:
    return eigenvalues if order == "algebraic" else jnp.abs(eigenvalues)


def sort_spectrum(
    eigenvalues: jax.Array, eigenvectors: jax.Array, order: Order
) -> tuple[jax.Array, jax.Array]:
    """Eigenpairs (columns) sorted from the leading one down, by value or by magnitude."""
    index = jnp.argsort(-_score(eigenvalues, order))
    return eigenvalues[index], eigenvectors[:, index]


def _accurate(
    eigenvalues: jax.Array, errors: jax.Array, tolerance: Any, scale: jax.Array
) -> jax.Array:
    """Whether errors are within the relative tolerance, or lost in the rounding at this scale."""
    eps = jnp.finfo(eigenvalues.dtype).eps
    tolerance = jnp.sqrt(eps) if tolerance is None else tolerance
    return errors <= tolerance * jnp.abs(eigenvalues) + _ULPS * eps * scale


# Lanczos ------------------------------------------------------------------------------------------


class _Process(NamedTuple):
    """A Lanczos process.

    Attributes:
      basis: orthonormal block of ``m`` rows, those from ``length`` on zero.
      vector: unit vector orthogonal to them, the next to be multiplied.
      projected: the operator in the basis, ``(m, m)``.
      length: number of rows.
      num_products: products so far.
      beta: norm of the last residual, the coupling of ``vector`` to the last row.
      scale: largest entry of ``projected`` and ``beta`` so far.
      random: whether ``vector`` is random instead of a residual.
      reseeded: whether a Krylov space was exhausted before.
      smallest: smallest Ritz value seen.
      done: whether to stop.
    """

    basis: PyTree
    vector: PyTree
    projected: jax.Array
    length: jax.Array
    num_products: jax.Array
    beta: jax.Array
    scale: jax.Array
    random: jax.Array
    reseeded: jax.Array
    smallest: jax.Array
    done: jax.Array


def _norm(vector: PyTree) -> jax.Array:
    block = blocks.as_block(vector)
    return jnp.sqrt(blocks.inner(block, block)[0, 0])


def _unit(vector: PyTree, norm: jax.Array) -> PyTree:
    factor = 1 / jnp.where(norm > 0, norm, 1)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), vector)


def _orthogonalize(vector: PyTree, basis: PyTree) -> tuple[PyTree, jax.Array]:
    # Classical Gram-Schmidt, twice: "twice is enough" (Giraud et al. 2005).
    total: Any = 0
    for _ in range(2):
        coefficients = blocks.inner(basis, blocks.as_block(vector))[:, 0]
        vector = jax.tree.map(jnp.subtract, vector, blocks.combine(coefficients, basis))
        total = total + coefficients
    return vector, total


def _ritz(process: _Process, order: Order) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ritz values ``(m,)`` (-inf beyond the length), vectors, residual norms, error estimates."""
    projected, length, beta = process.projected, process.length, process.beta
    used = jnp.arange(projected.shape[0]) < length
    # Rows not in use get an eigenvalue of their own, far outside the spectrum.
    outside = -2 * jnp.max(jnp.sum(jnp.abs(projected), axis=1))
    outside = jnp.where(outside < 0, outside, -1)
    values, vectors = jnp.linalg.eigh(projected + jnp.diag(jnp.where(used, 0, outside)))
    real = values > 0.75 * outside
    index = jnp.argsort(jnp.where(real, -_score(values, order), jnp.inf))
    values, vectors, real = values[index], vectors[:, index], real[index]
    last = jnp.maximum(length - 1, 0)
    residuals = beta * jnp.abs(vectors[last])
    # What the process has not seen couples to a Ritz vector only through the next Lanczos vector,
    # with strength `residual`, and so shifts it by residual^2 * m(theta), where m is the resolvent
    # of the unseen part at that vector. If the process went on as it ended, with constant
    # coefficients alpha and beta, that would be the continued fraction below.
    centre = jnp.abs(values - projected[last, last])
    inside = centre <= 2 * beta
    root = jnp.sqrt(jnp.where(inside, 0, centre**2 - 4 * beta**2))
    gap = jnp.where(inside, residuals, (centre + root) / 2)
    errors = residuals * jnp.minimum(1, residuals / jnp.where(gap > 0, gap, 1))
    return jnp.where(real, values, -jnp.inf), vectors, residuals, errors


def _begin(vector: PyTree, basis: PyTree, random: bool) -> _Process:
    dtype = blocks.scalar_dtype(vector)
    capacity = jax.tree.leaves(basis)[0].shape[0]
    zero = jnp.zeros((), dtype)
    return _Process(
        basis=basis,
        vector=_unit(vector, _norm(vector)),
        projected=jnp.zeros((capacity, capacity), dtype),
        length=jnp.zeros((), jnp.int32),
        num_products=jnp.zeros((), jnp.int32),
        beta=zero,
        scale=zero,
        random=jnp.asarray(random),
        reseeded=jnp.zeros((), bool),
        smallest=zero + jnp.inf,
        done=jnp.zeros((), bool),
    )


def _absorb(
    basis: PyTree,
    process: _Process,
    image: PyTree,
    key: jax.Array,
    tolerance: Any,
    *,
    num_directions: int,
    order: Order,
) -> _Process:
    """One step: takes in the operator's image of ``process.vector``.

    The basis comes on its own, so that its buffer can be donated.
    """
    length, vector = process.length, process.vector
    basis = jax.tree.map(
        lambda b, x: lax.dynamic_update_index_in_dim(b, x, length, 0), basis, vector
    )
    image = jax.tree.map(lambda w, x: w.astype(x.dtype), image, vector)
    residual, coefficients = _orthogonalize(image, basis)
    # Coefficients of a whole row, not just three: after a restart the first row couples to all.
    projected = process.projected.at[length].set(coefficients).at[:, length].set(coefficients)
    beta = _norm(residual)
    scale = jnp.maximum(process.scale, jnp.maximum(beta, jnp.max(jnp.abs(coefficients))))
    threshold = _ULPS * jnp.finfo(scale.dtype).eps * scale
    exhausted = beta <= threshold

    def reseed() -> PyTree:
        fresh = blocks.random(jax.random.fold_in(key, process.num_products), vector)
        fresh, _ = _orthogonalize(_unit(fresh, _norm(fresh)), basis)
        return _unit(fresh, _norm(fresh))

    new = _Process(
        basis=basis,
        vector=lax.cond(exhausted, reseed, lambda: _unit(residual, beta)),
        projected=projected,
        length=length + 1,
        num_products=process.num_products + 1,
        beta=jnp.where(exhausted, 0, beta),
        scale=scale,
        random=exhausted,
        reseeded=process.reseeded | exhausted,
        smallest=process.smallest,
        done=(length + 1 == blocks.dimension(vector)) | ~jnp.isfinite(scale),
    )
    if tolerance is None:
        return new
    values, _, _, errors = (x[:num_directions] for x in _ritz(new, order))
    accurate = jnp.all(_accurate(values, errors, tolerance, scale))
    # An exhausted space says nothing about copies of its eigenvalues outside of it. Only when a
    # random vector turns out to be an eigenvector, all that is left is one eigenvalue, and known.
    found = _score(coefficients[length], order)
    closed = exhausted & process.random & (found <= _score(values[-1], order) + threshold)
    accurate = jnp.where(new.reseeded, closed, accurate) & (new.length >= num_directions)
    return new._replace(done=new.done | accurate)


def _compress(basis: PyTree, process: _Process, *, keep: int, order: Order) -> _Process:
    """Thick restart: the ``keep`` leading Ritz vectors take the place of the whole basis."""
    values, vectors, _, _ = _ritz(process._replace(basis=basis), order)
    leading = blocks.combine(vectors[:, :keep].T, basis)
    rest = process.projected.shape[0] - keep
    return process._replace(
        basis=jax.tree.map(lambda b, x: b.at[:keep].set(x).at[keep:].set(0), basis, leading),
        projected=jnp.diag(jnp.pad(values[:keep], (0, rest))),
        length=jnp.full((), keep, jnp.int32),
        smallest=_smallest(process, values),
    )


def _smallest(process: _Process, values: jax.Array) -> jax.Array:
    used = jnp.where(values == -jnp.inf, jnp.inf, values)
    return jnp.minimum(process.smallest, jnp.min(used))


def _conclude(
    process: _Process, tolerance: Any, *, num_directions: int, order: Order
) -> Eigenpairs:
    values, vectors, residuals, errors = _ritz(process, order)
    k = num_directions
    return Eigenpairs(
        eigenvalues=values[:k],
        basis=blocks.combine(vectors[:, :k].T, process.basis),
        residual_norms=residuals[:k],
        num_products=process.num_products,
        converged=_accurate(values[:k], errors[:k], tolerance, process.scale),
        smallest=_smallest(process, values),
    )


# For the host's loop: compiled once per tree of shapes, whatever the product is.
_STATIC = ("num_directions", "order")
_host_begin = jax.jit(_begin, donate_argnames="basis")
_host_absorb = jax.jit(_absorb, static_argnames=_STATIC, donate_argnames="basis")
_host_compress = jax.jit(_compress, static_argnames=("keep", "order"), donate_argnames="basis")
_host_conclude = jax.jit(_conclude, static_argnames=_STATIC)


def lanczos(
    product: Callable[[PyTree], PyTree],
    like: PyTree,
    num_directions: int,
    *,
    key: jax.Array,
    num_products: int,
    order: Order = "algebraic",
    tolerance: float | None = None,
    max_basis: int | None = None,
    start: PyTree | None = None,
    loop: Loop = "graph",
) -> Eigenpairs:
    r"""Leading eigenpairs by thick-restart Lanczos with full reorthogonalization.

    When the basis is full, its leading Ritz vectors take its place and the process goes on (Wu,
    Simon, 2000). When the Krylov space is exhausted (multiple eigenvalues, low rank), it goes on
    from a random vector orthogonal to it, so that multiplicities are found.

    With a tolerance, the process stops as soon as the leading eigenvalues are accurate.  The error
    of a Ritz value :math:`\theta` with residual norm :math:`r` is estimated as the smaller of
    :math:`r`, a bound, and :math:`r^2 m(\theta)`, what second-order perturbation theory gives
    (with 1/gap in place of ``m``: Parlett, theorem 11.7.1). Our reading: :math:`m` is the resolvent
    of the operator outside the Krylov space, modelled by a process that goes on with the last
    coefficients :math:`\alpha, \beta` (Haydock's square-root terminator, 1980),
    :math:`m = 2 / (d + \sqrt{d^2 - 4 \beta^2})`, :math:`d = |\theta - \alpha|`.  Like every
    Krylov method, it cannot tell an eigenvalue that its start has no component of.

    Args:
      product: the operator, on a pytree like ``like``; symmetric.
      like: pytree of arrays or shapes that gives the vectors' structure, shapes and dtypes; in the
        host's loop also the placement, where leaves are arrays on a mesh.
      num_directions: how many leading eigenpairs to return (all, if the dimension is smaller).
      key: PRNG key of the random vectors.
      num_products: budget of products; at least ``num_directions``. More than the dimension are not
        used unless there are restarts.
      order: ``"algebraic"`` (default): the largest eigenvalues; ``"magnitude"``: the largest in
        magnitude.
      tolerance: relative error of the eigenvalues at which to stop; ``None`` (default): use the
        whole budget.
      max_basis: vectors kept, the memory of the process, at least ``num_directions + 3``; ``None``
        (default): ``3 * num_directions + 20``.
      start: first vector; default: random. A vector rich in the leading directions, such as the
        loss gradient for its Hessian, saves products.
      loop: ``"graph"`` (default) or ``"host"``, see the module.

    Returns:
      The :class:`Eigenpairs`. At the end of the budget ``converged`` says which pairs are accurate.
      A product that is not finite ends the process, with none converged.

    Raises:
      ValueError, TypeError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import lanczos
      >>> diagonal = jnp.array([4.0, -5.0, 1.0, 2.0])
      >>> pairs = lanczos(
      ...     lambda v: diagonal * v, diagonal, 2, key=jax.random.key(0), num_products=4)
      >>> [round(float(v), 4) for v in pairs.eigenvalues], round(float(pairs.smallest), 4)
      ([4.0, 2.0], -5.0)

    References:
      Golub, Van Loan, *Matrix Computations*, 4th ed., sections 10.1 and 10.3. Parlett, *The
      Symmetric Eigenvalue Problem*, sections 11.7 and 13.2. Wu, Simon, `Thick-restart Lanczos
      method for large symmetric eigenvalue problems <https://doi.org/10.1137/S0895479898334605>`_,
      SIAM J. Matrix Anal. Appl. 22, 2000. Haydock, *Solid State Physics* 35, 1980.
    """
    _check(num_directions, num_products, order, tolerance, loop)
    size = blocks.dimension(like)
    k = min(num_directions, size)
    if k == 0:
        return _no_pairs(like)
    if num_products < k:
        raise ValueError(
            f"`num_products` must be at least `num_directions`, {k}, got {num_products}."
        )
    capacity = min(3 * k + 20 if max_basis is None else max_basis, size, num_products)
    if capacity < min(k + 3, size, num_products):
        raise ValueError(
            f"`max_basis` must be at least `num_directions` + 3, {k + 3}, got {max_basis}: a "
            "restart keeps more vectors than it returns, and needs room to go on."
        )
    if capacity == size:
        num_products = min(num_products, size)
    keep = k + (capacity - k) // 2
    restarts = capacity < num_products
    start_key, key = jax.random.split(key)
    vector = blocks.random(start_key, like)
    if start is not None:
        usable = _norm(start) > 0
        vector = jax.tree.map(lambda s, x: jnp.where(usable, s, x).astype(x.dtype), start, vector)
    vector, basis = blocks.place(vector, like), blocks.zeros(capacity, like)
    if loop == "host":
        process = _host_begin(vector, basis, start is None)
        for _ in range(num_products):
            if restarts and int(process.length) == capacity:
                basis, process = process.basis, process._replace(basis=None)
                process = _host_compress(basis, process, keep=keep, order=order)
            basis, process = process.basis, process._replace(basis=None)
            image = product(process.vector)
            process = _host_absorb(
                basis, process, image, key, tolerance, num_directions=k, order=order
            )
            if process.done:
                break
        return _host_conclude(process, tolerance, num_directions=k, order=order)

    def step(process: _Process) -> _Process:
        if restarts:
            process = lax.cond(
                process.length == capacity,
                lambda p: _compress(p.basis, p, keep=keep, order=order),
                lambda p: p,
                process,
            )
        image = product(process.vector)
        return _absorb(process.basis, process, image, key, tolerance, num_directions=k, order=order)

    process = lax.while_loop(
        lambda p: (p.num_products < num_products) & ~p.done,
        step,
        _begin(vector, basis, start is None),
    )
    return _conclude(process, tolerance, num_directions=k, order=order)


def _check(
    num_directions: int, num_products: int, order: str, tolerance: float | None, loop: str
) -> None:
    check_integer("num_directions", num_directions, 0)
    check_integer("num_products", num_products, 0)
    check_choice("order", order, ("algebraic", "magnitude"))
    check_choice("loop", loop, ("graph", "host"))
    if tolerance is not None:
        check_number("tolerance", tolerance, 0, 1, open_low=True, open_high=True)


# Block iteration ----------------------------------------------------------------------------------


def subspace_sweep(
    products: Callable[[PyTree], PyTree],
    basis: PyTree,
    *,
    shift: jax.Array,
    order: Order = "algebraic",
) -> tuple[jax.Array, PyTree, jax.Array]:
    """One warm-started step of block power iteration with Rayleigh-Ritz: one block product.

    The products with an orthonormal basis ``U`` give the Ritz pairs of its span and, rotated into
    them, the next basis: the orthonormalized rows of ``Q^T (H + shift) U``.

    Args:
      products: the symmetric operator on a block.
      basis: orthonormal block of ``m`` vectors.
      shift: scalar added to the spectrum so that its top leads in magnitude (order
        ``"algebraic"``); the negative of the smallest eigenvalue, or 0.
      order: as in :func:`lanczos`.

    Returns:
      ``(eigenvalues, basis, smallest)``: the Ritz values ``(m,)`` of the basis that came in
      (accurate to second order in its error), the new basis with rows in their order, and the
      smallest Ritz value.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import subspace_sweep
      >>> diagonal = jnp.array([4.0, 2.0, 1.0])
      >>> basis, shift = jnp.array([[0.8, 0.6, 0.0]]), jnp.array(0.0)
      >>> values, basis, _ = subspace_sweep(lambda u: diagonal[None] * u, basis, shift=shift)
      >>> [round(float(x), 3) for x in (values[0], *basis[0])]
      [3.28, 0.936, 0.351, 0.0]

    References:
      Stewart, *Matrix Algorithms II: Eigensystems*, section 5.1 (subspace iteration).
    """
    images = products(basis)
    projected = blocks.inner(basis, images)
    projected = (projected + projected.T) / 2
    values, vectors = jnp.linalg.eigh(projected)
    smallest = values[0]
    values, vectors = sort_spectrum(values, vectors, order)
    # A little of the old basis keeps directions that the operator annihilates: a singular operator
    # leaves them where they were instead of mapping them to noise.
    magnitude = jnp.max(jnp.abs(values), initial=0)
    magnitude = jnp.where(magnitude > 0, magnitude, 1)
    keep = shift + jnp.sqrt(jnp.finfo(values.dtype).eps) * magnitude
    shifted = jax.tree.map(lambda w, u: w + keep.astype(u.dtype) * u, images, basis)
    return values, blocks.orthonormalize(shifted, rotation=vectors.T), smallest
