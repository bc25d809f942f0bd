"""What is found in the program of a network, and what is read from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import optax_accel as oa
from optax_accel.natural_gradient import factors as stats
from optax_accel.natural_gradient.finding import find

N, T = 6, 4


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def loss(outputs: jax.Array) -> jax.Array:
    targets = normal(*outputs.shape, seed=9)
    return 0.5 * jnp.sum((outputs - targets) ** 2) / len(outputs)


def loss_slope(outputs: jax.Array) -> np.ndarray:
    """The gradient of the loss with respect to the outputs."""
    return (np.asarray(outputs) - normal(*outputs.shape, seed=9)) / len(outputs)


def tree(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


X, SEQUENCE, IMAGES = normal(N, 3), normal(N, T, 3), normal(N, 7, 6, 3)
HEADS = normal(N, T, 2, 5)
TOKENS = np.random.default_rng(0).integers(0, 5, (N, T))
PATCHES = ("NHWC", "HWIO", "NHWC")


def layer_norm(p: Any, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-3)
    return centred * (scale * p["scale"][None]) + p["shift"][None]


def batch_norm(p: Any, x: Any) -> Any:
    variance = jnp.var(x, axis=0) + 1e-3
    return (x - x.mean(0)[None]) * (p["scale"] * lax.rsqrt(variance))[None] + p["shift"][None]


def conv(p: Any, x: Any, numbers: Any = PATCHES, **kwargs: Any) -> Any:
    kwargs = {"window_strides": (1, 1), "padding": "SAME"} | kwargs
    return lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **kwargs)


def recurrent(p: Any) -> Any:
    h = jnp.zeros((N, 4))
    for t in range(T):
        h = jnp.tanh(SEQUENCE[:, t] @ p["w"] + h @ p["v"] + p["b"][None])
    return h


def layer(h: Any, p: Any) -> Any:
    return jnp.tanh(h @ p["w"] + p["b"][None])


def scanned(function: Any, p: Any, x: Any = X) -> Any:
    """Applies a function of an activation and of parameters once for each slice of these."""
    return lax.scan(lambda h, p: (function(h, p), None), x, p)[0]


def counted(function: Any, p: Any, x: Any = X) -> Any:
    """Likewise, in a loop over positions."""
    num = len(jax.tree.leaves(p)[0])
    return lax.fori_loop(0, num, lambda i, h: function(h, jax.tree.map(lambda leaf: leaf[i], p)), x)


def over_time(p: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["w"] + h @ p["v"] + p["b"][None])
        return h, h * p["scale"][None]

    return lax.scan(step, jnp.zeros((N, 4)), SEQUENCE.swapaxes(0, 1))[1].swapaxes(0, 1)


# -- functions with derivative rules of their own, none of which is the derivative of what is inside


def with_vjp(function: Any, backward: Any) -> Any:
    """``function``, whose backward pass is ``backward(arguments, gradient)``."""
    new = jax.custom_vjp(function)
    new.defvjp(lambda *args: (new(*args), args), backward)
    return new


round_through = with_vjp(lambda x: jnp.round(x), lambda _, g: (g,))
round_clipped = with_vjp(
    lambda x: jnp.round(x), lambda args, g: (jnp.where(jnp.abs(args[0]) < 1, g, 0),)
)
reverse = with_vjp(lambda x: x, lambda _, g: (-g,))
clip_gradient = with_vjp(lambda x: x, lambda _, g: (jnp.clip(0.5 * g, -0.1, 0.1),))
matmul = with_vjp(lambda x, w: x @ w, lambda xw, g: (2 * g @ xw[1].T, 3 * xw[0].T @ g))
two_layers = with_vjp(
    lambda x, w, v: jnp.tanh(x @ w) @ v,
    lambda args, g: (g @ args[2].T @ args[1].T, jnp.ones_like(args[1]), args[2] * g.sum()),
)


@jax.custom_jvp
def safe_norm(x: Any) -> Any:
    return jnp.sqrt(jnp.sum(x**2))


@safe_norm.defjvp
def safe_norm_jvp(primals: Any, tangents: Any) -> Any:
    norm = safe_norm(*primals)
    return norm, jnp.sum(primals[0] * tangents[0]) / jnp.where(norm > 0, norm, 1)


@jax.custom_jvp
def custom(w: Any, x: Any) -> Any:
    return x @ w


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[1] @ primals[0]))


def rows(function: Any, x: Any) -> Any:
    return jax.vmap(function)(x)[:, None]


def time_first(function: Any, x: Any) -> Any:
    """``function`` of the positions of all examples, with the examples inside of one axis."""
    y = function(x.swapaxes(0, 1).reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[1::-1], -1).swapaxes(0, 1)


DENSE = {"w": "dense", "b": "dense"}
CONV = {"w": "convolution", "b": "convolution"}
# Predict, shapes of the parameters, kinds that are expected.
Case = tuple[Callable[[Any], Any], dict[str, tuple[int, ...]], dict[str, str]]
CASES: dict[str, Case] = {
    "dense": (lambda p: X @ p["w"] + p["b"][None], {"w": (3, 2), "b": (2,)}, DENSE),
    "bias first": (lambda p: p["b"][None] + X @ p["w"], {"w": (3, 2), "b": (2,)}, DENSE),
    "transposed": (lambda p: X @ p["w"].T + p["b"][None], {"w": (2, 3), "b": (2,)}, DENSE),
    "from the left": (lambda p: (p["w"] @ X.T).T + p["b"][None], {"w": (2, 3), "b": (2,)}, DENSE),
    "flattened": (
        lambda p: X @ p["w"].reshape(3, 4) + p["b"].ravel()[None],
        {"w": (3, 2, 2), "b": (2, 2)},
        DENSE,
    ),
    "vector": (lambda p: X @ p["w"], {"w": (3,)}, {"w": "dense"}),
    "sequence": (lambda p: SEQUENCE @ p["w"] + p["b"][None, None], {"w": (3, 2), "b": (2,)}, DENSE),
    "time first": (
        lambda p: (normal(5, N, 3) @ p["w"] + p["b"][None, None]).transpose(1, 0, 2),
        {"w": (3, 2), "b": (2,)},
        DENSE,
    ),
    "time first in one axis": (
        lambda p: time_first(
            lambda x: x @ p["w"] + p["b"][None],
            SEQUENCE,
        ),
        {"w": (3, 2), "b": (2,)},
        DENSE,
    ),
    "two batches in one axis": (
        lambda p: jnp.multiply(*jnp.split(jnp.concatenate([X, 2 * X]) @ p["w"], 2)),
        {"w": (3, 2)},
        {"w": "dense"},
    ),
    "written into an array": (
        lambda p: jnp.zeros((N, 2, 2)).at[:, 1].set(jnp.stack([X, X], 1).sum(1) @ p["w"]),
        {"w": (3, 2)},
        {"w": "dense"},
    ),
    "heads": (
        lambda p: jnp.einsum("ntd,dhe->nhte", SEQUENCE, p["w"]) + p["b"][None, :, None],
        {"w": (3, 2, 5), "b": (2, 5)},
        DENSE,
    ),
    "from heads": (
        lambda p: jnp.einsum("nthe,hed->ntd", normal(N, T, 2, 5), p["w"]) + p["b"][None, None],
        {"w": (2, 5, 3), "b": (3,)},
        DENSE,
    ),
    "half a bias": (
        lambda p: jnp.einsum("ntd,dhe->nthe", SEQUENCE, p["w"]) + p["b"][None, None, None],
        {"w": (3, 2, 5), "b": (5,)},
        {"w": "dense", "b": "scale-shift"},
    ),
    "output read twice": (
        lambda p: (h := X @ p["w"]) * jnp.tanh(h + p["b"][None]),
        {"w": (3, 2), "b": (2,)},
        {"w": "dense", "b": "scale-shift"},
    ),
    "jit": (
        lambda p: jax.jit(lambda w, b: jax.jit(jnp.matmul)(X, w) + b[None])(p["w"], p["b"]),
        {"w": (3, 2), "b": (2,)},
        DENSE,
    ),
    "checkpoint": (
        lambda p: jax.checkpoint(lambda p: jnp.tanh(X @ p["w"] + p["b"][None]))(p),
        {"w": (3, 2), "b": (2,)},
        DENSE,
    ),
    "vmap": (
        lambda p: jax.vmap(lambda x: jnp.tanh(p["w"] @ x + p["b"]))(X),
        {"w": (2, 3), "b": (2,)},
        DENSE,
    ),
    "reuse": (
        recurrent,
        {"w": (3, 4), "v": (4, 4), "b": (4,)},
        {"w": "dense", "v": "dense", "b": "scale-shift"},
    ),
    "reuse with bias": (
        lambda p: (h := X @ p["w"] + p["b"][None]) + jnp.tanh(jnp.tanh(h) @ p["w"] + p["b"][None]),
        {"w": (3, 3), "b": (3,)},
        DENSE,
    ),
    "convolution": (
        lambda p: conv(p, IMAGES) + p["b"][None, None, None],
        {"w": (3, 2, 3, 4), "b": (4,)},
        CONV,
    ),
    "channels first": (
        lambda p: (
            conv(p, IMAGES.transpose(0, 3, 1, 2), ("NCHW", "OIHW", "NCHW"), padding="VALID")
            + p["b"][None, :, None, None]
        ),
        {"w": (4, 3, 3, 2), "b": (4,)},
        CONV,
    ),
    "strides and dilations": (
        lambda p: conv(
            p,
            IMAGES,
            window_strides=(2, 1),
            padding=((1, 2), (0, 3)),
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 1),
        ),
        {"w": (3, 2, 3, 4)},
        {"w": "convolution"},
    ),
    "one dimension": (
        lambda p: conv(p, SEQUENCE, ("NWC", "WIO", "NWC"), window_strides=(1,)),
        {"w": (3, 3, 2)},
        {"w": "convolution"},
    ),
    "embedding": (lambda p: p["w"][TOKENS], {"w": (5, 3)}, {"w": "embedding"}),
    "columns of a table": (
        lambda p: jnp.take(p["w"], TOKENS[:, 0], axis=1).T,
        {"w": (3, 5)},
        {"w": "embedding"},
    ),
    "tied embedding": (
        lambda p: jnp.tanh(p["w"][TOKENS]) @ p["w"].T + p["b"][None, None],
        {"w": (5, 3), "b": (5,)},
        {"w": "tied", "b": "scale-shift"},
    ),
    "tied autoencoder": (
        lambda p: jnp.tanh(jnp.tanh(X @ p["w"]) @ p["w"].T) @ p["w"],
        {"w": (3, 2)},
        {"w": "tied"},
    ),
    "transposed twice": (
        lambda p: jnp.tanh(X @ p["w"].T) @ p["w"].reshape(3, 3, 1).squeeze(2).T,
        {"w": (3, 3)},
        {"w": "dense"},
    ),
    "scaled weight": (
        lambda p: X @ (0.5 * p["w"] / X[0, 0]) + p["b"][None],
        {"w": (3, 2), "b": (2,)},
        DENSE,
    ),
    "scaled table": (lambda p: (3 * p["w"])[TOKENS], {"w": (5, 3)}, {"w": "embedding"}),
    "low-rank adapter": (
        lambda p: X @ (normal(3, 4) + 0.5 * (p["w"] @ p["v"])) + p["b"][None],
        {"w": (3, 2), "v": (2, 4), "b": (4,)},
        {"w": "dense", "v": "dense", "b": "scale-shift"},
    ),
    "fixed factors": (
        lambda p: jnp.tanh(X @ (X.T @ X @ p["w"])) @ (p["v"] @ normal(4, 2)).T.T,
        {"w": (3, 5), "v": (5, 4)},
        {"w": "dense", "v": "dense"},
    ),
    "adapter of a trained weight": (
        lambda p: jnp.tanh(SEQUENCE @ (p["u"] - (2 * p["v"]) @ p["w"])),
        {"u": (3, 4), "v": (3, 2), "w": (2, 4)},
        {"u": "dense", "v": "dense", "w": "dense"},
    ),
    "transposed adapter": (
        lambda p: X @ (p["w"].T @ p["v"].T).T,
        {"w": (2, 4), "v": (3, 2)},
        {"w": "dense", "v": "dense"},
    ),
    "adapter of a convolution": (
        lambda p: conv({"w": (p["w"] @ p["v"]).reshape(3, 2, 3, 4)}, IMAGES),
        {"w": (18, 2), "v": (2, 4)},
        {"w": "convolution", "v": "convolution"},
    ),
    "three factors": (
        lambda p: X @ (p["u"] @ (p["v"] @ p["w"])),
        {"u": (3, 2), "v": (2, 5), "w": (5, 4)},
        {"u": "dense", "v": "dense", "w": "dense"},
    ),
    "layer norm": (
        lambda p: layer_norm(p, X @ p["w"]),
        {"w": (3, 4), "scale": (4,), "shift": (4,)},
        {"w": "dense", "scale": "scale-shift", "shift": "scale-shift"},
    ),
    "one plus scale": (
        lambda p: X * (1 + p["scale"])[None] - p["shift"][None],
        {"scale": (3,), "shift": (3,)},
        {"scale": "scale-shift", "shift": "scale-shift"},
    ),
    "subtracted and added": (
        lambda p: jnp.tanh(X - p["shift"][None]) + p["shift"][None],
        {"shift": (3,)},
        {"shift": "scale-shift"},
    ),
    "learned positions": (
        lambda p: jnp.tanh(SEQUENCE + p["shift"][None]),
        {"shift": (T, 3)},
        {"shift": "scale-shift"},
    ),
    "temperature": (lambda p: X * p["scale"], {"scale": ()}, {"scale": "scale-shift"}),
    "spread first": (
        lambda p: X * jnp.broadcast_to(p["scale"][None], (N, 3)),
        {"scale": (3,)},
        {"scale": "scale-shift"},
    ),
}
# One parameter for several layers, or several steps of time.
STACKED: dict[str, Case] = {
    "scanned": (lambda p: scanned(layer, p), {"w": (2, 3, 3), "b": (2, 3)}, DENSE),
    "scanned backwards, checkpointed, last axis": (
        lambda p: lax.scan(
            lambda h, p: (jax.checkpoint(layer)(h, p), None),
            X,
            {"w": jnp.moveaxis(p["w"], -1, 0), "b": p["b"]},
            reverse=True,
        )[0],
        {"w": (3, 3, 2), "b": (2, 3)},
        DENSE,
    ),
    "scanned in groups": (
        lambda p: scanned(lambda h, p: scanned(layer, p, h), p),
        {"w": (3, 2, 3, 3), "b": (3, 2, 3)},
        DENSE,
    ),
    "scanned pairs": (
        lambda p: scanned(
            lambda h, p: layer(
                layer(h, {k: v[1] for k, v in p.items()}), {k: v[0] for k, v in p.items()}
            ),
            {k: v.reshape(2, 2, *v.shape[1:]) for k, v in p.items()},
        ),
        {"w": (4, 3, 3), "b": (4, 3)},
        DENSE,
    ),
    "numbered": (
        lambda p: layer(
            layer(X, {"w": p["w"][0], "b": p["b"][0]}),
            {"w": lax.dynamic_index_in_dim(p["w"], 2, keepdims=False), "b": p["b"][-1]},
        ),
        {"w": (3, 3, 3), "b": (3, 3)},
        DENSE,
    ),
    "numbered pairs": (
        lambda p: functools.reduce(
            lambda h, ij: layer(h, {"w": p["w"][ij[0]][ij[1]], "b": p["b"][ij]}),
            [(0, 1), (1, 0), (0, 0), (1, 1)],
            X,
        ),
        {"w": (2, 2, 3, 3), "b": (2, 2, 3)},
        DENSE,
    ),
    "numbered twice": (
        lambda p: jnp.tanh(SEQUENCE @ p["w"][1] + SEQUENCE) @ p["w"][1] + SEQUENCE @ p["w"][0],
        {"w": (2, 3, 3)},
        {"w": "dense"},
    ),
    "counted": (lambda p: counted(layer, p), {"w": (2, 3, 3), "b": (2, 3)}, DENSE),
    "unstacked": (
        lambda p: functools.reduce(
            jnp.matmul, [*jnp.unstack(p["w"]), jnp.take(p["v"], 1, axis=1), *p["u"]], X
        ),
        {"w": (2, 3, 3), "v": (3, 2, 3), "u": (2, 3, 3)},
        dict.fromkeys("wvu", "dense"),
    ),
    "over time": (
        over_time,
        {"w": (3, 4), "v": (4, 4), "b": (4,), "scale": (4,)},
        {"w": "dense", "v": "dense", "b": "scale-shift", "scale": "scale-shift"},
    ),
    "constant first state": (
        lambda p: lax.scan(lambda h, _: (layer(h, p), None), jnp.ones((N, 3)), length=2)[0],
        {"w": (3, 3), "b": (3,)},
        DENSE,
    ),
    "given back": (
        lambda p: (
            (loop := lambda h, w: lax.scan(lambda h, w: (jnp.tanh(h @ w), w), h, w))
            and loop(*loop(X, p["w"]))[0]
        ),
        {"w": (2, 3, 3)},
        {"w": "dense"},
    ),
    "over time in scanned layers": (
        lambda p: scanned(
            lambda x, p: lax.scan(lambda h, x: (layer(h + x, p),) * 2, x[0], x)[1],
            p,
            SEQUENCE.swapaxes(0, 1),
        ).swapaxes(0, 1),
        {"w": (2, 3, 3), "b": (2, 3)},
        DENSE,
    ),
    "scanned norms": (
        lambda p: scanned(lambda h, p: layer_norm(p, jnp.tanh(h)), p),
        {"scale": (2, 3), "shift": (2, 3)},
        {"scale": "scale-shift", "shift": "scale-shift"},
    ),
    "counted norms": (
        lambda p: counted(lambda h, p: layer_norm(p, jnp.tanh(h)) * p["gain"], p),
        {"scale": (2, 3), "shift": (2, 3), "gain": (2,)},
        {"scale": "scale-shift", "shift": "scale-shift", "gain": "scale-shift"},
    ),
    "numbered norms": (
        lambda p: layer_norm({k: v[1] for k, v in p.items()}, X) * p["scale"][0][None],
        {"scale": (2, 3), "shift": (2, 3)},
        {"scale": "scale-shift", "shift": "scale-shift"},
    ),
    "scanned convolutions": (
        lambda p: scanned(lambda h, p: jnp.tanh(conv(p, h) + p["b"][None, None, None]), p, IMAGES),
        {"w": (2, 3, 3, 3, 3), "b": (2, 3)},
        CONV,
    ),
    "convolutions over time": (
        lambda p: lax.scan(lambda h, _: (jnp.tanh(conv(p, h)), None), IMAGES, length=2)[0],
        {"w": (3, 2, 3, 3)},
        {"w": "convolution"},
    ),
    "heads": (
        lambda p: jnp.einsum("nthd,hde->nthe", HEADS, p["w"]) + p["b"][None, None],
        {"w": (2, 5, 3), "b": (2, 3)},
        DENSE,
    ),
    "scanned heads": (
        lambda p: scanned(
            lambda h, p: jnp.tanh(jnp.einsum("hed,nthd->nthe", p["w"], h) + p["b"][None, None]),
            p,
            HEADS,
        ),
        {"w": (3, 2, 5, 5), "b": (3, 2, 5)},
        DENSE,
    ),
    "groups": (
        lambda p: conv(p, IMAGES, feature_group_count=3) + p["b"][None, None, None],
        {"w": (3, 3, 1, 6), "b": (6,)},
        CONV,
    ),
    "scanned groups": (
        lambda p: scanned(lambda h, p: jnp.tanh(conv(p, h, feature_group_count=3)), p, IMAGES),
        {"w": (2, 2, 3, 1, 3)},
        {"w": "convolution"},
    ),
    "transposed kernel": (
        lambda p: (
            lax.conv_transpose(IMAGES, p["w"], (2, 1), "SAME", transpose_kernel=True)
            + p["b"][None, None, None]
        ),
        {"w": (3, 2, 4, 3), "b": (4,)},
        CONV,
    ),
    "scanned tables": (
        lambda p: scanned(lambda h, p: h + jnp.tanh(h) * p["w"][TOKENS], p, SEQUENCE),
        {"w": (2, 5, 3)},
        {"w": "embedding"},
    ),
}
CASES |= {f"stacked: {name}": case for name, case in STACKED.items()}
# What others contain in part.
SLOW = {
    f"stacked: {name}"
    for name in (
        *("scanned in groups", "scanned pairs", "scanned heads", "scanned groups"),
        *("counted norms", "convolutions over time", "over time in scanned layers", "unstacked"),
        *("scanned norms", "constant first state"),
    )
}


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


# Derivative rules where parameters pass, or behind layers.
RULES: dict[str, Case] = {
    "rounded weight": (
        lambda p: jnp.tanh(X @ round_through(p["w"])) @ p["v"],
        {"w": (3, 4), "v": (4, 2)},
        {"w": "dense", "v": "dense"},
    ),
    "rounded weight without a rule": (
        lambda p: X @ (p["w"] + lax.stop_gradient(jnp.round(8 * p["w"]) - p["w"])),
        {"w": (3, 4)},
        {"w": "dense"},
    ),
    "rounded and clipped weight": (
        lambda p: X @ jax.checkpoint(lambda w: jax.jit(round_clipped)(w.T).T)(p["w"]),
        {"w": (3, 4)},
        {"w": "generic"},
    ),
    "integer weight": (
        lambda p: X @ p["w"].astype(int).astype(float),
        {"w": (3, 4)},
        {"w": "generic"},
    ),
    "integer activation": (
        lambda p: (X @ p["w"]).astype(int).astype(float) + p["b"][None],
        {"w": (3, 4), "b": (4,)},
        {"w": "generic", "b": "scale-shift"},
    ),
    "rounded activation": (
        lambda p: round_through(X @ p["w"] + p["b"][None]) @ p["v"],
        {"w": (3, 4), "b": (4,), "v": (4, 2)},
        DENSE | {"v": "dense"},
    ),
    "reversal": (
        lambda p: reverse(X @ p["w"]) * reverse(p["scale"])[None] + p["b"][None],
        {"w": (3, 4), "scale": (4,), "b": (4,)},
        {"w": "dense", "scale": "generic", "b": "scale-shift"},
    ),
    "clipped gradient": (
        lambda p: clip_gradient(clip_gradient(X @ p["w"] + p["b"][None]) @ p["v"]),
        {"w": (3, 4), "b": (4,), "v": (4, 2)},
        DENSE | {"v": "dense"},
    ),
    "norm at zero": (
        lambda p: X @ p["w"] + rows(safe_norm, jax.nn.relu(X @ p["v"] - 99)) + safe_norm(p["b"]),
        {"w": (3, 2), "v": (3, 4), "b": (2,)},
        {"w": "dense", "v": "dense", "b": "generic"},
    ),
    "normalized weight": (
        lambda p: jax.vmap(lambda x: x @ (p["w"] / safe_norm(p["w"])))(X),
        {"w": (3, 4)},
        {"w": "generic"},
    ),
    "product": (
        lambda p: jax.checkpoint(matmul)(jnp.tanh(X @ p["v"]), p["w"]) + p["b"][None],
        {"v": (3, 4), "w": (4, 2), "b": (2,)},
        {"v": "dense", "w": "generic", "b": "scale-shift"},
    ),
    "layer with a forward rule": (
        lambda p: custom(p["w"], jnp.tanh(X @ p["v"])),
        {"v": (3, 4), "w": (4, 2)},
        {"v": "dense", "w": "generic"},
    ),
    "two layers": (
        lambda p: two_layers(X @ p["u"], p["w"], p["v"]),
        {"u": (3, 4), "w": (4, 5), "v": (5, 2)},
        {"u": "dense", "w": "generic", "v": "generic"},
    ),
    "rules of libraries": (
        lambda p: (
            jax.nn.softmax(jax.nn.relu6(jax.nn.relu(X @ p["w"]) - 0.1) @ p["v"])
            + optax.safe_norm(p["b"], 1e-3) * jax.nn.softplus(p["scale"])[None]
        ),
        {"w": (3, 4), "v": (4, 2), "b": (2,), "scale": (2,)},
        {"w": "dense", "v": "dense", "b": "generic", "scale": "generic"},
    ),
    "stopped": (
        lambda p: X @ p["w"] + lax.stop_gradient(jnp.tanh(X @ p["w"])) * p["scale"][None],
        {"w": (3, 4), "scale": (4,)},
        {"w": "dense", "scale": "scale-shift"},
    ),
    "clipped look-up": (
        lambda p: jnp.take(p["w"], TOKENS - 2, axis=0, mode="clip"),
        {"w": (4, 3)},
        {"w": "embedding"},
    ),
}
# Batch normalization makes examples depend on each other.
COUPLED: dict[str, Case] = {
    "batch norm": (
        lambda p: batch_norm(p, X @ p["w"]),
        {"w": (3, 4), "scale": (4,), "shift": (4,)},
        {"w": "dense", "scale": "scale-shift", "shift": "scale-shift"},
    ),
}
FOLLOWED = "but only layouts, sums, matrix products and scalar factors of parameters are followed"
NO_EXAMPLES = "without an axis that becomes that of the outputs' examples"
GENERIC: dict[str, tuple[Callable[[Any], Any], dict[str, tuple[int, ...]], str]] = {
    "changing carry": (
        lambda p: lax.scan(lambda h, _: ((h[0] @ h[1], 2 * h[1]), None), (X, p["w"]), length=2)[0][
            0
        ],
        {"w": (3, 3)},
        "is used by `scan`, which changes it from one iteration to the next",
    ),
    "scaled before a loop": (
        lambda p: scanned(lambda h, p: h @ p["w"], {"w": 2 * p["w"]}),
        {"w": (2, 3, 3)},
        "is scaled before a `scan` takes it",
    ),
    "given back by one iteration to the next": (
        lambda p: lax.scan(
            lambda h, _: ((h[0] @ h[1], p["w"]), None), (X, jnp.ones((3, 3))), length=2
        )[0][0],
        {"w": (3, 3)},
        "is given back by a `scan` in another layout",
    ),
    "inside a loop": (
        lambda p: scanned(lambda h, p: h @ jnp.exp(p["w"]), p),
        {"w": (2, 3, 3)},
        f"is changed by `exp`, {FOLLOWED}",
    ),
    "scanned and counted in one": (
        lambda p: scanned(lambda h, p: counted(lambda h, p: h @ p["w"], p, h), p),
        {"w": (2, 2, 3, 3)},
        "is indexed by a number that changes in the loop that scans it",
    ),
    "conditional": (
        lambda p: lax.cond(X[0, 0] > 0, lambda: X @ p["w"], lambda: X),
        {"w": (3, 3)},
        "is used by `cond`, whose inside is not looked into",
    ),
    "part": (
        lambda p: X @ p["w"][:, :2],
        {"w": (3, 3)},
        "is used by `slice`, which takes a part of it that is not one slice",
    ),
    "tied by halves": (
        lambda p: p["w"][TOKENS] @ p["w"].reshape(3, 4),
        {"w": (4, 3)},
        "is used as dense and as embedding",
    ),
    "function": (
        lambda p: X * jnp.exp(p["w"])[None],
        {"w": (3,)},
        f"is changed by `exp`, {FOLLOWED}",
    ),
    "with activations": (
        lambda p: jnp.arctan2(X, p["w"][None]),
        {"w": (3,)},
        "is combined with activations by `atan2`",
    ),
    "repeated": (
        lambda p: X @ jnp.broadcast_to(p["w"][:, None], (3, 2)),
        {"w": (3,)},
        "is repeated before a layer takes it",
    ),
    "different factors": (
        lambda p: X @ (np.arange(6.0).reshape(3, 2) * p["w"]),
        {"w": (3, 2)},
        "is multiplied by different numbers that are not parameters before a layer takes it",
    ),
    "normalized, with a scale that is no parameter": (
        lambda p: X @ (p["w"] / jnp.linalg.norm(p["w"]) * normal(2)[None]),
        {"w": (3, 2)},
        "is multiplied by different numbers that are not parameters before a layer takes it",
    ),
    "two layers in one array": (
        lambda p: jnp.tanh(X @ p["w"][:, :3]) @ p["w"][:, 3:],
        {"w": (3, 5)},
        "is used by `slice`, which takes a part of it that is not one slice",
    ),
    "product in a loop": (
        lambda p: scanned(lambda h, p: h @ (p["w"] @ p["v"]), p),
        {"w": (2, 3, 3), "v": (2, 3, 3)},
        "is multiplied by a parameter inside of a loop, where products are not followed",
    ),
    "scaled in a loop": (
        lambda p: scanned(lambda h, p: h @ (2 * p["w"]), p),
        {"w": (2, 3, 3)},
        "is scaled inside of a loop",
    ),
    "product added": (
        lambda p: X + (p["w"] @ p["v"])[None],
        {"w": (3, 3), "v": (3,)},
        "is multiplied by a parameter, and no layer takes the product as a whole",
    ),
    "used in two weights": (
        lambda p: jnp.tanh(X @ jnp.exp(p["w"])) @ jnp.sin(p["w"]),
        {"w": (3, 3)},
        f"is changed by `exp`, {FOLLOWED}",
    ),
    "used in a weight and as one": (
        lambda p: jnp.tanh(X @ jnp.exp(p["w"])) @ p["w"],
        {"w": (3, 3)},
        f"is changed by `exp`, {FOLLOWED}",
    ),
    "part of a product": (
        lambda p: X @ (p["w"] @ p["v"])[:, :2],
        {"w": (3, 3), "v": (3, 3)},
        "is used by `slice`, which takes a part of it that is not one slice",
    ),
    "no examples": (
        lambda p: X + (jnp.ones((5, 3)) @ p["w"]).sum(0)[None],
        {"w": (3, 3)},
        f"has inputs (5, 3) {NO_EXAMPLES}",
    ),
    "frozen matrix": (
        lambda p: X @ (normal(N, 5) @ p["w"])[:3],
        {"w": (5, 2)},
        f"has inputs (6, 5) {NO_EXAMPLES}",
    ),
    "frozen matrix with a multiple of the rows": (
        lambda p: X @ (p["w"] @ normal(4, 2 * N)).T[:3],
        {"w": (2, 4)},
        f"has inputs (4, 12) {NO_EXAMPLES}",
    ),
    "frozen matrix in a loop": (
        lambda p: scanned(lambda h, p: h @ (normal(N, 5) @ p["w"])[:3], p),
        {"w": (2, 5, 3)},
        f"has inputs (6, 5) {NO_EXAMPLES}",
    ),
    "frozen pictures": (
        lambda p: X @ conv(p, normal(N, 2, 2, 3))[:3, 0, 0],
        {"w": (1, 1, 3, 2)},
        f"has inputs (6, 2, 2, 3) {NO_EXAMPLES}",
    ),
    "fixed look-up": (
        lambda p: X @ p["w"][np.arange(N) % 4][:3],
        {"w": (4, 2)},
        f"has indices (6, 1) {NO_EXAMPLES}",
    ),
    "frozen scale": (
        lambda p: X @ (normal(N, 3) * p["w"][None])[:3],
        {"w": (3,)},
        "is combined by `mul` with an array without an axis over the examples",
    ),
    "frozen shift": (
        lambda p: X @ (normal(N, 3) + p["w"][None])[:3],
        {"w": (3,)},
        "is combined by `add` with an array without an axis over the examples",
    ),
    "positions of a loop over the examples": (
        lambda p: lax.map(lambda x: x @ p["w"], normal(N, N, 3)),
        {"w": (3, 2)},
        f"has inputs (6, 3) {NO_EXAMPLES}",
    ),
    "two axes of examples": (
        lambda p: (h := X[:, :2] @ p["w"]) + h.T,
        {"w": (2, N)},
        "has inputs (6, 2) whose examples lie on different axes",
    ),
    "unused": (lambda p: X, {"w": (3,)}, "is not used"),
    "empty": (lambda p: X @ p["w"], {"w": (3, 0)}, "has no entries"),
    "rule": (
        lambda p: matmul(X, p["w"]),
        {"w": (3, 3)},
        "is used by `custom_vjp_call`, which has a derivative rule of its own",
    ),
}


def captured(predict: Any, params: Any) -> Any:
    """The network and what the gradients of the loss per example leave at its layers."""
    network = find(oa.Objective(predict, loss), params)

    @jax.jit
    def run(params: Any) -> Any:
        outputs, pullback, values = network.capture(jax.tree.leaves(params), lambda t: t)
        gradients, generic = pullback(jax.grad(loss)(outputs))
        gradients = jax.tree.map(lambda g: N * g[None], gradients)
        return outputs, values, gradients, generic

    return network, *run(params)


@functools.cache
def captured_case(name: str) -> Any:
    predict, shapes, _ = (CASES | RULES | COUPLED)[name]
    params = jax.tree.map(jnp.asarray, tree(**shapes))
    return params, *captured(predict, params)


def gradients_of(block: Any, values: Any, gradients: Any, generic: Any) -> dict[int, jax.Array]:
    """The gradients of a block's parameters, from what is captured for it."""
    if block.kind == "generic":
        return {block.leaves[0]: generic[block.leaves[0]]}
    if not block.kronecker:
        each = stats.example_gradients(block, values, gradients, N, jnp.float64)
        return {block.leaves[0]: each[0].mean(0)}
    num = (block.num_slices,) if block.stacked else ()
    matrix = jnp.zeros((*num, *block.matrix_shape))
    for part, turned in block.parts():
        for use in part.uses:
            a = stats.inputs_of(part, use, values, N, jnp.float64)
            if part.kind == "embedding":
                a = jax.nn.one_hot(a, part.matrix_shape[0])
            g = stats.gradients_of(use, values, gradients, N, jnp.float64)
            if block.stacked:
                places = stats.places_of(use, values, block.num_slices)
                places = np.arange(block.num_slices) if places is None else places
                matrix = matrix.at[places].add(jnp.einsum("lnti,lnto->lio", a, g[:, 0]) / N)
            else:
                product = jnp.einsum("nti,nto->io", a, g[0]) / N
                matrix = matrix + (product.T if turned else product)
    return dict(zip(block.leaves, block.from_matrix(matrix), strict=True))


