"""Thick-restart Lanczos on pytrees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_flag, check_integer, check_product
from optax_accel._numerics import divided, max_norm, norm, power_of_two
from optax_accel._random import as_key
from optax_accel.curvature import blocks
from optax_accel.curvature.eigensolvers import (
    ORDERS,
    Eigenpairs,
    Loop,
    Order,
    check_settings,
    is_accurate,
    no_pairs,
    outward,
    relative_tolerance,
    rounding_error,
    run_if,
    run_while,
    score,
    sorting_key,
    would_lead,
)

# Lanczos goes on while an eigenvector could still be hidden whose component in the random start is
# this fraction of its expectation. In a simulation with the leading eigenvalues of a CNN's Hessian,
# seven of them within 4%, stopping by the error estimates alone gave a wrong set from 78 of 80
# starts, after two passes in a row from 27, and this rule with 1, 0.3 and 0.1 from 8, 2 and none.
# It takes about one more product.
_HIDDEN = 0.1
# The same for a sequence that confirms that no copy is missing: a normal component is smaller than
# this fraction of its expectation with probability 0.0008.
_MISSED = 1e-3


class _Process(NamedTuple):
    """A Lanczos process: a sequence of Lanczos vectors, after others that have ended.

    A sequence sees one direction of each eigenspace, that of its start. When it has seen all that
    it can, the leading Ritz vectors are kept and a new sequence starts from a random vector
    orthogonal to them. It looks for the other copies of multiple eigenvalues and for eigenvectors
    of which the start had no component.

    Attributes:
      basis: orthonormal block of ``m`` rows; those from ``length`` on are zero.
      vector: unit vector orthogonal to them, the next to be multiplied.
      previous: the last row.
      projected: the operator in the basis, ``(m, m)``.
      origin: the first vector of the sequence in the basis, ``(m,)``.
      length: number of rows.
      num_products: products so far.
      beta: norm of the last residual, the coupling of ``vector`` to the last row.
      scale: largest entry of ``projected`` and ``beta`` so far.
      smallest: smallest Ritz value seen.
      residuals: what ``projected`` leaves out of each row: the norm of the residual at which its
        sequence ended, ``(m,)``; zero for rows of the present sequence.
      errors: the error that this means for a Ritz value in the row, ``(m,)``.
      settled: the leading Ritz values when the present sequence started, ``(k,)``; minus infinity
        in the first.
      finished: whether the present sequence can add no more, so that a new one starts.
      full: whether it has, or there is no room for another row.
      confirmed: whether a sequence from a random start has left the leading values unchanged.
      going: whether to go on.
    """

    basis: chex.ArrayTree
    vector: chex.ArrayTree
    previous: chex.ArrayTree
    projected: jax.Array
    origin: jax.Array
    length: jax.Array
    num_products: jax.Array
    beta: jax.Array
    scale: jax.Array
    smallest: jax.Array
    residuals: jax.Array
    errors: jax.Array
    settled: jax.Array
    finished: jax.Array
    full: jax.Array
    confirmed: jax.Array
    going: jax.Array


def _norm(vector: chex.ArrayTree) -> jax.Array:
    block = blocks.as_block(vector)
    return jnp.sqrt(blocks.inner(block, block)[0, 0])


def _unit(vector: chex.ArrayTree, norm: jax.Array) -> chex.ArrayTree:
    factor = 1 / jnp.where(norm > 0, norm, 1)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), vector)


def _orthogonalize(
    vector: chex.ArrayTree, basis: chex.ArrayTree, newest: chex.ArrayTree, index: jax.Array
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The direction orthogonal to a basis, the coefficients of the rest, and the length left.

    The direction has length 1; the length left is that of the vector's part orthogonal to the
    basis.

    ``newest`` counts as the row ``index`` of the basis, which is zero: XLA copies a block that is
    changed before it is read.
    """

    def once(
        vector: chex.ArrayTree, total: jax.Array
    ) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
        of_newest = blocks.inner(blocks.as_block(newest), blocks.as_block(vector))[0, 0]
        coefficients = blocks.inner(basis, blocks.as_block(vector))[:, 0]

        def rest(x: jax.Array, part: jax.Array, row: jax.Array) -> jax.Array:
            return x - part - of_newest.astype(x.dtype) * row

        vector = jax.tree.map(rest, vector, blocks.combine(coefficients, basis), newest)
        return vector, total + coefficients.at[index].set(of_newest), _norm(vector)

    # Squares neither overflow nor underflow beside a unit, which costs no digit.
    unit = power_of_two(max_norm(vector))
    vector = divided(vector, unit)
    # Classical Gram-Schmidt, again where it took away much of the vector: "twice is enough"
    # (Giraud et al., 2005), and once where little was taken (Daniel et al., 1976).
    before = _norm(vector)
    zeros = jnp.zeros((jax.tree.leaves(basis)[0].shape[0],), before.dtype)
    vector, total, length = once(vector, zeros)
    vector, total, length = lax.cond(
        length < 0.7 * before,
        lambda vector, total, length: once(vector, total),
        lambda *same: same,
        vector,
        total,
        length,
    )
    return _unit(vector, length), unit * total, unit * length


