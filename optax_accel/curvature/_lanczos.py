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

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from optax_accel._arguments import check_choice, check_integer, check_number
from optax_accel._random import as_key
from optax_accel.curvature import blocks

Order = Literal["algebraic", "magnitude"]
Loop = Literal["graph", "host"]
T = TypeVar("T")

# Rounding: what is smaller than this many ulps of the largest entry seen counts as zero.
_ULPS = 10
# Lanczos looks on while an eigenvector of this fraction of the expected component in the random
# start could be hidden. In a simulation with the leading eigenvalues of a CNN's Hessian, seven of
# them within 4%, the estimates alone stopped at a wrong set from 78 of 80 starts, two passes in a
# row from 27, this rule with 1, 0.3 and 0.1 from 8, 2 and none. It takes about one more product.
_HIDDEN = 0.1
# The same in a sequence that is to confirm that no copy is missing: a normal component is smaller
# than this fraction of its expectation with a probability of 0.0008.
_MISSED = 1e-3


class Eigenpairs(NamedTuple):
    """What an eigensolver found.

    Attributes:
      eigenvalues: Ritz values ``(k,)``, the leading one first.
      basis: orthonormal block of the Ritz vectors, leaves ``(k, *shape)``, in the same order.
      residual_norms: ``|A u - theta u|`` of each pair, ``(k,)``, or a bound of it (of
        :func:`lanczos` after a second sequence). A symmetric operator has an eigenvalue within this
        distance of the Ritz value.
      num_products: operator-vector products used; int32 scalar.
      converged: ``(k,)``, whether the estimated relative error of each eigenvalue is within the
        tolerance (without one: half of the dtype's digits, ``eps ** 0.5``). With
        ``lanczos(tolerance=)`` it is true only if, in addition, a sequence from a fresh random
        vector, orthogonal to what was found, has shown no eigenvalue that should stand among the
        ``k``, so that copies of a multiple eigenvalue are counted. :func:`lanczos` without a
        tolerance, :func:`block_iteration` and :func:`lobpcg` judge each pair by itself: copies that
        the start had no part of may be missing.
      smallest: the smallest Ritz value seen, an estimate of the bottom of the spectrum; infinite if
        none was.
    """

    eigenvalues: jax.Array
    basis: chex.ArrayTree
    residual_norms: jax.Array
    num_products: jax.Array
    converged: jax.Array
    smallest: jax.Array


def _no_pairs(like: chex.ArrayTree) -> Eigenpairs:
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


def _relative(tolerance: Any, eigenvalues: jax.Array) -> Any:
    return jnp.sqrt(jnp.finfo(eigenvalues.dtype).eps) if tolerance is None else tolerance


def _accurate(
    eigenvalues: jax.Array, errors: jax.Array, tolerance: Any, scale: jax.Array
) -> jax.Array:
    """Whether errors are within the relative tolerance, or lost in the rounding at this scale."""
    rounding = _ULPS * jnp.finfo(eigenvalues.dtype).eps * scale
    return errors <= _relative(tolerance, eigenvalues) * jnp.abs(eigenvalues) + rounding


# What goes on between two products is compiled once per tree of shapes, whatever the operator is,
# for the loop on the host; inside a compiled function `jit` adds nothing.
_STATIC = ("num_directions", "order")


def _while(loop: Loop, condition: Callable[[T], Any], body: Callable[[T], T], state: T) -> T:
    if loop == "graph":
        return lax.while_loop(condition, body, state)
    while condition(state):
        state = body(state)
    return state


def _repeat(loop: Loop, times: int, body: Callable[[T], T], state: T) -> T:
    if loop == "graph":
        return lax.fori_loop(0, times, lambda _, state: body(state), state)
    for _ in range(times):
        state = body(state)
    return state


def _if(loop: Loop, condition: Any, function: Callable[[T], T], state: T) -> T:
    if loop == "graph":
        return lax.cond(condition, function, lambda state: state, state)
    return function(state) if condition else state


# Lanczos ------------------------------------------------------------------------------------------


