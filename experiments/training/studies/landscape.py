r"""The loss around trained parameters, along directions that mean something.

A slice is the loss at :math:`\theta + \sum_i a_i d_i` for coordinates :math:`a` on a grid. The
directions are

* ``dominant``: eigenvectors of the largest eigenvalues of the Hessian;
* ``bulk``: a random vector without its part in the space of the k leading eigenvectors;
* ``random``: filter-normalized as in Li et al., "Visualizing the loss landscape of neural nets"
  (2018), section 4;
* ``trajectory``: principal components of what training went through, section 7 there.

All of them are given the same length, that of the random one, which is that of all weights of the
network: so 1 on any axis is as far as these weights are long. (Our reading. Li et al. normalize
the random directions only; an eigenvector whose filters were rescaled would be none.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optax_accel as oa
from experiments import progress
from experiments.runs.records import number
from optax_accel import curvature
from optax_accel.curvature import blocks

PyTree = Any

KINDS = ("dominant", "bulk", "random", "trajectory")
"""The kinds of directions."""
PLANES = (
    ("dominant 1", "dominant 2"),
    ("dominant 1", "bulk"),
    ("random 1", "random 2"),
    ("trajectory 1", "trajectory 2"),
)
"""The two directions of each plane; those of which one is missing are left out."""

LEAST_POINTS = 3
"""Points of the training that its two principal components need."""

# The relative accuracy of the eigenvalues, and the products that they may take, each.
TOLERANCE, PRODUCTS = 1e-4, 30
# A slice is fitted where the loss changes by this share of itself, so that rounding does not count.
CHANGE = 0.05
# Points and degree of the polynomial that is fitted there.
NODES, DEGREE = 17, 4
# How much farther than the path its slices reach.
MARGIN = 1.2

rounded = functools.partial(number, digits=7)


# Directions -------------------------------------------------------------------------------------


def filter_normalized(direction: PyTree, params: PyTree) -> PyTree:
    """A direction whose filters have the norms of the network's (Li et al., section 4).

    A filter is what makes one output of a layer: a column of a matrix, ``(inputs, outputs)``, and
    the last axis of a convolution's kernel, as Flax stores them. Leaves with one axis or none,
    biases and the scales of normalizations, do not move. (That the last axis counts the filters of
    every other leaf too, such as a table of embeddings, is our reading.)

    >>> params = {"w": jnp.array([[3.0, 1.0], [4.0, 0.0]]), "b": jnp.ones(2)}
    >>> direction = {"w": jnp.array([[0.0, 2.0], [1.0, 0.0]]), "b": jnp.ones(2)}
    >>> normalized = filter_normalized(direction, params)
    >>> normalized["w"].tolist(), normalized["b"].tolist()
    ([[0.0, 1.0], [5.0, 0.0]], [0.0, 0.0])

    Args:
      direction: a pytree like the parameters, of floats.
      params: the parameters.

    Returns:
      The direction, in the dtypes that it had; filters of zeros stay zeros.
    """

    def leaf(d: jax.Array, w: jax.Array) -> jax.Array:
        if d.ndim < 2:
            return jnp.zeros_like(d)
        axes = tuple(range(d.ndim - 1))
        own, wanted = (jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True)) for x in (d, w))
        return (d * jnp.where(own > 0, wanted / jnp.where(own > 0, own, 1), 0)).astype(d.dtype)

    return jax.tree.map(leaf, direction, params)


def random_directions(params: PyTree, num: int, seed: int) -> PyTree:
    """Vectors with independent standard normal entries.

    Args:
      params: pytree of arrays or shapes.
      num: number of vectors.
      seed: seed of the entries.

    Returns:
      A block, leaves ``(num, *shape)``.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    drawn = [
        jax.random.normal(key, (num, *leaf.shape), jnp.promote_types(leaf.dtype, jnp.float32))
        for key, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, drawn)


