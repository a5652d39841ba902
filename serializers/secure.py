"""The reducer for TLS contexts: what of one can be read, unless it has a key.

Python gives neither a context's key back nor says that there is one, so OpenSSL is asked. The
protocols offered (ALPN) lie in the context's own structure, where they are found as `layout` says.
"""

from __future__ import annotations

import _ssl
import ctypes
import functools
import ssl
from typing import Any

from .layout import find_field, read_field
from .resources import REDUCERS, REOPEN, Reduced, refuse

_WORD = ctypes.sizeof(ctypes.c_void_p)
_SETTINGS = (
    "options",
    "verify_flags",
    "minimum_version",
    "maximum_version",
    "post_handshake_auth",
    "keylog_filename",
    "sni_callback",
)


@functools.cache
def _library() -> Any:
    """OpenSSL, as the ssl module uses it; None if it cannot be asked."""
    path = getattr(_ssl, "__file__", None)
    if path is None:
        return None
    library = ctypes.CDLL(path)
    for name, result in (("get0_certificate", ctypes.c_void_p), ("get_options", ctypes.c_uint64)):
        function = getattr(library, f"SSL_CTX_{name}", None)
        if function is None:
            return None
        function.argtypes, function.restype = [ctypes.c_void_p], result
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    probe.options |= ssl.OP_NO_TICKET
    mask = 2**64 - 1
    if library.SSL_CTX_get_options(_pointer(probe)) != int(probe.options) & mask:
        return None
    return library


def _pointer(context: ssl.SSLContext) -> int:
    """OpenSSL's own object, which is the first thing in the context's structure."""
    return read_field(context, object.__basicsize__, _WORD)


@functools.cache
def _alpn_length_offset() -> int | None:
    samples: list[tuple[object, int]] = []
    for protocols in ((), ("ab",), ("abc", "de")):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        samples.append((context, sum(len(name) + 1 for name in protocols)))
    return find_field(samples, 4)


def _alpn_of(context: ssl.SSLContext) -> list[str] | None:
    """The protocols offered; None if that cannot be told."""
    offset = _alpn_length_offset()
    if offset is None:
        return None
    length = read_field(context, offset, 4)
    if not length:
        return []
    wire = ctypes.string_at(read_field(context, offset - _WORD, _WORD), length)
    names = []
    while wire:
        names.append(wire[1 : 1 + wire[0]].decode("ascii"))
        wire = wire[1 + wire[0] :]
    return names


def _reduce_context(context: ssl.SSLContext) -> Reduced:
    library = _library()
    if library is None:
        refuse(context, "whether it has a key cannot be told here", REOPEN)
    if library.SSL_CTX_get0_certificate(_pointer(context)):
        refuse(context, "it has a certificate and its key, which cannot be read back", REOPEN)
    protocols = _alpn_of(context)
    if protocols is None:
        refuse(context, "which protocols it offers cannot be told here", REOPEN)
    settings = {name: getattr(context, name) for name in _SETTINGS if hasattr(context, name)}
    for name in ("options", "verify_flags", "minimum_version", "maximum_version"):
        settings[name] = int(settings[name])
    verify = (context.check_hostname, int(context.verify_mode))
    # Suites of TLS 1.3 are no part of this list's language.
    ciphers = ":".join(c["name"] for c in context.get_ciphers() if c["protocol"] != "TLSv1.3")
    authorities = b"".join(context.get_ca_certs(binary_form=True))
    args = (type(context), int(context.protocol), verify, ciphers, authorities, protocols)
    return _make_context, args, settings, None, None, _fill_context


def _make_context(
    kind: Any,
    protocol: int,
    verify: tuple[bool, int],
    ciphers: str,
    authorities: bytes,
    protocols: list[str],
) -> Any:
    context = ssl.SSLContext.__new__(kind, protocol)
    context.check_hostname = False
    context.verify_mode = ssl.VerifyMode(verify[1])
    context.check_hostname = verify[0]
    if ciphers:
        context.set_ciphers(ciphers)
    if authorities:
        context.load_verify_locations(cadata=authorities)
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


def _fill_context(context: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if value is not None and getattr(context, name) != value:
            setattr(context, name, value)


REDUCERS[ssl.SSLContext] = _reduce_context