class _Process(NamedTuple):
    """A Lanczos process: a sequence of Lanczos vectors, after others that were given up.

    A sequence sees one direction of each eigenspace, that of its start. So when it has found what
    it can, the leading Ritz vectors are kept and a new one starts from a random vector orthogonal
    to them. It looks for what is left of multiple eigenvalues, and of those of which the start had
    nothing.

    Attributes:
      basis: orthonormal block of ``m`` rows, those from ``length`` on zero.
      vector: unit vector orthogonal to them, the next to be multiplied.
      previous: the last row.
      projected: the operator in the basis, ``(m, m)``.
      origin: the first vector of the sequence in the basis, ``(m,)``.
      length: number of rows.
      num_products: products so far.
      beta: norm of the last residual, the coupling of ``vector`` to the last row.
      scale: largest entry of ``projected`` and ``beta`` so far.
      smallest: smallest Ritz value seen.
      residuals: of each row what is left out of ``projected``: the norm of the residual at which a
        sequence was given up, ``(m,)``; zero for rows of the present sequence.
      errors: the error that this means for a Ritz value in the row, ``(m,)``.
      settled: the leading Ritz values when the present sequence started, ``(k,)``; minus infinity
        in the first.
      finished: whether the present sequence has nothing more to tell: a new one starts.
      confirmed: whether a sequence from a random start has found nothing that leads.
      done: whether to stop.
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
    confirmed: jax.Array
    done: jax.Array


def _norm(vector: chex.ArrayTree) -> jax.Array:
    block = blocks.as_block(vector)
    return jnp.sqrt(blocks.inner(block, block)[0, 0])


def _unit(vector: chex.ArrayTree, norm: jax.Array) -> chex.ArrayTree:
    factor = 1 / jnp.where(norm > 0, norm, 1)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), vector)


def _orthogonalize(
    vector: chex.ArrayTree, basis: chex.ArrayTree, newest: chex.ArrayTree, index: jax.Array
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The part of a vector orthogonal to a basis, the coefficients of the rest, and its norm.

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

    # Classical Gram-Schmidt, again where it took away much of the vector: "twice is enough"
    # (Giraud et al., 2005), and once where little was taken (Daniel et al., 1976).
    before = _norm(vector)
    zeros = jnp.zeros((jax.tree.leaves(basis)[0].shape[0],), before.dtype)
    vector, total, norm = once(vector, zeros)
    return lax.cond(
        norm < 0.7 * before,
        lambda vector, total, norm: once(vector, total),
        lambda *same: same,
        vector,
        total,
        norm,
    )


def _ritz(process: _Process, order: Order) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ritz values ``(m,)`` (-inf beyond the length), vectors, residual norms, error estimates."""
    projected, length, beta = process.projected, process.length, process.beta
    used = jnp.arange(projected.shape[0]) < length
    # Rows not in use get an eigenvalue of their own, far outside the spectrum.
    outside = -2 * jnp.max(jnp.sum(jnp.abs(projected), axis=1))
    outside = jnp.where(outside < 0, outside, -1)
    values, vectors = jnp.linalg.eigh(projected + jnp.diag(jnp.where(used, 0, outside)))
    real = ~(values <= 0.75 * outside)  # so are values that are not finite
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
    # What was given up before: the triangle inequality for residuals; errors are of second order.
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
    accurate = _accurate(leading, errors[:k], tolerance, process.scale)
    relative = _relative(tolerance, values)
    ascending = jnp.sort(leading)
    middle = (ascending[1:] + ascending[:-1]) / 2
    margin = 0.1 * process.scale
    outward = 1 if order == "algebraic" else jnp.sign(leading)
    beyond = leading + jnp.sqrt(relative) * outward * jnp.abs(leading)
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
    hidden = (component > limit) & ~near & (_score(places, order) >= _score(leading[-1], order))
    return accurate & jnp.isfinite(leading), jnp.any(hidden)


@functools.partial(jax.jit, static_argnames="num_directions", donate_argnames="basis")
def _begin(vector: chex.ArrayTree, basis: chex.ArrayTree, *, num_directions: int) -> _Process:
    dtype = blocks.scalar_dtype(vector)
    capacity = jax.tree.leaves(basis)[0].shape[0]
    zero = jnp.zeros((), dtype)
    no = jnp.zeros((), bool)
    return _Process(
        basis=basis,
        vector=_unit(vector, _norm(vector)),
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
        confirmed=no,
        done=no,
    )


