"""Training of LocalMixer by back-propagation and by forward gradients, and how noisy these are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import models
import optax_accel as oa
from experiments.training.replicas import Replica
from experiments.training.studies.image_runs import ImageRunner, PyTree, seconds_of

LAYERS = ("patches", "mixed", "grouped")  # what learns from local losses, in each block
CHANNEL_LAYERS = ("mixed", "grouped")


def optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD as in the authors' configuration.

    Momentum 0.9, weight decay 1e-4 of matrices, a tenth of the gradient for the classifier.

    Args:
      schedule: of the learning rate.

    Returns:
      The transformation.
    """

    def of(wanted: str) -> Callable[[PyTree], PyTree]:
        return lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: wanted in _names(path), params
        )

    return optax.chain(
        optax.masked(optax.scale(0.1), of("linear")),
        optax.masked(optax.add_decayed_weights(1e-4), of("kernel")),
        optax.sgd(schedule, momentum=0.9),
    )


def _names(path: Any) -> list[str]:
    return [str(getattr(entry, "key", entry)) for entry in path]


def _sum(numbers: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(numbers))


def selected(tree: PyTree, names: Sequence[str]) -> list[jax.Array]:
    """The arrays of a network, or of its gradient, that belong to layers of some names.

    Args:
      tree: the parameters or their gradient.
      names: those of the layers.

    Returns:
      The arrays, in the order of the tree.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if set(names) & set(_names(path))]


class _Shifted(oa.Taps):
    """Taps of which the first ones are moved: the derivative by the move is that of the activation.

    Args:
      tap: the taps behind.
      moves: what is added at the first taps.
    """

    def __init__(self, tap: oa.Taps, moves: Sequence[jax.Array]):
        self._tap, self._moves = tap, list(moves)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        return self._tap(x + self._moves.pop(0) if self._moves else x, **options)

    def mean(self, losses: jax.Array, **options: Any) -> jax.Array:
        return self._tap.mean(losses, **options)


class Runner(ImageRunner):
    """Trains LocalMixer on one task, see `protocol_runs.Runner`.

    Args:
      setting: ``task``, ``num_patches``, ``channels``, ``num_groups``, ``num_blocks``, ``steps``,
        ``batch_size`` and ``draws``, the number of estimates that noise is measured with.
      data_dir: folder with the data files.
      folder: not used.
    """

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps; one with forward gradients costs about 1 + passes gradients."""
        return float(self.setting["steps"] * (1 + options.get("passes", 0)))

    def seconds(self) -> float:
        """Seconds of a gradient by back-propagation."""
        graphdef, params = self._network(0)
        loss = functools.partial(self._loss, graphdef, {"locality": "global"})
        batch = self.batch(self.order(0)[0])
        call = functools.partial(jax.jit(jax.grad(loss)), params, *batch)
        return seconds_of(call)

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other, by one compiled program; see `protocol_runs.Runner`."""
        train = self.program("train", self._train, options)
        for rate, seed in runs:
            _, start = self._network(seed)
            trained, wrong = train(start, jnp.float32(rate), jax.random.key(seed), self.order(seed))
            scores: dict[str, Any] = dict(
                zip(("validation", "error"), map(float, wrong), strict=True)
            )
            if options["gradient"] == "forward":
                noise = self.program("noise", self._noise, options)
                batch = self.batch(self.order(seed)[0])
                found = noise(trained, jax.random.key(seed + 1), *batch)
                scores |= {"noise": float(found["noise"]), "angle": 1 - float(found["cosine"])}
                scores["cosines"] = [float(cosine) for cosine in found["cosines"]]
                if "groups" in options:
                    scores |= self._before_the_first_step(options, seed)
            yield scores

    def _before_the_first_step(self, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The variance against its closed form, and against the number of groups."""
        _, start = self._network(seed)
        batch, key = self.batch(self.order(seed)[0]), jax.random.key(seed + 2)
        closed = self.program("closed", self._closed_form, options)
        noises = []
        for groups in options["groups"]:
            noise = self.program(
                f"noise of {groups} groups",
                functools.partial(self._noise, num_groups=groups, layers=CHANNEL_LAYERS),
                options,
            )
            noises.append(float(noise(self._network(seed, groups)[1], key, *batch)["noise"]))
        slope = np.polyfit(np.log(options["groups"]), np.log(noises), 1)[0]
        return {
            "closed": float(closed(start, key, *batch)),
            "slope": float(slope),
            "noise of groups": noises,
        }

    # -- the network ---------------------------------------------------------------------------

    def _network(self, seed: int, num_groups: int | None = None) -> tuple[Any, PyTree]:
        sizes = ("num_patches", "channels", "num_groups", "num_blocks")
        options = {name: self.setting[name] for name in sizes}
        model = models.LocalMixer(
            input_shape=self.task.input_shape,
            num_classes=self.task.num_classes,
            rngs=seed,
            **options | ({} if num_groups is None else {"num_groups": num_groups}),
        )
        graphdef, params = nnx.split(model)
        return graphdef, nnx.to_pure_dict(params)

    def _loss(
        self,
        graphdef: Any,
        options: Mapping[str, Any],
        params: PyTree,
        x: jax.Array,
        y: jax.Array,
        tap: oa.Taps | None = None,
    ) -> jax.Array:
        perturb = options.get("perturb", "activations")
        model = nnx.merge(graphdef, params)
        return model.loss(x, y, locality=options["locality"], perturb=perturb, tap=tap)

    # -- programs ------------------------------------------------------------------------------

    def _train(
        self, options: Mapping[str, Any], params: PyTree, rate: Any, key: Any, order: Any
    ) -> tuple[PyTree, list[jax.Array]]:
        """A whole training; returns the parameters and the errors on validation and test split."""
        graphdef, _ = self._network(0)
        reverse = options["gradient"] == "reverse"
        tx = optimizer(optax.linear_schedule(rate, 0.0, self.setting["steps"]))
        if not reverse:
            tx = oa.forward_gradient(
                tx, perturb="activations", num_samples=options["passes"], key=key
            )
        tx = optax.with_extra_args_support(tx)
        x, y = self.standardized(self.task.train.x), jnp.asarray(self.task.train.y)

        def step(carry: tuple[PyTree, PyTree], rows: jax.Array) -> tuple[Any, None]:
            params, state = carry

            def value_fn(params: PyTree, tap: oa.Taps | None = None) -> jax.Array:
                return self._loss(graphdef, options, params, x[rows], y[rows], tap)

            gradient = jax.grad(value_fn)(params) if reverse else optax.tree.zeros_like(params)
            updates, state = tx.update(gradient, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = lax.scan(step, (params, tx.init(params)), order)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
        wrong = []
        for split in (self.task.validation, self.task.test):
            logits = nnx.merge(graphdef, params)(self.standardized(split.x))
            share = jnp.mean(jnp.argmax(logits, axis=-1) != split.y)
            wrong.append(jnp.where(finite, share, jnp.nan))
        return params, wrong

    def _noise(
        self,
        options: Mapping[str, Any],
        params: PyTree,
        key: Any,
        x: jax.Array,
        y: jax.Array,
        *,
        num_groups: int | None = None,
        layers: Sequence[str] = LAYERS,
    ) -> dict[str, Any]:
        """Relative variance of an estimate, and its cosines with the gradient."""
        graphdef, _ = self._network(0, num_groups)
        loss = functools.partial(self._loss, graphdef, options, x=x, y=y)
        gradient = selected(jax.grad(loss)(params), layers)
        total = _sum([jnp.sum(g**2) for g in gradient])

        def of_draw(key: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array]:
            estimate = selected(
                oa.forward_value_and_grad(
                    lambda params, tap: loss(params, tap=tap),
                    params,
                    key=key,
                    perturb="activations",
                    num_samples=options["passes"],
                )[1],
                layers,
            )
            products = [jnp.sum(e * g) for e, g in zip(estimate, gradient, strict=True)]
            squares = [jnp.sum(e**2) for e in estimate]
            errors = [jnp.sum((e - g) ** 2) for e, g in zip(estimate, gradient, strict=True)]
            cosines = [
                p / jnp.sqrt(jnp.maximum(s * jnp.sum(g**2), 1e-30))
                for p, s, g in zip(products, squares, gradient, strict=True)
            ]
            cosine = _sum(products) / jnp.sqrt(_sum(squares) * total)
            return _sum(errors), cosines, cosine

        keys = jax.random.split(key, self.setting["draws"])
        errors, cosines, cosine = lax.map(of_draw, keys)
        return {
            "noise": errors.mean() / total,
            "cosine": cosine.mean(),
            "cosines": [each.mean() for each in cosines],
        }

    def _closed_form(
        self, options: Mapping[str, Any], params: PyTree, key: Any, x: jax.Array, y: jax.Array
    ) -> jax.Array:
        r"""The variance of estimates at the first block's activations over that of the closed form.

        The estimate at the activation :math:`j` of an example's patch and group is the derivative
        along :math:`u`, :math:`\sum_i \delta_i u_i` with all active units of that patch and group
        in the block, times :math:`u_j`. Its variance is :math:`\sum_i \delta_i^2 + \delta_j^2`.
        """
        graphdef, _ = self._network(0)
        patches, groups = self.setting["num_patches"] ** 2, self.setting["num_groups"]
        shape = (len(y), patches, groups, self.setting["channels"] // groups)
        moves = [jnp.zeros(shape), jnp.zeros(shape)]

        def loss(moves: list[jax.Array], tap: oa.Taps | None = None) -> jax.Array:
            return self._loss(graphdef, options, params, x, y, _Shifted(tap or oa.Taps(), moves))

        slopes = jnp.stack(jax.grad(loss)(moves))
        own = jnp.sum(slopes**2, axis=(0, 4), keepdims=True)
        expected = jnp.sum(jnp.where(slopes != 0, own + slopes**2, 0))

        def of_draw(key: jax.Array) -> jax.Array:
            estimate = oa.forward_value_and_grad(loss, moves, key=key, perturb="activations")[1]
            return jnp.sum((jnp.stack(estimate) - slopes) ** 2)

        return lax.map(of_draw, jax.random.split(key, self.setting["draws"])).mean() / expected
