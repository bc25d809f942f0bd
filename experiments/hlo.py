"""Reads compiled programs: their memory, their collectives, and what these cost."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# XLA has these as well, but nothing here makes them and the cost models below do not cover them.
UNSUPPORTED = ("collective-broadcast", "ragged-all-to-all")


class Memory(NamedTuple):
    """Bytes that a compiled program needs on each device, as the compiler plans it.

    Attributes:
      temp: of intermediate results.
      total: of arguments, results and intermediate results together; a donated argument and the
        result that takes its place count once.
    """

    temp: int
    total: int


def memory(compiled: Any) -> Memory:
    """The memory that the compiler has planned for a program.

    >>> import jax
    >>> memory(jax.jit(lambda x: 2 * x).lower(jax.numpy.zeros(10)).compile()).total
    80

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns.

    Returns:
      The bytes per device.
    """
    planned = compiled.memory_analysis()
    assert planned is not None  # all platforms of JAX tell
    total = planned.temp_size_in_bytes + planned.argument_size_in_bytes
    total += planned.output_size_in_bytes - planned.alias_size_in_bytes
    return Memory(planned.temp_size_in_bytes, total)


class Branch(NamedTuple):
    """One branch of a conditional.

    Attributes:
      conditional: name of the instruction.
      number: index of this branch, from 0.
      of: number of branches; each execution runs one of them.
    """

    conditional: str
    number: int
    of: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective instruction of a compiled program, as one device sees it.

    Attributes:
      kind: one of `KINDS`.
      bytes: size of the whole array: what one device has reduced, scattered, exchanged or passed
        on, or what it holds after an all-gather.
      group: number of devices that take part together; for a permute, of those that send or
        receive.
      times: executions per execution of the program (or of the branch), which is the product of the
        trip counts of the loops around it; None where a trip count is unknown.
      branches: the branches of conditionals that contain it, the outermost first.
    """

    kind: str
    bytes: int
    group: int
    times: int | None = 1
    branches: tuple[Branch, ...] = ()


def collectives(compiled: Any) -> list[Collective]:
    """The collectives in the optimized HLO of a compiled program.

    An asynchronous pair (``-start``, ``-done``) counts once. So does a collective that carries
    several arrays; its bytes are their sum.

    >>> text = '''HloModule total, num_partitions=8
    ... ENTRY main (x: f32[6,5]) -> f32[6,5] {
    ...   x = f32[6,5] parameter(0)
    ...   ROOT y = f32[6,5] all-reduce(x), replica_groups={}, to_apply=add
    ... }'''
    >>> collectives(text)
    [Collective(kind='all-reduce', bytes=120, group=8, times=1, branches=())]

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns, or its ``as_text()``.

    Returns:
      The collectives between different devices, in the order of the program.

    Raises:
      ValueError: the text is not a program that this function understands.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    return [collective for collective in _Program(text).walk() if collective.group > 1]


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: list[str]
    attributes: str


class _Program:
    """The computations of an HLO module in text form."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        header = text.split("\n", 1)[0]
        self.devices = math.prod(
            int(match[1])
            for name in ("num_partitions", "replica_count")
            if (match := re.search(rf"\b{name}=(\d+)", header))
        )
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
                current = self.computations[match[2]] = {}
                if match[1]:
                    self.entry = match[2]
            elif line.startswith(" ") and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("not the text of a compiled program: it has no ENTRY computation")

    def walk(self) -> Iterator[Collective]:
        """The collectives, in order, through loops, branches and calls."""
        return self._walk(self.entry, 1, ())

    def _walk(
        self, name: str, times: int | None, branches: tuple[Branch, ...]
    ) -> Iterator[Collective]:
        computation = self.computations[name]
        for instruction in computation.values():
            kind = instruction.op.removesuffix("-start")
            if kind in UNSUPPORTED:
                raise ValueError(f"no cost is known for {kind}: {instruction.name}")
            if kind in KINDS:
                size, group = self._size(instruction, computation), self._group(instruction)
                if kind == "all-gather":
                    size *= group
                yield Collective(kind, size, group, times, branches)
            elif instruction.op == "conditional":
                called = _called(instruction, "branch_computations")
                called = called or [
                    *_called(instruction, "true_computation"),
                    *_called(instruction, "false_computation"),
                ]
                for i, branch in enumerate(called):
                    path = (*branches, Branch(instruction.name, i, len(called)))
                    yield from self._walk(branch, times, path)
            elif instruction.op == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
                inner = int(trips[1]) * times if trips and times is not None else None
                for key in ("condition", "body"):
                    for body in _called(instruction, key):
                        yield from self._walk(body, inner, branches)
            elif not instruction.op.endswith(("-update", "-done")):  # these repeat their -start's
                for key in ("calls", "to_apply", "called_computations"):
                    for callee in _called(instruction, key):
                        yield from self._walk(callee, times, branches)

    def _size(self, instruction: _Instruction, computation: dict[str, _Instruction]) -> int:
        return sum(_bytes(computation[name].shape) for name in instruction.operands)

    def _group(self, instruction: _Instruction) -> int:
        attributes = instruction.attributes
        if match := re.search(r"source_target_pairs=([\d{},]*)", attributes):
            pairs = re.findall(r"(\d+),(\d+)", match[1])
            return len({device for pair in pairs if pair[0] != pair[1] for device in pair})
        if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
            return match[1].count(",") + 1
        if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(match[1])
        if match := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", attributes):
            sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
            axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", match[2])  # perhaps part of an axis
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        if "replica_groups={}" in attributes or "replica_groups=" not in attributes:
            return self.devices
        raise ValueError(f"cannot read the replica groups of {instruction.name}: {attributes}")