@functools.partial(jax.jit, donate_argnames="basis")
def _insert(basis: chex.ArrayTree, vector: chex.ArrayTree, index: jax.Array) -> chex.ArrayTree:
    return jax.tree.map(lambda b, x: lax.dynamic_update_index_in_dim(b, x, index, 0), basis, vector)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _absorb(
    basis: chex.ArrayTree,
    process: _Process,
    image: chex.ArrayTree,
    tolerance: Any,
    *,
    num_directions: int,
    order: Order,
) -> _Process:
    """One step: takes in the operator's image of ``process.vector``, which joins the basis."""
    length, vector = process.length, process.vector
    image = jax.tree.map(lambda w, x: w.astype(x.dtype), image, vector)
    # First what the three-term recurrence says: then the whole basis has little left to take.
    alpha = blocks.inner(blocks.as_block(vector), blocks.as_block(image))[0, 0]
    local = jnp.zeros_like(process.origin)
    local = local.at[jnp.maximum(length - 1, 0)].set(process.beta).at[length].set(alpha)

    def recur(w: jax.Array, x: jax.Array, previous: jax.Array) -> jax.Array:
        return w - alpha.astype(w.dtype) * x - process.beta.astype(w.dtype) * previous

    residual = jax.tree.map(recur, image, vector, process.previous)
    residual, coefficients, beta = _orthogonalize(residual, basis, vector, length)
    # Coefficients of a whole row, not just three: after a restart the first row couples to all.
    coefficients = coefficients + local
    projected = process.projected.at[length].set(coefficients).at[:, length].set(coefficients)
    scale = jnp.maximum(process.scale, jnp.maximum(beta, jnp.max(jnp.abs(coefficients))))
    rounding = _ULPS * jnp.finfo(scale.dtype).eps * scale
    exhausted = beta <= rounding
    new = process._replace(
        basis=None,
        vector=_unit(residual, beta),
        previous=vector,
        projected=projected,
        length=length + 1,
        num_products=process.num_products + 1,
        beta=jnp.where(exhausted, 0, beta),
        scale=scale,
    )
    complete = length + 1 == blocks.dimension(vector)
    new = new._replace(
        finished=exhausted & ~complete,
        confirmed=complete,
        done=complete | ~jnp.isfinite(scale),
    )
    if tolerance is None:
        return new
    values, vectors, _, errors = _ritz(new, order)
    accurate, hidden = _judge(new, values, vectors, errors, tolerance, order, num_directions)
    # An exhausted space hides nothing but copies of its eigenvalues.
    sure = jnp.all(accurate) & (exhausted | ~hidden) & (length + 1 >= num_directions)
    confirmed = complete | (sure & _unchanged(new, values, tolerance, order))
    return new._replace(
        finished=(exhausted | sure) & ~complete, confirmed=confirmed, done=new.done | confirmed
    )