def principal_directions(points: Sequence[PyTree], num: int) -> tuple[PyTree, np.ndarray]:
    """Principal components of points that training went through (Li et al., section 7).

    They apply PCA to the differences from the last point; since PCA subtracts the mean, which
    point is subtracted before does not matter. Only the matrix of the points' inner products is
    decomposed, so that no matrix with a row for each parameter is made.

    >>> points = [jnp.array([x, 0.5 * (x == 2.0), 1.0]) for x in (0.0, 2.0, 4.0)]
    >>> basis, shares = principal_directions(points, 2)
    >>> abs(basis).round(4).tolist(), shares.round(3).tolist()
    ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0.98, 0.02])

    Args:
      points: parameters, at least one more than directions.
      num: number of directions.

    Returns:
      An orthonormal block of the directions, that of the largest variance first, and their shares
      of the variance, ``(num,)``. The sign of each is such that the last point lies on its positive
      side, seen from the first one.

    Raises:
      ValueError: there are too few points, or they vary in fewer directions.
    """
    if len(points) <= num:
        raise ValueError(
            f"{num} principal directions need at least {num + 1} points of the training, got "
            f"{len(points)}"
        )
    # Differences from the last point first: their rounding errors are smaller.
    last = points[-1]
    wide = [jax.tree.map(lambda x, y: jnp.float32(x) - jnp.float32(y), p, last) for p in points]
    block = jax.tree.map(lambda *leaves: jnp.stack(leaves), *wide)
    block = jax.tree.map(lambda x: x - jnp.mean(x, axis=0, keepdims=True), block)
    values, vectors = np.linalg.eigh(np.asarray(blocks.inner(block, block), np.float64))
    values, vectors = values[::-1], vectors[:, ::-1]
    if values[num - 1] <= len(points) * np.finfo(np.float32).eps * max(values[0], 0.0):
        raise ValueError(
            f"the {len(points)} points of the training vary in fewer than {num} directions; take "
            "points that are further apart"
        )
    signs = np.where(vectors[-1, :num] >= vectors[0, :num], 1.0, -1.0)
    coefficients = (vectors[:, :num] * signs).T / np.sqrt(values[:num])[:, None]
    return blocks.combine(jnp.asarray(coefficients, jnp.float32), block), values[:num] / sum(values)


def without(vector: PyTree, basis: PyTree) -> PyTree:
    """A vector without its part in the span of an orthonormal block.

    >>> without(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0]])).tolist()
    [0.0, 2.0]
    """
    # Twice: what rounding leaves of the part is as small as rounding errors of the rest then.
    for _ in range(2):
        coefficients = blocks.inner(basis, blocks.as_block(vector))[:, 0]
        inside = blocks.combine(coefficients, basis)
        vector = jax.tree.map(jnp.subtract, vector, inside)
    return vector


def with_length(vector: PyTree, length: float) -> PyTree:
    """The vector's direction with another length."""
    own = norm(vector)
    return jax.tree.map(lambda x: x * (length / own if own else 0.0), vector)


def norm(vector: PyTree) -> float:
    """The Euclidean norm."""
    block = blocks.as_block(vector)
    return float(np.sqrt(blocks.inner(block, block)[0, 0]))


# Slices -----------------------------------------------------------------------------------------


