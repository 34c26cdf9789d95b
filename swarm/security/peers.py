"""Who is calling: the identity in the certificate of an mTLS connection's other end."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import grpc.aio

from swarm.errors import Denied, Invalid
from swarm.security.identity import Certified, Identity, certified_pem

TLS_VERSION = b"TLSv1.3"


def peer_identity(context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
    """Who the caller's certificate says it is; gRPC has checked that our root CA signed it.
    Raises Denied on a connection without one."""
    return peer_certified(context).identity


def peer_certified(context: grpc.aio.ServicerContext[Any, Any]) -> Certified:
    """The same with the validity. Raises Denied."""
    properties = context.auth_context()
    version = _one(properties.get("ssl_tls_version", ()))
    if version != TLS_VERSION:
        raise Denied(f"the connection uses {version.decode() or 'no TLS'}: TLS 1.3 is required")
    certificate_pem = _one(properties.get("x509_pem_cert", ()))
    if not certificate_pem:
        raise Denied("the connection shows no client certificate: join the swarm first")
    try:
        return certified_pem(certificate_pem)
    except Invalid as error:
        raise Denied(str(error)) from None


def peer_host(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The address that the connection comes from, without port; "" for a unix socket.
    gRPC writes ipv4:10.0.0.1:4321 or ipv6:%5Bfe80::1%5D:4321."""
    kind, _, rest = context.peer().partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    host = unquote(rest).rpartition(":")[0].strip("[]")
    # A dual-stack listener shows IPv4 callers as mapped addresses.
    return host.removeprefix("::ffff:") if "." in host else host


def _one(values: Any) -> bytes:
    found = list(values)
    return bytes(found[0]) if len(found) == 1 else b""