def _ritz(process: _Process, order: Order) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ritz values ``(m,)`` (-inf beyond the length), vectors, residual norms, error estimates."""
    projected, length, beta = process.projected, process.length, process.beta
    used = jnp.arange(projected.shape[0]) < length
    # Rows that are not in use get an eigenvalue far outside the spectrum.
    outside = -2 * jnp.max(jnp.sum(jnp.abs(projected), axis=1))
    outside = jnp.where(outside < 0, outside, -1)
    values, vectors = jnp.linalg.eigh(projected + jnp.diag(jnp.where(used, 0, outside)))
    real = ~(values <= 0.75 * outside)  # so are values that are not finite
    first = jnp.sum(~real)  # those outside are the smallest
    index = jnp.argsort(jnp.where(real, sorting_key(values, order, first), jnp.inf))
    values, vectors, real = values[index], vectors[:, index], real[index]
    last = jnp.maximum(length - 1, 0)
    residuals = beta * jnp.abs(vectors[last])
    # What the process has not seen couples to a Ritz vector only through the next Lanczos vector,
    # with strength `residual`, and so shifts it by residual^2 * m(theta), where m is the resolvent
    # of the unseen part at that vector. If the process went on as it ended, with constant
    # coefficients alpha and beta, that would be the continued fraction below.
    centre = jnp.abs(values - projected[last, last])
    inside = centre <= 2 * beta
    below, above = jnp.where(inside, 0, centre - 2 * beta), centre + 2 * beta
    root = jnp.sqrt(below) * jnp.sqrt(above)  # of centre**2 - 4 * beta**2, which might overflow
    gap = jnp.where(inside, residuals, (centre + root) / 2)
    errors = residuals * jnp.minimum(1, residuals / jnp.where(gap > 0, gap, 1))
    # What earlier sequences left out: residuals add up by the triangle inequality, and errors are
    # of second order.
    residuals = residuals + jnp.abs(vectors.T) @ process.residuals
    errors = errors + (vectors.T) ** 2 @ process.errors
    return jnp.where(real, values, -jnp.inf), vectors, residuals, errors


def _judge(
    process: _Process,
    values: jax.Array,
    vectors: jax.Array,
    errors: jax.Array,
    tolerance: Any,
    order: Order,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """Which of the ``k`` leading Ritz values are accurate, and whether others may be hidden.

    A Ritz value may settle on an eigenvalue while a larger one is still to come, of which the start
    had little. With ``c`` the start and ``e`` the last unit vector in the basis, the Krylov
    relation gives the component of the next Lanczos vector along an eigenvector ``u`` with
    eigenvalue ``x`` outside of the Ritz values: that of the start along ``u``, divided by
    ``g(x) = beta c^T (x - T)^{-1} e``.  It is at most one, and a random start has about
    ``dimension ** -0.5``, so where ``|g|`` is much smaller there is no eigenvalue. Our reading: we
    look half way between the leading Ritz values, above them, and a little beyond each of them, by
    a fraction of the root of the tolerance: one closer than that is told by the error estimate.
    """
    leading = values[:k]
    accurate = is_accurate(leading, errors[:k], tolerance, process.scale)
    relative = relative_tolerance(tolerance, values)
    ascending = jnp.sort(leading)
    middle = (ascending[1:] + ascending[:-1]) / 2
    margin = 0.1 * process.scale
    beyond = leading + jnp.sqrt(relative) * outward(leading, order) * jnp.abs(leading)
    places = jnp.concatenate([ascending[:1] - margin, middle, ascending[-1:] + margin, beyond])
    distances = places[:, None] - values[None, :]
    usable = jnp.isfinite(distances) & (distances != 0)
    last = vectors[jnp.maximum(process.length - 1, 0)]
    weights = process.beta * (process.origin @ vectors) * last
    terms = jnp.where(usable, weights[None, :] / jnp.where(usable, distances, 1), 0)
    component = jnp.abs(jnp.sum(terms, axis=1)) * blocks.dimension(process.vector) ** 0.5
    # Ritz values closer than the tolerance count as one, and what would not lead does not count.
    near = jnp.min(jnp.abs(distances), axis=1) <= relative * process.scale
    limit = jnp.where(jnp.isfinite(process.settled[0]), _MISSED, _HIDDEN)
    hidden = (component > limit) & ~near & would_lead(places, leading, order)
    return accurate & jnp.isfinite(leading), jnp.any(hidden)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: chex.PRNGKey, treedef: Any, shapes: Any) -> tuple[chex.ArrayTree, chex.PRNGKey]:
    """A random vector, and the key of the following ones."""
    start_key, key = jax.random.split(key)
    return blocks.random(start_key, jax.tree.unflatten(treedef, shapes)), key


@jax.jit
def _unless_zero(start: chex.ArrayTree, other: chex.ArrayTree) -> chex.ArrayTree:
    usable = max_norm(start) > 0
    return jax.tree.map(lambda s, x: jnp.where(usable, s, x).astype(x.dtype), start, other)


@functools.partial(jax.jit, static_argnames="num_directions", donate_argnames="basis")
def _begin(vector: chex.ArrayTree, basis: chex.ArrayTree, *, num_directions: int) -> _Process:
    dtype = blocks.scalar_dtype(vector)
    capacity = jax.tree.leaves(basis)[0].shape[0]
    zero = jnp.zeros((), dtype)
    no = jnp.zeros((), bool)
    return _Process(
        basis=basis,
        vector=_unit(vector, norm(vector)),
        previous=jax.tree.map(jnp.zeros_like, vector),
        projected=jnp.zeros((capacity, capacity), dtype),
        origin=jnp.zeros((capacity,), dtype).at[0].set(1),
        length=jnp.zeros((), jnp.int32),
        num_products=jnp.zeros((), jnp.int32),
        beta=zero,
        scale=zero,
        smallest=zero + jnp.inf,
        residuals=jnp.zeros((capacity,), dtype),
        errors=jnp.zeros((capacity,), dtype),
        settled=jnp.full((num_directions,), -jnp.inf, dtype),
        finished=no,
        full=no,
        confirmed=no,
        going=~no,
    )


@functools.partial(jax.jit, donate_argnames="basis")
def _insert(basis: chex.ArrayTree, vector: chex.ArrayTree, index: jax.Array) -> chex.ArrayTree:
    return jax.tree.map(lambda b, x: lax.dynamic_update_index_in_dim(b, x, index, 0), basis, vector)


@functools.partial(jax.jit, static_argnames=("num_directions", "order", "confirm"))
def _absorb(
    basis: chex.ArrayTree,
    process: _Process,
    image: chex.ArrayTree,
    tolerance: Any,
    budget: Any,
    *,
    num_directions: int,
    order: Order,
    confirm: bool,
) -> _Process:
    """One step: takes in the operator's image of ``process.vector``, which joins the basis."""
    length, vector = process.length, process.vector
    image = jax.tree.map(lambda w, x: w.astype(x.dtype), image, vector)
    # The three-term recurrence comes first, so that the whole basis has little left to take away.
    alpha = blocks.inner(blocks.as_block(vector), blocks.as_block(image))[0, 0]
    local = jnp.zeros_like(process.origin)
    local = local.at[jnp.maximum(length - 1, 0)].set(process.beta).at[length].set(alpha)

    def recur(w: jax.Array, x: jax.Array, previous: jax.Array) -> jax.Array:
        return w - alpha.astype(w.dtype) * x - process.beta.astype(w.dtype) * previous

    residual = jax.tree.map(recur, image, vector, process.previous)
    following, coefficients, beta = _orthogonalize(residual, basis, vector, length)
    # Coefficients of a whole row, not just three: after a restart the first row couples to all.
    coefficients = coefficients + local
    projected = process.projected.at[length].set(coefficients).at[:, length].set(coefficients)
    scale = jnp.maximum(process.scale, jnp.maximum(beta, jnp.max(jnp.abs(coefficients))))
    rounding = rounding_error(scale)
    exhausted = beta <= rounding
    new = process._replace(
        basis=None,
        vector=following,
        previous=vector,
        projected=projected,
        length=length + 1,
        num_products=process.num_products + 1,
        beta=jnp.where(exhausted, 0, beta),
        scale=scale,
    )
    spans_all = length + 1 == blocks.dimension(vector)
    finished, confirmed = exhausted, spans_all
    if tolerance is not None:
        # Fewer vectors than pairs are not worth an eigenproblem.
        sure, unchanged = lax.cond(
            length + 1 >= num_directions,
            lambda: _is_sure(new, exhausted, tolerance, order, num_directions),
            lambda: (jnp.zeros_like(exhausted),) * 2,
        )
        finished, confirmed = exhausted | sure, spans_all | sure & (unchanged | (not confirm))
    finished &= ~spans_all
    going = jnp.isfinite(scale) & ~confirmed & (new.num_products < budget)
    return new._replace(
        finished=finished,
        full=finished | (new.length == process.origin.shape[0]),
        confirmed=confirmed,
        going=going,
    )


