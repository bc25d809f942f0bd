"""Fine-tuning of a pretrained network: all of it, a few entries, adapters, or its last layer.

Two settings: a Transformer language model of WikiText-2 that becomes a classifier of SST-2's
reviews, by a linear layer on the mean of its hidden states; and, without any files, a perceptron
for digits that learns the same digits moved by some pixels, with a new last layer. All contestants
train the new layer. One network is pretrained for all runs; these differ in the new layer's first
weights, the batches and what is drawn at random.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import models
import optax_accel as oa
from experiments import cli, data, progress, timing
from experiments.data.transfer import shifted_digits, text_to_reviews
from experiments.training import losses, networks
from experiments.training.replicas import Replica, tree_bytes

PyTree = Any
HEAD = "head"  # the name of the new layer's parameters, beside those of the pretrained "trunk"
SPARSE = ("gradient", "random", "magnitude")
POINTS = 10  # of the curve over a run


@dataclasses.dataclass(frozen=True)
class Domain:
    """What is pretrained and fine-tuned.

    Attributes:
      trunk: parameters before the pretraining.
      pretraining_loss: of these parameters and a batch of rows.
      rows: those that it trains on, any tree of arrays whose first axes are the examples.
      features: what the new layer sees: a function of the trunk's parameters and inputs.
      task: what it is fine-tuned for.
    """

    trunk: PyTree
    pretraining_loss: Callable[[PyTree, PyTree], jax.Array]
    rows: PyTree
    features: Callable[[PyTree, jax.Array], jax.Array]
    task: data.Task


def _digits(setting: Mapping[str, Any]) -> Domain:
    first, task = shifted_digits(setting["pixels"], setting["examples"])
    sizes = tuple(setting["hidden_sizes"])
    model = models.create(
        "mlp", input_shape=first.input_shape, num_classes=10, hidden_sizes=sizes, rngs=0
    )
    graphdef, trunk, rest = networks.split(model)
    loss = networks.objective(graphdef)

    def features(trunk: PyTree, x: jax.Array) -> jax.Array:
        h = x.reshape(x.shape[0], -1)
        for number in range(len(sizes)):
            layer = trunk["layers"][number]
            h = model.activation(h @ layer["kernel"] + layer["bias"][None])
        return h

    return Domain(
        trunk,
        lambda params, rows: loss.bind(rest=rest, x=rows[0], y=rows[1])(params),
        (first.train.x, first.train.y),
        features,
        task,
    )


def _reviews(setting: Mapping[str, Any], data_dir: Path | None) -> Domain:
    length = setting["length"]
    windows, task = text_to_reviews(
        data_dir, vocabulary_size=setting["vocabulary_size"], length=length
    )
    model = models.create(
        "transformer_lm",
        input_shape=(length,),
        num_classes=None,
        vocabulary_size=task.vocabulary_size,
        dropout_rate=0.0,
        rngs=0,
        **setting["model_options"],
    )
    graphdef, trunk, rest = networks.split(model)
    loss = networks.objective(graphdef)

    def features(trunk: PyTree, x: jax.Array) -> jax.Array:
        h = networks.nnx.merge(graphdef, trunk, rest, copy=True).hidden(x)
        real = (x > 0)[..., None]  # without padding
        return jnp.sum(jnp.where(real, h, 0), axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)

    return Domain(
        trunk,
        lambda params, rows: loss.bind(rest=rest, x=rows[:, :-1], y=rows[:, 1:])(params),
        windows,
        features,
        task,
    )


def lora(rank: int, key: jax.Array) -> oa.Reparametrization:
    """LoRA as a reparametrization: a matrix is its old self plus a product of two thin ones.

    The first of these is drawn, with variance 1 / (its number of rows), in the same way for all
    matrices of one shape; the second starts at zero.

    Args:
      rank: number of columns of the first one.
      key: PRNG key.

    Returns:
      The pair of maps; the optimizer has to leave the coordinate ``"frozen"`` as it is.

    References:
      Hu et al., `LoRA: low-rank adaptation of large language models
      <https://arxiv.org/abs/2106.09685>`_, 2021, section 4.1.
    """

    def inverse(w: jax.Array) -> dict[str, jax.Array]:
        rows, columns = w.shape
        a = jax.random.normal(key, (rows, rank), w.dtype) / np.sqrt(rows).astype(w.dtype)
        return {"frozen": w, "a": a, "b": jnp.zeros((rank, columns), w.dtype)}

    return oa.Reparametrization(lambda c: c["frozen"] + c["a"] @ c["b"], inverse)


def _only(inner: optax.GradientTransformation, trains: Callable[[Any], bool]) -> Any:
    """An optimizer of the parameters whose path a function accepts; the others stand still."""

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "train" if trains(path) else "stand", params
        )

    return optax.partition({"train": inner, "stand": optax.set_to_zero()}, labels)


def _names(path: Any) -> list[str]:
    return [str(getattr(entry, "key", entry)) for entry in path]


def transformation(
    options: Mapping[str, Any], rate: Any, steps: int, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """How a contestant trains: by Adam, whose rate falls linearly to zero.

    Args:
      options: ``trains``: ``"all"``, ``"head"``, ``"lora"`` with its ``rank``, or the selection of
        `sift` with its ``share``.
      rate: learning rate.
      steps: number of steps.
      key: PRNG key of what is drawn at random.

    Returns:
      The transformation.
    """
    schedule = optax.linear_schedule(rate, 0.0, steps)
    trains = options["trains"]
    if trains == "all":
        return optax.adam(schedule)
    if trains == "head":
        return _only(optax.adam(schedule), lambda path: HEAD in _names(path))
    if trains == "lora":
        # All matrices but the embeddings; biases and norms stand still.
        def adapted(params: PyTree) -> PyTree:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "kernel" in _names(path) and HEAD not in _names(path), params
            )

        adam = _only(
            optax.adam(schedule),
            lambda path: HEAD in _names(path) or _names(path)[-1] in ("a", "b"),
        )
        return oa.reparametrize(adam, lora(options["rank"], key), mask=adapted)
    cli.check_known("selection", trains, SPARSE)

    def dense(params: PyTree) -> PyTree:
        return {name: name == HEAD for name in params}

    return oa.sift(schedule, options["share"], selection=trains, dense=dense, key=key)


def share_inside(gradients: PyTree, indices: PyTree) -> jax.Array:
    """Share of the squared gradients of the trunk that lies in sets of entries.

    Args:
      gradients: of all parameters.
      indices: the entries of each tensor, flattened; anything in place of those of the new layer.

    Returns:
      A scalar; 1 where all gradients are zero.
    """
    leaves, sets = jax.tree.leaves(gradients["trunk"]), jax.tree.leaves(indices["trunk"])
    inside = sum(jnp.sum(g.ravel()[i] ** 2) for g, i in zip(leaves, sets, strict=True))
    total = sum(jnp.sum(g**2) for g in leaves)
    return jnp.where(total > 0, inside / total, 1.0)


class Runner:
    """Fine-tunes on one setting, see `protocol_runs.Runner`.

    Args:
      setting: ``domain`` (``"digits"`` or ``"reviews"``), ``steps``, ``batch_size``,
        ``pretraining_steps``, ``pretraining_rate``, ``pretraining_batch_size`` and what the domain
        reads: ``pixels``, ``examples`` and ``hidden_sizes``, or ``vocabulary_size``, ``length`` and
        ``model_options``.
      data_dir: folder with the data files.
      folder: where the pretrained network is kept.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        self.setting, self.folder = setting, folder
        of_digits = setting["domain"] == "digits"
        self.domain = _digits(setting) if of_digits else _reviews(setting, data_dir)
        self.task = self.domain.task
        self._programs: dict[str, Callable[..., Any]] = {}

    def config(self) -> dict[str, Any]:
        """Checksums of the data that it is fine-tuned for; those of the pretraining come along."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps; a first gradient that only chooses entries is one of them."""
        return float(self.setting["steps"])

    def seconds(self) -> float:
        """Seconds of a gradient of all parameters."""
        gradient = jax.jit(jax.grad(self._loss))
        params, rows = self._start(self.domain.trunk, 0), self._order(0)[0]
        call = functools.partial(gradient, params, self.task.train.x[rows], self.task.train.y[rows])
        timing.timed(call)
        return min(timing.timed(call)[1] for _ in range(5))

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterator[dict[str, Any]]:
        """Trains runs one after the other, by one compiled program; see `protocol_runs.Runner`."""
        trunk, program = self.pretrained, self._program(options)
        sizes = self._sizes(options, self._start(trunk, 0))
        for rate, seed in runs:
            params = self._start(trunk, seed)
            key = jax.random.key(seed)
            trained, inside = program(params, jnp.float32(rate), key, self._order(seed))
            names = ("validation", "error")
            scores: dict[str, Any] = dict(
                zip(names, map(float, self._errors(trained)), strict=True)
            )
            scores |= sizes
            if options["trains"] in SPARSE:
                found = np.asarray(inside, np.float64)
                scores["outside"] = 1.0 - float(found[0])
                parts = np.array_split(found, min(POINTS, len(found)))
                scores["inside"] = [float(part.mean()) for part in parts]
            yield scores

    @functools.cached_property
    def pretrained(self) -> PyTree:
        """The pretrained trunk, trained when it is first asked for and then kept."""
        path = self.folder / "pretrained.npz"
        if path.exists():
            with np.load(path) as saved:
                leaves = [jnp.asarray(saved[name]) for name in saved.files if name != "losses"]
            return jax.tree.unflatten(jax.tree.structure(self.domain.trunk), leaves)
        setting, rows = self.setting, self.domain.rows
        steps, size = setting["pretraining_steps"], setting["pretraining_batch_size"]
        schedule = optax.cosine_decay_schedule(setting["pretraining_rate"], steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
            loss, gradients = jax.value_and_grad(self.domain.pretraining_loss)(params, batch)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        params = jax.tree.map(jnp.array, self.domain.trunk)
        state, seen = tx.init(params), []
        examples = len(jax.tree.leaves(rows)[0])
        batches = iter(data.index_batches(examples, batch_size=size, seed=0))
        for number in range(steps):
            index = next(batches)
            batch = jax.tree.map(lambda array, index=index: jnp.asarray(array[index]), rows)
            params, state, loss = step(params, state, batch)
            if number % 16 == 0:
                seen.append(float(loss))
                progress.tell(f"pretraining: step {number} of {steps}, loss {seen[-1]:.2f}")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        arrays: dict[str, Any] = {f"{i}": leaf for i, leaf in enumerate(jax.tree.leaves(params))}
        np.savez(file, losses=np.array(seen), **arrays)
        cli.write_atomic(path, file.getvalue())
        return params

    def _start(self, trunk: PyTree, seed: int) -> PyTree:
        """The parameters before the first step: the trunk, and a new layer of this seed."""
        x = jax.ShapeDtypeStruct((1, *self.task.input_shape), self.task.train.x.dtype)
        width = jax.eval_shape(self.domain.features, trunk, x).shape[-1]
        rng = np.random.default_rng(seed)
        bound = width**-0.5
        kernel = rng.uniform(-bound, bound, (width, self.task.num_classes)).astype(np.float32)
        bias = jnp.zeros(self.task.num_classes)
        return {"trunk": trunk, HEAD: {"kernel": jnp.asarray(kernel), "bias": bias}}

    def _logits(self, params: PyTree, x: jax.Array) -> jax.Array:
        head = params[HEAD]
        return self.domain.features(params["trunk"], x) @ head["kernel"] + head["bias"][None]

    def _loss(self, params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses.find_loss("cross_entropy")(self._logits(params, x), y)

    def _order(self, seed: int) -> np.ndarray:
        steps, size = self.setting["steps"], self.setting["batch_size"]
        return data.index_steps(len(self.task.train.y), batch_size=size, seed=seed, steps=steps)

    def _program(self, options: Mapping[str, Any]) -> Callable[..., Any]:
        """A whole training as one program of parameters, rate, key and rows of each batch."""
        name = cli.to_json(dict(options))
        if name not in self._programs:
            self._programs[name] = jax.jit(functools.partial(self._train, dict(options)))
        return self._programs[name]

    def _train(
        self, options: Mapping[str, Any], params: PyTree, rate: Any, key: Any, order: Any
    ) -> tuple[PyTree, jax.Array]:
        tx = transformation(options, rate, self.setting["steps"], key)
        x, y = jnp.asarray(self.task.train.x), jnp.asarray(self.task.train.y)
        sparse = options["trains"] in SPARSE

        def step(carry: tuple[PyTree, PyTree], rows: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            gradients = jax.grad(self._loss)(params, x[rows], y[rows])
            updates, state = tx.update(gradients, state, params)
            indices = optax.tree.get(state, "selected_indices") if sparse else None
            inside = share_inside(gradients, indices) if sparse else jnp.zeros(())
            return (optax.apply_updates(params, updates), state), inside

        (params, _), inside = lax.scan(step, (params, tx.init(params)), order)
        return params, inside

    @functools.cached_property
    def _errors(self) -> Callable[[PyTree], list[jax.Array]]:
        """The shares of wrong answers on validation and test split; NaN for a run that diverged."""

        def errors(params: PyTree) -> list[jax.Array]:
            finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)])
            found = []
            for split in (self.task.validation, self.task.test):
                answers = jnp.argmax(self._logits(params, jnp.asarray(split.x)), axis=-1)
                found.append(jnp.where(finite.all(), jnp.mean(answers != split.y), jnp.nan))
            return found

        return jax.jit(errors)

    def _sizes(self, options: Mapping[str, Any], params: PyTree) -> dict[str, float]:
        """Bytes of the optimizer's state and number of trained values, as shares of all of Adam."""

        def state_of(options: Mapping[str, Any]) -> Any:
            key = jax.random.key(0)
            tx = transformation(options, 0.1, self.setting["steps"], key)
            return jax.eval_shape(tx.init, params)

        def moments(state: Any) -> int:  # each trained value has one
            return tree_bytes([found for _, found in optax.tree.get_all_with_path(state, "mu")])

        state, full = state_of(options), state_of({"trains": "all"})
        return {
            "state": tree_bytes(state) / tree_bytes(full),
            "trained": moments(state) / moments(full),
        }
