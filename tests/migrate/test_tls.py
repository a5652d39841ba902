"""Nodes with certificates: who can join, call or read, and who cannot."""

from __future__ import annotations

import json
import os
import pathlib
import stat
import sys
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

import migrate
from migrate.shell import membership
from migrate.shell.directories import MemoryDirectory, Put
from migrate.tools import certs
from migrate.tools.cli import cli
from rpc import auth
from rpc.tls import load_tls
from rpc.v1 import api_pb2, api_pb2_grpc
from tests.migrate.clusters import QUICK, linked, run
from tests.migrate.servers import Counter

pytest.importorskip("cryptography", reason="certificates are made with cryptography")

OVER_TCP = QUICK.replace(same_host=False, move_step_timeout_s=1.0, repeat_first_s=0.1)
"""As between hosts: nobody is found by the channel that processes of one host share."""


@pytest.fixture(autouse=True)
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A user's configuration with a cluster secret and certificates."""
    monkeypatch.setenv("LIVEMIGRATE_SECRET_FILE", str(tmp_path / "home" / "cluster.secret"))
    monkeypatch.delenv("LIVEMIGRATE_TLS_DIR", raising=False)
    made = CliRunner().invoke(cli, ["certs", "init", "--host", "127.0.0.1", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["folder"] == str(tmp_path / "home" / "tls")
    return tmp_path / "home"


def test_nodes_and_clients_of_many_hosts_work_over_tls(home: pathlib.Path) -> None:
    async def main() -> None:
        directory = f"memory://{home}"
        tls = home / "tls"
        async with (
            # Beyond loopback, so that nothing has to be said of certificates.
            migrate.Node(
                "a", "0.0.0.0:0", directory, options=OVER_TCP, advertise="127.0.0.1:0"
            ) as a,
            migrate.Node("b", "127.0.0.1:0", directory, options=OVER_TCP, tls=tls) as b,
            migrate.connect(b.address, options=OVER_TCP, tls=tls) as client,
        ):
            await linked(a, [a, b])
            assert {a._links.channel_kind(b.id), b._links.channel_kind(a.id)} == {"grpc"}  # type: ignore[union-attr]
            ref = await client.spawn(Counter, 5, options=migrate.SpawnOptions(on="a"))
            assert await client.call(ref, Counter.incr, 1) == 6
            report = await client.migrate(ref, to="b")
            assert (report.source, report.target) == ("a", "b")
            assert await client.call(ref, Counter.incr, 1) == 7
            assert {it.address for it in await client.nodes()} == {a.address, b.address}

    run(main())


def test_a_foreign_process_can_neither_join_nor_call_nor_read(
    home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """It even has the cluster secret and the token; what it lacks is a certificate."""
    certs.init(tmp_path / "other", [], 30, renew=False)

    async def main() -> None:
        directory = f"memory://{home}"
        async with migrate.Node("a", directory=directory, options=OVER_TCP, tls=home / "tls") as a:
            await a.spawn(Counter, 5, options=migrate.SpawnOptions(name="hits"))
            for foreign in (None, tmp_path / "other"):
                with pytest.raises(migrate.MigrateError, match="no node could be reached"):
                    client = migrate.connect(
                        a.address, options=OVER_TCP, tls=foreign, timeout_s=1.0
                    )
                    async with client:
                        raise AssertionError("it is in")
                # A node of the same directory gets no link, so no server and no state goes there.
                async with migrate.Node(
                    "f", directory=directory, options=OVER_TCP, tls=foreign
                ) as stranger:
                    assert a._links is not None and not a._links.is_up(stranger.id)
                    there: Any = await stranger.whereis("hits")
                    with pytest.raises(migrate.CallTimeout):
                        await there.incr.with_options(timeout=1.0)(1)
                    with pytest.raises(migrate.MoveError):
                        await a.migrate(await a.whereis("hits"), to="f")
            token = auth.load_or_create_token(home / "cluster.token")
            other = load_tls(tmp_path / "other", "client")
            for credentials in (None, other.channel_credentials()):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await located(a.address, token, credentials)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            ours = load_tls(home / "tls", "client").channel_credentials()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await located(a.address, "wrong" * 8, ours)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert (await located(a.address, token, ours)).server.node == "a"
            assert await a.call(await a.whereis("hits"), Counter.incr, 0) == 5

    run(main())


async def located(
    address: str, token: str, credentials: grpc.ChannelCredentials | None
) -> api_pb2.WhereIsResponse:
    """Ask the public API, as a program in another language does: by the host's own name."""
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    )
    async with channel:
        return await api_pb2_grpc.ApiStub(channel).WhereIs(
            api_pb2.WhereIsRequest(name="hits"),
            metadata=(("authorization", f"Bearer {token}"),),
            timeout=20,
        )


def test_listening_everywhere_needs_an_address_for_others(home: pathlib.Path) -> None:
    async def main() -> None:
        with pytest.raises(migrate.UsageError, match="--advertise"):
            async with migrate.Node("a", "0.0.0.0:0"):
                pass
        with pytest.raises(migrate.UsageError, match=r"advertise: .*host:port"):
            migrate.Node("a", advertise="nonsense")

    run(main())


def test_listening_beyond_loopback_with_a_damaged_folder_is_refused(home: pathlib.Path) -> None:
    (home / "tls" / "node.key").chmod(0o644)

    async def main() -> None:
        with pytest.raises(migrate.AuthError, match="chmod 600"):
            async with migrate.Node("a", "0.0.0.0:0", advertise="127.0.0.1:0"):
                pass
        # Where nothing leaves the machine nothing of it is read.
        async with migrate.Node("a"):
            pass

    run(main())


# ------------------------------------------------------------------ making certificates


def test_certificates_are_made_once_and_kept(home: pathlib.Path) -> None:
    folder = home / "tls"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == [
        f"{name}.{kind}" for name in ("ca", "client", "node") for kind in ("key", "pem")
    ]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    again = CliRunner().invoke(cli, ["certs", "init"])
    assert again.exit_code == 0 and "is complete" in again.stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    (folder / "client.pem").unlink()
    assert "client.key, client.pem made" in CliRunner().invoke(cli, ["certs", "init"]).stdout
    CliRunner().invoke(cli, ["certs", "init", "--renew"])
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == set(after) - {
        "ca.pem",
        "ca.key",
    }


def test_without_the_key_of_the_authority_nothing_is_made(home: pathlib.Path) -> None:
    (home / "tls" / "ca.key").unlink()
    done = CliRunner().invoke(cli, ["certs", "init", "--renew"])
    assert done.exit_code == 1 and "where the authority's key is" in done.stderr


def test_without_cryptography_the_remedy_is_named(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "cryptography":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    done = CliRunner().invoke(cli, ["certs", "init", "--renew"])
    assert done.exit_code == 1 and "livemigrate[tls]" in done.stderr


# ---------------------------------------------------------------- where processes can be seen


def row(**changes: object) -> membership.NodeRow:
    import msgspec

    return msgspec.structs.replace(membership.describe("x@1", "x", "h:1"), **changes)


def test_only_where_its_number_means_the_same_a_process_is_seen_dead() -> None:
    here = membership.describe("x@1", "x", "h:1")
    boot, _, space = here.boot.partition("/")
    assert boot and space
    gone = {"pid": os.getpid(), "started": 1.0}
    for one_machine in (False, True):
        assert not membership.seen_dead(here, one_machine)
        assert membership.seen_dead(row(**gone), one_machine)
        # Another container of this machine: this pid is somebody else there, or nobody here.
        assert not membership.seen_dead(row(**gone, boot=f"{boot}/1"), one_machine)
    # Another boot: of another machine of the same name, unless there is but one machine.
    assert not membership.seen_dead(row(boot=f"another/{space}"), one_machine=False)
    assert membership.seen_dead(row(boot=f"another/{space}"), one_machine=True)


def test_a_name_goes_to_another_once_its_node_is_silent_for_longer_than_its_lease() -> None:
    class Far(MemoryDirectory):
        one_machine = False

    async def main() -> None:
        import msgspec

        async with Far() as directory:
            far = row(boot="another/1", name="a", id="a@1")
            lease = await directory.lease(600)
            await directory.txn(
                [],
                [
                    Put("node/a@1", msgspec.msgpack.encode(far)),
                    Put("nodename/a", b"a@1"),
                    Put("alive/a@1", b"", lease),
                ],
                [],
            )
            with pytest.raises(migrate.UsageError, match="is alive at h:1"):
                async with migrate.Node("a", directory=directory):
                    pass
            await directory.revoke(lease)
            async with migrate.Node("a", directory=directory) as node:
                # It may only be unreachable, so what it owns stays its own.
                assert await directory.get("node/a@1") is not None
                entry = await directory.get("nodename/a")
                assert entry is not None and entry.value == node.id.encode()

    run(main())