def outputs_and_gradient(predict: Any, params: Any) -> tuple[jax.Array, Any]:
    """Of the network as it is written."""

    def loss_and_outputs(p: Any) -> tuple[jax.Array, jax.Array]:
        outputs = predict(p)
        return loss(outputs), outputs

    gradient, outputs = jax.jit(jax.grad(loss_and_outputs, has_aux=True))(params)
    return outputs, gradient


@pytest.mark.parametrize("name", marked([*CASES, *RULES, *COUPLED]))
def test_what_is_found(x64, name):
    """The kinds; for every block the gradient that `jax.grad` gives, from inputs and outputs."""
    predict, _, expected = (CASES | RULES | COUPLED)[name]
    params, network, outputs, *read = captured_case(name)
    assert {n: b.kind for b in network.blocks for n in b.names} == {
        f"['{key}']": kind for key, kind in expected.items()
    }
    plain, gradient = outputs_and_gradient(predict, params)
    np.testing.assert_allclose(outputs, plain, rtol=1e-12)
    want = jax.tree.leaves(gradient)
    found = jax.jit(lambda read: [gradients_of(block, *read) for block in network.blocks])(read)
    for gradients in found:
        for i, got in gradients.items():
            np.testing.assert_allclose(got, want[i], rtol=1e-10, atol=1e-12)
            assert np.isfinite(want[i]).all()


