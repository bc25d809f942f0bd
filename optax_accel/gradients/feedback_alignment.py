r"""Feedback alignment: hidden layers learn from the output error through fixed random matrices.

For layers :math:`z_l = h_{l-1} W_l`, :math:`h_l = \phi(z_l)` and the error at the outputs,
:math:`e = \partial L / \partial z_L`, back-propagation gives layer l the error
:math:`\delta_l = (\delta_{l+1} W_{l+1}^\top) \odot \phi'(z_l)`.  Direct feedback alignment (DFA)
replaces what comes from the layers above by the output error times a fixed matrix:

.. math:: \delta_L = e, \qquad \delta_l = (e B_l) \odot \phi'(z_l), \qquad
          \partial W_l = h_{l-1}^\top \delta_l

with :math:`B_l` of shape (outputs, entries of :math:`h_l`).  No error passes through a layer: the
matrix products of the backward pass that lead from one layer to the one below are gone, and the
gradients of all layers can be computed at once.  Three kinds are here:

* ``"dfa"``: the inputs of every dense layer and every convolution get :math:`e B_l`.  As in
  Nøkland (2016, section 3).
* ``"cdfa"``: those of dense layers alone; a stack of convolutions is trained by back-propagation
  from :math:`e B_l` at its flattened output.  Our reading of Han and Yoo (2019), from the abstract.
* ``"fa"``: the error is passed from layer to layer, through fixed matrices in place of the
  transposed weights: :math:`\delta_l = (\delta_{l+1} B_{l+1}) \odot \phi'(z_l)`.  As in Lillicrap
  et al. (2016).

With ``binary=True`` (BDFA, our reading of the same abstract) each B becomes its signs times the
mean of its absolute values.  How the authors draw B is not public; uniform and normal entries of
the scale :math:`1 / \sqrt{\text{outputs}}`, and the product of the initial weights are offered.

Nøkland, `Direct feedback alignment provides learning in deep neural networks
<https://arxiv.org/abs/1609.01596>`_, 2016; Han, Yoo, `Efficient convolutional neural network
training with direct feedback alignment <https://arxiv.org/abs/1901.01986>`_, 2019; Lillicrap,
Cownden, Tweed, Akerman, `Random synaptic feedback weights support error backpropagation for deep
learning <https://doi.org/10.1038/ncomms13276>`_, 2016.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import check_choice, check_flag
from optax_accel._random import as_key
from optax_accel.gradients._aligned_programs import Aligned, align, wide
from optax_accel.natural_gradient.finding import Example, check_example, trace
from optax_accel.objective import Objective

Kind: TypeAlias = Literal["dfa", "cdfa", "fa"]
Feedback: TypeAlias = Literal["uniform", "normal", "product"]
Layer: TypeAlias = Callable[[Any, Any], jax.Array]


def feedback_alignment(
    objective: Objective,
    params: chex.ArrayTree,
    example: Example = None,
    *,
    kind: Kind = "dfa",
    feedback: Feedback | Mapping[str, jax.Array] = "uniform",
    binary: bool = False,
    key: chex.PRNGKey | int = 0,
) -> Objective:
    r"""An objective whose gradient is that of feedback alignment, for any optimizer.

    Values, outputs and auxiliary outputs are those of ``objective``; ``grad`` and
    ``value_and_grad`` are aligned, with micro-batches, weights and means over replicas as before.
    The layers are found in the program of ``predict`` as :func:`~optax_accel.kfac` finds them, so
    that networks of any library can be given as they are.  The input of every aligned layer, unless
    it is data, gets its gradient from the feedback, and what lies between two layers (activation
    functions, normalization, pooling, sums) is differentiated as usual.  Second derivatives do not
    exist: give methods that ask for them the objective itself, as ``value_fn``.

    **Feedback matrices** are drawn once, here, and stay fixed.  They are a function of ``key`` (and
    of ``params`` for ``"product"``), so that a run that goes on from a checkpoint makes the same
    ones again from the same seed and the same initial parameters, and nothing has to be saved.  To
    keep or choose them yourself, give a dictionary of arrays.

    Args:
      objective: ``Objective(predict, loss)`` with outputs that are one array ``(examples,
        outputs)``.
      params: the initial parameters, arrays or, unless ``feedback="product"``,
        ``jax.ShapeDtypeStruct``.
      example: keyword arguments of ``predict``, a dictionary of arrays or ``jax.ShapeDtypeStruct``,
        of which only shapes and dtypes matter. ``None`` (default) for an objective that holds its
        batch.
      kind: ``"dfa"`` (default): the output error goes directly to the inputs of all dense layers
        and convolutions; ``"cdfa"``: directly to those of dense layers, while convolutions
        back-propagate; ``"fa"``: from layer to layer, by fixed matrices in place of the weights.
      feedback: what the matrices are. With n the number of outputs (for ``"fa"``: those of the
        layer that an input reaches, its fan-out), ``"uniform"`` (default): entries uniform between
        :math:`\pm 1 / \sqrt{n}`; ``"normal"``: normal of standard deviation :math:`1 / \sqrt{n}`;
        ``"product"``: the transposed product of the initial weights of all layers above (for
        ``"fa"``: the initial weights), which must be a chain with nothing but elementwise functions
        and reshapes in between, so that the first step of a linear network is exact
        back-propagation. Or a dictionary of arrays by the names of the layers' weights:
        ``(outputs, entries of the layer's input)``, in ``"fa"`` shaped like the weight; an error
        lists names and shapes if they do not fit.
      binary: whether each matrix is replaced by its signs times the mean of its absolute values, so
        that the feedback needs no multiplication but one. Default: False.
      key: PRNG key or integer seed of the matrices. Default: 0.

    Returns:
      An objective of the same arguments.

    Raises:
      ValueError: an argument is unknown; the objective has no ``predict``; its outputs are not one
        array ``(examples, outputs)``; no layer can be aligned; matrices do not fit.
      TypeError: the objective is not an Objective, or the outputs are not real floating-point.

    Warns:
      UserWarning: parameters are used in other ways than by layers that can be aligned; it names
        them and says why. They are trained by back-propagation from the next aligned layer.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> def predict(params, x):
      ...     return jnp.tanh(x @ params["hidden"]) @ params["out"]
      >>> x, y = jnp.eye(4, 3), jnp.eye(4, 2)
      >>> objective = oa.Objective(predict, lambda outputs: jnp.mean((outputs - y) ** 2))
      >>> params = {"hidden": jnp.zeros((3, 5)), "out": jnp.zeros((5, 2))}
      >>> aligned = oa.feedback_alignment(objective, params, {"x": x})
      >>> grads = aligned.grad(params, x=x)
      >>> bool(jnp.any(grads["hidden"] != 0))  # back-propagation would give zeros
      True
      >>> tx = optax.adam(1e-2)
      >>> updates, _ = tx.update(grads, tx.init(params), params)

    References:
      Nøkland, `Direct feedback alignment provides learning in deep neural networks
      <https://arxiv.org/abs/1609.01596>`_, 2016; Han, Yoo, `Efficient convolutional neural network
      training with direct feedback alignment <https://arxiv.org/abs/1901.01986>`_, 2019; Lillicrap
      et al., `Random synaptic feedback weights support error backpropagation for deep learning
      <https://doi.org/10.1038/ncomms13276>`_, 2016.
    """
    check_choice("kind", kind, get_args(Kind))
    _check_feedback("feedback", feedback)
    check_flag("binary", binary)
    check_example("feedback_alignment", objective, example)
    closed, outputs = trace(objective.outputs, params, example)
    found = align(closed, params, outputs, kind)
    if found.unaligned:
        reasons = "".join(f"\n  {name} {reason}" for name, reason in found.unaligned)
        warnings.warn(
            f"feedback_alignment cannot align the layers of {len(found.unaligned)} parameters, "
            f"which are trained by back-propagation from the next aligned layer:{reasons}",
            stacklevel=2,
        )
    if isinstance(feedback, Mapping):
        matrices = _given(found, feedback)
    elif feedback == "product":
        matrices = found.products(jax.tree.leaves(params))
    else:
        dtype = wide(jax.tree.leaves(outputs)[0].dtype)
        matrices = _draw(feedback, key, found.shapes, found.fan_outs, dtype)
    if binary:
        matrices = {name: _signs(matrix) for name, matrix in matrices.items()}

    def aligned(predict: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
        @functools.wraps(predict)
        def of_params(params: chex.ArrayTree, **kwargs: Any) -> Any:
            def network(params: chex.ArrayTree) -> Any:
                return predict(params, **kwargs)

            closed, result = jax.make_jaxpr(network, return_shape=True)(params)
            outputs = result[0] if has_aux else result
            program = align(closed, params, outputs, kind)
            _check_same(program, matrices)
            leaves = program.evaluate(jax.tree.leaves(params), matrices)
            return jax.tree.unflatten(jax.tree.structure(result), leaves)

        return of_params

    return objective.with_predict(aligned)


def dfa_value_and_grad(
    layers: Sequence[Layer],
    loss: Callable[..., jax.Array],
    feedback: Sequence[jax.Array | None],
) -> Callable[..., tuple[jax.Array, Sequence[Any]]]:
    """The loss of a chain of layers and its gradient by direct feedback alignment.

    It is :func:`feedback_alignment` for a network that is given as a list of layers, each with the
    function that follows it.  Each layer is differentiated with respect to its own parameters
    alone; a layer without parameters is not differentiated at all.

    Args:
      layers: functions ``layer(params, inputs) -> outputs`` of arrays whose first axis is that of
        the examples; the last layer's outputs are ``(examples, outputs)``.
      loss: ``loss(outputs, *args) -> scalar``.
      feedback: for every layer but the last the matrix ``(outputs of the network, outputs of the
        layer)`` that carries the error to its outputs, or ``None`` for a layer without parameters;
        :func:`dfa_feedback` draws them.

    Returns:
      ``value_and_grad(params, inputs, *args) -> (value, gradient)``: ``params`` is a sequence of
      the layers' parameters, the gradient a list of pytrees like these, and ``args`` go to
      ``loss``.

    Raises:
      ValueError: there are not as many matrices as hidden layers; when called: there are not as
        many parameters as layers, the outputs have another rank than 2, or a matrix does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> layers = [lambda w, h: jnp.tanh(h @ w), lambda w, h: h @ w]
      >>> params = [jnp.ones((3, 4)), jnp.ones((4, 2))]
      >>> feedback = oa.dfa_feedback(jax.random.key(0), params)
      >>> value_and_grad = oa.dfa_value_and_grad(layers, jnp.mean, feedback)
      >>> value, gradient = jax.jit(value_and_grad)(params, jnp.ones((5, 3)))
      >>> [g.shape for g in gradient]
      [(3, 4), (4, 2)]

    References:
      Nøkland, `Direct feedback alignment provides learning in deep neural networks
      <https://arxiv.org/abs/1609.01596>`_, 2016.
    """
    layers, feedback = list(layers), list(feedback)
    if len(layers) < 2:
        raise ValueError(
            f"dfa_value_and_grad: there are no layers to align, got {len(layers)} layer(s): give "
            "at least two, or use jax.value_and_grad, which is the same for one."
        )
    if len(feedback) != len(layers) - 1:
        raise ValueError(
            "dfa_value_and_grad: `feedback` must have one matrix for every layer but the last "
            f"(None for layers without parameters): {len(layers) - 1} for {len(layers)} layers, "
            f"got {len(feedback)}."
        )

    def value_and_grad(
        params: Sequence[Any], inputs: jax.Array, *args: Any
    ) -> tuple[jax.Array, Sequence[Any]]:
        if len(params) != len(layers):
            raise ValueError(
                f"dfa_value_and_grad: `params` must have one entry for each of the {len(layers)} "
                f"layers, got {len(params)}."
            )
        pulls = []
        outputs = [inputs]
        for layer, own in zip(layers, params, strict=True):
            result, pull = _local(layer, own, outputs[-1])
            outputs.append(result)
            pulls.append(pull)
        value, error = jax.value_and_grad(loss)(outputs[-1], *args)
        if error.ndim != 2:
            raise ValueError(
                "dfa_value_and_grad: the outputs of the last layer must have the shape (examples, "
                f"outputs), got {error.shape}; reshape them there, and back in the loss."
            )
        gradient = []
        for i, (pull, own) in enumerate(zip(pulls, params, strict=True)):
            if pull is None:
                gradient.append(own)
            elif i < len(feedback):
                gradient.append(pull(_sent(i, error, feedback[i], outputs[i + 1]))[0])
            else:
                gradient.append(pull(error)[0])
        return value, gradient

    return value_and_grad


def _local(
    layer: Layer, params: Any, inputs: jax.Array
) -> tuple[jax.Array, Callable[..., Any] | None]:
    """A layer's outputs, and the pullback to its parameters, if it has any."""
    if not jax.tree.leaves(params):
        return layer(params, inputs), None
    return jax.vjp(lambda own: layer(own, inputs), params)


def _sent(i: int, error: jax.Array, matrix: jax.Array | None, like: jax.Array) -> jax.Array:
    """The output error as it arrives at the outputs of a hidden layer.

    Raises:
      ValueError: the matrix does not fit.
    """
    shape = (error.shape[1], math.prod(like.shape[1:]))
    if matrix is None or matrix.shape != shape:
        got = None if matrix is None else matrix.shape
        raise ValueError(
            f"dfa_value_and_grad: `feedback[{i}]` must have the shape {shape}, the outputs of the "
            f"network by those of layer {i}; got {got}."
        )
    sent = error.astype(matrix.dtype) @ matrix
    return sent.reshape(like.shape).astype(like.dtype)


def dfa_feedback(
    key: chex.PRNGKey | int,
    params: Sequence[Any],
    kind: Feedback = "uniform",
    binary: bool = False,
) -> list[jax.Array | None]:
    r"""Fixed matrices of direct feedback alignment, for a chain of dense layers.

    Args:
      key: PRNG key or integer seed.
      params: the parameters of each layer, a pytree with one matrix ``(inputs, outputs)`` and
        anything of other ranks (biases), or without leaves for a layer without parameters.
      kind: with n the number of the network's outputs, ``"uniform"`` (default): entries uniform
        between :math:`\pm 1 / \sqrt{n}`; ``"normal"``: normal of standard deviation
        :math:`1 / \sqrt{n}`; ``"product"``: the transposed product
        :math:`(W_{l+1} \cdots W_L)^\top` of the given weights of all layers above, with which the
        first gradient of a linear network is that of back-propagation.
      binary: whether each matrix is replaced by its signs times the mean of its absolute values.
        Default: False.

    Returns:
      For each layer but the last a matrix ``(outputs of the network, outputs of the layer)``, of
      the dtype of the weights but at least float32; ``None`` for layers without parameters.

    Raises:
      ValueError: ``kind`` is unknown, there are fewer than two layers, or a layer does not have
        exactly one matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> params = [jnp.ones((3, 4)), {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}]
      >>> [matrix.shape for matrix in oa.dfa_feedback(0, params)]
      [(2, 4)]
      >>> oa.dfa_feedback(0, params, kind="product")[0].tolist()
      [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """
    check_choice("kind", kind, get_args(Feedback))
    check_flag("binary", binary)
    weights = {i: _weight(i, own) for i, own in enumerate(params) if jax.tree.leaves(own)}
    if len(weights) < 2:
        raise ValueError(
            "dfa_feedback: there are no layers to align: give the parameters of at least two "
            f"layers, got {len(weights)}."
        )
    last = max(weights)
    outputs = weights[last].shape[1]
    hidden = [i for i in weights if i != last]
    dtype = wide(weights[last].dtype)
    if kind == "product":
        matrices, product = {}, jnp.eye(outputs, dtype=dtype)
        for i in reversed(hidden):
            above = min(j for j in weights if j > i)
            product = product @ weights[above].astype(dtype).T
            matrices[str(i)] = product
    else:
        shapes = {str(i): (outputs, weights[i].shape[1]) for i in hidden}
        matrices = _draw(kind, key, shapes, dict.fromkeys(shapes, outputs), dtype)
    if binary:
        matrices = {name: _signs(matrix) for name, matrix in matrices.items()}
    return [matrices.get(str(i)) for i in range(len(params) - 1)]


def _weight(i: int, params: Any) -> jax.Array:
    """The one matrix of a layer.

    Raises:
      ValueError: it has none or several.
    """
    found = [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) == 2]
    if len(found) != 1:
        raise ValueError(
            f"dfa_feedback: the parameters of layer {i} must contain one matrix (inputs, outputs), "
            f"got the shapes {[jnp.shape(leaf) for leaf in jax.tree.leaves(params)]}. For other "
            "layers make the matrices yourself, (outputs of the network, outputs of the layer), or "
            "use feedback_alignment, which finds the shapes in the program of the network."
        )
    return found[0]