def _unchanged(process: _Process, values: jax.Array, tolerance: Any, order: Order) -> jax.Array:
    """Whether the leading Ritz values are those of the sequences before."""
    leading = _score(values[: process.settled.shape[0]], order)
    changes = jnp.abs(leading - _score(process.settled, order))
    return jnp.all(_accurate(leading, changes, tolerance, process.scale))


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

    The sequence goes on, unless it has nothing more to tell; then a new one starts, with at most
    ``before`` vectors before it.
    """
    values, vectors, residuals, errors = _ritz(process, order)
    k, capacity = process.settled.shape[0], values.shape[0]
    rest = capacity - keep
    rounding = _ULPS * jnp.finfo(values.dtype).eps * process.scale
    finished = process.finished | jnp.all(residuals[:k] <= rounding)
    length = jnp.minimum(process.length, jnp.where(finished, before, keep))
    used = jnp.arange(keep) < length
    leading = blocks.combine(jnp.where(used[None, :], vectors[:, :keep], 0).T, basis)
    basis = jax.tree.map(lambda b, x: b.at[:keep].set(x).at[keep:].set(0), basis, leading)

    def kept(rows: jax.Array) -> jax.Array:
        return jnp.pad(jnp.where(used, rows[:keep], 0), (0, rest))

    def start() -> chex.ArrayTree:
        fresh = blocks.random(jax.random.fold_in(key, process.num_products), process.vector)
        nothing = jax.tree.map(jnp.zeros_like, fresh)
        fresh, _, norm = _orthogonalize(_unit(fresh, _norm(fresh)), basis, nothing, length)
        return _unit(fresh, norm)

    # Of a sequence that goes on, the next product tells what is missing.
    given_up = jnp.abs(vectors.T) @ process.residuals, vectors.T**2 @ process.errors
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
        residuals=kept(jnp.where(finished, residuals, given_up[0])),
        errors=kept(jnp.where(finished, errors, given_up[1])),
        settled=jnp.where(finished, values[:k], process.settled),
        finished=jnp.zeros((), bool),
    )


def _smallest(process: _Process, values: jax.Array) -> jax.Array:
    used = jnp.where(values == -jnp.inf, jnp.inf, values)
    return jnp.minimum(process.smallest, jnp.min(used))


@functools.partial(jax.jit, static_argnames=_STATIC)
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
    loop: Loop = "graph",
) -> Eigenpairs:
    r"""Leading eigenpairs by thick-restart Lanczos with full reorthogonalization.

    When the basis is full, its leading Ritz vectors take its place and the process goes on (Wu,
    Simon, 2000). When the Krylov space is exhausted (multiple eigenvalues, low rank), it goes on
    from a random vector orthogonal to it, so that multiplicities are found.

    With a tolerance, a sequence ends as soon as the leading eigenvalues are accurate.  The error
    of a Ritz value :math:`\theta` with residual norm :math:`r` is estimated as the smaller of
    :math:`r`, a bound, and :math:`r^2 m(\theta)`, what second-order perturbation theory gives
    (with 1/gap in place of ``m``: Parlett, theorem 11.7.1). Our reading: :math:`m` is the resolvent
    of the operator outside the Krylov space, modelled by a process that goes on with the last
    coefficients :math:`\alpha, \beta` (Haydock's square-root terminator, 1980),
    :math:`m = 2 / (d + \sqrt{d^2 - 4 \beta^2})`, :math:`d = |\theta - \alpha|`.  It goes on while a
    larger eigenvalue may be hidden between the Ritz values, of which the start had little.

    A Krylov space has one direction of each eigenspace only.  So the leading Ritz vectors are kept
    and a new sequence starts from a random vector orthogonal to them, until one has changed none
    of the leading eigenvalues by more than the tolerance: then the process stops.  On spectra with
    ten simple outliers, at tolerances 1e-3 and 1e-4, that took 4 products more than the 28 or 29 of
    the first sequence, and 8 to 20 more than 21 where the outliers touch the bulk; each further
    copy takes as many again.  It also finds what a given ``start`` has no part of.  A last copy is
    missed if the random vector has less than a thousandth of its expected part along it, with
    probability 0.001.

    Args:
      product: the operator, on a pytree like ``like``; symmetric.
      like: pytree of arrays or shapes that gives the vectors' structure, shapes and dtypes; in the
        host's loop also the placement, where leaves are arrays on a mesh.
      num_directions: how many leading eigenpairs to return (all, if the dimension is smaller).
      key: PRNG key of the random vectors, or an integer seed.
      num_products: budget of products; at least ``num_directions``. More than the dimension are not
        used unless there are restarts.
      order: ``"algebraic"`` (default): the largest eigenvalues; ``"magnitude"``: the largest in
        magnitude.
      tolerance: relative error of the eigenvalues at which to stop; ``None`` (default): use the
        whole budget.
      max_basis: vectors kept, the memory of the process, at least ``num_directions + 3``; ``None``
        (default): ``2 * num_directions + 16``.
      start: first vector; default: random. A vector rich in the leading directions, such as the
        loss gradient for its Hessian, saves products.
      loop: ``"graph"`` (default) or ``"host"``, see the module.

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
    _check(num_directions, num_products, order, tolerance, loop)
    size = blocks.dimension(like)
    k = min(num_directions, size)
    if k == 0:
        return _no_pairs(like)
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
    # Without restarts only a new sequence compresses, and is to know all that was found; with them
    # it needs room more than vectors that are known roughly.
    keep = before = capacity
    if capacity < num_products:
        keep, before = k + (capacity - k) // 2, k + (capacity - k) // 4
    start_key, key = jax.random.split(as_key(key))
    vector = blocks.random(start_key, like)
    if start is not None:
        usable = _norm(start) > 0
        vector = jax.tree.map(lambda s, x: jnp.where(usable, s, x).astype(x.dtype), start, vector)
    vector, basis = blocks.place(vector, like), blocks.zeros(capacity, like)

    def compress(process: _Process) -> _Process:
        basis, process = _take_basis(process)
        return _compress(basis, process, key, keep=keep, before=before, order=order)

    def step(process: _Process) -> _Process:
        full = process.finished | (process.length == capacity)
        process = _if(loop, full, compress, process)
        image = product(process.vector)
        basis, process = _take_basis(process)
        new = _absorb(basis, process, image, tolerance, num_directions=k, order=order)
        return new._replace(basis=_insert(basis, process.vector, process.length))

    process = _while(
        loop,
        lambda process: (process.num_products < num_products) & ~process.done,
        step,
        _begin(vector, basis, num_directions=k),
    )
    return _conclude(process, tolerance, num_directions=k, order=order)


def _take_basis(process: _Process) -> tuple[chex.ArrayTree, _Process]:
    """The basis apart: its buffer alone is donated, because the caller may hold the vector."""
    return process.basis, process._replace(basis=None)


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
    products: Callable[[chex.ArrayTree], chex.ArrayTree],
    basis: chex.ArrayTree,
    *,
    shift: jax.Array,
    order: Order = "algebraic",
) -> tuple[jax.Array, chex.ArrayTree, jax.Array]:
    """One warm-started step of block power iteration with Rayleigh-Ritz: one block product.

    The products with an orthonormal basis ``U`` give the Ritz pairs of its span and, rotated into
    them, the next basis: the orthonormalized rows of ``Q^T (H + shift) U``.

    Args:
      products: the symmetric operator on a block.
      basis: orthonormal block of ``m`` vectors.
      shift: scalar added to the spectrum so that its top leads in magnitude (order
        ``"algebraic"``); the negative of the smallest eigenvalue, or 0.
      order: which eigenvalues lead: ``"algebraic"`` (default) the largest, ``"magnitude"`` the
        largest in magnitude.

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
    values, vectors = _rayleigh_ritz(basis, images, order)
    shifted = _power(basis, images, values, shift)
    return values, blocks.orthonormalize(shifted, rotation=vectors.T), jnp.min(values)


def _rayleigh_ritz(
    basis: chex.ArrayTree, images: chex.ArrayTree, order: Order
) -> tuple[jax.Array, jax.Array]:
    projected = blocks.inner(basis, images)
    values, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
    return sort_spectrum(values, vectors, order)


def _power(
    basis: chex.ArrayTree, images: chex.ArrayTree, values: jax.Array, shift: jax.Array
) -> chex.ArrayTree:
    """``(H + shift) U``, with a little more of the old basis.

    That keeps directions that the operator annihilates: a singular operator leaves them where they
    were instead of mapping them to noise.
    """
    magnitude = jnp.max(jnp.abs(values), initial=0)
    magnitude = jnp.where(magnitude > 0, magnitude, 1)
    keep = shift + jnp.sqrt(jnp.finfo(values.dtype).eps) * magnitude
    return jax.tree.map(lambda w, u: w + keep.astype(u.dtype) * u, images, basis)


class _Sweep(NamedTuple):
    """A block iteration.

    Attributes:
      basis: the Ritz vectors, a block of ``m``.
      images: their products.
      eigenvalues: the Ritz values, ``(m,)``.
      residual_norms: ``(m,)``.
      converged: ``(k,)``.
      num_products: products so far.
      smallest: smallest Ritz value seen.
    """

    basis: chex.ArrayTree
    images: chex.ArrayTree
    eigenvalues: jax.Array
    residual_norms: jax.Array
    converged: jax.Array
    num_products: jax.Array
    smallest: jax.Array


@functools.partial(jax.jit, static_argnames=_STATIC)
def _assess(
    basis: chex.ArrayTree,
    images: chex.ArrayTree,
    num_products: jax.Array,
    smallest: jax.Array,
    tolerance: Any,
    *,
    num_directions: int,
    order: Order,
) -> _Sweep:
    """Ritz pairs of a basis with their residuals, from its images."""
    images = jax.tree.map(lambda w, u: w.astype(u.dtype), images, basis)
    values, vectors = _rayleigh_ritz(basis, images, order)
    basis, images = (blocks.combine(vectors.T, block) for block in (basis, images))

    def squares(u: jax.Array, w: jax.Array) -> jax.Array:
        theta = values.reshape(-1, *(1,) * (u.ndim - 1))
        return jnp.sum((w.astype(theta.dtype) - theta * u) ** 2, axis=tuple(range(1, u.ndim)))

    residuals = jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(squares, basis, images))))
    # What is outside of the block lies, as far as the block can tell, beyond its last Ritz value.
    score = _score(values, order)
    gap = score - score[-1]
    errors = residuals * jnp.minimum(1, residuals / jnp.where(gap > residuals, gap, residuals))
    errors = jnp.where(residuals > 0, errors, 0)
    k, scale = num_directions, jnp.max(jnp.abs(values))
    return _Sweep(
        basis=basis,
        images=images,
        eigenvalues=values,
        residual_norms=residuals,
        converged=_accurate(values[:k], errors[:k], tolerance, scale),
        num_products=num_products + values.shape[0],
        smallest=jnp.minimum(smallest, jnp.min(values)),
    )


def _filter_interval(sweep: _Sweep, order: Order) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Centre and half width of the unwanted interval, and sigma, which sets the scaling."""
    values = sweep.eigenvalues
    if order == "algebraic":
        low, high = sweep.smallest, values[-1]
    else:
        low, high = -jnp.abs(values[-1]), jnp.abs(values[-1])
    centre, radius = (low + high) / 2, (high - low) / 2
    scale = jnp.maximum(jnp.max(jnp.abs(values)), jnp.abs(low))
    radius = jnp.maximum(radius, jnp.sqrt(jnp.finfo(values.dtype).eps) * scale)
    radius = jnp.where(radius > 0, radius, 1)
    distance = values[0] - centre
    return centre, radius, radius / jnp.where(jnp.abs(distance) > radius, distance, radius)


