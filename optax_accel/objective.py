"""The loss as a value: the one place that knows how to evaluate and differentiate it.

Optax hands a transformation that needs more than the gradient a function, ``value_fn``.  An
:class:`Objective` is such a function, ``objective(params) -> scalar``, that also gives the products
the methods of this package ask for and that owns the collectives: with ``axis_name`` every value,
gradient and product is the mean over the replicas, so no method writes its own ``pmean``.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from optax_accel._arguments import check_integer
from optax_accel.accumulation import mean_over_micro_batches, vary_over

ValueFn = Callable[..., jax.Array]


class _MicroBatches(NamedTuple):
    """How an accumulated objective evaluates the loss."""

    predict: Callable[..., chex.ArrayTree] | None  # these take the batch by name
    loss: ValueFn
    batch: dict[str, chex.ArrayTree]
    number: int
    unroll: bool


class Objective:
    r"""A scalar loss of the parameters, with its first and second derivatives.

    ``Objective(predict, loss)`` composes :math:`L(\theta) = \ell(f(\theta))` from
    ``predict: params -> outputs`` and ``loss: outputs -> scalar``; the split is what gives the
    Gauss-Newton operator.  ``Objective.from_value_fn(value_fn)`` wraps a plain closure, for which
    everything but the Gauss-Newton products and the outputs is available.

    ``predict`` and ``loss`` (or ``value_fn``) may take further keyword arguments.  They are given
    by name, either in the call, ``objective(params, x=x, y=y)``, or as extra arguments of
    ``tx.update(..., value_fn=objective, x=x, y=y)``, as in Optax's line searches.

    Args:
      predict: maps parameters (any pytree) to outputs (any pytree of float arrays).
      loss: maps the outputs to a scalar (shape ``()``); for a batch, the *mean* over its examples,
        so that means over replicas are means over the global batch.
      axis_name: name of the ``pmap``, ``shard_map`` or ``vmap`` axis over which values, gradients
        and products are averaged. ``None`` (default) for one device and for global-view ``jit``,
        where the mean over a sharded batch is global already.
      hvp_mode: how Hessian products are differentiated. ``"forward_over_reverse"`` (default) is
        the cheapest, 1 to 2 gradients a product (Pearlmutter 1994); ``"reverse_over_reverse"``
        works for losses whose gradient has no forward-mode rule (some custom kernels).

    Raises:
      ValueError: unknown ``hvp_mode``.
      TypeError: ``predict`` or ``loss`` is not callable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> x, y = jnp.ones((4, 3)), jnp.zeros((4, 2))
      >>> objective = oa.Objective(
      ...     predict=lambda params: x @ params["w"],
      ...     loss=lambda outputs: 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1)),
      ... )
      >>> params = {"w": jnp.ones((3, 2))}
      >>> float(objective(params))
      9.0
      >>> objective.hvp(params, params)["w"].shape
      (3, 2)

    References:
      Pearlmutter, `Fast exact multiplication by the Hessian
      <https://doi.org/10.1162/neco.1994.6.1.147>`_, 1994; Schraudolph, `Fast curvature
      matrix-vector products <https://doi.org/10.1162/08997660260028683>`_, 2002.
    """

    def __init__(
        self,
        predict: Callable[..., chex.ArrayTree],
        loss: Callable[..., jax.Array],
        axis_name: str | None = None,
        *,
        hvp_mode: Literal["forward_over_reverse", "reverse_over_reverse"] = "forward_over_reverse",
    ):
        for name, fn in (("predict", predict), ("loss", loss)):
            if not callable(fn):
                raise TypeError(f"Objective: `{name}` must be callable, got {type(fn).__name__}.")
        if hvp_mode not in ("forward_over_reverse", "reverse_over_reverse"):
            raise ValueError(
                f"Objective: unknown hvp_mode {hvp_mode!r}; allowed are 'forward_over_reverse' "
                "and 'reverse_over_reverse'."
            )
        self._predict: Callable[..., chex.ArrayTree] | None = predict
        self._loss = loss
        self.axis_name = axis_name
        self.hvp_mode = hvp_mode
        self._where: jax.Array | None = None
        self._micro: _MicroBatches | None = None

    @classmethod
    def from_value_fn(
        cls,
        value_fn: ValueFn,
        axis_name: str | None = None,
        *,
        hvp_mode: Literal["forward_over_reverse", "reverse_over_reverse"] = "forward_over_reverse",
    ) -> Objective:
        """An objective from a plain function ``value_fn(params, **kwargs) -> scalar``.

        Args:
          value_fn: the local loss of a replica; it must not average over ``axis_name`` itself.
          axis_name: as for :class:`Objective`.
          hvp_mode: as for :class:`Objective`.

        Returns:
          The objective; :meth:`ggn_vp` and :meth:`outputs` raise ``ValueError`` on it.

        Example:
          >>> import jax.numpy as jnp
          >>> import optax_accel as oa
          >>> objective = oa.Objective.from_value_fn(lambda w: jnp.sum(w**4))
          >>> objective.grad(jnp.ones(2)).tolist()
          [4.0, 4.0]
        """
        # `outputs = params` and `loss = value_fn`: one composition rule serves both constructors.
        objective = cls(lambda params: params, value_fn, axis_name, hvp_mode=hvp_mode)
        objective._predict = None
        return objective

    def __repr__(self) -> str:
        kind = "from_value_fn" if self._predict is None else "predict, loss"
        return f"Objective({kind}, axis_name={self.axis_name!r})"

    # -- derived objectives ------------------------------------------------------------------

    def _copy(
        self,
        predict: Callable[[Any], Any] = lambda fn: fn,
        loss: Callable[[Any], Any] = lambda fn: fn,
        **attributes: Any,
    ) -> Objective:
        """A copy with other functions, made of those there are, and other attributes."""
        new = copy.copy(self)
        vars(new).pop("_compiled", None)  # programs of `curvature`, made for this one
        new._predict = self._predict and predict(self._predict)
        new._loss = loss(self._loss)
        if self._micro is not None:
            new._micro = self._micro._replace(
                predict=self._micro.predict and predict(self._micro.predict),
                loss=loss(self._micro.loss),
            )
        vars(new).update(attributes)
        return new

    @property
    def local(self) -> Objective:
        """The same objective without collectives: this replica's own loss."""
        return self if self.axis_name is None else self._copy(axis_name=None, _where=None)

    def averaged_where(self, axis_name: str, where: jax.Array) -> Objective:
        """The same objective that averages over an axis in some steps only.

        Args:
          axis_name: as for :class:`Objective`.
          where: boolean scalar, the same on all replicas: whether to average; if not, values,
            gradients and products are the replica's own.

        Returns:
          The objective.
        """
        return self._copy(axis_name=axis_name, _where=where)

    def bind(self, **kwargs: Any) -> Objective:
        """Fixes the keyword arguments that ``predict`` and ``loss`` take; ignores the others.

        Args:
          **kwargs: candidates, as the extra arguments of an Optax ``update``.

        Returns:
          An objective of the parameters alone.

        Raises:
          TypeError: an argument without a default was not given.
        """
        given_later = () if self._micro is None else (*self._micro.batch, "micro_batch")

        def bound(fn: Callable[..., Any]) -> Callable[..., Any]:
            return _bind_by_name(fn, kwargs, given_later)

        return self._copy(bound, bound)

    def accumulated(
        self, num_micro_batches: int, *, unroll: bool = False, **batch: chex.ArrayTree
    ) -> Objective:
        r"""The objective of a batch that is seen in parts: gradient accumulation for every method.

        Value, gradient, Hessian and Gauss-Newton products are the means over the micro-batches,
        weighted with their numbers of examples: those of the whole batch, up to rounding, wherever
        the loss is a mean over examples that do not see each other (batch normalization makes them
        see those of their micro-batch).  One micro-batch is in memory at a time.  A value with its
        gradient costs what it costs without micro-batches; a product recomputes the gradient that
        it differentiates, and so does ``jax.grad`` of the objective with the value.  ``outputs``,
        Fisher products and the factors of K-FAC see the whole batch at once.

        ``predict`` and ``loss`` may take an argument ``micro_batch``, the number of the part (int32
        scalar), e.g. to fold it into the key of dropout; it needs a default, for the whole batch.

        Args:
          num_micro_batches: number of parts, at least 1.
          unroll: static; as in :func:`~optax_accel.mean_over_micro_batches`, which says how the
            batch is divided: for convolutions on a CPU.
          **batch: arguments of ``predict`` and ``loss`` with a leading axis of examples.

        Returns:
          An objective of the parameters, and of the arguments that are not given here.

        Example:
          >>> import jax, jax.numpy as jnp, optax
          >>> import optax_accel as oa
          >>> objective = oa.Objective(
          ...     predict=lambda params, x: x @ params,
          ...     loss=lambda outputs, y: jnp.mean((outputs - y) ** 2),
          ... )
          >>> x, y, params = jnp.eye(4), jnp.arange(4.0), jnp.zeros(4)
          >>> tx = oa.extrap_sgd(0.1, 0.1)
          >>> parts = objective.accumulated(2, x=x, y=y)
          >>> updates, _ = tx.update(parts.grad(params), tx.init(params), params, value_fn=parts)
          >>> updates.shape
          (4,)
        """
        check_integer("num_micro_batches", num_micro_batches, 1)

        def bound(fn: Callable[..., Any]) -> Callable[..., Any]:
            named, _, _ = argument_names(fn)
            given = {name: value for name, value in batch.items() if name in named}
            return functools.partial(fn, **given) if given else fn

        micro = _MicroBatches(self._predict, self._loss, batch, num_micro_batches, unroll)
        whole = self._copy(bound, bound)
        return whole if num_micro_batches == 1 else whole._copy(_micro=micro)

    def precompose(self, transform: Callable[[chex.ArrayTree], chex.ArrayTree]) -> Objective:
        """The objective of ``transform(params)``, e.g. of a part of the parameters.

        Args:
          transform: maps the new parameters to the ones this objective takes.

        Returns:
          An objective of the new parameters.
        """

        def of_new(outer: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(outer)
            def composed(params: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
                return outer(transform(params), **kwargs)

            return composed

        return self._copy(loss=of_new) if self._predict is None else self._copy(of_new)

    # -- values and first derivatives --------------------------------------------------------

    def _local_value(self, params: chex.ArrayTree, **kwargs: Any) -> jax.Array:
        return self._over_parts(jax.checkpoint, _value_of, params, kwargs)

    def _over_parts(
        self,
        wrap: Callable[[Any], Any],
        function: Callable[..., chex.ArrayTree],
        *args: Any,
    ) -> chex.ArrayTree:
        """``function(predict, loss, *args)`` of the batch, or its mean over the micro-batches.

        Args:
          wrap: what is done to the function of one micro-batch, e.g. ``jax.checkpoint``, without
            which a derivative would keep what all of them have computed.
          function: a mean over the examples, if ``loss`` is one.
          *args: its last one are keyword arguments.
        """
        micro = self._micro
        if micro is None:
            return function(self._predict, self._loss, *args)
        *first, kwargs = args

        def of_part(
            carry: None, part: chex.ArrayTree, index: jax.Array
        ) -> tuple[None, chex.ArrayTree]:
            given = kwargs | part | {"micro_batch": index}

            def of_first(*first: Any) -> chex.ArrayTree:
                return function(micro.predict, micro.loss, *first, given)

            return carry, wrap(of_first)(*first)

        return mean_over_micro_batches(of_part, micro.batch, micro.number, unroll=micro.unroll)[1]

    def __call__(self, params: chex.ArrayTree, **kwargs: Any) -> jax.Array:
        """The loss at ``params``: a scalar, the mean over replicas when ``axis_name`` is set."""
        return self._mean(self._local_value(params, **kwargs))

    def value_and_grad(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> tuple[jax.Array, chex.ArrayTree]:
        """The loss and its gradient (like ``params`` in structure, shapes and dtypes)."""

        def one(
            predict: Any, loss: Any, params: chex.ArrayTree, kwargs: dict[str, Any]
        ) -> chex.ArrayTree:
            return jax.value_and_grad(lambda p: _value_of(predict, loss, p, kwargs))(params)

        return self._mean(self._over_parts(lambda fn: fn, one, self._vary(params), kwargs))

    def grad(self, params: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
        """The gradient at ``params``, like ``params`` in structure, shapes and dtypes."""
        return self.value_and_grad(params, **kwargs)[1]

    def outputs(self, params: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
        """The network outputs ``predict(params)`` of this replica's batch.

        Raises:
          ValueError: the objective was built from a value function.
        """
        return _call_by_name(self._need_predict("outputs"), params, kwargs)

    # -- second derivatives ------------------------------------------------------------------

    def hessian(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        """The Hessian at ``params`` as a linear function of a pytree like ``params``.

        The gradient is linearized once; each call of the result costs one product.  Vectors may
        have another float dtype than the parameters (a float32 basis for bfloat16 parameters):
        they are cast for the product, and the result has the vector's dtype.
        """
        return self._second_derivative(_value_of, params, kwargs)

    def functional_hessian(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        r"""The functional Hessian at ``params``, ``hessian - gauss_newton``, as a linear function.

        :math:`H_f = \sum_j (\partial \ell / \partial f_j) \nabla^2_\theta f_j` is the Hessian of
        :math:`\langle c, f(\theta) \rangle` with the loss gradient :math:`c` held fixed: one
        Hessian product, without the cancellation of a difference of two.

        Raises:
          ValueError: the objective was built from a value function.
        """
        self._need_predict("functional_hessian")

        def linearized(
            predict: Any, loss: Any, params: chex.ArrayTree, kwargs: dict[str, Any]
        ) -> Any:
            outputs = _call_by_name(predict, params, kwargs)
            slope = jax.grad(lambda out: _call_by_name(loss, out, kwargs))(outputs)
            return optax.tree.vdot(lax.stop_gradient(slope), outputs)

        return self._second_derivative(linearized, params, kwargs)

    def gauss_newton(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        r"""The generalized Gauss-Newton matrix at ``params`` as a linear function.

        :math:`G = J^\top (\nabla^2_f \ell) J` with ``J`` the Jacobian of ``predict``; the
        functional Hessian is ``hessian - gauss_newton``.

        Raises:
          ValueError: the objective was built from a value function.
        """
        self._need_predict("ggn_vp")
        params = self._vary(params)
        if self._micro is None:
            product = _gauss_newton(self._predict, self._loss, params, kwargs)
            return self._operator(product, params)

        def one(
            predict: Any, loss: Any, vector: chex.ArrayTree, kwargs: dict[str, Any]
        ) -> chex.ArrayTree:
            return _gauss_newton(predict, loss, params, kwargs)(vector)

        _, product = jax.linearize(
            lambda vector: self._over_parts(jax.checkpoint, one, vector, kwargs),
            optax.tree.zeros_like(params),
        )
        return self._operator(product, params)

    def hvp(self, params: chex.ArrayTree, vector: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
        """Hessian-vector product; ``vector`` and the result are like ``params``."""
        return self.hessian(params, **kwargs)(vector)

    def hvp_block(
        self, params: chex.ArrayTree, block: chex.ArrayTree, **kwargs: Any
    ) -> chex.ArrayTree:
        """Hessian products with every row of a block (leaves ``(k, *leaf.shape)``), vectorized."""
        return jax.vmap(self.hessian(params, **kwargs))(block)

    def ggn_vp(
        self, params: chex.ArrayTree, vector: chex.ArrayTree, **kwargs: Any
    ) -> chex.ArrayTree:
        """Gauss-Newton-vector product; ``vector`` and the result are like ``params``.

        Raises:
          ValueError: the objective was built from a value function.
        """
        return self.gauss_newton(params, **kwargs)(vector)

    def ggn_vp_block(
        self, params: chex.ArrayTree, block: chex.ArrayTree, **kwargs: Any
    ) -> chex.ArrayTree:
        """Gauss-Newton products with every row of a block (leaves ``(k, *leaf.shape)``).

        Raises:
          ValueError: the objective was built from a value function.
        """
        return jax.vmap(self.gauss_newton(params, **kwargs))(block)

    # -- internals ---------------------------------------------------------------------------

    def _need_predict(self, what: str) -> Callable[..., chex.ArrayTree]:
        if self._predict is None:
            raise ValueError(
                f"Objective.{what} needs the network outputs, but this objective was built from a "
                "value function; build it with Objective(predict, loss)."
            )
        return self._predict

    def _second_derivative(
        self, value: Callable[..., jax.Array], params: chex.ArrayTree, kwargs: dict[str, Any]
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        def one(
            predict: Any, loss: Any, params: chex.ArrayTree, kwargs: dict[str, Any]
        ) -> chex.ArrayTree:
            return jax.grad(lambda p: value(predict, loss, p, kwargs))(params)

        def gradient(params: chex.ArrayTree) -> chex.ArrayTree:
            return self._over_parts(jax.checkpoint, one, params, kwargs)

        params = self._vary(params)
        if self.hvp_mode == "forward_over_reverse":
            _, product = jax.linearize(gradient, params)
        else:
            _, pullback = jax.vjp(gradient, params)
            product = Partial(_first_result, pullback)
        return self._operator(product, params)

    def _operator(
        self, product: Callable[[chex.ArrayTree], chex.ArrayTree], params: chex.ArrayTree
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        # A Partial of Partials: what the linearization has stored are leaves of a pytree, which a
        # jitted function can return and another take, so that products share it.
        return Partial(functools.partial(_apply, self.axis_name), product, params, self._where)

    def _vary(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        return vary_over(tree, self.axis_name)

    def _mean(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        return mean_over(tree, self.axis_name, self._where)


def _value_of(predict: Any, loss: Any, params: chex.ArrayTree, kwargs: dict[str, Any]) -> jax.Array:
    """The scalar ``loss(predict(params))``, or ``loss(params)``."""
    outputs = params if predict is None else _call_by_name(predict, params, kwargs)
    value = jnp.asarray(_call_by_name(loss, outputs, kwargs))
    if value.shape != ():
        raise ValueError(
            f"Objective: the loss must be a scalar, got shape {value.shape}; reduce it, "
            "e.g. with jnp.mean."
        )
    return value


def _gauss_newton(
    predict: Any, loss: Any, params: chex.ArrayTree, kwargs: dict[str, Any]
) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    outputs, push = jax.linearize(lambda p: _call_by_name(predict, p, kwargs), params)
    _, loss_hessian = jax.linearize(jax.grad(lambda out: _call_by_name(loss, out, kwargs)), outputs)
    return Partial(congruence, push, loss_hessian, params)


def _apply(
    axis_name: str | None,
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    params: chex.ArrayTree,
    where: jax.Array | None,
    vector: chex.ArrayTree,
) -> chex.ArrayTree:
    """The mean over replicas of a product in the dtypes of the parameters."""
    tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
    result = mean_over(product(vary_over(tangent, axis_name)), axis_name, where)
    return jax.tree.map(lambda r, v: r.astype(v.dtype), result, vector)


def mean_over(
    tree: chex.ArrayTree, axis_name: str | None, where: jax.Array | None = None
) -> chex.ArrayTree:
    """The mean over the replicas of an axis, if there is one; where told, in some steps only."""
    if axis_name is None:
        return tree
    if where is None:
        return lax.pmean(tree, axis_name)

    def mean(tree: chex.ArrayTree) -> chex.ArrayTree:
        return vary_over(lax.pmean(tree, axis_name), axis_name)

    return lax.cond(where, mean, lambda tree: tree, vary_over(tree, axis_name))


def mean_arguments(
    updates: chex.ArrayTree,
    extra_args: dict[str, Any],
    axis_name: str,
    where: jax.Array | None = None,
) -> tuple[chex.ArrayTree, dict[str, Any]]:
    """What ``update`` is given by each replica, averaged: the gradient, ``value`` and ``grad``."""
    given = {name: extra_args[name] for name in ("value", "grad") if name in extra_args}
    if given.get("grad") is updates:  # not sent twice
        del given["grad"]
    updates, given = mean_over(vary_over((updates, given), axis_name), axis_name, where)
    if "grad" in extra_args:
        given.setdefault("grad", updates)
    return updates, extra_args | given


def _first_result(
    function: Callable[..., tuple[chex.ArrayTree, ...]], *args: chex.ArrayTree
) -> chex.ArrayTree:
    return function(*args)[0]


def congruence(
    push: Callable[[chex.ArrayTree], chex.ArrayTree],
    middle: Callable[[chex.ArrayTree], chex.ArrayTree],
    params: chex.ArrayTree,
    vector: chex.ArrayTree,
) -> chex.ArrayTree:
    """``J^T M J`` times a vector, from the linear functions ``J`` and ``M``."""
    return jax.linear_transpose(push, params)(middle(push(vector)))[0]


def as_objective(
    value_fn: Objective | ValueFn | None,
    extra_args: dict[str, Any],
    *,
    method: str,
    params: chex.ArrayTree,
    why: str,
    argument: str = "value_fn",
) -> Objective:
    """What a method makes of the ``value_fn`` extra argument of its ``update``.

    Args:
      value_fn: an :class:`Objective` or a function ``value_fn(params, **kwargs) -> scalar``.
      extra_args: the extra arguments of ``update``; those that ``value_fn`` names are bound to it.
      method: name of the calling method, for messages.
      params: the parameters given to ``update``.
      why: what the method evaluates the loss for, for messages.
      argument: name of the extra argument, for messages.

    Returns:
      An objective of the parameters alone.

    Raises:
      ValueError: ``value_fn`` or ``params`` is missing, or ``params`` has masked-out holes.
      TypeError: ``value_fn`` is not callable or lacks an argument.
    """
    call = f"tx.update(grads, state, params, {argument}=objective)"
    if value_fn is None:
        raise ValueError(
            f"{method} needs the extra argument `{argument}` to {why}. Call it as: {call}, with an "
            "optax_accel.Objective or any function of the parameters that returns the scalar loss."
        )
    if not callable(value_fn):
        raise TypeError(f"{method}: `{argument}` must be callable, got {type(value_fn).__name__}.")
    check_params(params, method, call)
    if not isinstance(value_fn, Objective):
        value_fn = Objective.from_value_fn(value_fn)
    return value_fn.bind(**extra_args)


def check_params(params: chex.ArrayTree, method: str, call: str = "tx.init(params)") -> None:
    """Raises ``ValueError`` if ``params`` is missing or has the holes of ``optax.masked``."""
    if params is None:
        raise ValueError(f"{method} needs the parameters. Call it as: {call}.")
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            f"{method} met a MaskedNode: inside optax.masked or optax.partition the loss cannot be "
            f"evaluated, because a part of the parameters is hidden. Give {method} its own `mask=` "
            "instead and chain it outside."
        )


def argument_names(fn: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Names of all and of the required arguments after the first, and whether ** is taken."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none: they get no extra arguments
        return [], [], False
    parameters = list(signature.parameters.values())
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first_is_positional = parameters and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY
    named = [p for p in parameters[1 if first_is_positional else 0 :] if p.kind in keyword]
    required = [p.name for p in named if p.default is inspect.Parameter.empty]
    variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return [p.name for p in named], required, variadic


def _call_by_name(fn: Callable[..., Any], first: chex.ArrayTree, kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return fn(first)
    names, _, variadic = argument_names(fn)
    return fn(first, **(kwargs if variadic else {k: v for k, v in kwargs.items() if k in names}))


def _bind_by_name(
    fn: Callable[..., Any], kwargs: dict[str, Any], given_later: tuple[str, ...] = ()
) -> Callable[[chex.ArrayTree], Any]:
    # Only arguments that are named are bound: as in Optax, a bare ** gets nothing.
    names, required, _ = argument_names(fn)
    missing = [name for name in required if name not in kwargs and name not in given_later]
    if missing:
        label = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"`{label}` takes the arguments {missing}, which were not given; pass them as extra "
            f"arguments of update, e.g. tx.update(..., value_fn=value_fn, {missing[0]}=...)."
        )
    bound = {k: v for k, v in kwargs.items() if k in names}
    return functools.partial(fn, **bound) if bound else fn
