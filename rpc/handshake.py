"""How two sides of a new connection come to know and trust each other.

    dialler   HELLO      nonce, who I am
    acceptor  CHALLENGE  nonce, who I am, proof
    dialler   PROOF      proof, the last link with you that I saw end
    acceptor  WELCOME    the link is up

Either may answer with REFUSAL instead. The acceptor proves itself first, so a
dialler never hands anything but a nonce to a stranger. PROOF and WELCOME are
sealed with the connection's keys. This module builds and reads the messages;
`rpc.links` decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from rpc import auth, frames
from rpc.errors import AuthFailed, FrameError, PeerRefused, RpcError
from rpc.v1 import link_pb2

PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
"""Versions of what is said on links that this release speaks."""

_TEXT_MAX: Final = 256
_FEATURES_MAX: Final = 64
_PEER_BYTES_MAX: Final = 8192

SECRET_REMEDY: Final = (
    "both sides must read the same cluster secret: run them as the same user, or give both a "
    f"copy of the file named by {auth.SECRET_FILE_VARIABLE}"
)


@dataclass(frozen=True)
class PeerInfo:
    """Who stands at one end of a link.

    Attributes:
        id: Names one incarnation of a process; never reused.
        name: For people; may be reused.
        kind: "node" or "client".
        address: host:port to dial it; "" for clients.
        pid: Its process id.
        versions: Lowest and highest protocol version it speaks.
        features: What it can do beyond its version.
    """

    id: str
    name: str
    kind: str
    address: str
    pid: int
    versions: tuple[int, int] = (PROTOCOL_MIN, PROTOCOL_MAX)
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what could not be sent.

        Raises:
            ValueError: A field is out of its bounds.
        """
        if not self.id or self.kind not in ("node", "client"):
            raise ValueError("a peer needs an id, and its kind is 'node' or 'client'")
        texts = (self.id, self.name, self.address, *self.features)
        if max(map(len, texts)) > _TEXT_MAX or len(self.features) > _FEATURES_MAX:
            raise ValueError(
                f"a peer's texts have at most {_TEXT_MAX} characters, and it has at most "
                f"{_FEATURES_MAX} features"
            )
        if not 0 < self.versions[0] <= self.versions[1] < 2**32 or not 0 <= self.pid < 2**32:
            raise ValueError(f"versions {self.versions} or pid {self.pid} is out of range")

    def to_bytes(self) -> bytes:
        """Serialize as `livemigrate.v1.LinkPeer`."""
        message = link_pb2.LinkPeer(
            id=self.id,
            name=self.name,
            kind=self.kind,
            address=self.address,
            pid=self.pid,
            protocol_min=self.versions[0],
            protocol_max=self.versions[1],
            features=self.features,
        )
        data = message.SerializeToString()
        if len(data) > _PEER_BYTES_MAX:
            raise ValueError(f"a peer's description has at most {_PEER_BYTES_MAX} bytes")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> PeerInfo:
        """Read what a peer says of itself.

        Raises:
            FrameError: It is no description, or a field is out of its bounds.
        """
        if len(data) > _PEER_BYTES_MAX:
            raise FrameError(f"a peer's description of {len(data)} bytes")
        message = link_pb2.LinkPeer()
        try:
            message.ParseFromString(data)
            return cls(
                id=message.id,
                name=message.name,
                kind=message.kind,
                address=message.address,
                pid=message.pid,
                versions=(message.protocol_min, message.protocol_max),
                features=tuple(message.features),
            )
        except (DecodeError, ValueError) as error:
            raise FrameError(f"a peer describes itself in no valid way: {error}") from error


REASONS: Final = {
    "secret": link_pb2.LINK_REFUSAL_REASON_SECRET,
    "version": link_pb2.LINK_REFUSAL_REASON_VERSION,
    "incarnation": link_pb2.LINK_REFUSAL_REASON_INCARNATION,
    "duplicate": link_pb2.LINK_REFUSAL_REASON_DUPLICATE,
    "limit": link_pb2.LINK_REFUSAL_REASON_LIMIT,
    "closing": link_pb2.LINK_REFUSAL_REASON_CLOSING,
    "malformed": link_pb2.LINK_REFUSAL_REASON_MALFORMED,
    "certificate": link_pb2.LINK_REFUSAL_REASON_CERTIFICATE,
}
"""Why a link can be refused, as in link.proto."""

_NAMES: Final = {number: name for name, number in REASONS.items()}


