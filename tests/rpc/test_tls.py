"""Mutual TLS between the ends of a link: who gets in, and who does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrate.tools import certs
from rpc.errors import AuthFailed, LinkTimeout, ListenFailed, PeerRefused, SecretFileError
from rpc.links import Links, PeerInfo
from rpc.tls import Credentials, Tls, TlsFolder, default_tls_folder, load_tls
from tests.rpc.harness import PATIENCE_S, SECRET, Recorder, peer, run

pytest.importorskip("cryptography", reason="certificates are made with cryptography")

REFUSED_S = 0.7
"""How long a dialler tries that must not get in. One that could takes some milliseconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certs") / "tls"
    certs.init(made, ["127.0.0.1"], 30, renew=False)
    return made


def ends(
    peer_id: str, tls: Credentials | None, secret: bytes = SECRET, kind: str = "node"
) -> Links:
    return Links(peer(peer_id, kind=kind), secret, Recorder(), tls=tls)


async def tried(acceptor: Links, dialler: Links) -> PeerInfo:
    """Dial; both are closed in any case."""
    try:
        where = await acceptor.listen("127.0.0.1:0")
        # Not by the channel that processes of one host share.
        acceptor._listeners[1:], rest = [], acceptor._listeners[1:]
        for listener in rest:
            await listener.close(0)
        return await dialler.connect(where, REFUSED_S)
    finally:
        await dialler.close()
        await acceptor.close()


def test_nodes_and_clients_with_certificates_of_the_authority_get_in(folder: Path) -> None:
    async def main() -> None:
        node, client = load_tls(folder, "node"), load_tls(folder, "client")
        assert (await tried(ends("b", node), ends("a", node))).id == "b"
        assert (await tried(ends("b", node), ends("a", client, kind="client"))).id == "b"

    run(main())


def test_who_has_no_certificate_gets_no_further_than_tls(folder: Path, tmp_path: Path) -> None:
    certs.init(tmp_path / "other", [], 30, renew=False)
    # Its own certificates, but it trusts the right authority.
    other = load_tls(tmp_path / "other", "node")
    ours = load_tls(folder, "node")

    async def main() -> None:
        for stranger in (None, other, Tls(ours.ca, other.cert, other.key)):
            acceptor = ends("b", ours)
            with pytest.raises(LinkTimeout):
                await tried(acceptor, ends("a", stranger))
            # Not even a handshake began.
            recorder = acceptor.handler
            assert isinstance(recorder, Recorder) and recorder.events == []

    run(main())


def test_a_dialler_shows_nothing_to_an_acceptor_that_is_no_node_of_the_authority(
    folder: Path, tmp_path: Path
) -> None:
    certs.init(tmp_path / "other", [], 30, renew=False)
    other, ours = load_tls(tmp_path / "other", "node"), load_tls(folder, "node")
    client = load_tls(folder, "client")

    async def main() -> None:
        for impostor in (None, other, client):
            acceptor = ends("b", impostor)
            with pytest.raises(LinkTimeout):
                await tried(acceptor, ends("a", ours))
            recorder = acceptor.handler
            assert isinstance(recorder, Recorder) and recorder.events == []

    run(main())


def test_with_a_client_s_certificate_nobody_is_a_node(folder: Path) -> None:
    async def main() -> None:
        node, client = load_tls(folder, "node"), load_tls(folder, "client")
        with pytest.raises(PeerRefused, match=r"\(certificate\).*not a node's") as caught:
            await tried(ends("b", node), ends("a", client))
        assert caught.value.reason == "certificate"

    run(main())


def test_certificates_do_not_stand_for_the_cluster_secret(folder: Path) -> None:
    async def main() -> None:
        node = load_tls(folder, "node")
        with pytest.raises(AuthFailed):
            await tried(ends("b", node), ends("a", node, secret=b"x" * 32))

    run(main())


def test_without_tls_nothing_beyond_loopback_is_listened_on_or_dialled() -> None:
    async def main() -> None:
        links = ends("a", None)
        with pytest.raises(ListenFailed, match="migrate certs init"):
            await links.listen("0.0.0.0:0")
        with pytest.raises(LinkTimeout, match=r"refusing to dial 192\.0\.2\.1:1 without TLS"):
            await links.connect("192.0.2.1:1", 0.2)
        await links.close()

    run(main())


def test_what_is_advertised_is_dialled_and_found_on_this_host(folder: Path) -> None:
    async def main() -> None:
        node = load_tls(folder, "node")
        acceptor, dialler = ends("b", node), ends("a", node)
        where = await acceptor.listen("0.0.0.0:0", advertise="127.0.0.1:0")
        assert where.startswith("127.0.0.1:") and not where.endswith(":0")
        assert acceptor.me.address == where
        assert (await dialler.connect(where, PATIENCE_S)).address == where
        # A name that only hosts of a larger network know is no matter on this one.
        far = ends("c", node)
        named = await far.listen("127.0.0.1:0", advertise="far.example:0")
        assert named.startswith("far.example:")
        assert (await dialler.connect(named, PATIENCE_S)).id == "c"
        assert dialler.channel_kind("c") == "unix"
        for links in (dialler, acceptor, far):
            await links.close()

    run(main())


