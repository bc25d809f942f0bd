"""Uses of parameters grouped into blocks, whose curvature is approximated together.

A vector added to the output of a dense layer or a convolution is its bias, one block with it.  A
parameter used several times in the same way (over time, over branches) has one block, the sum over
its uses; so has a matrix that is used transposed as well, or both as a table and as a weight (tied
embeddings).  Uses from which no gradient comes back (``stop_gradient``, rounding) do not count.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from optax_accel.natural_gradient.effective import Computed, views_of
from optax_accel.natural_gradient.following import Follower
from optax_accel.natural_gradient.layers import Block, Use
from optax_accel.natural_gradient.layouts import Ops, simplified

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
        self._computed: dict[int, list[int]] = {}  # likewise, of weights computed from parameters
        for index, use in enumerate(follower.uses):
            if use.output not in self._readers:
                continue
            if use.leaf in self._uses:
                self._uses[use.leaf].append(index)
            elif isinstance(follower.weights[use.leaf - len(self._uses)], Computed):
                self._computed.setdefault(use.leaf, []).append(index)
        # Of each parameter of such a weight that has a layer, the weight.
        self._weight_of: dict[int, int] = {}
        self._reasons = self._why_generic()

    def _why_generic(self) -> dict[int, str]:
        follower = self._follower
        reasons: dict[int, str] = {}
        for refusal in follower.refusals:
            if any(number in self._readers for number in refusal.results):
                reasons.setdefault(refusal.leaf, refusal.reason)
        self._note_computed(reasons)
        seen = {refusal.leaf for refusal in follower.refusals} | {u.leaf for u in follower.uses}
        for weight in follower.weights:
            seen |= {view.leaf for view in views_of(weight)}
        for leaf, indices in self._uses.items():
            if leaf in self._weight_of:
                continue
            uses = [follower.uses[i] for i in indices]
            kinds = sorted({use.kind for use in uses})
            layouts = {use.ops for use in uses}
            if 0 in self._shapes[leaf]:
                reasons[leaf] = "has no entries"
            elif not indices:
                reasons.setdefault(leaf, "has no gradient" if leaf in seen else "is not used")
            elif self._tied(uses):
                pass
            elif len(kinds) > 1:
                reasons.setdefault(leaf, f"is used as {' and as '.join(kinds)}")
            elif kinds != ["scale-shift"] and len(layouts) > 1:
                reasons.setdefault(leaf, "is used in several layouts")
        return reasons

    def _note_computed(self, reasons: dict[int, str]) -> None:
        """Finds the weights whose parameters are used in nothing else; adds reasons for others."""
        follower = self._follower
        leaves = {weight: follower.parameters_of(weight) for weight in self._computed}
        counts = collections.Counter(leaf for some in leaves.values() for leaf in some)
        for weight, indices in self._computed.items():
            layouts = {(use.kind, use.ops) for use in (follower.uses[i] for i in indices)}
            own = leaves[weight]
            free = all(
                counts[i] == 1
                and not self._uses[i]
                and i not in reasons
                and 0 not in self._shapes[i]
                for i in own
            )
            if free and len(layouts) == 1:
                self._weight_of.update(dict.fromkeys(own, weight))
                continue
            computed = follower.weights[weight - len(self._uses)]
            assert isinstance(computed, Computed)
            for i in own:
                reasons.setdefault(i, computed.reason)

    def _block_of_weight(
        self, weight: int, names: Sequence[str], selected: Sequence[bool]
    ) -> Block:
        """The block of a weight that is computed, with all of its parameters that take part."""
        own = [i for i, of in self._weight_of.items() if of == weight and selected[i]]
        leaves = tuple(sorted(own))
        uses = tuple(self._follower.uses[i] for i in self._computed[weight])
        computed = self._follower.weights[weight - len(self._uses)]
        assert isinstance(computed, Computed)
        return Block(
            uses[0].kind,
            leaves,
            tuple(names[i] for i in leaves),
            tuple(self._shapes[i] for i in leaves),
            uses,
            function=self._follower.program.function_of_inputs(computed.number),
        )

    def _tied(self, uses: Sequence[Use]) -> tuple[Use, ...]:
        """Different uses of one matrix, as a table, as a weight or as its transpose; or none."""
        kinds = {use.kind for use in uses}
        if not kinds <= {"dense", "embedding"} or len({(u.kind, u.ops) for u in uses}) < 2:
            return ()
        shape = self._shapes[uses[0].leaf]
        first = next((use for use in uses if use.kind == "embedding"), uses[0])
        plain = simplified(first.ops, shape)
        turned = simplified((*first.ops, ("transpose", (1, 0))), shape)
        tied = []
        for use in uses:
            own = simplified(use.ops, shape)
            if len(use.ops[-1][1]) != 2 or own not in (plain, turned):
                return ()
            tied.append(dataclasses.replace(use, transposed=own != plain))
        # The first use gives the layout of the block.
        return tuple(sorted(tied, key=lambda use: (use.transposed, use.kind != "embedding")))

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
            and leaf not in self._weight_of
            and selected[leaf]
            and (bias := self._bias_of(leaf)) is not None
            and selected[bias[0]]
        }
        joined = {leaf for leaf, _ in biases.values()}
        for leaf, indices in self._uses.items():
            if leaf in joined or not selected[leaf]:
                continue
            if leaf in self._weight_of:
                block = self._block_of_weight(self._weight_of[leaf], names, selected)
                if leaf == block.leaves[0]:
                    yield block
                continue
            leaves: tuple[int, ...] = (leaf,)
            uses = tuple(self._follower.uses[i] for i in indices)
            if leaf in biases:
                partner, ops = biases[leaf]
                leaves += (partner,)
                uses = tuple(dataclasses.replace(use, bias_ops=ops) for use in uses)
            reason = self._reasons.get(leaf, "")
            kind = "generic" if reason else uses[0].kind
            if kind != "generic" and (tied := self._tied(uses)):
                ways = {(use.kind, use.transposed) for use in tied}
                uses, kind = tied, "tied" if len(ways) > 1 else kind
            yield Block(
                kind,
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
        if any(len(shifts) != 1 for shifts in candidates) or self._tied([uses[i] for i in indices]):
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