def _parse(line: str) -> _Instruction:
    """One line: ``ROOT %name = shape op(operands), attributes``."""
    line = re.sub(r"/\*.*?\*/", "", line).strip().removeprefix("ROOT ")
    name, rest = line.split(" = ", 1)
    match = re.search(r"(?:^|\s)([a-z][a-z0-9\-]*)\(", rest)
    if match is None:
        raise ValueError(f"cannot read this line of a compiled program: {line}")
    depth, end = 1, match.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    # Some versions print the shape of an operand before its name, some the % of the name.
    operands = re.findall(r"(?:^|\s)%?([\w.\-]+)(?=,|$)", rest[match.end() : end - 1])
    return _Instruction(name.lstrip("%"), rest[: match.start()], match[1], operands, rest[end:])


def _called(instruction: _Instruction, key: str) -> list[str]:
    match = re.search(rf"\b{key}=(\{{.*?\}}|%?[\w.\-]+)", instruction.attributes)
    return re.findall(r"[\w.\-]+", match[1]) if match else []


def _bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple, e.g. ``(f32[8,4]{1,0}, bf16[])``."""
    bits = 0
    for dtype, dimensions in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape):
        width = {"pred": 8, "token": 0}.get(dtype)
        if width is None:
            digits = re.search(r"\d+", dtype)
            assert digits is not None, dtype
            width = int(digits[0])
        bits += width * math.prod(int(d.lstrip("<=")) for d in dimensions.split(",") if d)
    return bits // 8


class Cost(NamedTuple):
    """What collectives cost.

    Attributes:
      sent: bytes that a worker sends.
      hops: messages that a worker sends one after the other, each of which takes the network's
        latency.
    """

    sent: float
    hops: float

    def __add__(self, other: Any) -> Cost:
        return Cost(self.sent + other.sent, self.hops + other.hops)

    def __mul__(self, factor: Any) -> Cost:
        return Cost(self.sent * factor, self.hops * factor)


def cost(collective: Collective, workers: int | None = None) -> Cost:
    """What one execution costs, by the usual models.

    Around a ring of n workers, an all-gather and a reduce-scatter of b bytes send (n - 1) / n b in
    n - 1 hops, and an all-reduce is one after the other; an all-to-all exchanges with each worker
    in turn; a permute sends everything in one hop. No algorithm for these sends less. Recursive
    halving and doubling sends as much in log2 n instead of n - 1 hops.

    >>> cost(Collective("all-reduce", bytes=120, group=8))
    Cost(sent=210.0, hops=14)

    Args:
      collective: the collective.
      workers: n; None for the size of the collective's own group.

    Returns:
      The cost for the busiest worker.

    References:
      Thakur, Rabenseifner, Gropp, `Optimization of collective communication operations in MPICH
      <https://doi.org/10.1177/1094342005051521>`_, 2005, section 4; for the ring also Patarasu,
      Yuan, `Bandwidth optimal all-reduce algorithms for clusters of workstations
      <https://doi.org/10.1016/j.jpdc.2008.09.002>`_, 2009.
    """
    workers = workers or collective.group
    if workers == 1:
        return Cost(0.0, 0)
    if collective.kind == "collective-permute":
        return Cost(float(collective.bytes), 1)
    rounds = 2 if collective.kind == "all-reduce" else 1
    return Cost(rounds * collective.bytes * (workers - 1) / workers, rounds * (workers - 1))


def total_cost(program: Sequence[Collective], workers: int | None = None) -> Cost:
    """What several collectives cost together.

    Args:
      program: the collectives. Each runs as often as the loops around it say, or once where that is
        unknown.
      workers: number of workers; None for the size of each collective's own group.

    Returns:
      The sum of their costs.
    """
    costs = (cost(collective, workers) * (collective.times or 1) for collective in program)
    return sum(costs, start=Cost(0.0, 0))


def sent(program: Sequence[Collective]) -> float:
    """Bytes that a device sends in all of these collectives."""
    return total_cost(program).sent


def split(program: Sequence[Collective]) -> tuple[list[Collective], list[list[Collective]]]:
    """Separates what every execution of a program sends from what conditionals add now and then.

    Args:
      program: the collectives of a program.

    Returns:
      The collectives that run in any case, which for a conditional are those of its cheapest
      branch; and, for each conditional that has a dearer branch, those of its dearest one.
    """
    always: list[Collective] = []
    sometimes: list[list[Collective]] = []
    conditionals: dict[str, list[list[Collective]]] = {}
    for collective in program:
        if not collective.branches:
            always.append(collective)
            continue
        (name, number, of), *inner = collective.branches
        branches = conditionals.setdefault(name, [[] for _ in range(of)])
        branches[number].append(dataclasses.replace(collective, branches=tuple(inner)))
    for branches in conditionals.values():
        low, high = (pick(branches, key=sent) for pick in (min, max))
        inner_always, inner_sometimes = split(low)
        always += inner_always
        sometimes += inner_sometimes
        if sent(high) > sent(low):
            sometimes.append(high)
    return always, sometimes