def _is_sure(
    process: _Process, exhausted: jax.Array, tolerance: Any, order: Order, num_directions: int
) -> tuple[jax.Array, jax.Array]:
    """Whether the sequence has told all that it can, and whether that changed the leading values.

    An exhausted space hides nothing but copies of its eigenvalues.
    """
    values, vectors, _, errors = _ritz(process, order)
    accurate, hidden = _judge(process, values, vectors, errors, tolerance, order, num_directions)
    sure = jnp.all(accurate) & (exhausted | ~hidden)
    return sure, _unchanged(process, values, tolerance, order)


def _unchanged(process: _Process, values: jax.Array, tolerance: Any, order: Order) -> jax.Array:
    """Whether the leading Ritz values are those of the sequences before."""
    leading = score(values[: process.settled.shape[0]], order)
    changes = jnp.abs(leading - score(process.settled, order))
    return jnp.all(is_accurate(leading, changes, tolerance, process.scale))


@functools.partial(jax.jit, static_argnames=("keep", "before", "order"), donate_argnames="basis")
def _compress(
    basis: chex.ArrayTree,
    process: _Process,
    key: chex.PRNGKey,
    *,
    keep: int,
    before: int,
    order: Order,
) -> _Process:
    """Thick restart: the ``keep`` leading Ritz vectors take the place of the whole basis.

    The sequence goes on, unless it can add no more; then a new one starts, with at most ``before``
    vectors before it.
    """
    values, vectors, residuals, errors = _ritz(process, order)
    k, capacity = process.settled.shape[0], values.shape[0]
    rest = capacity - keep
    rounding = rounding_error(process.scale)
    finished = process.finished | jnp.all(residuals[:k] <= rounding)
    length = jnp.minimum(process.length, jnp.where(finished, before, keep))
    used = jnp.arange(keep) < length
    leading = blocks.combine(jnp.where(used[None, :], vectors[:, :keep], 0).T, basis)
    basis = jax.tree.map(lambda b, x: b.at[:keep].set(x).at[keep:].set(0), basis, leading)

    def kept(rows: jax.Array) -> jax.Array:
        return jnp.pad(jnp.where(used, rows[:keep], 0), (0, rest))

    def start() -> chex.ArrayTree:
        fresh = blocks.random(jax.random.fold_in(key, process.num_products), process.vector)
        zero = jax.tree.map(jnp.zeros_like, fresh)
        return _orthogonalize(fresh, basis, zero, length)[0]

    # In a sequence that goes on, the next product tells what is missing.
    left_out = jnp.abs(vectors.T) @ process.residuals, vectors.T**2 @ process.errors
    return process._replace(
        basis=basis,
        vector=lax.cond(finished, start, lambda: process.vector),
        previous=jax.tree.map(lambda x: x[-1], leading),
        projected=jnp.diag(kept(values)),
        origin=jnp.where(
            finished, jnp.zeros(capacity).at[length].set(1), kept(vectors.T @ process.origin)
        ).astype(values.dtype),
        length=length,
        beta=jnp.where(finished, 0, process.beta),
        smallest=_smallest(process, values),
        residuals=kept(jnp.where(finished, residuals, left_out[0])),
        errors=kept(jnp.where(finished, errors, left_out[1])),
        settled=jnp.where(finished, values[:k], process.settled),
        finished=jnp.zeros((), bool),
    )


