"""The loss as a value: the one place that knows how to evaluate and differentiate it.

Optax hands a transformation that needs more than the gradient a function, ``value_fn``.  An
:class:`Objective` is such a function, ``objective(params) -> scalar``, that also gives the products
the methods of this package ask for and that owns the collectives: with ``axis_name`` every value,
gradient and product is the mean over the replicas, so no method writes its own ``pmean``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from optax_accel._arguments import check_flag, check_integer
from optax_accel._derivatives import (
    HVPMode,
    LinearFunction,
    derivative,
    gauss_newton_of,
    jacobian_of,
    linear_at,
    loss_hessian_of,
)
from optax_accel._functions import (
    AUX_OF,
    Functions,
    HasAux,
    argument_names,
    bind_by_name,
    select_named,
)
from optax_accel._means import as_array, fixed_if_unused, is_inexact, mean_over, vary_over
from optax_accel._numerics import norm
from optax_accel.accumulation import mean_over_micro_batches

ValueFn = Callable[..., jax.Array]


class _MicroBatches(NamedTuple):
    """How an accumulated objective evaluates the loss."""

    functions: Functions  # these take the batch by name
    batch: dict[str, chex.ArrayTree]
    number: int
    unroll: bool
    carry: dict[str, chex.ArrayTree]  # what the first micro-batch is given and hands on


class Objective:
    r"""A scalar loss of the parameters, with its first and second derivatives.

    ``Objective(predict, loss)`` composes :math:`L(\theta) = \ell(f(\theta))` from
    ``predict: params -> outputs`` and ``loss: outputs -> scalar``; the split is what gives the
    Gauss-Newton operator.  ``Objective.from_value_fn(value_fn)`` wraps a plain closure, for which
    everything but the Gauss-Newton products and the outputs is available.

    ``predict`` and ``loss`` (or ``value_fn``) may take further keyword arguments.  Pass them by
    name, either in the call, ``objective(params, x=x, y=y)``, or as extra arguments of
    ``tx.update(..., value_fn=objective, x=x, y=y)``, as in Optax's line searches.

    **Means.** The loss of a batch is a mean, and wherever a batch is seen in parts (micro-batches,
    the batches of a loader, replicas) the parts are averaged.  By default a micro-batch and a batch
    of a loader count by their number of examples and all replicas count alike, which is right for
    a mean over examples if all replicas have the same number of them.  It is wrong for a loss that
    divides by something else, such as the number of valid tokens under a mask: the objective
    cannot tell, and it does not inspect masks among its arguments.  Return the divisor of the loss
    from ``weight``; then value, gradient and all products are those of the whole batch for any
    split.

    **Auxiliary outputs.** With ``has_aux``, :meth:`value_and_grad` returns
    ``((value, aux), gradient)``, as ``jax.value_and_grad`` does; calls of the objective,
    :meth:`grad` and all products leave them out.  Over micro-batches and replicas the
    floating-point leaves of ``aux`` are averaged as the loss is; all other leaves (counters, keys)
    are those of the last micro-batch and of this replica.  Every micro-batch starts from the
    same arguments, so the running statistics of batch normalization are those after one step with
    the mean of the micro-batches' statistics; the ``carry`` of :meth:`accumulated` hands them on
    from one micro-batch to the next.

    **Finite differences.** A product with :math:`v` is
    :math:`(g(x + h v) - g(x - h v)) / 2h`, for the gradient :math:`g` (for Gauss-Newton and Fisher
    products: for the outputs, and for the gradient of the loss at them), with

    .. math:: h = \sqrt[3]{\epsilon}\, \sqrt{1 + \|x\|}\, /\, \|v\|

    and :math:`\epsilon` the machine precision of the parameters: its cube root balances truncation
    and rounding of central differences (Nocedal and Wright 2006, section 8.1), and the norms are
    those of Jacobian-free Newton-Krylov methods (Knoll and Keyes 2004, section 2).  The relative
    error is of the order of :math:`\epsilon^{2/3}` where the loss varies on the scale of 1: in the
    tests, on small networks, at most 2e-4 in float32 and 1e-9 in float64.  Where the network
    computes in half precision, rounding errors swamp the differences: pass the float32 form of such
    a network as ``value_fn``.  A product costs two gradients.

    Args:
      predict: maps parameters (any pytree) to outputs (any pytree of float arrays).
      loss: maps the outputs to a scalar (shape ``()``); for a batch, the *mean* over its examples,
        or the weighted mean that ``weight`` declares.
      axis_name: name of the ``pmap``, ``shard_map`` or ``vmap`` axis over which values, gradients
        and products are averaged. ``None`` (default) for one device and for global-view ``jit``,
        where the mean over a sharded batch is global already.
      weight: function of those arguments of the batch that it names, such as
        ``lambda mask: jnp.sum(mask)``; it does not get the parameters. It returns the number by
        which the loss of that batch was divided, a scalar of at least 0: the weight of a
        micro-batch, a batch of a loader or a replica in a mean. A part of weight 0 does not count,
        even where its loss is 0 / 0. ``None`` (default): micro-batches and batches of a loader
        count by their number of examples, replicas count alike.
      has_aux: which functions return auxiliary outputs. ``True`` or ``"loss"``: ``loss`` returns
        ``(value, aux)``; ``"predict"``: ``predict`` returns ``(outputs, aux)``, e.g. new batch
        statistics; ``"both"``: both do, and ``aux`` is the pair ``(of_predict, of_loss)``.
        ``False`` (default): neither does.
      hvp_mode: how all products are differentiated: with the Hessian, the Gauss-Newton matrix, the
        functional Hessian, Fisher matrices, and the Hessian of the loss at the outputs.
        ``"forward_over_reverse"`` (default) is the cheapest, 1 to 2 gradients a product
        (Pearlmutter 1994). ``"reverse_over_reverse"`` needs no forward-mode derivatives, which
        functions with a ``jax.custom_vjp`` do not have; it differentiates their backward pass.
        ``"finite_difference"`` needs nothing but gradients, for kernels whose backward pass cannot
        be differentiated, such as fused attention.

    Raises:
      ValueError: unknown ``hvp_mode`` or ``has_aux``.
      TypeError: ``predict``, ``loss`` or ``weight`` is not callable.

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

      A mean over the valid tokens of a batch, whose parts have different numbers of such tokens:

      >>> objective = oa.Objective(
      ...     predict=lambda scale, tokens: scale * tokens,
      ...     loss=lambda outputs, mask: jnp.sum(outputs * mask) / jnp.sum(mask),
      ...     weight=lambda mask: jnp.sum(mask),
      ... )
      >>> tokens, mask = jnp.array([[4.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> float(objective(1.0, tokens=tokens, mask=mask))
      2.0
      >>> float(objective.accumulated(2, tokens=tokens, mask=mask)(1.0))
      2.0

    References:
      Pearlmutter, `Fast exact multiplication by the Hessian
      <https://doi.org/10.1162/neco.1994.6.1.147>`_, 1994; Schraudolph, `Fast curvature
      matrix-vector products <https://doi.org/10.1162/08997660260028683>`_, 2002; Nocedal, Wright,
      `Numerical optimization <https://doi.org/10.1007/978-0-387-40065-5>`_, 2006; Knoll, Keyes,
      `Jacobian-free Newton-Krylov methods <https://doi.org/10.1016/j.jcp.2003.08.010>`_, 2004.
    """

    def __init__(
        self,
        predict: Callable[..., chex.ArrayTree],
        loss: Callable[..., Any],
        axis_name: str | None = None,
        *,
        weight: Callable[..., chex.Numeric] | None = None,
        has_aux: HasAux = False,
        hvp_mode: HVPMode = "forward_over_reverse",
    ):
        for name, fn in (("predict", predict), ("loss", loss), ("weight", weight)):
            if not callable(fn) and not (name == "weight" and fn is None):
                raise TypeError(f"Objective: `{name}` must be callable, got {type(fn).__name__}.")
        if hvp_mode not in get_args(HVPMode):
            raise ValueError(
                f"Objective: unknown hvp_mode {hvp_mode!r}; allowed are "
                f"{', '.join(map(repr, get_args(HVPMode)))}."
            )
        if has_aux not in AUX_OF:
            raise ValueError(
                f"Objective: unknown has_aux {has_aux!r}; allowed are False, True (the loss "
                "returns a pair), 'loss', 'predict' and 'both'."
            )
        self.axis_name = axis_name
        self.has_aux = bool(has_aux)
        self.hvp_mode = hvp_mode
        self._functions = Functions(predict, loss, weight, AUX_OF[has_aux])
        self._where: jax.Array | None = None
        self._micro: _MicroBatches | None = None

    @classmethod
    def from_value_fn(
        cls,
        value_fn: ValueFn,
        axis_name: str | None = None,
        *,
        weight: Callable[..., chex.Numeric] | None = None,
        has_aux: bool = False,
        hvp_mode: HVPMode = "forward_over_reverse",
    ) -> Objective:
        """An objective from a plain function ``value_fn(params, **kwargs) -> scalar``.

        Args:
          value_fn: the local loss of a replica; it must not average over ``axis_name`` itself.
          axis_name: name of the axis of replicas to average over; ``None`` (default) for one
            device and for global-view ``jit``.
          weight: function of those arguments of the batch that it names, which returns the number
            by which the loss of that batch was divided; ``None`` (default): micro-batches and
            batches of a loader count by their number of examples, replicas count alike.
          has_aux: whether ``value_fn`` returns a pair ``(value, aux)``, as in
            ``jax.value_and_grad``; :meth:`value_and_grad` then returns it, too.
          hvp_mode: how Hessian products are differentiated: ``"forward_over_reverse"`` (default),
            ``"reverse_over_reverse"`` or ``"finite_difference"``, as for :class:`Objective`.

        Returns:
          The objective; :meth:`ggn_vp` and :meth:`outputs` raise ``ValueError`` on it.

        Example:
          >>> import jax.numpy as jnp
          >>> import optax_accel as oa
          >>> objective = oa.Objective.from_value_fn(lambda w: jnp.sum(w**4))
          >>> objective.grad(jnp.ones(2)).tolist()
          [4.0, 4.0]
          >>> objective = oa.Objective.from_value_fn(lambda w: (w**2, {"w": w}), has_aux=True)
          >>> (value, aux), gradient = objective.value_and_grad(3.0)
          >>> float(value), float(aux["w"]), float(gradient)
          (9.0, 3.0, 6.0)
        """
        check_flag("has_aux", has_aux)
        objective = cls(
            lambda params: params,
            value_fn,
            axis_name,
            weight=weight,
            has_aux=has_aux,
            hvp_mode=hvp_mode,
        )
        # `outputs = params` and `loss = value_fn`: one composition rule serves both constructors.
        objective._functions = objective._functions._replace(predict=None)
        return objective

    def __repr__(self) -> str:
        kind = "predict, loss" if self.has_outputs else "from_value_fn"
        return f"Objective({kind}, axis_name={self.axis_name!r})"

    @property
    def has_outputs(self) -> bool:
        """Whether the objective was built from ``predict`` and ``loss``."""
        return self._functions.predict is not None

    @property
    def has_weight(self) -> bool:
        """Whether the objective was built with a ``weight``."""
        return self._functions.weight is not None

    @property
    def is_accumulated(self) -> bool:
        """Whether the objective sees its batch in micro-batches, made by :meth:`accumulated`."""
        return self._micro is not None

    @property
    def arguments(self) -> tuple[list[str], list[str], bool]:
        """The keyword arguments by name, the required ones, and whether ``**`` is taken."""
        functions = self._functions
        signatures = [
            argument_names(function, skip)
            for function, skip in (
                (functions.predict, 1),
                (functions.loss, 1),
                (functions.weight, 0),
            )
            if function is not None
        ]
        names = [name for names, _, _ in signatures for name in names]
        required = [name for _, names, _ in signatures for name in names]
        return names, required, any(variadic for *_, variadic in signatures)

    @property
    def predict_arguments(self) -> tuple[list[str], list[str], bool]:
        """The same as :attr:`arguments`, for ``predict`` alone.

        Raises:
          ValueError: the objective was built from a value function.
        """
        self._need_predict("predict_arguments")
        return argument_names(self._functions.predict)  # type: ignore[arg-type]

    # -- derived objectives ------------------------------------------------------------------

    def _copy(
        self, change: Callable[[Any, str], Any] = lambda function, name: function, **attributes: Any
    ) -> Objective:
        """A copy with ``change(function, name)`` for each function, and with other attributes."""
        new = self._with_functions(lambda functions: functions.change(change))
        vars(new).update(attributes)
        return new

    def _with_functions(self, change: Callable[[Functions], Functions]) -> Objective:
        new = copy.copy(self)
        vars(new).pop("_compiled", None)  # programs of `curvature`, made for this one
        new._functions = change(self._functions)
        if self._micro is not None:
            new._micro = self._micro._replace(functions=change(self._micro.functions))
        return new

    @property
    def local(self) -> Objective:
        """The same objective without collectives, which is the loss of this replica alone."""
        return self if self.axis_name is None else self._copy(axis_name=None, _where=None)

    @property
    def without_aux(self) -> Objective:
        """The same objective whose :meth:`value_and_grad` gives no auxiliary outputs."""
        return self._copy(has_aux=False) if self.has_aux else self

    def averaged_over(self, axis_name: str, where: jax.Array | None = None) -> Objective:
        """The same objective averaged over an axis of replicas.

        Args:
          axis_name: name of the ``pmap``, ``shard_map`` or ``vmap`` axis.
          where: boolean scalar, the same on all replicas: whether to average; if not, values,
            gradients and products are the replica's own. ``None`` (default): always.

        Returns:
          The objective.
        """
        return self._copy(axis_name=axis_name, _where=where)

    def bind(self, **kwargs: Any) -> Objective:
        """Fixes the keyword arguments that the functions of the objective take; ignores the others.

        Args:
          **kwargs: candidates, as the extra arguments of an Optax ``update``.

        Returns:
          An objective of the parameters alone.

        Raises:
          TypeError: an argument without a default was not given.
        """
        micro = self._micro
        given_later = () if micro is None else (*micro.batch, *micro.carry, "micro_batch")

        def bound(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            return bind_by_name(function, kwargs, given_later, skip=int(name != "weight"))

        return self._copy(bound)

    def given(self, **kwargs: Any) -> Objective:
        """Fixes some of the keyword arguments that the functions of the objective take.

        Args:
          **kwargs: the arguments; those that none of the functions names are ignored.

        Returns:
          An objective of the parameters and of the remaining arguments.
        """

        def bound(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            names, _, _ = argument_names(function, skip=int(name != "weight"))
            named = select_named(kwargs, names, variadic=False)
            return functools.partial(function, **named) if named else function

        return self._copy(bound)

    def scaled(self, factor: chex.Numeric) -> Objective:
        """The objective times a number.

        Value, gradient and all products of the result are multiplied by it, auxiliary outputs are
        not.

        Args:
          factor: scalar, for example the scale of :func:`~optax_accel.dynamic_loss_scale`.

        Returns:
          An objective of the same arguments.

        Example:
          >>> import jax.numpy as jnp
          >>> import optax_accel as oa
          >>> objective = oa.Objective.from_value_fn(lambda w: jnp.sum(w**2)).scaled(10.0)
          >>> value, gradient = objective.value_and_grad(jnp.ones(2))
          >>> float(value), gradient.tolist()
          (20.0, [20.0, 20.0])
        """

        def times(functions: Functions) -> Functions:
            before = functions.factor
            return functions._replace(factor=factor if before is None else factor * before)

        return self._with_functions(times)

    def accumulated(
        self,
        num_micro_batches: int,
        *,
        unroll: bool = False,
        carry: dict[str, chex.ArrayTree] | None = None,
        **batch: chex.ArrayTree,
    ) -> Objective:
        r"""The objective of a batch that is seen in parts: gradient accumulation for every method.

        Value, gradient, Hessian and Gauss-Newton products are the means over the micro-batches,
        weighted with their ``weight``, or without one with their numbers of examples: those of the
        whole batch, up to rounding, wherever the loss is such a mean over examples that do not see
        each other (batch normalization makes them see those of their micro-batch).  One micro-batch
        is in memory at a time.  A value with its gradient costs what it costs without
        micro-batches; a product recomputes the gradient that it differentiates, and so does
        ``jax.grad`` of the objective with the value.  ``outputs``, Fisher products and the factors
        of K-FAC see the whole batch at once.

        ``predict`` and ``loss`` may take an argument ``micro_batch``, the number of the part (int32
        scalar), e.g. to fold it into the key of dropout; it needs a default, for the whole batch.

        Args:
          num_micro_batches: number of micro-batches, at least 1.
          unroll: static; writes the micro-batches out one after the other instead of in a
            ``lax.scan``: for convolutions on a CPU, which are slow in loops.
            :func:`~optax_accel.mean_over_micro_batches` describes how a batch is divided.
          carry: one argument of the functions by name, with its value, that each pass changes and
            returns as its auxiliary output (that of ``predict`` where ``loss`` has one, too), such
            as the running statistics of batch normalization. :meth:`value_and_grad` gives its
            floating-point leaves to the next micro-batch as the one before returned them, the
            initial values of its other leaves (counters, keys) to all, and returns those of the
            last micro-batch; all other methods give every micro-batch the initial value. A
            micro-batch of ``weight`` 0 passes its floating-point leaves on unchanged. ``None``
            (default) means that nothing is carried.
          **batch: arguments of ``predict``, ``loss`` and ``weight``: arrays with a leading axis of
            examples, which are divided, and anything without axes (flags, numbers, strings,
            ``None``, PRNG keys), which every micro-batch gets unchanged.

        Returns:
          An objective of the parameters and of the remaining arguments.

        Raises:
          ValueError: ``num_micro_batches`` is less than 1, or ``carry`` has several entries.

        Example:
          >>> import jax, jax.numpy as jnp, optax
          >>> import optax_accel as oa
          >>> objective = oa.Objective(
          ...     predict=lambda params, x: x @ params,
          ...     loss=lambda outputs, y: jnp.mean((outputs - y) ** 2),
          ... )
          >>> x, y, params = jnp.eye(4), jnp.arange(4.0), jnp.zeros(4)
          >>> tx = oa.extrap_sgd(0.1)
          >>> parts = objective.accumulated(2, x=x, y=y)
          >>> updates, _ = tx.update(parts.grad(params), tx.init(params), params, value_fn=parts)
          >>> updates.shape
          (4,)
        """
        check_integer("num_micro_batches", num_micro_batches, 1)
        check_flag("unroll", unroll)
        carry = carry or {}
        if len(carry) > 1:
            raise ValueError(
                f"Objective.accumulated: `carry` takes one argument, got {', '.join(carry)}; put "
                "them into one pytree."
            )
        micro = _MicroBatches(self._functions, batch, num_micro_batches, unroll, carry)
        whole = self.given(**batch, **carry)
        return whole if num_micro_batches == 1 else whole._copy(_micro=micro)

    def precompose(self, transform: Callable[[chex.ArrayTree], chex.ArrayTree]) -> Objective:
        """The objective of ``transform(params)``, e.g. of a part of the parameters.

        Args:
          transform: maps the new parameters to those that this objective takes.

        Returns:
          An objective of the new parameters.
        """
        first = "predict" if self.has_outputs else "loss"

        def of_new(outer: Callable[..., Any], name: str) -> Callable[..., Any]:
            if name != first:
                return outer

            @functools.wraps(outer)
            def composed(params: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
                return outer(transform(params), **kwargs)

            return composed

        return self._copy(of_new)

    def with_predict(
        self, change: Callable[[Callable[..., Any], bool], Callable[..., Any]]
    ) -> Objective:
        """The objective of another network, or of this one with another derivative.

        Args:
          change: maps ``predict``, and whether it returns a pair with auxiliary outputs, to the
            function that takes its place and has the same arguments and results.

        Returns:
          An objective of the same arguments, with the same loss.

        Raises:
          ValueError: the objective was built from a value function.

        Example:
          >>> import jax.numpy as jnp
          >>> import optax_accel as oa
          >>> objective = oa.Objective(lambda w, x: w * x, lambda outputs: jnp.mean(outputs))
          >>> doubled = objective.with_predict(
          ...     lambda predict, has_aux: lambda w, x: predict(2 * w, x)
          ... )
          >>> float(doubled(jnp.ones(3), x=jnp.ones(3)))
          2.0
        """
        self._need_predict("with_predict")
        has_aux = "predict" in self._functions.aux_of

        def changed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            return change(function, has_aux) if name == "predict" else function

        return self._copy(changed)

    # -- means -------------------------------------------------------------------------------

    def batch_weight(self, **kwargs: Any) -> jax.Array | None:
        """How much a batch counts in a mean over several, or ``None`` if no ``weight`` was given.

        Args:
          **kwargs: the arguments of the batch that are not bound to the objective.

        Returns:
          A scalar in the widest float dtype, for this replica's whole batch, whether or not it is
          divided into micro-batches.
        """
        return self._functions.weight_of(kwargs)

    def mean(self, tree: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
        """The mean over the replicas of values that each has computed from its own batch.

        Replicas count with their ``weight``, or alike if none was given; a replica of weight 0 does
        not count, even where its value is NaN. Without an ``axis_name`` the tree is returned
        unchanged.

        Args:
          tree: means over this replica's batch; leaves that are not floating-point pass unchanged.
          **kwargs: arguments of ``weight`` that are not bound to the objective.

        Returns:
          A tree like ``tree``, the same on all replicas.
        """
        if self.axis_name is None:
            return tree
        weight = self.batch_weight(**kwargs)
        return mean_over(self.vary(tree), self.axis_name, self._where, weight)

    def mean_of_replicas(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """The mean over the replicas, all of which count alike, whatever their ``weight``.

        Args:
          tree: this replica's values; leaves that are not floating-point pass unchanged.

        Returns:
          A tree like ``tree``, the same on all replicas.
        """
        return mean_over(self.vary(tree), self.axis_name, self._where)

    def vary(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Marks values as differing between the replicas of a ``shard_map``, for derivatives.

        JAX sums the gradient with respect to an unmarked value over the replicas, and the means of
        this class would then be wrong by their number.
        """
        return vary_over(jax.tree.map(as_array, tree), self.axis_name)

    def mean_product(
        self,
        product: Callable[[chex.ArrayTree], chex.ArrayTree],
        params: chex.ArrayTree,
        **kwargs: Any,
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        """The mean over the replicas of a linear function that depends on their batches.

        Args:
          product: linear function of a pytree like ``params``, itself a pytree
            (``jax.tree_util.Partial``), as the result is: a jitted function can return it.
          params: parameters; vectors are cast to their dtypes for the product, and the result back
            to the dtypes of the vector.
          **kwargs: arguments of ``weight`` that are not bound to the objective.

        Returns:
          The mean, weighted as in :meth:`mean`.
        """
        weight = None if self.axis_name is None else self.batch_weight(**kwargs)
        apply = functools.partial(_apply, self.axis_name)
        return Partial(apply, product, params, self._where, weight)

    # -- values and first derivatives --------------------------------------------------------

    def _local_value(self, params: chex.ArrayTree, **kwargs: Any) -> jax.Array:
        return self._over_parts(jax.checkpoint, Functions.value, params, kwargs)

    def _over_parts(
        self,
        wrap: Callable[[Any], Any],
        function: Callable[..., Any],
        *args: Any,
        hand_on: bool = False,
    ) -> Any:
        """``function(functions, *args)`` of the batch, or its mean over the micro-batches.

        Args:
          wrap: applied to the function of one micro-batch, e.g. ``jax.checkpoint``, without which
            a derivative would keep the intermediate results of all of them.
          function: a mean over the batch, if ``loss`` is one.
          *args: its arguments; the last one is a dictionary of keyword arguments.
          hand_on: whether the function returns ``(result, next)``, ``next`` for the ``carry`` of
            the micro-batches. The mean then is of the results, and the last ``next`` is returned
            beside it.
        """
        micro = self._micro
        if micro is None:
            return function(self._functions, *args)
        *first, kwargs = args
        functions, at_start = micro.functions, micro.carry

        def of_part(carry: Any, part: chex.ArrayTree, index: jax.Array) -> Any:
            start = at_start
            if hand_on:
                start = jax.tree.map(
                    lambda new, old: new if is_inexact(new) else old, carry, at_start
                )
            arguments = kwargs | start | part | {"micro_batch": index}
            weight = functions.weight_of(arguments)

            def of_first(*first: Any) -> Any:
                return function(functions, *fixed_if_unused(first, weight), arguments)

            result = wrap(of_first)(*first)
            if not hand_on:
                return None, result
            result, after = result
            carry = dict.fromkeys(at_start, after)
            if weight is not None:
                carry = jax.tree.map(
                    lambda old, new: jnp.where(weight == 0, old, new) if is_inexact(new) else new,
                    start,
                    carry,
                )
            return carry, result

        def weight_of(part: dict[str, chex.ArrayTree]) -> Any:
            return functions.weight_of(kwargs | part)

        carry, mean = mean_over_micro_batches(
            of_part,
            micro.batch,
            micro.number,
            carry=at_start if hand_on else None,
            unroll=micro.unroll,
            weight=None if functions.weight is None else weight_of,
        )
        return (mean, *carry.values()) if hand_on else mean

    def __call__(self, params: chex.ArrayTree, **kwargs: Any) -> jax.Array:
        """The loss at ``params``: a scalar, the mean over replicas when ``axis_name`` is set."""
        at = params
        try:
            if self.axis_name is not None:
                at = fixed_if_unused(params, self.batch_weight(**kwargs))
            return self.mean(self._local_value(at, **kwargs), **kwargs)
        except Exception as error:
            hint = _INJECTED if _is_count(params) else ""
            missing = [name for name in self.arguments[1] if name not in kwargs]
            if missing and isinstance(error, TypeError):
                raise TypeError(
                    f"Objective: its functions take the arguments {missing}, which were not given; "
                    f"pass them by name: objective(params, {missing[0]}=...).{hint}"
                ) from error
            if hint:
                error.add_note(hint.strip())
            raise

    def value_and_grad(self, params: chex.ArrayTree, **kwargs: Any) -> tuple[Any, chex.ArrayTree]:
        """The loss and its gradient (like ``params`` in structure, shapes and dtypes).

        With ``has_aux``, ``((value, aux), gradient)``.
        """
        has_aux, both = self.has_aux, len(self._functions.aux_of) == 2
        hand_on = has_aux and self._micro is not None and bool(self._micro.carry)

        def one(functions: Functions, params: chex.ArrayTree, kwargs: dict[str, Any]) -> Any:
            function = functions.value_and_aux if has_aux else functions.value
            result = jax.value_and_grad(lambda p: function(p, kwargs), has_aux=has_aux)(params)
            if not hand_on:
                return result
            (value, aux), gradient = result
            carried, other = aux if both else (aux, None)
            return (value, other, gradient), carried

        result = self._over_parts(lambda fn: fn, one, self.vary(params), kwargs, hand_on=hand_on)
        if hand_on:
            (value, other, gradient), carried = result
            result = (value, (carried, other) if both else carried), gradient
        return self.mean(result, **kwargs)

    def grad(self, params: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
        """The gradient at ``params``, like ``params`` in structure, shapes and dtypes."""
        return self.without_aux.value_and_grad(params, **kwargs)[1]

    def value_and_grad_of_parts(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> tuple[jax.Array, chex.ArrayTree, jax.Array, int]:
        """The loss, its gradient, and how long the gradients of the batch's parts are.

        The parts are the micro-batches of :meth:`accumulated` on each of the replicas.  How much
        longer their gradients are than the mean tells the noise of the gradient.

        Args:
          params: the parameters.
          **kwargs: the arguments of the batch that are not bound to the objective.

        Returns:
          ``(value, gradient, squared_norm, number)``: the mean over the parts of the squared
          Euclidean norms of their gradients, scalar, and the number of parts, 1 of a whole batch.

        Example:
          >>> import jax.numpy as jnp
          >>> import optax_accel as oa
          >>> objective = oa.Objective.from_value_fn(lambda w, x: w * jnp.mean(x))
          >>> parts = objective.accumulated(2, x=jnp.array([1.0, 3.0]))
          >>> value, gradient, squared_norm, number = parts.value_and_grad_of_parts(1.0)
          >>> float(gradient), float(squared_norm), number
          (2.0, 5.0, 2)
        """

        def one(functions: Functions, params: chex.ArrayTree, kwargs: dict[str, Any]) -> Any:
            value, gradient = jax.value_and_grad(lambda p: functions.value(p, kwargs))(params)
            return value, gradient, norm(gradient) ** 2

        result = self._over_parts(lambda fn: fn, one, self.vary(params), kwargs)
        value, gradient, squared_norm = self.mean(result, **kwargs)
        number = 1 if self._micro is None else self._micro.number
        if self.axis_name is not None:
            number *= lax.axis_size(self.axis_name)
        return value, gradient, squared_norm, number

    def outputs(self, params: chex.ArrayTree, **kwargs: Any) -> chex.ArrayTree:
        """The network outputs ``predict(params)`` of this replica's batch, without ``aux``.

        Raises:
          ValueError: the objective was built from a value function.
        """
        self._need_predict("outputs")
        return self._functions.outputs(params, kwargs)

    def loss_of_outputs(self, outputs: chex.ArrayTree, **kwargs: Any) -> jax.Array:
        """The loss of network outputs: of this replica's whole batch, without ``aux``.

        Raises:
          ValueError: the objective was built from a value function.
        """
        self._need_predict("loss_of_outputs")
        return self._functions.loss_of(outputs, kwargs)

    # -- second derivatives ------------------------------------------------------------------

    def hessian(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        """The Hessian at ``params`` as a linear function of a pytree like ``params``.

        The gradient is linearized once; each call of the result costs one product.  Vectors may
        have another float dtype than the parameters (a float32 basis for bfloat16 parameters):
        they are cast for the product, and the result has the vector's dtype.
        """

        def value(
            functions: Functions, params: chex.ArrayTree, base: Any, kwargs: dict[str, Any]
        ) -> jax.Array:
            del base
            return functions.value(params, kwargs)

        return self._second_derivative(value, params, kwargs)

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

        def value(
            functions: Functions, params: chex.ArrayTree, base: Any, kwargs: dict[str, Any]
        ) -> jax.Array:
            outputs = functions.outputs(params, kwargs)
            fixed = outputs if base is None else functions.outputs(base, kwargs)
            slope = jax.grad(lambda out: functions.loss_of(out, kwargs))(fixed)
            return optax.tree.vdot(lax.stop_gradient(slope), outputs)

        return self._second_derivative(value, params, kwargs)

    def gauss_newton(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        r"""The generalized Gauss-Newton matrix at ``params`` as a linear function.

        :math:`G = J^\top (\nabla^2_f \ell) J` with ``J`` the Jacobian of ``predict``; the
        functional Hessian is ``hessian - gauss_newton``.

        Raises:
          ValueError: the objective was built from a value function.
          TypeError: an output of ``predict`` is not floating point.
        """
        self._need_predict("gauss_newton")
        params, mode, functions = self.vary(params), self.hvp_mode, self._functions
        if self._micro is None:
            product = gauss_newton_of(mode, functions.outputs, functions.loss_of, params, kwargs)
            return self.mean_product(product, params, **kwargs)

        def one(
            functions: Functions,
            params: chex.ArrayTree,
            vector: chex.ArrayTree,
            kwargs: dict[str, Any],
        ) -> chex.ArrayTree:
            return gauss_newton_of(mode, functions.outputs, functions.loss_of, params, kwargs)(
                vector
            )

        def of_all(
            params: chex.ArrayTree, kwargs: dict[str, Any], vector: chex.ArrayTree
        ) -> chex.ArrayTree:
            return self._over_parts(lambda fn: fn, one, params, vector, kwargs)

        return self.mean_product(linear_at(of_all, params, kwargs), params, **kwargs)

    def loss_hessian(self, outputs: chex.ArrayTree, **kwargs: Any) -> LinearFunction:
        """The Hessian of ``loss`` at network outputs, as a linear function of a pytree like them.

        It is that of this replica's whole batch, without means over micro-batches or replicas,
        differentiated as ``hvp_mode`` says.

        Raises:
          ValueError: the objective was built from a value function.
        """
        self._need_predict("loss_hessian")
        return loss_hessian_of(self.hvp_mode, self._functions.loss_of, outputs, kwargs)

    def jacobian(
        self, params: chex.ArrayTree, **kwargs: Any
    ) -> tuple[chex.ArrayTree, LinearFunction, LinearFunction]:
        """The outputs of this replica's whole batch and their Jacobian, differentiated once.

        Returns:
          ``(outputs, push, pull)``: ``push`` maps a pytree like ``params`` to one like the outputs,
          the product with the Jacobian; ``pull`` the other way, with its transpose. Neither
          micro-batches nor replicas are averaged.

        Raises:
          ValueError: the objective was built from a value function.
        """
        self._need_predict("jacobian")
        return jacobian_of(self.hvp_mode, self._functions.outputs, self.vary(params), kwargs)

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

    def _need_predict(self, what: str) -> None:
        if not self.has_outputs:
            raise ValueError(
                f"Objective.{what} needs the network outputs, but this objective was built from a "
                "value function; build it with Objective(predict, loss)."
            )

    def _second_derivative(
        self,
        value: Callable[..., jax.Array],
        params: chex.ArrayTree,
        kwargs: dict[str, Any],
    ) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
        def one(
            functions: Functions, params: chex.ArrayTree, base: Any, kwargs: dict[str, Any]
        ) -> chex.ArrayTree:
            return jax.grad(lambda p: value(functions, p, base, kwargs))(params)

        def gradient(params: chex.ArrayTree, given: tuple[Any, dict[str, Any]]) -> chex.ArrayTree:
            return self._over_parts(jax.checkpoint, one, params, *given)

        params = self.vary(params)
        # Differences move the parameters; values that are held fixed are computed at these.
        base = params if self.hvp_mode == "finite_difference" else None
        product = derivative(self.hvp_mode, gradient, params, (base, kwargs), norm)
        return self.mean_product(product, params, **kwargs)


_INJECTED = (
    " It was called with a step count in place of parameters: optax.inject_hyperparams takes every "
    "callable for a schedule. Use optax_accel.inject_hyperparams, or declare the objective static: "
    'static_args="objective".'
)


def _is_count(params: chex.ArrayTree) -> bool:
    return (
        isinstance(params, jax.Array)
        and not params.ndim
        and jnp.issubdtype(params.dtype, jnp.integer)
    )


def _apply(
    axis_name: str | None,
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    params: chex.ArrayTree,
    where: jax.Array | None,
    weight: jax.Array | None,
    vector: chex.ArrayTree,
) -> chex.ArrayTree:
    """The mean over replicas of a product in the dtypes of the parameters."""
    vector = jax.tree.map(jnp.asarray, vector)
    tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
    result = mean_over(product(vary_over(tangent, axis_name)), axis_name, where, weight)
    return jax.tree.map(lambda r, v: r.astype(v.dtype), result, vector)
