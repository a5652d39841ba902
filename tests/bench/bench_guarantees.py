"""What completion records and order cost a call to another process of this host.

`python -m tests.bench.bench_guarantees [--rounds N] [--json]`. Two node processes take turns: one
as it is, and one whose core keeps no results, checks no numbers and sends its answers straight out,
so that a repeated, lost or overtaken request would be carried out as it comes. The caller's half
stays as it is: without numbers it could not tell which answer is whose.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import migrate
from migrate.core.delivery import Entry
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Envelope, Reply
from migrate.core.node import Core
from migrate.tools import loops
from migrate.tools.bench import p, per_second, round_trips
from migrate.tools.bench_servers import Counter

CALLS = 4_000
PIPELINED = 40_000


@migrate.server
class Bare:
    """Takes records and order away from the node that it is spawned on."""

    def __init__(self) -> None:
        Core._arrive = _arrive  # type: ignore[method-assign]
        Core._answer = _answer  # type: ignore[method-assign]


def _arrive(self: Core, inc: Incarnation, env: Envelope, now_ms: int) -> None:
    session = inc.sessions.get(env.session)
    if session is None:
        opened = self._session(inc, env.session, env.seq, env.acked_below, env.reply_to, now_ms)
        assert not isinstance(opened, int)
        session = opened
    session.expected = env.seq + 1
    session.pending += 1
    inc.mailbox.append(self._entry(session, env, now_ms))
    self._pump(inc, now_ms)


def _answer(
    self: Core,
    inc: Incarnation,
    entry: Entry,
    status: int,
    payload: bytes | None,
    value: object,
    now_ms: int,
) -> None:
    session = entry.session
    if session is None:
        return
    session.pending -= 1
    if payload is None:
        status, payload = self.port.pack_result(status, value)
    self.port.send(session.reply_to, Reply(session.id, entry.seq, status, payload))


async def measure(rounds: int) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {"with_us": [], "bare_us": [], "with_rate": [], "bare_rate": []}
    async with migrate.LocalCluster(["with", "bare"]) as cluster:
        refs: dict[str, Any] = {}
        async with migrate.Node("here", directory=cluster.directory) as node:
            for name in ("with", "bare"):
                refs[name] = await node.spawn(Counter, options=migrate.SpawnOptions(on=name))
                await round_trips(refs[name].incr, 500)
            await node.spawn(Bare, options=migrate.SpawnOptions(on="bare"))
            for turn in range(rounds):
                for name in ("with", "bare") if turn % 2 else ("bare", "with"):
                    incr = refs[name].incr
                    await round_trips(incr, 200)
                    seen[f"{name}_us"].append(p(await round_trips(incr, CALLS), 0.5) * 1e6)
                    seen[f"{name}_rate"].append(await per_second(incr, PIPELINED))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    seen = loops.run(measure(args.rounds))
    if args.json:
        print(json.dumps(seen))
        return
    middle = {name: statistics.median(values) for name, values in seen.items()}
    pairs = zip(seen["with_us"], seen["bare_us"], strict=True)
    ratio = statistics.median(mine / bare for mine, bare in pairs)
    print(
        f"a call, p50: {middle['with_us']:.1f} us, bare {middle['bare_us']:.1f} us; of it ", end=""
    )
    print(f"{ratio:.3f} (median of {args.rounds} pairs)")
    print(f"256 in flight: {middle['with_rate']:,.0f}/s, bare {middle['bare_rate']:,.0f}/s")


if __name__ == "__main__":
    main()
