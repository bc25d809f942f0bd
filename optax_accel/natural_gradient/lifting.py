"""Uses of parameters in a loop, as seen from around it: as uses of all iterations at once."""

from __future__ import annotations

import dataclasses

from optax_accel.natural_gradient.layers import Use
from optax_accel.natural_gradient.program import Loop, Program


def lift(use: Use, program: Program, loop: Loop, depth: int) -> Use | None:
    """The use of a parameter by all iterations of a loop.

    Activations and gradients of all iterations have a leading axis.  Where the parameter is
    scanned, or indexed anew in every iteration, it numbers slices of the parameter; else iterations
    are further positions of the layer.

    Args:
      use: in the body of the loop.
      program: around the loop.
      loop: the loop.
      depth: of the loop's body.

    Returns:
      The use; None if the slice that an iteration scans is indexed by a number that changes.
    """

    def around(number: int | None) -> int | None:
        return None if number is None else program.of_all_iterations(loop, number)

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis + 1 for axis in axes)

    use = dataclasses.replace(
        use,
        columns=moved(use.columns),
        rows=moved(use.rows),
        output_rows=moved(use.output_rows),
        channels=moved(use.channels),
        stack=moved(use.stack),
        output_stack=moved(use.output_stack),
        output=program.of_all_iterations(loop, use.output),
        input=around(use.input),
        coefficient=around(use.coefficient),
    )
    scanned = [axis for axis, d in use.loops if d == depth]
    slot = use.slot
    indexed = slot is not None and slot.number is not None
    if slot is not None and indexed:
        if scanned:
            return None
        slot = slot._replace(number=around(slot.number))
    loops = tuple((axis, d) for axis, d in use.loops if d != depth)
    use = dataclasses.replace(use, slot=slot, loops=loops)
    if use.kind == "scale-shift" and scanned:
        return dataclasses.replace(
            use, channels=(0, *use.channels), core_axes=(*scanned, *use.core_axes)
        )
    if indexed or scanned:
        return dataclasses.replace(use, stack=(0, *use.stack), output_stack=(0, *use.output_stack))
    return dataclasses.replace(use, rows=(*use.rows, 0), output_rows=(*use.output_rows, 0))