@functools.partial(jax.jit, static_argnames="order")
def _filter_start(
    sweep: _Sweep, *, order: Order
) -> tuple[chex.ArrayTree, chex.ArrayTree, jax.Array]:
    """The filter's first two polynomials, the second from the products at hand, and sigma."""
    centre, radius, sigma = _filter_interval(sweep, order)
    first = jax.tree.map(
        lambda w, u: (w - centre.astype(u.dtype) * u) * (sigma / radius).astype(u.dtype),
        sweep.images,
        sweep.basis,
    )
    return sweep.basis, first, sigma


@functools.partial(jax.jit, static_argnames="order")
def _filter_step(
    sweep: _Sweep,
    state: tuple[chex.ArrayTree, chex.ArrayTree, jax.Array],
    images: chex.ArrayTree,
    *,
    order: Order,
) -> tuple[chex.ArrayTree, chex.ArrayTree, jax.Array]:
    """One degree of the three-term recurrence, scaled to stay of order one at the top."""
    centre, radius, first_sigma = _filter_interval(sweep, order)
    before, block, sigma = state
    following = 1 / (2 / first_sigma - sigma)

    def leaf(w: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        factor, weight = 2 * following / radius, sigma * following
        image = w.astype(y.dtype) - centre.astype(y.dtype) * y
        return factor.astype(y.dtype) * image - weight.astype(y.dtype) * z

    return block, jax.tree.map(leaf, images, block, before), following


@functools.partial(jax.jit, static_argnames="order")
def _next_basis(sweep: _Sweep, filtered: chex.ArrayTree, *, order: Order) -> chex.ArrayTree:
    """The next orthonormal basis: of the filtered block, or by a power step without one."""
    if filtered is None:
        shift = jnp.maximum(-sweep.smallest, 0) * (order == "algebraic")
        filtered = _power(sweep.basis, sweep.images, sweep.eigenvalues, shift)
    return blocks.orthonormalize(filtered)


def block_iteration(
    products: Callable[[chex.ArrayTree], chex.ArrayTree],
    start: chex.ArrayTree,
    num_directions: int | None = None,
    *,
    num_products: int,
    order: Order = "algebraic",
    tolerance: float | None = None,
    chebyshev_degree: int = 0,
    smallest: Any = None,
    loop: Loop = "graph",
) -> Eigenpairs:
    """Leading eigenpairs by block subspace iteration with Rayleigh-Ritz, from a given basis.

    Each sweep multiplies the whole block. It converges by the ratio of the first eigenvalue outside
    the block to the ones inside, so rows beyond the wanted ones pay. From a good basis, such as
    that of a little earlier in training, few sweeps are enough; from a random one use
    :func:`lanczos`. A Chebyshev filter of degree ``d`` damps the interval between ``smallest`` and
    the block's last Ritz value in every sweep, for ``d`` products per row instead of one.

    With a tolerance, it stops as soon as the leading eigenvalues are accurate. The error of a Ritz
    value with residual norm ``r`` is estimated as ``min(r, r^2 / gap)`` (Parlett, theorem 11.7.1),
    with the gap to the block's last Ritz value (our reading: what is outside lies beyond it).

    Args:
      products: the symmetric operator on a block: leaves ``(m, *shape)`` to the same.
      start: block of ``m`` linearly independent rows; :func:`optax_accel.curvature.blocks.
        random_basis` makes a random one.
      num_directions: how many leading eigenpairs to return, at most ``m``; ``None`` (default): all.
      num_products: budget, at least ``m``; counted per row.
      order: which eigenvalues lead: ``"algebraic"`` (default) the largest, ``"magnitude"`` the
        largest in magnitude.
      tolerance: relative error of the leading eigenvalues at which to stop; ``None`` (default): use
        the whole budget.
      chebyshev_degree: degree of the filter; 0 (default): none, a power step, for order
        ``"algebraic"`` shifted by the smallest Ritz value seen, if negative.
      smallest: lower end of the spectrum or an estimate (``lanczos(...).smallest``); what is below
        is not damped. Required by the filter of order ``"algebraic"``; default otherwise: the
        smallest Ritz value seen.
      loop: ``"graph"`` (default) or ``"host"``, see the module.

    Returns:
      The :class:`Eigenpairs`: the Ritz pairs of the last basis that was multiplied.

    Raises:
      ValueError, TypeError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import block_iteration, blocks
      >>> diagonal = jnp.array([4.0, 3.0, 0.5, 0.2, -0.1, 0.0])
      >>> pairs = block_iteration(
      ...     lambda u: diagonal[None] * u, blocks.random_basis(jax.random.key(0), diagonal, 3), 2,
      ...     num_products=60, tolerance=1e-4)
      >>> [round(float(v), 3) for v in pairs.eigenvalues], bool(pairs.converged.all())
      ([4.0, 3.0], True)

    References:
      Stewart, *Matrix Algorithms II: Eigensystems*, section 5.1. Zhou, Saad, Tiago, Chelikowsky,
      `Self-consistent-field calculations using Chebyshev-filtered subspace iteration
      <https://doi.org/10.1016/j.jcp.2006.03.017>`_, J. Comput. Phys. 219, 2006 (scaled filter).
    """
    leaves = jax.tree.leaves(start)
    rows = leaves[0].shape[0] if leaves else 0
    k = rows if num_directions is None else num_directions
    _check(k, num_products, order, tolerance, loop)
    check_integer("chebyshev_degree", chebyshev_degree, 0)
    if k > rows:
        raise ValueError(f"`num_directions` must be at most the rows of `start`, {rows}, got {k}.")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), start)
    if rows > blocks.dimension(like):
        raise ValueError(
            f"`start` has {rows} rows of dimension {blocks.dimension(like)}; give at most as many "
            "rows as the dimension."
        )
    if chebyshev_degree and order == "algebraic" and smallest is None:
        raise ValueError(
            "the Chebyshev filter damps an interval and needs its lower end: pass `smallest`, e.g. "
            "lanczos(...).smallest of a few products."
        )
    if k == 0:
        return _no_pairs(like)
    if num_products < rows:
        raise ValueError(
            f"`num_products` must be at least the rows of `start`, {rows}, got {num_products}."
        )
    smallest = jnp.asarray(jnp.inf if smallest is None else smallest, blocks.scalar_dtype(start))
    # The filter's first degree takes the products at hand.
    extra = rows * max(chebyshev_degree - 1, 0)

    def assess(basis: chex.ArrayTree, count: jax.Array, smallest: jax.Array) -> _Sweep:
        images = products(basis)
        return _assess(basis, images, count, smallest, tolerance, num_directions=k, order=order)

    def unfinished(sweep: _Sweep) -> jax.Array:
        affordable = sweep.num_products + extra + rows <= num_products
        affordable &= jnp.all(jnp.isfinite(sweep.residual_norms))
        return affordable if tolerance is None else affordable & ~jnp.all(sweep.converged)

    def step(sweep: _Sweep) -> _Sweep:
        filtered = None
        if chebyshev_degree:
            _, filtered, _ = _repeat(
                loop,
                chebyshev_degree - 1,
                lambda state: _filter_step(sweep, state, products(state[1]), order=order),
                _filter_start(sweep, order=order),
            )
        basis = _next_basis(sweep, filtered, order=order)
        return assess(basis, sweep.num_products + extra, sweep.smallest)

    first = assess(_orthonormalize(start), jnp.zeros((), jnp.int32), smallest)
    sweep = _while(loop, unfinished, step, first)
    return Eigenpairs(
        eigenvalues=sweep.eigenvalues[:k],
        basis=blocks.rows(sweep.basis, 0, k),
        residual_norms=sweep.residual_norms[:k],
        num_products=sweep.num_products,
        converged=sweep.converged,
        smallest=sweep.smallest,
    )


