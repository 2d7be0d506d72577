"""What a compiled program says of itself: its HLO text, loops counted as often as they run.

XLA's own ``cost_analysis`` counts the body of a loop once, and a scanned tower is a loop.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4}
_BYTES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8}

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_LOOP = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclass
class _Computation:
    """One function of the program."""

    cycles: int = 0  # the compiler's estimate of one run, without what it calls
    limit: int = 1  # the largest integer constant: of a loop's condition, how often it holds
    calls: list[tuple[str, str, int]] = field(
        default_factory=list
    )  # (name, condition, known trips)
    collectives: list[tuple[str, int, int]] = field(default_factory=list)  # (kind, channel, bytes)


@dataclass(frozen=True)
class Program:
    """The figures of one compiled program, on one chip."""

    cycles: int  # 0 where the compiler gives none (only the TPU's does)
    collectives: dict[str, int]  # kind -> bytes of the results, in one run


def read(text: str) -> Program:
    """The figures of ``compiled.as_text()``."""
    computations, entry = _parse(text.splitlines())
    times = _times(computations, entry)
    cycles = sum(times.get(name, 0) * each.cycles for name, each in computations.items())
    sent: dict[tuple[str, int], int] = {}
    for name, each in computations.items():
        for kind, channel, size in each.collectives:
            # One collective may be cut in pieces, to overlap with work; they share a channel.
            key = (kind, channel)
            sent[key] = max(sent.get(key, 0), times.get(name, 0) * size)
    totals = {kind: sum(v for (k, _), v in sent.items() if k == kind) for kind in COLLECTIVES}
    return Program(cycles, {kind: size for kind, size in totals.items() if size})


def results(text: str, kind: str) -> list[int]:
    """Bytes of every result of every collective of one kind in ``compiled.as_text()``."""
    found = (_COLLECTIVE.search(line) for line in text.splitlines())
    return [size for each in found if each and each[2] == kind for size in _sizes(each[1])]


def _parse(lines) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, here = "", _Computation()
    for line in lines:
        if (head := _HEAD.match(line)) and " = " not in line.split("(", 1)[0]:
            here = computations.setdefault(head.group(2), _Computation())
            entry = head.group(2) if head.group(1) else entry
        else:
            _note(here, line)
    return computations, entry


def _note(here: _Computation, line: str) -> None:
    """Add what one instruction says to its computation."""
    if found := _CYCLES.search(line):
        here.cycles += int(found.group(1))
    if found := _LIMIT.search(line):
        here.limit = max(here.limit, int(found.group(1)))
    if found := _LOOP.search(line):
        known = _TRIPS.search(line)
        here.calls.append((found.group(2), found.group(1), int(known.group(1)) if known else 0))
    elif found := _CALLED.search(line):
        here.calls.append((found.group(1), "", 1))
    if found := _COLLECTIVE.search(line):
        channel = _CHANNEL.search(line)
        size = max(_sizes(found.group(1)), default=0)
        here.collectives.append((found.group(2), int(channel.group(1)) if channel else 0, size))


def _sizes(types: str) -> Iterator[int]:
    """Bytes of every array type in a piece of HLO."""
    for dtype, shape in _ARRAY.findall(types):
        yield _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)


def _times(computations: dict[str, _Computation], entry: str) -> dict[str, int]:
    """How often each computation runs when the program runs once."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for called, condition, known in computations[name].calls:
            if called in computations:
                trips = known or computations.get(condition, _Computation()).limit
                visit(called, count * trips)

    visit(entry, 1)
    return times