@pytest.mark.parametrize("name", GENERIC)
def test_what_is_not_found(x64, name):
    predict, shapes, reason = GENERIC[name]
    params = jax.tree.map(jnp.asarray, tree(**shapes))
    network, outputs, _, _, generic = captured(predict, params)
    assert {(block.kind, block.reason) for block in network.blocks} == {("generic", reason)}
    plain, gradient = outputs_and_gradient(predict, params)
    np.testing.assert_allclose(outputs, plain, rtol=1e-12)
    for got, want in zip(generic.values(), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (lambda w, x: x @ w, (3, 3), "dense"),
        (lambda w, x: w[(x[:, 0] > 0).astype(int)], (2, 3), "embedding"),
        (lambda w, x: x * w[None], (3,), "scale-shift"),
    ],
)
def test_gradients_belong_to_their_examples(x64, layer, shape, kind):
    """Where time stands before the examples in one axis, and as many positions as examples."""
    x = normal(N, N, 3)
    params = {"w": jnp.asarray(normal(*shape))}

    def predict(p: Any) -> Any:
        return time_first(lambda x: layer(p["w"], x), x)

    network, _, values, gradients, _ = captured(predict, params)
    (block,) = network.blocks
    assert block.kind == kind
    if kind == "scale-shift":
        got = stats.example_gradients(block, values, gradients, N, jnp.float64)[0]
    else:
        (use,) = block.uses
        a = stats.inputs_of(block, use, values, N, jnp.float64)
        a = jax.nn.one_hot(a, 2) if kind == "embedding" else a
        got = jnp.einsum(
            "nti,nto->nio", a, stats.gradients_of(use, values, gradients, N, a.dtype)[0]
        )

    def example_losses(p: Any) -> Any:
        outputs = predict(p)
        return 0.5 * jnp.sum((outputs - normal(*outputs.shape, seed=9)) ** 2, axis=(1, 2))

    want = jax.jacrev(example_losses)(params)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


