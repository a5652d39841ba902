"""A new release is rolled out: servers move to nodes that have it while callers keep calling."""

import asyncio
import json
import os
import pathlib
import sys
import tempfile
from asyncio.subprocess import PIPE, Process

import migrate

OLD = """
import migrate

@migrate.server
class Cart:
    def __init__(self):
        self.prices = []                  # version 1 keeps amounts in units: 1.25

    def add(self, price):
        self.prices.append(price)
        return len(self.prices)

    def total(self):
        return sum(self.prices)
"""

NEW = """
import migrate

@migrate.server(version=2)
class Cart:
    def __init__(self):
        self.cents = []                   # version 2 keeps whole cents: 125

    def upgrade(self, state, from_version):
        return {"cents": [round(100 * price) for price in state["prices"]]}

    def add(self, price):
        self.cents.append(round(100 * price))
        return len(self.cents)

    def total(self):
        return sum(self.cents) / 100
"""


async def start(name: str, source: str, folder: pathlib.Path) -> tuple[Process, str]:
    """A node process that finds its own release of the module `cart`, and its address."""
    release = folder / name
    release.mkdir()
    (release / "cart.py").write_text(source)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migrate", "node", "--announce", "--with-parent"),
        *("--name", name, "--directory", f"sqlite:///{folder}/cluster.db"),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(release), *sys.path])},
        stdin=PIPE,
        stdout=PIPE,
    )
    assert process.stdout is not None
    return process, json.loads(await process.stdout.readline())["address"]


async def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        old, address = await start("old", OLD, folder)
        new, _ = await start("new", NEW, folder)
        try:
            await roll_out(folder / "old", address)
        finally:
            for process in (old, new):
                process.terminate()
                await process.wait()


async def roll_out(release: pathlib.Path, address: str) -> None:
    sys.path.insert(0, str(release))
    from cart import Cart  # the release that this caller was written for

    async with migrate.connect(address) as client:
        ref = await client.spawn(Cart, options=migrate.SpawnOptions(on="old"))
        added: list[int] = []

        async def caller() -> None:
            for _ in range(200):
                added.append(await client.call(ref, Cart.add, 0.1))

        calling = asyncio.create_task(caller())
        report = await client.migrate(ref, to="new")
        await calling
        info = await client.info(ref)
        total = await client.call(ref, Cart.total)
        print(f"{len(added)} calls, downtime {report.downtime_s * 1000:.1f} ms; total {total}")
        refusal = ""
        try:
            await client.migrate(ref, to="old")
        except migrate.TargetRefused as refused:
            refusal = refused.cause or ""
            print(f"there is no way back: {refusal}")
    assert added == list(range(1, 201))
    assert (info.node, info.version) == ("new", 2)
    assert total == 20.0  # In units, 200 times 0.1 is 20.000000000000014.
    assert "older" in refusal


asyncio.run(main())
