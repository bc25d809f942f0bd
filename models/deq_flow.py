"""Optical flow as the fixed point of a recurrent update: a deep equilibrium network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _common, _equilibrium
from optax_accel import equilibrium

STRIDE = 4  # pixels of a cell's side: two convolutions of stride 2


class FlowState(NamedTuple):
    """What the solver iterates, on a grid of cells of `STRIDE` pixels a side.

    Attributes:
        hidden: The state of the recurrent unit, (N, rows, columns, width).
        flow: The flow in cells, right and down, (N, rows, columns, 2), float32.
    """

    hidden: jax.Array
    flow: jax.Array


class _Inputs(NamedTuple):
    """What the update reads besides its state: gates' biases, and the correlations."""

    context: jax.Array
    correlation: jax.Array


class DeqFlow(nnx.Module):
    """The flow between two pictures as a fixed point, after DEQ-Flow (Bai et al. 2022), in small.

    Features of both pictures come from two convolutions of stride 2. Inner products of the features
    of each cell of the first picture with those of every cell of the second one are the
    correlations. The update looks them up around where the present flow points, feeds a
    convolutional gated recurrent unit with them, and moves the flow by what a head reads from its
    state. Solved for its fixed point, that is the estimate: the flow that the update does not move
    any more. Weights of nine neighbouring cells, for each pixel, make a flow of full size.

    In train mode the solver is cut in `corrections` segments; after each `phantom_steps` updates
    are differentiated and give a supervised output (fixed-point correction). In eval mode one
    solve of 1.5 times the steps gives the estimate.

    Published are the structure (RAFT's; Teed and Deng 2020), the fixed point, the correction and
    the reuse. Our reading for a small size: two convolutions of stride 2 as the encoders, one level
    of correlation, one unit of 3x3 convolutions, states that start at zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> options = {"input_shape": (8, 8, 2), "steps": 6, "corrections": 3}
        >>> model = nnx.eval_shape(lambda: DeqFlow(**options))
        >>> def outputs(model):
        ...     return nnx.eval_shape(lambda model: model(jnp.ones((5, 8, 8, 2))), model)
        >>> outputs(model).shape  # the flow after each correction
        (5, 3, 8, 8, 2)
        >>> model.eval()
        >>> outputs(model).shape
        (5, 1, 8, 8, 2)

    Args:
        input_shape: (height, width, 2 * channels): the first picture's channels, then the second
            one's; height and width are multiples of 4.
        width: Channels of features, context and recurrent unit; default: 32.
        radius: Cells around the target of a flow whose correlations the update reads, in each
            direction; default: 4, the authors'.
        steps: Updates of the solver in train mode, over all corrections; default: 12. The authors'
            networks take 36 and 40.
        corrections: Number of supervised outputs in train mode; default: 3; `steps` allow at most
            one for two steps. The authors take 6 and 2.
        phantom_steps: Updates that are differentiated for each of them; default: 1, the authors'
            first.
        loop: "while" (default) stops when all pictures have converged; "unrolled" writes all
            updates into the program. No convolution is in the loop, but products with patches: XLA
            runs convolutions in loops many times slower on a CPU (jax#12868).
        tolerance: A picture has converged when the residual is below this share of the state;
            default: 1e-4.
        dtype: Type of the convolutions; default: that of inputs and parameters. Correlations and
            flow are at least float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Bai, Geng, Savani, Kolter, `Deep equilibrium optical flow estimation
        <https://arxiv.org/abs/2204.08442>`_, CVPR 2022, section 3; Teed, Deng, `RAFT
        <https://arxiv.org/abs/2003.12039>`_, ECCV 2020, section 3.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        width: int = 32,
        radius: int = 4,
        steps: int = 12,
        corrections: int = 3,
        phantom_steps: int = 1,
        loop: Literal["while", "unrolled"] = "while",
        tolerance: float = 1e-4,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("DeqFlow", self.input_shape, STRIDE)
        channels, rest = divmod(self.input_shape[2], 2)
        if rest or not channels:
            raise ValueError(
                "DeqFlow needs input_shape=(height, width, 2 * channels) for two pictures, got "
                f"{self.input_shape}"
            )
        counts = {"width": width, "radius": radius, "steps": steps, "corrections": corrections}
        for name, value in (counts | {"phantom_steps": phantom_steps}).items():
            _equilibrium.check_count(name, value, 1)
        if steps < 2 * corrections:
            raise ValueError(
                f"steps must be at least 2 for each of the {corrections} corrections, got {steps}"
            )
        self.width, self.radius = width, radius
        self.steps, self.corrections = steps, corrections
        self.gradient = equilibrium.phantom(phantom_steps)
        self.loop, self.tolerance = loop, tolerance
        self.solver(steps)  # refuses a tolerance or a loop that there is not
        layers = _common.Layers(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.features = _Encoder(layers, channels, width, width)
        self.context = _Encoder(layers, channels, width, 3 * width)
        self.update = _Update(layers, width, (2 * radius + 1) ** 2)
        self.weights = nnx.List(
            [layers.conv(width, 2 * width), layers.conv(2 * width, 9 * STRIDE**2, size=1)]
        )
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.deterministic = False  # switched by `model.train()` and `model.eval()`

    def __call__(self, x: jax.Array) -> jax.Array:
        """The flow from the first picture to the second one, in pixels, right and down.

        Args:
            x: A batch of pairs of pictures, (N, *input_shape).

        Returns:
            (N, corrections, height, width, 2), of which the last one is the estimate; in eval mode
            (N, 1, height, width, 2). At least float32.
        """
        if self.deterministic:
            return self.estimate(x)[0][:, None]
        inputs = self._inputs(x)
        outputs, _ = self._solve(self.start(x), inputs, self.solver(self.steps), self.corrections)
        return jnp.stack([self._full_size(z) for z in outputs], axis=1)

    def solver(self, steps: int, tolerance: float | None = None) -> equilibrium.FixedPointSolver:
        """The solver of this network: plain iteration, as in the authors' released networks.

        Args:
            steps: The most updates.
            tolerance: Of the relative residual; default: the network's.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        return equilibrium.fixed_point(steps, tolerance, stop="relative", loop=self.loop)

    def start(self, x: jax.Array) -> FlowState:
        """The state where nothing is known: zeros.

        Args:
            x: A batch of pairs of pictures.
        """
        rows, columns = (size // STRIDE for size in self.input_shape[:2])
        dtype = jnp.result_type(x.dtype, self.param_dtype) if self.dtype is None else self.dtype
        hidden = jnp.zeros((len(x), rows, columns, self.width), dtype)
        flow = jnp.zeros((len(x), rows, columns, 2), jnp.promote_types(dtype, jnp.float32))
        return FlowState(hidden, flow)

    def estimate(
        self,
        x: jax.Array,
        z0: FlowState | None = None,
        solver: equilibrium.FixedPointSolver | None = None,
    ) -> tuple[jax.Array, FlowState, equilibrium.FixedPointReport]:
        """The flow, with what is needed to start the next pair of a sequence.

        Args:
            x: A batch of pairs of pictures, (N, *input_shape).
            z0: Where the solver starts, such as `moved_on` of the last pair's state; default:
                `start`.
            solver: The solver; default: `solver` of 1.5 times the steps.

        Returns:
            The flow in pixels, (N, height, width, 2); the fixed point; and the solver's report.
        """
        solver = self.solver(self.steps * 3 // 2) if solver is None else solver
        z0 = self.start(x) if z0 is None else z0
        (z,), report = self._solve(z0, self._inputs(x), solver, 1)
        return self._full_size(z), z, report

    def _inputs(self, x: jax.Array) -> _Inputs:
        _common.check_input(self, x, self.input_shape)
        first, second = jnp.split(x, 2, axis=-1)
        one, other = (_standardized(self.features(each)) for each in (first, second))
        return _Inputs(self.context(first), correlations(one, other))

    def _solve(
        self,
        z0: FlowState,
        inputs: _Inputs,
        solver: equilibrium.FixedPointSolver,
        corrections: int,
    ) -> tuple[tuple[FlowState, ...], equilibrium.FixedPointReport]:
        graphdef, params = nnx.split(self.update)

        def f(z: FlowState, params: nnx.State[Any, Any], x: _Inputs) -> FlowState:
            return nnx.merge(graphdef, params)(z, x, self.radius)

        found: tuple[tuple[FlowState, ...], equilibrium.FixedPointReport] = equilibrium.deq(
            f, z0, params, inputs, solver=solver, gradient=self.gradient, corrections=corrections
        )
        return found

    def _full_size(self, z: FlowState) -> jax.Array:
        """Every pixel's flow is a mean of the nine cells around it (RAFT, section 3.3)."""
        n, rows, columns, _ = z.flow.shape
        one, other = self.weights
        scores = other(nnx.relu(one(z.hidden))).astype(z.flow.dtype)
        scores = scores.reshape(n, rows, columns, 9, STRIDE, STRIDE)
        padded = jnp.pad(z.flow, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        cells = jnp.stack(
            [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=3
        )
        whole = jnp.einsum("nrckij,nrckd->nricjd", jax.nn.softmax(scores, axis=3), cells)
        return STRIDE * whole.reshape(n, STRIDE * rows, STRIDE * columns, 2)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Class method used by `nnx.view`.

        Args:
            deterministic: Whether one solve gives the estimate, rather than the corrections.
        """
        if deterministic is not None:
            self.deterministic = deterministic


class _Encoder(nnx.Module):
    """Two convolutions of stride 2 with relu between them."""

    def __init__(self, layers: _common.Layers, fan_in: int, width: int, fan_out: int):
        self.first = layers.conv(fan_in, width, strides=2)
        self.second = layers.conv(width, fan_out, strides=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


def _standardized(x: jax.Array) -> jax.Array:
    """Each channel of each picture with mean 0 and variance 1, in at least float32.

    Otherwise the brightness that all cells share outweighs what tells them from each other.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = wide - wide.mean(axis=(1, 2), keepdims=True)
    variance = jnp.mean(centered**2, axis=(1, 2), keepdims=True)
    return (centered * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


class _Update(nnx.Module):
    """Motion features, a convolutional gated recurrent unit, and the head that moves the flow."""

    def __init__(self, layers: _common.Layers, width: int, num_correlations: int):
        def patches(fan_in: int, fan_out: int) -> nnx.Linear:
            return layers.linear(9 * fan_in, fan_out)

        self.of_correlation = layers.linear(num_correlations, width)
        self.of_flow = patches(2, width)
        self.motion = patches(2 * width, width)
        self.gates = patches(2 * width + 2, 2 * width)
        self.candidate = patches(2 * width + 2, width)
        self.head = nnx.List([patches(width, width), patches(width, 2)])

    def __call__(self, z: FlowState, x: _Inputs, radius: int) -> FlowState:
        dtype = z.hidden.dtype
        seen = look_up(x.correlation, z.flow, radius).astype(dtype)
        flow = z.flow.astype(dtype)
        parts = [nnx.relu(self.of_correlation(seen)), nnx.relu(self.of_flow(_patches(flow)))]
        motion = nnx.relu(self.motion(_patches(*parts)))
        of_gates, of_candidate = jnp.split(x.context, [2 * z.hidden.shape[-1]], axis=-1)
        gates = nnx.sigmoid(self.gates(_patches(z.hidden, motion, flow)) + of_gates)
        update, reset = jnp.split(gates, 2, axis=-1)
        candidate = self.candidate(_patches(reset * z.hidden, motion, flow)) + of_candidate
        hidden = (1 - update) * z.hidden + update * jnp.tanh(candidate)
        first, second = self.head
        move = second(_patches(nnx.relu(first(_patches(hidden)))))
        return FlowState(hidden.astype(dtype), z.flow + move.astype(z.flow.dtype))


def _patches(*parts: jax.Array) -> jax.Array:
    """The channels of each cell and of its eight neighbors, side by side; zeros around the grid.

    A linear layer of them is a 3x3 convolution.
    """
    x = jnp.concatenate(parts, axis=-1)
    _, rows, columns, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def correlations(one: jax.Array, other: jax.Array) -> jax.Array:
    """Inner products of the features of all pairs of cells, over the root of their number.

    Args:
        one: (N, rows, columns, channels).
        other: Of the same shape.

    Returns:
        (N, rows, columns, rows, columns): of each cell of `one` with each cell of `other`; at least
        float32.
    """
    wide = jnp.promote_types(one.dtype, jnp.float32)
    product = jnp.einsum("nrcf,nijf->nrcij", one, other, preferred_element_type=wide)
    return product / one.shape[-1] ** 0.5


def look_up(correlation: jax.Array, flow: jax.Array, radius: int) -> jax.Array:
    """The correlations around the cell to which the flow points, interpolated linearly.

    Args:
        correlation: (N, rows, columns, rows, columns), see `correlations`.
        flow: In cells, right and down, (N, rows, columns, 2).
        radius: How many cells around the target are read, in each direction.

    Returns:
        (N, rows, columns, (2 * radius + 1) ** 2); 0 outside of the picture.
    """
    n, rows, columns = correlation.shape[:3]
    right, down = flow[..., 0], flow[..., 1]
    around = jnp.arange(-radius, radius + 1, dtype=flow.dtype)
    # As products with matrices of hat functions: gathering takes a CPU longer.
    of_rows = _hats(_grid(rows, flow)[None, :, None] + down, around, rows)
    of_columns = _hats(_grid(columns, flow)[None, None] + right, around, columns)
    found = jnp.einsum("nrcai,nrcij,nrcbj->nrcab", of_rows, correlation, of_columns)
    return found.reshape(n, rows, columns, -1)


def moved_on(z: FlowState) -> FlowState:
    """Where to start at the next pair of a sequence: the flow moved along itself.

    What is at a cell now, and moves by the flow, is expected to go on moving so. Cells that nothing
    reaches keep their flow, and all keep their hidden state, as in the authors' code, which moves
    the flow to the nearest cell where ours shares it among the four around.

    Args:
        z: The fixed point of a pair of pictures.

    Returns:
        A state of the same shapes.

    References:
        Bai et al. 2022, section 3.4.
    """
    _, rows, columns, _ = z.flow.shape
    right, down = z.flow[..., 0], z.flow[..., 1]
    here = jnp.zeros(1, z.flow.dtype)
    of_rows = _hats(_grid(rows, z.flow)[None, :, None] + down, here, rows)[..., 0, :]
    of_columns = _hats(_grid(columns, z.flow)[None, None] + right, here, columns)[..., 0, :]
    shares = jnp.einsum("nrci,nrcj->nrcij", of_rows, of_columns)
    arrived = jnp.einsum("nrcij,nrcd->nijd", shares, z.flow)
    weight = jnp.sum(shares, axis=(1, 2))[..., None]
    reached = weight > 1e-3
    moved = arrived / jnp.where(reached, weight, 1)
    return FlowState(z.hidden, jnp.where(reached, moved, z.flow))


def _grid(size: int, like: jax.Array) -> jax.Array:
    return jnp.arange(size, dtype=like.dtype)


def _hats(targets: jax.Array, around: jax.Array, size: int) -> jax.Array:
    """Weights of linear interpolation: (..., offsets, size) at targets (...) plus offsets."""
    points = targets[..., None] + around.reshape((1,) * targets.ndim + (-1,))
    grid = _grid(size, points).reshape((1,) * points.ndim + (-1,))
    return jnp.maximum(0, 1 - jnp.abs(points[..., None] - grid))


def correction_loss(outputs: jax.Array, flow: jax.Array, gamma: float = 0.8) -> jax.Array:
    """The loss of fixed-point correction: mean absolute errors of all outputs, weighted.

    >>> import jax.numpy as jnp
    >>> outputs = jnp.ones((1, 3, 4, 4, 2))
    >>> round(float(correction_loss(outputs, jnp.zeros((1, 4, 4, 2)))), 4)
    2.44

    Args:
        outputs: What `DeqFlow` returns, (N, corrections, height, width, 2).
        flow: The true flow, (N, height, width, 2).
        gamma: The factor by which each output weighs less than the next one; default: the authors'.

    Returns:
        A scalar: a mean over the examples.

    References:
        Bai et al. 2022, section 3.3; the absolute error is the authors' code's.
    """
    errors = jnp.mean(jnp.abs(outputs - flow[:, None]), axis=(0, 2, 3, 4))
    return equilibrium.correction_loss(list(errors), gamma)


def end_point_error(outputs: jax.Array, flow: jax.Array) -> jax.Array:
    """The mean distance of the estimate from the true flow, in pixels.

    >>> import jax.numpy as jnp
    >>> estimate, truth = jnp.zeros((1, 1, 2, 2, 2)), jnp.full((1, 2, 2, 2), 3.0)
    >>> float(end_point_error(estimate, truth.at[..., 1].set(4.0)))
    5.0

    Args:
        outputs: What `DeqFlow` returns, of which the last one counts.
        flow: The true flow, (N, height, width, 2).

    Returns:
        A scalar: a mean over pixels and examples.
    """
    return jnp.mean(jnp.linalg.norm(outputs[:, -1] - flow, axis=-1))