class Landscape:
    """The loss as a function of coordinates along directions.

    All slices of a landscape run the same compiled program, `chunk` points at a time by ``vmap``.

    Args:
      objective: the loss, a function of the parameters alone.
      params: the origin, leaves of floats.
      directions: vectors like the parameters, by name.
      chunk: points evaluated at a time. 1 where the network has convolutions and runs on a CPU: of
        several weights at once they would be grouped convolutions, which XLA computes slowly there.

    Raises:
      ValueError: there are no directions, or the chunk is not positive.

    Example:
      >>> objective = oa.Objective(lambda w: w, lambda w: w[0] ** 2 + 4 * w[1])
      >>> axes = {"x": jnp.array([1.0, 0.0]), "y": jnp.array([0.0, 2.0])}
      >>> landscape = Landscape(objective, jnp.array([1.0, 0.0]), axes)
      >>> landscape.line("x", [0.0, 1.0, 2.0]).tolist()
      [1.0, 4.0, 9.0]
      >>> landscape.plane("x", "y", [0.0, 1.0], [0.0, 0.5, 1.0]).tolist()
      [[1.0, 4.0], [5.0, 8.0], [9.0, 12.0]]
    """

    def __init__(
        self,
        objective: oa.Objective,
        params: PyTree,
        directions: Mapping[str, PyTree],
        chunk: int = 32,
    ):
        if not directions:
            raise ValueError(
                f"a landscape needs at least one direction, of the kinds {', '.join(KINDS)}"
            )
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.names = list(directions)
        self._params, self._chunk = params, chunk
        self._block = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions.values())

        def at(params: PyTree, block: PyTree, coordinates: jax.Array) -> jax.Array:
            move = blocks.combine(coordinates, block)
            return objective(jax.tree.map(lambda p, m: (p + m).astype(p.dtype), params, move))

        one = at if chunk == 1 else jax.vmap(at, in_axes=(None, None, 0))
        self._losses = jax.jit(one)

    def __call__(self, coordinates: np.ndarray) -> np.ndarray:
        """The losses at points.

        Args:
          coordinates: ``(points, directions)``, in the order of `names`.

        Returns:
          ``(points,)``, float64; not finite where the loss is not.
        """
        coordinates = np.asarray(coordinates, np.float32)
        size, found = self._chunk, []
        for start in range(0, len(coordinates), size):
            part = coordinates[start : start + size]
            # All chunks have the same shape, so that nothing is compiled again.
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            filled = filled[0] if size == 1 else filled
            losses = self._losses(self._params, self._block, jnp.asarray(filled))
            found.append(np.atleast_1d(np.asarray(losses, np.float64))[: len(part)])
            progress.advance(len(part))
        return np.concatenate(found) if found else np.zeros(0)

    def line(self, name: str, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
        """The losses along one direction, ``(alphas,)``."""
        points = np.zeros((len(alphas), len(self.names)))
        points[:, self.names.index(name)] = alphas
        return self(points)

    def plane(
        self,
        x: str,
        y: str,
        alphas: Sequence[float] | np.ndarray,
        betas: Sequence[float] | np.ndarray,
    ) -> np.ndarray:
        """The losses on a grid of two directions.

        Args:
          x: name of the first direction.
          y: name of the second direction.
          alphas: coordinates along the first one.
          betas: coordinates along the second one.

        Returns:
          ``(betas, alphas)``: a row for each coordinate along the second direction.
        """
        grid_x, grid_y = np.meshgrid(alphas, betas)
        points = np.zeros((grid_x.size, len(self.names)))
        points[:, self.names.index(x)] = grid_x.ravel()
        points[:, self.names.index(y)] += grid_y.ravel()
        return self(points).reshape(grid_x.shape)


def derivatives(values: Callable[[np.ndarray], np.ndarray], reach: float) -> tuple[float, float]:
    """Slope and curvature of a function at 0, from its values alone.

    The interval is halved until the values there differ by at most a twentieth from that in the
    middle; a polynomial of degree 4 through 17 Chebyshev points is fitted there. With losses in
    float32 that leaves about four digits of the curvature, where central differences of a fixed
    width would lose all in rounding or in higher derivatives.

    >>> slope, curvature = derivatives(lambda t: 1 + 2 * t + 3 * t**2 + t**3, 1.0)
    >>> round(slope, 9), round(curvature, 9)
    (2.0, 6.0)

    Args:
      values: the function, of an array of points.
      reach: half of the widest interval to begin with.

    Returns:
      The first and the second derivative at 0; NaN if values there are not finite.
    """
    width = reach
    for _ in range(40):
        low, middle, high = values(np.array([-width, 0.0, width]))
        if max(abs(low - middle), abs(high - middle)) <= CHANGE * abs(middle):
            break
        width /= 2
    nodes = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
    found = values(width * nodes)
    if not np.isfinite(found).all():
        return float("nan"), float("nan")
    fitted = np.polynomial.polynomial.polyfit(nodes, found, DEGREE)
    return float(fitted[1] / width), float(2 * fitted[2] / width**2)


# The study --------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where the landscape is looked at.

    Attributes:
      title: what was trained and how, in one line.
      objective: the loss of the examples, a function of the parameters alone.
      params: the parameters.
      steps: the steps of the training whose parameters are known.
      iterates: these parameters; the last ones are `params`.
      directions: number of leading eigenvectors that are taken for dominant.
      chunk: points that can be evaluated at a time.
    """

    title: str
    objective: oa.Objective
    params: PyTree
    steps: list[int]
    iterates: list[PyTree]
    directions: int
    chunk: int


class Directions(NamedTuple):
    """The directions at a point, and what was found with them.

    Attributes:
      by_name: the directions; all have the same length.
      length: their length.
      eigenvalues: leading eigenvalues of the Hessian, if some direction needs them.
      converged: whether these are accurate.
      shares: shares of the variance of the training's path along its principal components.
    """

    by_name: dict[str, PyTree]
    length: float
    eigenvalues: list[float]
    converged: bool
    shares: list[float]


def find_directions(point: Point, kinds: Sequence[str], seed: int) -> Directions:
    """The directions of some kinds.

    Args:
      point: where.
      kinds: of `KINDS`.
      seed: seed of the random ones and of Lanczos' start.

    Returns:
      The directions.

    Raises:
      ValueError: the training left too few points for its principal components.
    """
    drawn = random_directions(point.params, 3, seed)
    first, second, third = (jax.tree.map(lambda x, i=i: x[i], drawn) for i in range(3))
    random = [filter_normalized(x, point.params) for x in (first, second)]
    length = norm(random[0])
    found: dict[str, PyTree] = {}
    eigenvalues: list[float] = []
    shares: list[float] = []
    converged = True
    if {"dominant", "bulk"} & {*kinds}:
        pairs = eigenpairs(point, seed)
        eigenvalues = [float(value) for value in pairs.eigenvalues]
        converged = bool(pairs.converged.all())
        rows = [jax.tree.map(lambda x, i=i: x[i], pairs.basis) for i in range(len(eigenvalues))]
        if "dominant" in kinds:
            found |= {f"dominant {i}": row for i, row in enumerate(rows[:2], start=1)}
        if "bulk" in kinds:
            found["bulk"] = without(third, pairs.basis)
    if "random" in kinds:
        found |= {f"random {i}": x for i, x in enumerate(random, start=1)}
    if "trajectory" in kinds:
        basis, variance = principal_directions(point.iterates, 2)
        shares = [float(share) for share in variance]
        found |= {f"trajectory {i + 1}": jax.tree.map(lambda x, i=i: x[i], basis) for i in (0, 1)}
    by_name = {name: with_length(vector, length) for name, vector in found.items()}
    return Directions(by_name, length, eigenvalues, converged, shares)


def eigenpairs(point: Point, seed: int) -> curvature.Eigenpairs:
    """The leading eigenpairs of the Hessian at a point."""
    progress.tell("finding the dominant directions")
    operator = curvature.hessian(point.objective, point.params)
    return curvature.lanczos(
        operator,
        operator.like,
        point.directions,
        key=jax.random.key(seed),
        num_products=PRODUCTS * point.directions,
        tolerance=TOLERANCE,
        loop="host",
    )


def measure(
    point: Point, kinds: Sequence[str], *, reach: float, resolution: int, seed: int
) -> dict[str, Any]:
    """All slices at a point.

    Args:
      point: where.
      kinds: of `KINDS`.
      reach: how far slices go both ways; those along the path of the training go as far as it does.
      resolution: points along each axis; odd, so that the point itself is one.
      seed: seed of the random directions.

    Returns:
      Plain JSON: ``lines``, each with its losses, its slope and curvature per unit length at the
      point, and the same from derivatives (`product`, the Rayleigh quotient); ``planes``, each with
      rows of losses and where the path of the training lies in it; what `Directions` has. What is
      not finite is None.

    Raises:
      ValueError: the loss at the point is not finite; see also `find_directions`.
    """
    if not np.isfinite(loss := float(point.objective(point.params))):
        raise ValueError(f"the loss at the end of the training is {loss}; lower the learning rate")
    directions = find_directions(point, kinds, seed)
    landscape = Landscape(point.objective, point.params, directions.by_name, point.chunk)
    operator = curvature.hessian(point.objective, point.params)
    paths = {name: path_along(point, v, directions) for name, v in directions.by_name.items()}
    planes = [pair for pair in PLANES if {*pair} <= directions.by_name.keys()]
    progress.expect(resolution * (len(paths) + resolution * len(planes)))
    progress.tell("evaluating slices")

    def axis(name: str) -> np.ndarray:
        # A path is seen whole, whatever the reach.
        far = float(np.abs(paths[name]).max()) if name.startswith("trajectory") else 0.0
        end = MARGIN * far if far > 0 else reach
        return np.linspace(-end, end, resolution)

    lines = []
    for name, direction in directions.by_name.items():
        alphas = axis(name)
        slope, second = derivatives(functools.partial(landscape.line, name), float(alphas[-1]))
        image = blocks.as_block(operator(direction))
        product = float(blocks.inner(blocks.as_block(direction), image)[0, 0])
        lines.append(
            {
                "name": name,
                "alphas": [rounded(alpha) for alpha in alphas],
                "losses": [rounded(loss) for loss in landscape.line(name, alphas)],
                "slope": rounded(slope / directions.length),
                "curvature": rounded(second / directions.length**2),
                "product": rounded(product / directions.length**2),
            }
        )
    found = []
    for x, y in planes:
        alphas, betas = axis(x), axis(y)
        losses = landscape.plane(x, y, alphas, betas)
        # Filter-normalized directions are not orthogonal: no point projects onto their plane.
        path = None if x.startswith("random") else zip(paths[x], paths[y], strict=True)
        found.append(
            {
                "x": x,
                "y": y,
                "alphas": [rounded(alpha) for alpha in alphas],
                "betas": [rounded(beta) for beta in betas],
                "losses": [[rounded(loss) for loss in row] for row in losses],
                "path": path and [[rounded(a), rounded(b)] for a, b in path],
            }
        )
    return {
        "loss": rounded(loss),
        "length": rounded(directions.length),
        "eigenvalues": [rounded(value) for value in directions.eigenvalues],
        "converged": directions.converged,
        "shares": [rounded(share) for share in directions.shares],
        "steps": point.steps,
        "lines": lines,
        "planes": found,
    }


def evaluations(kinds: Sequence[str], resolution: int) -> int:
    """How many times `measure` evaluates the loss on the grids of lines and planes."""
    names = [*kinds, *(f"{kind} {i}" for kind in kinds for i in (1, 2))]
    lines = sum(1 if kind == "bulk" else 2 for kind in kinds)
    planes = sum({*pair} <= {*names} for pair in PLANES)
    return resolution * (lines + resolution * planes)


def path_along(point: Point, direction: PyTree, directions: Directions) -> np.ndarray:
    """Coordinates of the training's points along a direction, from the point itself."""
    row = blocks.as_block(direction)
    origin = point.params
    moves = (
        jax.tree.map(lambda x, y: jnp.float32(x) - jnp.float32(y), iterate, origin)
        for iterate in point.iterates
    )
    products = [blocks.inner(row, blocks.as_block(move))[0, 0] for move in moves]
    return np.asarray(products, np.float64) / directions.length**2