def _smallest(process: _Process, values: jax.Array) -> jax.Array:
    used = jnp.where(values == -jnp.inf, jnp.inf, values)
    return jnp.minimum(process.smallest, jnp.min(used))


@functools.partial(jax.jit, static_argnames=("num_directions", "order"))
def _conclude(
    process: _Process, tolerance: Any, *, num_directions: int, order: Order
) -> Eigenpairs:
    values, vectors, residuals, errors = _ritz(process, order)
    k = num_directions
    accurate, hidden = _judge(process, values, vectors, errors, tolerance, order, k)
    sure = process.confirmed
    if tolerance is None:
        sure |= ~hidden | _unchanged(process, values, tolerance, order)
    return Eigenpairs(
        eigenvalues=values[:k],
        basis=blocks.combine(vectors[:, :k].T, process.basis),
        residual_norms=residuals[:k],
        num_products=process.num_products,
        converged=accurate & sure,
        smallest=_smallest(process, values),
    )


def lanczos(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    like: chex.ArrayTree,
    num_directions: int,
    *,
    key: chex.PRNGKey,
    num_products: int,
    order: Order = "algebraic",
    tolerance: float | None = None,
    max_basis: int | None = None,
    start: chex.ArrayTree | None = None,
    confirm: bool = True,
    loop: Loop = "graph",
) -> Eigenpairs:
    r"""Leading eigenpairs by thick-restart Lanczos with full reorthogonalization.

    When the basis is full, its leading Ritz vectors take its place and the process goes on (Wu,
    Simon, 2000). When the Krylov space is exhausted (multiple eigenvalues, low rank), it goes on
    from a random vector orthogonal to it, so that multiplicities are found.

    With a tolerance, a sequence ends as soon as the leading eigenvalues are accurate.  The error
    of a Ritz value :math:`\theta` with residual norm :math:`r` is estimated as the smaller of
    :math:`r`, a bound, and :math:`r^2 m(\theta)`, what second-order perturbation theory gives
    (with ``1 / gap`` in place of ``m``: Parlett, theorem 11.7.1). Our reading: :math:`m` is the
    resolvent of the operator outside the Krylov space, modelled by a process that goes on with the
    last coefficients :math:`\alpha, \beta` (Haydock's square-root terminator, 1980), :math:`m = 2 /
    (d + \sqrt{d^2 - 4 \beta^2})`, :math:`d = |\theta - \alpha|`. It goes on while a larger
    eigenvalue may be hidden between the Ritz values, of which the start had little.

    A Krylov space has one direction of each eigenspace only.  So the leading Ritz vectors are kept
    and a new sequence starts from a random vector orthogonal to them, until one has changed none
    of the leading eigenvalues by more than the tolerance: then the process stops.  On spectra with
    ten simple outliers, at tolerances 1e-3 and 1e-4, that took 4 products more than the 28 or 29 of
    the first sequence, and 8 to 20 more than 21 where the outliers touch the bulk; each further
    copy takes as many again. It also finds eigenvectors of which the ``start`` passed in has no
    component. The last copy is missed if the random vector has less than a thousandth of its
    expected component along it, which happens with probability 0.001.

    Args:
      product: the operator, on a pytree like ``like``; symmetric.
      like: pytree of arrays or shapes that gives the vectors' structure, shapes and dtypes; in the
        host's loop also the placement, where leaves are arrays on a mesh.
      num_directions: how many leading eigenpairs to return (all, if the dimension is smaller).
      key: PRNG key of the random vectors, or an integer seed.
      num_products: budget of products; at least ``num_directions``. More than the dimension are not
        used unless there are restarts.
      order: ``"algebraic"`` (default): the largest eigenvalues; ``"magnitude"``: the largest in
        magnitude; ``"smallest"``: the smallest, the smallest one first; ``"both"``: the largest and
        the smallest in turn, ``[::2]`` the largest and ``[1::2]`` the smallest.
      tolerance: relative error of the eigenvalues at which to stop; ``None`` (default): use the
        whole budget.
      max_basis: vectors kept, the memory of the process, at least ``num_directions + 3``; ``None``
        (default): ``2 * num_directions + 16``.
      start: first vector; default: random. A vector rich in the leading directions, such as the
        loss gradient for its Hessian, saves products.
      confirm: with a tolerance, whether a second sequence has to confirm that no copy of a multiple
        eigenvalue is missing; default: True. Without it the process stops where other Lanczos
        programs do, a few products sooner: enough for a network's leading eigenvalues, which are
        simple.
      loop: ``"graph"`` (default) iterates in a ``lax.while_loop``, so that the solver can be part
        of a compiled function; ``"host"`` iterates in Python around compiled pieces, for products
        that cannot be traced or that XLA runs slowly inside loops (convolutions on a CPU).

    Returns:
      The :class:`Eigenpairs`. At the end of the budget ``converged`` says which pairs are accurate
      (with a tolerance: none, unless copies of them have been looked for).
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
    check_product("product", product)
    check_settings(num_directions, num_products, order, tolerance, loop, ORDERS)
    check_flag("confirm", confirm)
    if max_basis is not None:
        check_integer("max_basis", max_basis, 1)
    size = blocks.dimension(like)
    k = min(num_directions, size)
    if k == 0:
        return no_pairs(like)
    if num_products < k:
        raise ValueError(
            f"`num_products` must be at least `num_directions`, {k}, got {num_products}."
        )
    capacity = min(2 * k + 16 if max_basis is None else max_basis, size, num_products)
    if capacity < min(k + 3, size, num_products):
        raise ValueError(
            f"`max_basis` must be at least `num_directions` + 3, {k + 3}, got {max_basis}: a "
            "restart keeps more vectors than it returns, and needs room to go on."
        )
    if capacity == size:
        num_products = min(num_products, size)
    # Without restarts only a new sequence compresses, and it needs every vector there is; with them
    # it needs room more than vectors that are known roughly.
    keep = before = capacity
    if capacity < num_products:
        keep, before = k + (capacity - k) // 2, k + (capacity - k) // 4
    leaves, treedef = jax.tree.flatten(like)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    vector, key = _draw(as_key(key), treedef, shapes)
    if start is not None:
        vector = _unless_zero(start, vector)
    vector, basis = blocks.place(vector, like), blocks.zeros(capacity, like)

    def compress(process: _Process) -> _Process:
        basis, process = _take_basis(process)
        return _compress(basis, process, key, keep=keep, before=before, order=order)

    def step(process: _Process) -> _Process:
        process = run_if(loop, process.full, compress, process)
        image = product(process.vector)
        basis, process = _take_basis(process)
        new = _absorb(
            basis,
            process,
            image,
            tolerance,
            num_products,
            num_directions=k,
            order=order,
            confirm=bool(confirm),
        )
        return new._replace(basis=_insert(basis, process.vector, process.length))

    process = _begin(vector, basis, num_directions=k)
    process = run_while(loop, lambda process: process.going, step, process)
    return _conclude(process, tolerance, num_directions=k, order=order)


def _take_basis(process: _Process) -> tuple[chex.ArrayTree, _Process]:
    """The basis apart: its buffer alone is donated, because the caller may hold the vector."""
    return process.basis, process._replace(basis=None)