def _check_feedback(name: str, feedback: Any) -> None:
    """Raises if it is neither a known rule nor a dictionary.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(feedback, Mapping):
        allowed = get_args(Feedback)
        if not isinstance(feedback, str) or feedback not in allowed:
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(repr, allowed))}, or a dictionary of "
                f"arrays by the names of layers; got {feedback!r}."
            )


def _draw(
    feedback: str,
    key: chex.PRNGKey | int,
    shapes: Mapping[str, tuple[int, ...]],
    fan_outs: Mapping[str, int],
    dtype: Any,
) -> dict[str, jax.Array]:
    """Random matrices of the scale ``1 / sqrt(fan_out)``."""
    ends = [0]
    for shape in shapes.values():
        ends.append(ends[-1] + math.prod(shape))

    @jax.jit  # one draw and one program for all layers
    def draw(key: chex.PRNGKey) -> dict[str, jax.Array]:
        if feedback == "uniform":
            entries = jax.random.uniform(key, (ends[-1],), dtype, -1, 1)
        else:
            entries = jax.random.normal(key, (ends[-1],), dtype)
        return {
            name: entries[low:high].reshape(shape) / math.sqrt(fan_outs[name])
            for (name, shape), low, high in zip(shapes.items(), ends[:-1], ends[1:], strict=True)
        }

    return draw(as_key(key))


def _signs(matrix: jax.Array) -> jax.Array:
    """The signs of a matrix (1 for 0) times the mean of its absolute values."""
    scale = jnp.mean(jnp.abs(matrix))
    return jnp.where(matrix < 0, -scale, scale)


def _given(found: Aligned, feedback: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The matrices that a person gives.

    Raises:
      ValueError: they are not those that the network needs.
    """
    matrices = {name: jnp.asarray(matrix) for name, matrix in feedback.items()}
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    if shapes != found.shapes:
        raise ValueError(
            f"feedback_alignment: `feedback` must hold arrays of the shapes {found.shapes}, by the "
            f"names of the layers whose inputs get them; got {shapes}."
        )
    return {name: matrices[name] for name in found.shapes}


def _check_same(program: Aligned, matrices: Mapping[str, jax.Array]) -> None:
    """Raises if the network has other layers than when the matrices were drawn.

    Raises:
      ValueError: it has.
    """
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    if program.shapes != shapes:
        raise ValueError(
            f"feedback_alignment: the network now has the aligned layers {program.shapes}, but its "
            f"feedback was made for {shapes}. Build feedback_alignment with an example whose "
            "arrays have the shapes of those of a training step, up to the number of examples."
        )
