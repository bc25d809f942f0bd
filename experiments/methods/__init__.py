"""The one catalogue: every method that the experiments can run, ours and Optax's, by name."""

from experiments.methods.catalogue import METHODS, describe, get_methods
from experiments.methods.method import Context, Method, Paper, Phase

__all__ = ["METHODS", "Context", "Method", "Paper", "Phase", "describe", "get_methods"]