# -- libraries ------------------------------------------------------------------------------------


def linen_model() -> Any:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(4, (3, 3))(x)).reshape(N, -1, 4)
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(num_heads=2)(x))
            return nn.Dense(3)(x.mean(1))

    model = Model()
    params = model.init(jax.random.key(0), jnp.asarray(IMAGES, jnp.float32))
    return lambda p: model.apply(p, jnp.asarray(IMAGES, jnp.float32)), params


def equinox_model() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [
        eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
        jax.nn.relu,
        jnp.ravel,
        eqx.nn.Linear(80, 5, key=keys[1]),
        eqx.nn.LayerNorm(5),
        eqx.nn.Linear(5, 2, key=keys[2]),
    ]
    params, static = eqx.partition(eqx.nn.Sequential(map(as_layer, layers)), eqx.is_array)
    images = jnp.asarray(IMAGES.transpose(0, 3, 1, 2), jnp.float32)
    return lambda p: jax.vmap(eqx.combine(p, static))(images), params


def as_layer(layer: Any) -> Any:
    return layer if isinstance(layer, eqx.Module) else eqx.nn.Lambda(layer)


def nnx_attention() -> Any:
    model = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=nnx.Rngs(0))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = (nnx.as_pure(state) for state in states)
    x = jnp.asarray(normal(N, T, 6), jnp.float32)
    return lambda p: nnx.merge(graphdef, p, rest)(x), params


