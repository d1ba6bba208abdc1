"""A TCP proxy in front of PostgreSQL that misbehaves on command.

`async with open_chaos_proxy(dsn) as proxy` listens on 127.0.0.1; connect with `proxy.dsn` (a Unix socket would bypass
it; TLS is off, since the proxy reads the protocol). It starts in mode `pass`. Every mode can be changed at any time,
for all connections or, where it says so, for the one whose server process has a given pid:

    delay(seconds, jitter)  forward everything that much later, in order
    blackhole(pid)          keep the client's socket open, drop what either side sends, end the server's side
    freeze(pid)             stop reading, so that both sides' buffers fill
    rst(pid)                reset the client's connection
    refuse()                close the listener; existing connections go on
    reject()                accept and hang up at once, so that attempts can be counted; existing connections go on
    rate(bytes_per_second)  forward no faster than that, each way of each connection
    cut_reply(tag)          forward the next request that executes a statement with `tag` in its text, also one that is
                            prepared already, swallow its reply and hang up when the server is done: the client cannot
                            know whether it took effect
    cut_request(tag)        hang up instead of forwarding such a request: it did not
    mend()                  back to `pass`: listen again, thaw, forward new connections

Blackholed connections stay so. The proxy lives in a nursery of its own and needs a Trio run.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import trio
from psycopg.conninfo import conninfo_to_dict, make_conninfo

_CHUNK = 65536
_BACKEND_KEY_DATA, _READY_FOR_QUERY = b"K", b"Z"


class Requests:
    """What a client asks for: the text of each statement it executes, also of those it has prepared."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._has_started = False  # the first message of a connection has no type
        self._prepared: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> list[bytes]:
        """The texts of the statements whose execution is asked for by the messages that end in `data`."""
        self._buffer += data
        executed: list[bytes] = []
        while len(self._buffer) >= (5 if self._has_started else 4):
            start = 1 if self._has_started else 0
            size = start + int(struct.unpack_from("!I", self._buffer, start)[0])
            if len(self._buffer) < size:
                break
            if self._has_started:
                kind, body = bytes(self._buffer[:1]), bytes(self._buffer[5:size])
                if kind == b"Q":
                    executed.append(body.rstrip(b"\0"))
                elif kind == b"P":
                    name, text = body.split(b"\0", 2)[:2]
                    self._prepared[name] = text
                elif kind == b"B":
                    executed.append(self._prepared.get(body.split(b"\0", 2)[1], b""))
            self._has_started = True
            del self._buffer[:size]
        return executed