@pytest.mark.parametrize("missing", ["ca.pem", "node.pem", "node.key"])
def test_a_missing_file_is_named_with_the_remedy(
    folder: Path, tmp_path: Path, missing: str
) -> None:
    for path in folder.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / path.name).chmod(0o600)
    with pytest.raises(SecretFileError, match="migrate certs init") as caught:
        load_tls(tmp_path, "node")
    assert caught.value.path == str(tmp_path / missing)


def test_a_key_that_others_can_read_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / path.name).chmod(0o644)
    with pytest.raises(SecretFileError, match="chmod 600"):
        load_tls(tmp_path, "node")
    (tmp_path / "node.key").chmod(0o600)
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(SecretFileError, match="PEM"):
        load_tls(tmp_path, "node")


def test_a_client_without_a_certificate_of_its_own_uses_the_node_s(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("ca.pem", "node.pem", "node.key"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    assert load_tls(tmp_path, "client") == load_tls(folder, "node")
    assert load_tls(folder, "client") != load_tls(folder, "node")


def test_the_folder_is_beside_the_secret_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LIVEMIGRATE_TLS_DIR", raising=False)
    assert default_tls_folder("/a/cluster.secret") == Path("/a/tls")
    monkeypatch.setitem(os.environ, "LIVEMIGRATE_TLS_DIR", "/b")
    assert default_tls_folder("/a/cluster.secret") == Path("/b")


def test_certificates_that_are_none_fail_to_listen(folder: Path) -> None:
    async def main() -> None:
        node = load_tls(folder, "node")
        nonsense = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        links = ends("a", Tls(node.ca, nonsense, node.key))
        with pytest.raises(ListenFailed, match="certificates are none"):
            await links.listen("127.0.0.1:0")
        await links.close()

    run(main())


def replaced(folder: Path, source: Path, *names: str) -> None:
    """Put copies of files in a folder, each at once, as who renews certificates does."""
    for name in names:
        fresh = folder / f"{name}.new"
        fresh.write_bytes((source / name).read_bytes())
        fresh.chmod(0o600)
        fresh.rename(folder / name)


FILES = ("ca.pem", "node.pem", "node.key")


@pytest.fixture
def old_and_new(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("old", "new"):
        certs.init(tmp_path / name, [], 30, renew=False)
    return tmp_path / "old", tmp_path / "new"


def test_certificates_that_are_replaced_serve_from_the_next_handshake_on(
    old_and_new: tuple[Path, Path], tmp_path: Path
) -> None:
    """The authority itself is another one; nobody is started anew."""
    old, new = old_and_new

    async def main() -> None:
        ours = tmp_path / "ours"
        certs.init(ours, [], 30, renew=False)
        replaced(ours, old, *FILES)
        acceptor, mine = ends("b", TlsFolder(ours, "node")), TlsFolder(ours, "node")
        former, newer = load_tls(old, "node"), load_tls(new, "node")
        try:
            where = await acceptor.listen("127.0.0.1:0")
            acceptor._listeners[1:], rest = [], acceptor._listeners[1:]
            for listener in rest:
                await listener.close(0)

            async def gets_in(name: str, tls: Credentials) -> bool:
                dialler = ends(name, tls)
                try:
                    await dialler.connect(where, PATIENCE_S if name[0] == "y" else REFUSED_S)
                except LinkTimeout:
                    return False
                finally:
                    await dialler.close()
                return True

            assert await gets_in("y1", former) and await gets_in("y2", mine)
            assert not await gets_in("n1", newer)
            replaced(ours, new, *FILES)
            assert await gets_in("y3", newer) and await gets_in("y4", mine)
            assert not await gets_in("n2", former)
        finally:
            await acceptor.close()

    run(main())


def test_certificates_that_are_half_replaced_are_not_used(
    old_and_new: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    old, new = old_and_new
    folder = TlsFolder(old, "node")
    first = folder.current()
    assert folder.current() is first
    for name in ("ca.pem", "node.pem"):
        replaced(old, new, name)
        # The key is still that of the former certificate; an authority alone is whole.
        now = folder.current()
        assert now.cert == first.cert and now is folder.current()
    assert caplog.text.count("the former ones go on serving") == 1
    (old / "node.key").unlink()
    assert folder.current().key == first.key
    (old / "node.key").write_bytes(b"nonsense")
    (old / "node.key").chmod(0o600)
    assert folder.current().key == first.key
    assert caplog.text.count("the former ones go on serving") == 3
    replaced(old, new, "node.key")
    assert folder.current() == load_tls(new, "node")