class Repeated(nnx.Module):
    """Two layers of one stack, scanned."""

    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, x: Any) -> Any:
        carry = nnx.Carry
        return nnx.scan(lambda layer, x: nnx.remat(layer)(x), in_axes=(0, carry), out_axes=carry)(
            self.layers, x
        )


def nnx_scan() -> Any:
    graphdef, params = nnx.split(Repeated(nnx.Rngs(0)))
    return lambda p: nnx.merge(graphdef, p)(jnp.asarray(X, jnp.float32)), nnx.as_pure(params)


@pytest.mark.parametrize(
    ("build", "counts"),
    [
        (linen_model, {"convolution": 1, "dense": 5, "scale-shift": 2}),
        (equinox_model, {"convolution": 1, "dense": 2, "scale-shift": 2}),
        (nnx_attention, {"dense": 4}),
        (nnx_scan, {"dense": 1}),
    ],
)
def test_libraries(build, counts):
    """Every weight of every layer, with its bias."""
    predict, params = build()
    network = find(oa.Objective(predict, loss), params)
    found = [block.kind for block in network.blocks]
    assert {kind: found.count(kind) for kind in found} == counts
    assert all(block.has_bias for block in network.blocks if block.kronecker)


def test_masked_parameters_have_no_block():
    predict, shapes, _ = CASES["dense"]
    text = oa.describe_layers(
        oa.Objective(predict, loss), tree(**shapes), mask={"w": True, "b": False}
    )
    assert text.splitlines()[1:] == [
        "['w']       dense  3 x 2 Kronecker",
        "6 of 6 parameters (100.0 %) have Kronecker structure.",
    ]


@pytest.mark.parametrize(("size", "count"), [(4, 1), (12, 2)])
def test_what_is_said_of_diagonals(size, count):
    """Of matrices always; of all else where less than half of the parameters have structure."""

    def predict(p: Any) -> Any:
        return X @ p["w"] * p["scale"].sum() + jnp.exp(p["v"]).sum()

    params = jax.tree.map(jnp.asarray, tree(w=(3, 4), v=(2, 2), scale=(size,)))
    tx = oa.scale_by_kfac(oa.Objective(predict, loss))
    pattern = rf"{count} of 3 blocks.* 12 of {16 + size} parameters"
    with pytest.warns(UserWarning, match=pattern) as caught:
        tx.init(params)
    tx.init(params)  # said once
    assert ("['scale']" in str(caught[0].message)) == (count == 2)


def test_outputs_without_examples():
    for predict in (lambda p: p["w"].sum(), lambda p: (X @ p["w"], p["w"])):
        with pytest.raises(ValueError, match="leading axis of the outputs"):
            oa.describe_layers(oa.Objective(predict, loss), tree(w=(3, 2)))
