"""mTLS channels to managers that outlive a renewal of our certificate.

A gRPC channel keeps the credentials it was made with, also for its later reconnects. `RenewingChannel`
therefore makes its real channel anew at the first call after the credentials changed, so that whoever
holds one for months need not know about renewals. Calls under way end on the channel they began on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from swarm.security.identity import MANAGER_NAME

MESSAGE_BYTES_MAX = 8 << 20
"""As the managers' servers: an entry (1.5 MB) and a page of a listing fit with room."""

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    # Each channel its own connection: a refused one must not slow the next attempt to the same address down.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # the cluster's own traffic never goes through a web proxy
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A peer that vanished without closing is noticed after 1 s without data and 1.5 s without an answer.
    # gRPC's own threads answer pings: a busy event loop is not mistaken for a dead host.
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 1_500),
    ("grpc.http2.ping_timeout_ms", 1_500),  # grpcio 1.85 waits for this one, and its default is a minute
    ("grpc.http2.max_pings_without_data", 0),
    # Back within a second of a peer's return; an attempt to connect may take 2 s (which is what gRPC means by
    # its minimal backoff).
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def secure_channel(
    addr: str, credentials: grpc.ChannelCredentials, server_name: str = MANAGER_NAME
) -> grpc.aio.Channel:
    """One plain channel to host:port, whose server must have a certificate for `server_name`."""
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(addr, credentials, options=options)


class RenewingChannel(grpc.aio.Channel):
    """`current` returns the generation of the credentials and a function that makes a channel with them."""

    def __init__(self, current: Callable[[], tuple[int, Callable[[], grpc.aio.Channel]]]) -> None:
        self._current = current
        self._generation, make = current()
        self._channel = make()
        self._retiring: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def _latest(self) -> grpc.aio.Channel:
        generation, make = self._current()
        if generation != self._generation:
            # Streams begun before the change go on; they end with the second next change at the latest,
            # which makes their holders come back and show a current certificate.
            if self._retiring is not None:
                task = asyncio.get_running_loop().create_task(self._retiring.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            self._generation, self._channel, self._retiring = generation, make(), self._channel
        return self._channel

    def _deferred(self, kind: str, method: str, *coding: Any, **named_coding: Any) -> Any:
        """A multicallable that looks up the channel when it is called, not when the stub is made."""
        made_on: grpc.aio.Channel | None = None
        callable_: Any = None

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made_on, callable_
            channel = self._latest()
            if channel is not made_on:
                made_on, callable_ = channel, getattr(channel, kind)(method, *coding, **named_coding)
            return callable_(*args, **kwargs)

        return call

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._deferred("unary_unary", method, *args, **kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._deferred("unary_stream", method, *args, **kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._deferred("stream_unary", method, *args, **kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._deferred("stream_stream", method, *args, **kwargs)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._latest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._latest().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._latest().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await asyncio.gather(*self._closing)
        if self._retiring is not None:
            await self._retiring.close(grace)
            self._retiring = None
        await self._channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.close()
