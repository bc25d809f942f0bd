"""The policies of mixed precision: which dtypes a network computes in."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy of mixed precision: the dtypes that a network trains in.

    Parameters, and with them gradients and the state of the optimizer, are float32; the network
    casts them, and its inputs, to ``compute``; its outputs are cast to float32, in which the loss
    and all that follows is computed.

    >>> PRECISIONS["bf16"].options, PRECISIONS["bf16"].needs_loss_scale
    ({'dtype': 'bfloat16', 'param_dtype': 'float32'}, False)

    Attributes:
      compute: dtype of activations and of matrix products.
    """

    compute: str

    @property
    def options(self) -> dict[str, Any]:
        """Options for `models.create`."""
        if self.compute == "float32":
            return {}
        return {"dtype": self.compute, "param_dtype": "float32"}

    @property
    def needs_loss_scale(self) -> bool:
        """Whether small gradients would be lost; bfloat16 has the range of float32."""
        return self.compute == "float16"


PRECISIONS = {
    "f32": Precision("float32"),
    "bf16": Precision("bfloat16"),
    "f16": Precision("float16"),
}
