"""Gradients that are not plain back-propagation: what enters an optimizer is made differently."""

from optax_accel.gradients.feedback_alignment import (
    dfa_feedback,
    dfa_value_and_grad,
    feedback_alignment,
)
from optax_accel.gradients.forward import (
    ForwardGradientState,
    forward_gradient,
    forward_value_and_grad,
)
from optax_accel.gradients.masks import (
    SampleGradientsState,
    bernoulli_per_element,
    bernoulli_per_tensor,
    sample_gradients,
    stoch_grad_adam,
)
from optax_accel.gradients.sampled_layers import (
    SampledProductGradientsState,
    sample_products,
    sampled_product_gradients,
)
from optax_accel.gradients.sampled_products import (
    sampled_conv,
    sampled_conv_general_dilated,
    sampled_dot_general,
    sampled_matmul,
)
from optax_accel.gradients.sampled_terms import SampledTerms, sample_terms
from optax_accel.gradients.taps import Taps

__all__ = [
    "ForwardGradientState",
    "SampleGradientsState",
    "SampledProductGradientsState",
    "SampledTerms",
    "Taps",
    "bernoulli_per_element",
    "bernoulli_per_tensor",
    "dfa_feedback",
    "dfa_value_and_grad",
    "feedback_alignment",
    "forward_gradient",
    "forward_value_and_grad",
    "sample_gradients",
    "sample_products",
    "sample_terms",
    "sampled_conv",
    "sampled_conv_general_dilated",
    "sampled_dot_general",
    "sampled_matmul",
    "sampled_product_gradients",
    "stoch_grad_adam",
]
