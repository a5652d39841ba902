"""Which fault struck moves in which phase: the pairs that there are, and those that cannot be.

A pair is counted when the fault happens, by the phase that a move's machine is in at that very
moment. A fault of a node counts for the moves of that node, as "of the other" for the other
side of those moves, and as "of a third" for moves that the node has no part in. A broken or
blocked link counts for moves between its two ends; what happens to a message, for the moves of
the nodes that send and receive it; a failed question to the directory, for the move that asked.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, TypeAlias

from migrate.core.move import SourceMove, SourcePhase, TargetMove, TargetPhase

Move: TypeAlias = SourceMove | TargetMove
Hits: TypeAlias = "Counter[tuple[str, str]]"

PHASES: Final = (
    *(f"source {p.name}" for p in SourcePhase if p is not SourcePhase.ENDED),
    *(f"target {p.name}" for p in TargetPhase if p is not TargetPhase.ENDED),
)

AIM: Final[dict[str, float]] = {
    "source PREPARING": 0.05,
    "source COPYING": 0.05,
    "source QUIESCING": 0.05,
    "source ENCODING": 0.05,
    "source SHIPPING": 0.05,
    "source COMMITTING": 0.3,
    "source COMMITTED": 0.3,
    "source RECLAIMING": 1.0,
    "source RELEASING": 0.2,
    "target CHECKING": 0.1,
    "target RESERVED": 0.05,
    "target DECODING": 0.1,
    "target READY": 0.2,
    "target LIVE": 0.3,
}
"""Share of the times a phase is entered at which a fault is aimed at it, times `Plan.aim`: the
rarer and shorter a phase, the more often."""

NODE_FAULTS: Final = ("crash", "pause", "slow node")
FAULTS: Final = (
    *(f"{kind}{of}" for kind in NODE_FAULTS for of in ("", " of the other", " of a third")),
    "break",
    "partition",
    "one way",
    "split",
    "loss",
    "duplicate",
    "spike",
    "reorder",
    "withdraw",
    "directory slow",
    "directory away",
    "directory cut",
    "directory answer lost",
    "encode fails",
    "decode fails",
    "class refused",
    "copy fails",
    "take fails",
)

ASKS_DIRECTORY: Final = (
    "source COMMITTING",
    "source RECLAIMING",
    # A target begins to watch the row when it has to wait for its source.
    "target RESERVED",
    "target DECODING",
    "target READY",
    "target LIVE",
)

ONLY_IN: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    **{
        fault: (ASKS_DIRECTORY, "a move asks the directory in these phases only")
        for fault in (
            "directory slow",
            "directory away",
            "directory cut",
            "directory answer lost",
        )
    },
    "encode fails": (("source ENCODING",), "the state is captured in this phase only"),
    "decode fails": (("target DECODING",), "the state is loaded in this phase only"),
    "class refused": (("target CHECKING",), "the class is looked for in this phase only"),
    "copy fails": (("source COPYING",), "the state is sent ahead in this phase only"),
    "take fails": (("target RESERVED",), "chunks are installed in this phase only"),
}
"""Faults that can strike in some phases only: which, and why."""

WANTED: Final = 1_000
"""How often each possible pair must have happened over the campaigns."""


def phase_of(move: Move) -> str:
    """The phase of a move's machine, as one of PHASES (or an end)."""
    return f"{'source' if type(move) is SourceMove else 'target'} {move.phase.name}"


def possible(phase: str, fault: str) -> bool:
    """Whether a fault can strike a move in a phase."""
    return fault not in ONLY_IN or phase in ONLY_IN[fault][0]


def table(hits: Hits) -> str:
    """All pairs as text; `-` where a pair cannot be, with the reasons below."""
    lines = [f"{'phase of a move x fault':<30}{'times':>10}"]
    for fault in FAULTS:
        lines.append(fault)
        for phase in PHASES:
            if possible(phase, fault):
                n = hits[phase, fault]
                lines.append(f"  {phase:<28}{n:>10}{'' if n >= WANTED else '  too few'}")
    lines.append("Pairs that cannot be:")
    for fault, (phases, reason) in ONLY_IN.items():
        lines.append(f"  {fault} but in {', '.join(phases)}: {reason}")
    return "\n".join(lines)


def rarest(hits: Hits) -> tuple[int, str]:
    """The possible pair that happened least often, and how often that was."""
    return min(
        (hits[phase, fault], f"{fault} in {phase}")
        for phase in PHASES
        for fault in FAULTS
        if possible(phase, fault)
    )
