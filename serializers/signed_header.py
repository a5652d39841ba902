"""How the files that livemigrate writes begin: a line that tells what they are, then a header.

Layout::

    livemigrate KIND 1 header=00001234 mac=<64 hexadecimal digits>\\n
    {the header: JSON, that many bytes with the newline at its end}\\n

The line has a fixed length; the header is padded so that what follows begins on a multiple of 64.
The HMAC-SHA-256 is over the line up to `mac=` and the header.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
HeaderFlaw: TypeAlias = Literal["foreign", "newer", "truncated", "damaged", "wrong key"]

ALIGNMENT_BYTES: Final = 64

_MAC_DIGITS: Final = 64


def key_id(key: bytes) -> str:
    """A name for a key that tells nothing of it: 16 hexadecimal digits."""
    return hmac.digest(key, b"livemigrate checkpoint key id 1", "sha256").hex()[:16]


class SignedHeader:
    """The beginning of the files of one kind.

    Args:
        kind: What they are, in one word.
        format_version: The newest that can be read; one digit.
        bytes_max: The largest header.
        bad: Makes the error for a flaw and its reason.

    Attributes:
        line_bytes: Length of the first line.
    """

    def __init__(
        self,
        kind: str,
        format_version: int,
        bytes_max: int,
        bad: Callable[[HeaderFlaw, str], Exception],
    ) -> None:
        self._kind = kind
        self._format_version = format_version
        self._bytes_max = bytes_max
        self._bad = bad
        self._magic = f"livemigrate {kind} ".encode()
        self._line = re.compile(
            re.escape(self._magic) + rb"(\d{1,9}) header=(\d{8}) mac=([0-9a-f]{64})\n"
        )
        self.line_bytes = len(self._magic) + len(b"1 header=00000000 mac=\n") + _MAC_DIGITS

    def seal(self, text: bytes, key: bytes, format_version: int) -> tuple[bytes, bytes]:
        """Make the beginning of a file.

        Args:
            text: The header: JSON.
            key: What signs it.
            format_version: Of the oldest release that can read the file; one digit.

        Returns:
            Line and header, and the MAC in them.

        Raises:
            ValueError: The header is too large.
        """
        text += b" " * (-(self.line_bytes + len(text) + 1) % ALIGNMENT_BYTES) + b"\n"
        if len(text) > self._bytes_max:
            raise ValueError(
                f"the header would have {len(text)} bytes; {self._bytes_max} are allowed"
            )
        line = b"%s%d header=%08d mac=" % (self._magic, format_version, len(text))
        mac = hmac.digest(key, line + text, "sha256")
        return line + mac.hex().encode() + b"\n" + text, mac

    def end(self, data: Buffer) -> int:
        """Where the header ends, told by the first line.

        Args:
            data: The file, or at least its first `line_bytes` bytes.

        Raises:
            Exception: It is no first line of such a file, by `bad`.
        """
        line = bytes(data[: self.line_bytes])
        if not line.startswith(self._magic):
            if line and self._magic.startswith(line):
                raise self._bad("truncated", f"it has only {len(line)} bytes")
            raise self._bad(
                "foreign", f"it is no {self._kind} of livemigrate: its magic is missing"
            )
        number = re.match(rb"\d{1,9}", line[len(self._magic) :])
        version = int(number[0]) if number is not None else 0
        if version > self._format_version:
            raise self._bad(
                "newer",
                f"it is written in format {version}, and this release reads up to "
                f"{self._format_version}; upgrade livemigrate here",
            )
        found = self._line.fullmatch(line)
        if found is None or version < 1:
            if len(line) < self.line_bytes:
                raise self._bad("truncated", f"it has only {len(line)} bytes")
            raise self._bad("damaged", "its first line is not as any release writes it")
        size = int(found[2])
        if not 0 < size <= self._bytes_max:
            raise self._bad("damaged", f"its header cannot have {size} bytes")
        return self.line_bytes + size

    def text(self, data: Buffer) -> bytes:
        """The header; nothing is verified but the form of the first line.

        Args:
            data: The file, or at least all up to the header's `end`.

        Raises:
            Exception: There is none, by `bad`.
        """
        end = self.end(data)
        if len(data) < end:
            raise self._bad("truncated", "its header is cut off")
        return bytes(data[self.line_bytes : end])

    def verify(self, data: Buffer, key: bytes, signed_with: str) -> bytes:
        """Verify the signature of line and header.

        Args:
            data: The file, or at least all up to the header's `end`.
            key: What must have signed it.
            signed_with: Which key the header says it was.

        Returns:
            The MAC.

        Raises:
            Exception: It was signed with another key or changed, by `bad`.
        """
        end = self.end(data)
        line = bytes(data[: self.line_bytes])
        mac = bytes.fromhex(line[-_MAC_DIGITS - 1 : -1].decode())
        signed = line[: -_MAC_DIGITS - 1] + bytes(data[self.line_bytes : end])
        if hmac.compare_digest(hmac.digest(key, signed, "sha256"), mac):
            return mac
        if signed_with != key_id(key):
            raise self._bad(
                "wrong key",
                f"it is signed with key {signed_with}, and the key here is {key_id(key)}: it is of "
                "another cluster, or was written with a key of its own",
            )
        raise self._bad("damaged", "its header was changed: the signature does not fit")