def refusal(reason: str, message: str, me: PeerInfo) -> bytes:
    """Build the frame that ends a handshake.

    Args:
        reason: A key of the reasons in link.proto, in lower case.
        message: For people; cut to 1000 characters.
        me: Who refuses.
    """
    body = link_pb2.LinkRefusal(reason=REASONS[reason], message=message[:1000], peer_id=me.id)
    return frames.plain(frames.REFUSAL, body.SerializeToString())


def refused(payload: bytes, address: str) -> RpcError:
    """Turn a received refusal into the error to raise.

    Args:
        payload: Of a REFUSAL record; anything.
        address: Where it came from.

    Returns:
        AuthFailed or PeerRefused.
    """
    message = link_pb2.LinkRefusal()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise FrameError(f"{address} refused the link in no valid way: {error}") from error
    reason = _NAMES.get(message.reason, "unspecified")
    peer_id = message.peer_id[:_TEXT_MAX]
    if reason == "secret":
        return AuthFailed(
            f"{address} refused the link: it has another cluster secret; {SECRET_REMEDY}",
            address=address,
            peer_id=peer_id,
        )
    return PeerRefused(
        f"{address} refused the link ({reason}): {message.message[:1000]}",
        reason=reason,
        address=address,
        peer_id=peer_id,
    )


def hello(nonce: bytes, me: bytes) -> bytes:
    """Build the dialler's first frame."""
    body = link_pb2.LinkHello(nonce=nonce, peer=me)
    return frames.plain(frames.HELLO, body.SerializeToString())


def read_hello(frame: frames.Data, address: str) -> tuple[bytes, bytes, PeerInfo]:
    """Read the dialler's first frame.

    Returns:
        Nonce, description as sent, description.

    Raises:
        FrameError: It is none.
    """
    message = link_pb2.LinkHello()
    _read(frame, frames.HELLO, message, address)
    return _nonce(message.nonce), message.peer, PeerInfo.from_bytes(message.peer)


def challenge(nonce: bytes, me: bytes, proof: bytes) -> bytes:
    """Build the acceptor's first frame."""
    body = link_pb2.LinkChallenge(nonce=nonce, peer=me, proof=proof)
    return frames.plain(frames.CHALLENGE, body.SerializeToString())


def read_challenge(frame: frames.Data, address: str) -> tuple[bytes, bytes, PeerInfo, bytes]:
    """Read the acceptor's first frame.

    Returns:
        Nonce, description as sent, description, proof.

    Raises:
        FrameError: It is none.
        AuthFailed, PeerRefused: It is a refusal.
    """
    message = link_pb2.LinkChallenge()
    _read(frame, frames.CHALLENGE, message, address)
    return _nonce(message.nonce), message.peer, PeerInfo.from_bytes(message.peer), message.proof


def proof(proof: bytes, ended_link: bytes) -> bytes:
    """Build the payload of the dialler's PROOF record."""
    return link_pb2.LinkProof(proof=proof, ended_link=ended_link).SerializeToString()


def read_proof(payload: bytes) -> tuple[bytes, bytes]:
    """Read the payload of a PROOF record.

    Returns:
        The proof, and the id of the last link that the dialler saw end (or b"").

    Raises:
        FrameError: It is none.
    """
    message = link_pb2.LinkProof()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise FrameError(f"a proof that cannot be read: {error}") from error
    return message.proof, message.ended_link


def check_versions(me: PeerInfo, peer: PeerInfo, address: str) -> None:
    """Refuse a peer with whom we have no protocol version in common.

    Raises:
        PeerRefused: With reason "version".
    """
    if me.versions[0] > peer.versions[1] or peer.versions[0] > me.versions[1]:
        raise PeerRefused(
            f"{peer.name or peer.id} at {address} speaks protocol versions "
            f"{peer.versions[0]} to {peer.versions[1]}, this side {me.versions[0]} to "
            f"{me.versions[1]}; run releases of livemigrate that have one in common",
            reason="version",
            address=address,
            peer_id=peer.id,
        )


def _nonce(nonce: bytes) -> bytes:
    if len(nonce) != auth.NONCE_BYTES:
        raise FrameError(f"a nonce of {len(nonce)} bytes instead of {auth.NONCE_BYTES}")
    return nonce


def _read(
    frame: frames.Data,
    kind: int,
    message: link_pb2.LinkHello | link_pb2.LinkChallenge,
    address: str,
) -> None:
    got, payload = frames.open_plain(frame)
    if got == frames.REFUSAL:
        raise refused(payload, address)
    if got != kind:
        raise FrameError(f"a handshake message of kind {got} where {kind} was due")
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise FrameError(f"a handshake message that cannot be read: {error}") from error
