"""Every scenario that broke another system has a test named after it, or is known to be open."""

from __future__ import annotations

import pathlib
import re
from collections import defaultdict

ROOT = pathlib.Path(__file__).parents[2]

SCENARIOS = {
    1: "order of what is forwarded and what is sent directly",
    2: "what arrives while the state is pickled",
    3: "target killed after it had the bytes",
    4: "either side killed right after the commit",
    5: "time-out in the same tick as the commit",
    6: "pickling raises",
    7: "unpickling raises",
    8: "the target holds the same id",
    9: "new copy starts before the last write of the old one",
    10: "a ten-minute request when a drain starts",
    11: "a server that is never idle",
    12: "a hook that hangs",
    13: "timers and calls to itself during a move",
    14: "two that move at once and call each other in their hooks",
    15: "A calls B calls A while B moves",
    16: "ten rapid moves",
    17: "late and repeated news of a place",
    18: "a forwarding address that has expired",
    19: "the forwarding limit",
    20: "a cast to a server that has moved",
    21: "full mailboxes and buffers",
    22: "a control message that is lost",
    23: "death of a third node",
    24: "a slow third node",
    25: "a drain longer than its limit",
    26: "a node restarted under the same address",
    27: "a partition that heals",
    28: "a stale copy that goes on",
    29: "a death that was not told",
    30: "the directory fails in the middle of a move",
    31: "a pending call and a monitor follow a move",
    32: "a reply to a caller that has moved",
    33: "forwarded after it was handled",
    34: "reads before the state is complete",
    35: "a large state",
    36: "class missing or older at the target",
    37: "drain of the last node",
    38: "two nodes that drain together",
    39: "conflicting moves",
    40: "a handler that holds its node",
    41: "a retry under the same number",
    42: "what was buffered leaves at once",
    43: "memory dirtied faster than it is sent",
    44: "downtime of a lightly written server",
    45: "peak memory of a move",
    46: "other servers during a move under load",
    47: "a thousand moves under load",
    48: "a paused owner wakes after a promotion",
    49: "the directory is away for ten seconds",
    50: "completion records over a million calls",
    51: "a standby that lost its memory",
    52: "drain of a group whose members call each other",
    53: "power cut in the write of a checkpoint",
}

OPEN = {25, 46}
"""Of standbys, pre-copy and other things that are still to be built."""


def named_tests() -> dict[int, list[str]]:
    """Names of the tests that are named after a scenario."""
    found = defaultdict(list)
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text()
        for name, number in re.findall(r"^def (test_s(\d\d)_\w+)\(", text, re.MULTILINE):
            found[int(number)].append(f"{file.relative_to(ROOT)}::{name}")
    return dict(found)


def test_every_scenario_that_is_not_open_has_a_test() -> None:
    found = named_tests()
    missing = {n: SCENARIOS[n] for n in SCENARIOS if n not in found and n not in OPEN}
    assert missing == {}


def test_no_scenario_with_a_test_is_called_open_and_no_test_is_named_after_none() -> None:
    found = named_tests()
    assert {n: found[n] for n in OPEN if n in found} == {}
    assert {n: found[n] for n in found if n not in SCENARIOS} == {}