class Link:
    """One client connection and its counterpart."""

    def __init__(self, proxy: ChaosProxy, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self.proxy = proxy
        self.client = client
        self.server = server
        self.pid: int | None = None  # of the server process; None for a cancel request
        self.is_blackholed = False
        self.is_cutting = False
        self.thawed = trio.Event()
        self.thawed.set()
        self._requests = Requests()
        self._reply = bytearray()  # what has arrived of the message under way

    async def pump_requests(self) -> None:
        while data := await self._receive(self.client):
            texts = self._requests.feed(data)
            proxy = self.proxy
            if any(proxy.is_to_cut(text) for text in texts):
                proxy.cut_tag = None
                if proxy.cuts_request:
                    proxy.cuts += 1
                    self.close()
                    return
                self.is_cutting = True
            await self._forward(self.server, data)
        if not self.is_blackholed:
            await self.server.send_eof()

    async def pump_replies(self) -> None:
        while data := await self._receive(self.server):
            kinds = self._kinds(data)
            if self.is_cutting:
                if _READY_FOR_QUERY in kinds:  # not before: a statement on its own is committed after it is complete
                    self.proxy.cuts += 1
                    break
                continue
            await self._forward(self.client, data)
        if self.is_blackholed:
            await trio.sleep_forever()  # the client's socket stays open
        self.close()

    async def _receive(self, stream: trio.SocketStream) -> bytes:
        await self.thawed.wait()
        try:
            data = bytes(await stream.receive_some(_CHUNK))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""
        await self.thawed.wait()
        return data

    async def _forward(self, stream: trio.SocketStream, data: bytes) -> None:
        if self.proxy.delay_range != (0.0, 0.0):
            await trio.sleep(random.uniform(*self.proxy.delay_range))
        if self.proxy.bytes_per_second is not None:
            await trio.sleep(len(data) / self.proxy.bytes_per_second)
        if not self.is_blackholed:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.send_all(data)

    def _kinds(self, data: bytes) -> set[bytes]:
        """The types of the server's messages that end in `data`."""
        self._reply += data
        kinds: set[bytes] = set()
        while len(self._reply) >= 5:
            size = 1 + struct.unpack_from("!I", self._reply, 1)[0]
            if len(self._reply) < size:
                break
            kind = bytes(self._reply[:1])
            if kind == _BACKEND_KEY_DATA:
                self.pid = struct.unpack_from("!I", self._reply, 5)[0]
            kinds.add(kind)
            del self._reply[:size]
        return kinds

    def blackhole(self) -> None:
        self.is_blackholed = True
        self.server.socket.close()

    def reset(self) -> None:
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.client.socket.close()
        self.server.socket.close()


class ChaosProxy:
    """Made by `open_chaos_proxy`; the module's docstring lists the modes."""

    def __init__(self, dsn: str) -> None:
        parameters = conninfo_to_dict(dsn)
        host, port = str(parameters.get("host") or ""), int(parameters.get("port") or 5432)
        self._upstream = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._upstream_dsn = dsn
        self.host = "127.0.0.1"
        self.port: int = 0
        self.links: set[Link] = set()
        self.accepted = 0
        self.cuts = 0
        self.cut_tag: bytes | None = None
        self.cuts_request = False
        self._cuts_whole = False
        self.delay_range = (0.0, 0.0)
        self.bytes_per_second: float | None = None
        self.blackholes_new = False
        self.is_rejecting = False
        self._listener: trio.SocketListener | None = None
        self._mending = trio.Lock()
        self._mended = trio.Event()

    @property
    def dsn(self) -> str:
        """The upstream's DSN, through the proxy."""
        return make_conninfo(
            self._upstream_dsn, host=self.host, port=self.port, sslmode="disable", gssencmode="disable"
        )

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        self.delay_range = (max(0.0, seconds - jitter), seconds + jitter)

    def blackhole(self, pid: int | None = None) -> None:
        """Without a pid: all connections, and new ones as soon as they are accepted."""
        self.blackholes_new = self.blackholes_new or pid is None
        for link in self._chosen(pid):
            link.blackhole()

    def freeze(self, pid: int | None = None) -> None:
        for link in self._chosen(pid):
            link.thawed = trio.Event()

    def rst(self, pid: int | None = None) -> None:
        for link in self._chosen(pid):
            link.reset()

    def refuse(self) -> None:
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None

    def reject(self) -> None:
        self.is_rejecting = True

    def rate(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second

    def cut_reply(self, tag: bytes, *, is_whole: bool = False) -> None:
        """`is_whole`: `tag` is all of the statement's text."""
        self.cut_tag, self.cuts_request, self._cuts_whole = tag, False, is_whole

    def cut_request(self, tag: bytes, *, is_whole: bool = False) -> None:
        self.cut_tag, self.cuts_request, self._cuts_whole = tag, True, is_whole

    def is_to_cut(self, text: bytes) -> bool:
        tag = self.cut_tag
        return tag is not None and (tag == text if self._cuts_whole else tag in text)

    async def mend(self) -> None:
        self.delay_range = (0.0, 0.0)
        self.bytes_per_second = None
        self.cut_tag = None
        self.blackholes_new = self.is_rejecting = False
        for link in self.links:
            link.thawed.set()
        async with self._mending:  # several may mend at once
            if self._listener is None:
                self._listener = (await trio.open_tcp_listeners(self.port, host=self.host))[0]
                self.port = self._listener.socket.getsockname()[1]
                self._mended.set()
                self._mended = trio.Event()

    def _chosen(self, pid: int | None) -> list[Link]:
        chosen = [link for link in self.links if pid is None or link.pid == pid]
        if pid is not None and not chosen:
            raise LookupError(f"no connection of server process {pid} goes through the proxy")
        return chosen

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                if self._listener is None:
                    await self._mended.wait()
                    continue
                try:
                    client = await self._listener.accept()
                except trio.ClosedResourceError:
                    continue
                self.accepted += 1
                if self.is_rejecting:
                    client.socket.close()
                    continue
                nursery.start_soon(self._serve, client)

    async def _serve(self, client: trio.SocketStream) -> None:
        try:
            if isinstance(self._upstream, str):
                server = await trio.open_unix_socket(self._upstream)
            else:
                server = await trio.open_tcp_stream(*self._upstream)
        except (OSError, trio.Cancelled):  # the upstream is down, which the client may see
            client.socket.close()
            await trio.lowlevel.checkpoint()
            return
        link = Link(self, client, server)
        self.links.add(link)
        if self.blackholes_new:
            link.blackhole()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.pump_replies)
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await link.pump_requests()
                if link.is_blackholed:
                    nursery.cancel_scope.cancel()
        finally:
            self.links.discard(link)
            link.close()


@asynccontextmanager
async def open_chaos_proxy(dsn: str) -> AsyncGenerator[ChaosProxy]:
    """A proxy in front of the server of `dsn`; at the end of the block all its connections are closed."""
    proxy = ChaosProxy(dsn)
    await proxy.mend()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(proxy.run)
        try:
            yield proxy
        finally:
            proxy.refuse()
            nursery.cancel_scope.cancel()
