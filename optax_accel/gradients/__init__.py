"""Gradients that are not plain back-propagation: what enters an optimizer is made differently."""

from optax_accel.gradients.masks import (
    SampleGradientsState,
    bernoulli_per_element,
    bernoulli_per_tensor,
    sample_gradients,
    stoch_grad_adam,
)

__all__ = [
    "SampleGradientsState",
    "bernoulli_per_element",
    "bernoulli_per_tensor",
    "sample_gradients",
    "stoch_grad_adam",
]
