"""Uses of parameters grouped into blocks, whose curvature is approximated together.

A vector added to the output of a dense layer or a convolution is its bias, one block with it.  A
parameter used several times in the same way (over time, over branches) has one block, the sum over
its uses.  Uses from which no gradient comes back (``stop_gradient``, rounding) do not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from optax_accel.natural_gradient.following import Follower
from optax_accel.natural_gradient.layers import Block
from optax_accel.natural_gradient.layouts import Ops

# What is said of parameters that no layer could have.
UNUSED = ("has no entries", "has no gradient", "is not used")


class Grouping:
    """The blocks of the parameters that were followed through a program."""

    def __init__(self, follower: Follower):
        """Finds out how each parameter is used."""
        self._follower = follower
        program = follower.program
        self._shapes = [program.shape(number) for number in program.inputs]
        self._readers = program.readers()
        # Indices of the uses of each parameter, and why a parameter cannot have a layer.
        self._uses: dict[int, list[int]] = {leaf: [] for leaf in range(len(self._shapes))}
        for index, use in enumerate(follower.uses):
            if use.output in self._readers:
                self._uses[use.leaf].append(index)
        self._reasons = self._why_generic()

    def _why_generic(self) -> dict[int, str]:
        follower = self._follower
        reasons: dict[int, str] = {}
        for refusal in follower.refusals:
            if any(number in self._readers for number in refusal.results):
                reasons.setdefault(refusal.leaf, refusal.reason)
        seen = {refusal.leaf for refusal in follower.refusals} | {u.leaf for u in follower.uses}
        for leaf, indices in self._uses.items():
            kinds = sorted({follower.uses[i].kind for i in indices})
            layouts = {follower.uses[i].ops for i in indices}
            if 0 in self._shapes[leaf]:
                reasons[leaf] = "has no entries"
            elif not indices:
                reasons.setdefault(leaf, "has no gradient" if leaf in seen else "is not used")
            elif len(kinds) > 1:
                reasons.setdefault(leaf, f"is used as {' and as '.join(kinds)}")
            elif kinds != ["scale-shift"] and len(layouts) > 1:
                reasons.setdefault(leaf, "is used in several layouts")
        return reasons

    def blocks(self, names: Sequence[str], selected: Sequence[bool]) -> Iterator[Block]:
        """The blocks, in the order of the parameters.

        Args:
          names: of the parameters.
          selected: for each parameter whether it takes part.
        """
        biases = {
            leaf: bias
            for leaf in self._uses
            if leaf not in self._reasons
            and selected[leaf]
            and (bias := self._bias_of(leaf)) is not None
            and selected[bias[0]]
        }
        joined = {leaf for leaf, _ in biases.values()}
        for leaf, indices in self._uses.items():
            if leaf in joined or not selected[leaf]:
                continue
            leaves: tuple[int, ...] = (leaf,)
            uses = tuple(self._follower.uses[i] for i in indices)
            if leaf in biases:
                partner, ops = biases[leaf]
                leaves += (partner,)
                uses = tuple(dataclasses.replace(use, bias_ops=ops) for use in uses)
            reason = self._reasons.get(leaf, "")
            yield Block(
                "generic" if reason else uses[0].kind,
                leaves,
                tuple(names[i] for i in leaves),
                tuple(self._shapes[i] for i in leaves),
                () if reason else uses,
                reason,
            )

    def _bias_of(self, leaf: int) -> tuple[int, Ops] | None:
        """The bias that is added in every one of a layer's uses, and nowhere else."""
        indices, uses = self._uses[leaf], self._follower.uses
        candidates = [
            [
                (shift, ops)
                for shift, ops in self._follower.biases.get(i, [])
                if uses[shift].output in self._readers
            ]
            for i in indices
        ]
        if any(len(shifts) != 1 for shifts in candidates):
            return None
        partners = {(uses[shift].leaf, ops) for ((shift, ops),) in candidates}
        if len(partners) != 1:
            return None
        ((bias, ops),) = partners
        # The gradient of the bias is the layer's only if nothing else reads the layer's output.
        only_reader = all(
            self._readers[number] == 1
            for number, (index, _) in self._follower.outputs.items()
            if index in indices
        )
        shifts = sorted(shift for ((shift, _),) in candidates)
        if bias in self._reasons or shifts != self._uses[bias] or not only_reader:
            return None
        return bias, ops