_orthonormalize = jax.jit(blocks.orthonormalize)


# LOBPCG -------------------------------------------------------------------------------------------


def lobpcg(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    like: chex.ArrayTree,
    num_directions: int,
    *,
    num_products: int,
    key: chex.PRNGKey | None = None,
    start: chex.ArrayTree | None = None,
    tolerance: float | None = None,
) -> Eigenpairs:
    """The algebraically largest eigenpairs by JAX's own LOBPCG.

    A wrapper of ``jax.experimental.sparse.linalg.lobpcg_standard`` for comparison. That takes a
    matrix, so vectors are raveled into one array at the edge, in one dtype (sharded parameters are
    gathered), and its loop is part of the graph (convolutions in it run slowly on a CPU). Each of
    its iterations takes four products per direction. It is compiled anew for every ``product``.

    Args:
      product: the operator, on a pytree like ``like``; symmetric; traceable.
      like: pytree of arrays or shapes that gives the vectors' structure, shapes and dtypes.
      num_directions: how many eigenpairs to return; five times as many must be fewer than the
        dimension.
      num_products: budget; at least six per direction, for one iteration.
      key: PRNG key of a random start, or an integer seed.
      start: block of ``num_directions`` rows to start from instead.
      tolerance: relative residual norm, ``|A u - theta u| / theta``, at which to stop; ``None``
        (default): use the whole budget. It is the square root or so of the relative error of the
        eigenvalue.

    Returns:
      The :class:`Eigenpairs`; ``converged`` judges the relative residual norm, and ``smallest`` is
      the smallest of the eigenvalues.

    Raises:
      ValueError, TypeError: an argument outside its range; neither ``key`` nor ``start``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import lobpcg
      >>> diagonal = jnp.arange(12.0) ** 2
      >>> pairs = lobpcg(
      ...     lambda v: diagonal * v, diagonal, 2, key=jax.random.key(0), num_products=200)
      >>> [round(float(v)) for v in pairs.eigenvalues]
      [121, 100]

    References:
      Knyazev, `Toward the optimal preconditioned eigensolver
      <https://doi.org/10.1137/S1064827500366124>`_, SIAM J. Sci. Comput. 23, 2001.
    """
    from jax.experimental.sparse.linalg import lobpcg_standard

    _check(num_directions, num_products, "algebraic", tolerance, "graph")
    k, size = num_directions, blocks.dimension(like)
    if k == 0:
        return _no_pairs(like)
    if 5 * k >= size:
        raise ValueError(
            f"JAX's LOBPCG needs 5 * `num_directions` < dimension, got {k} and {size}; use lanczos."
        )
    if num_products < 6 * k:
        raise ValueError(
            f"`num_products` must be at least 6 * `num_directions`, {6 * k}, got {num_products}: "
            "LOBPCG takes one product per direction to begin, four per iteration, one to end."
        )
    if start is None:
        if key is None:
            raise ValueError("lobpcg needs a `key` for a random start, or a `start`.")
        start = jax.vmap(lambda key: blocks.random(key, like))(jax.random.split(as_key(key), k))
    dtype = blocks.scalar_dtype(like)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), like)
    _, unravel = ravel_pytree(zero)

    def ravel(vector: chex.ArrayTree) -> jax.Array:
        return ravel_pytree(jax.tree.map(lambda x: x.astype(dtype), vector))[0]

    def one(vector: jax.Array) -> jax.Array:
        tree = jax.tree.map(lambda x, y: x.astype(y.dtype), unravel(vector), like)
        return ravel(product(tree))

    many = jax.vmap(one, in_axes=1, out_axes=1)
    # Its tolerance is relative to 10 * dimension * (theta + |A u|).
    relative = 0.0 if tolerance is None else tolerance / (20 * size)
    iterations = (num_products - 2 * k) // (4 * k)
    rows = jax.vmap(ravel)(start)
    values, columns, used = lobpcg_standard(many, rows.T, m=iterations, tol=relative)
    residuals = jnp.linalg.norm(many(columns) - columns * values[None], axis=0)
    basis = jax.vmap(unravel, in_axes=1)(columns)
    scale = jnp.max(jnp.abs(values))
    return Eigenpairs(
        eigenvalues=values,
        basis=jax.tree.map(lambda b, x: b.astype(x.dtype), basis, like),
        residual_norms=residuals,
        num_products=jnp.asarray(2 * k + 4 * k * used, jnp.int32),
        converged=_accurate(values, residuals, tolerance, scale),
        smallest=values[-1],
    )
