"""The one catalogue: every method that the experiments can run, ours and Optax's, by name."""

from experiments.methods.catalogue import METHODS, Context, Method, get_methods

__all__ = ["METHODS", "Context", "Method", "get_methods"]
