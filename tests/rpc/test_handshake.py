from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc import frames, handshake
from rpc.errors import AuthFailed, FrameError, PeerRefused, RpcError
from rpc.handshake import PeerInfo
from rpc.v1 import link_pb2
from tests.rpc.harness import peer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(st.binary(max_size=300))
def test_no_bytes_do_worse_to_a_reader_than_one_of_our_errors(data: bytes) -> None:
    hello = frames.plain(frames.HELLO, data)
    challenge = frames.plain(frames.CHALLENGE, data)
    for read in (
        lambda: handshake.read_hello(hello, "there"),
        lambda: handshake.read_challenge(challenge, "there"),
        lambda: PeerInfo.from_bytes(data),
    ):
        with pytest.raises(RpcError):
            read()
    for tolerant in (lambda: handshake.read_proof(data), lambda: handshake.refused(data, "there")):
        try:
            tolerant()
        except FrameError:
            continue


@given(
    st.builds(
        PeerInfo,
        id=texts.filter(bool),
        name=texts,
        kind=st.sampled_from(["node", "client"]),
        address=texts,
        pid=st.integers(0, 2**32 - 1),
        versions=st.tuples(st.integers(1, 9), st.integers(10, 2**32 - 1)),
        features=st.lists(texts, max_size=10).map(tuple),
    )
)
def test_a_description_round_trips(info: PeerInfo) -> None:
    assert PeerInfo.from_bytes(info.to_bytes()) == info


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""},
        {"id": "x" * 257},
        {"kind": "spy"},
        {"versions": (2, 1)},
        {"versions": (0, 1)},
        {"pid": -1},
        {"features": ("x",) * 65},
        {"features": ("x" * 257,)},
    ],
)
def test_a_description_out_of_bounds_cannot_be_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"peer|versions"):
        peer("a", **changes)


def test_a_description_out_of_bounds_is_not_accepted_either() -> None:
    message = link_pb2.LinkPeer(id="x" * 257, kind="node", protocol_min=1, protocol_max=1)

    with pytest.raises(FrameError, match="256"):
        PeerInfo.from_bytes(message.SerializeToString())


def test_a_short_nonce_is_refused() -> None:
    with pytest.raises(FrameError, match="nonce"):
        handshake.read_hello(handshake.hello(b"short", peer("a").to_bytes()), "there")


@pytest.mark.parametrize("reason", ["version", "incarnation", "duplicate", "limit", "closing"])
def test_a_refusal_names_who_where_and_why(reason: str) -> None:
    frame = handshake.refusal(reason, "x" * 5000, peer("b"))

    error = handshake.refused(frames.open_plain(frame)[1], "there:1")

    assert isinstance(error, PeerRefused)
    assert (error.reason, error.peer_id, error.address) == (reason, "b", "there:1")
    assert len(str(error)) < 1200


def test_a_refusal_for_the_secret_is_an_authentication_failure() -> None:
    frame = handshake.refusal("secret", "", peer("b"))

    assert isinstance(handshake.refused(frames.open_plain(frame)[1], "there"), AuthFailed)


@pytest.mark.parametrize(
    ("mine", "theirs", "fits"),
    [((1, 3), (3, 5), True), ((3, 5), (1, 3), True), ((1, 2), (3, 5), False), ((6, 7), (3, 5), 0)],
)
def test_versions_fit_if_one_is_common(
    mine: tuple[int, int], theirs: tuple[int, int], fits: bool
) -> None:
    me, other = peer("a", versions=mine), peer("b", versions=theirs)
    if fits:
        handshake.check_versions(me, other, "there")
    else:
        with pytest.raises(PeerRefused, match="in common"):
            handshake.check_versions(me, other, "there")
