"""The daemon behind a mount: one trio nursery with the file system, the control socket and the housekeeping.

Starts in this order: store, lease, mount, own namespace, socket, requests. Ends when the file system is
unmounted or on SIGTERM and SIGINT, and takes its mount with it. One mount a process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import trio

from cidfs import control
from cidfs.errors import CidfsError, MountFailed
from cidfs.local.leases import Lease
from cidfs.local.removal import Removals
from cidfs.local.store import LocalStore
from cidfs.mount import session
from cidfs.mount.transport.pyfuse3 import Pyfuse3Transport
from cidfs.mount.view import StoreView

log = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 5.0
HOUSEKEEPING_SECONDS: Final = 60.0
REMOVALS_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class MountPlan:
    """What to mount, and where."""

    state: Path
    mountpoint: Path
    store_dir: str
    list_root: bool
    lock_timeout: float


def run(plan: MountPlan, ready: Callable[[], None]) -> None:
    """Mount and serve until the mount ends; ready is called when requests are being answered.

    Raises the errors of the start. Must be called before any thread has started in this process.
    """
    session.check_mountpoint(plan.mountpoint)
    with contextlib.ExitStack() as stack:
        LocalStore.open(
            plan.state, create=True, store_dir=plan.store_dir, lock_timeout=plan.lock_timeout
        ).close()
        store = stack.enter_context(LocalStore.open(plan.state))
        lease = store.lease("mount", mountpoint=session.printable(plan.mountpoint), transport="pyfuse3")
        stack.callback(lease.release)
        transport = Pyfuse3Transport(StoreView(store, list_root=plan.list_root))
        complaint: list[str] = []
        try:
            with session.captured_stderr(complaint):
                transport.mount(str(plan.mountpoint), session.options(plan.state))
        except RuntimeError as e:
            raise MountFailed(f"{plan.mountpoint}: the mount failed: {' '.join(complaint) or e}") from e
        isolation: session.Isolation | None = None
        try:
            mount = session.mounted_at(plan.mountpoint)  # in an own namespace it is out of sight
            device = mount.device if mount is not None else ""
            isolation = session.isolate(plan.mountpoint, plan.state, plan.store_dir)
            listener = _listen(lease)
            stack.callback(_remove, lease.socket_path)
            trio.run(_Daemon(plan, store, transport, device, lease, listener, ready).run)
        finally:
            if isolation is not None:
                isolation.unmount()
            else:
                session.unmount_if_mounted(plan.mountpoint)
            transport.close()


def _listen(lease: Lease) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with control.SocketAddress(lease.socket_path) as address:
        listener.bind(address)
    os.chmod(lease.socket_path, 0o660)
    listener.listen(16)
    return listener


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


class _Daemon:
    def __init__(
        self,
        plan: MountPlan,
        store: LocalStore,
        transport: Pyfuse3Transport,
        device: str,
        lease: Lease,
        listener: socket.socket,
        ready: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._store = store
        self._transport = transport
        self._device = device
        self._lease = lease
        self._listener = listener
        self._ready = ready
        self._began = time.monotonic()
        self._removals = Removals(store)
        self._letting_go = trio.Lock()
        self._to_forget: list[bytes] = []  # stays when who asked has gone in between

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals)
            nursery.start_soon(self._housekeeping)
            nursery.start_soon(self._watch_removals)
            nursery.start_soon(self._serve_control)
            nursery.start_soon(self._announce)
            await self._transport.serve()
            log.info("%s: unmounted", self._plan.mountpoint)
            notify("STOPPING=1")
            nursery.cancel_scope.cancel()

    async def _announce(self) -> None:
        await self._transport.answering.wait()
        session.raise_read_ahead(self._device)
        self._ready()
        notify("READY=1")

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP:
                    continue  # the terminal that it was started from has gone
                log.info("%s: ending on %s", self._plan.mountpoint, signal.Signals(number).name)
                self._transport.stop()

    async def _housekeeping(self) -> None:
        while True:
            await trio.sleep(HOUSEKEEPING_SECONDS)
            try:
                freed = await trio.to_thread.run_sync(self._store.free_dead_readers)
                self._store.packs.forget_unlinked()
            except CidfsError as e:
                log.warning("%s", e)
                continue
            if freed:
                log.info("freed %d reader slots of dead processes", freed)

    async def _watch_removals(self) -> None:
        while True:
            await trio.sleep(REMOVALS_SECONDS)
            await self._let_go()

    async def _let_go(self) -> None:
        """Let the kernel forget the names of what was removed, and packs go that were unlinked."""
        async with self._letting_go:  # who asks is answered when the kernel knows, whoever saw it first
            try:
                self._to_forget += await trio.to_thread.run_sync(self._removals.new)
            except CidfsError as e:
                log.warning("%s", e)
                return
            if self._to_forget:
                await self._transport.forget_names(self._to_forget)
                self._to_forget = []
                self._store.packs.forget_unlinked()

    async def _serve_control(self) -> None:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
        await trio.serve_listeners(self._answer, [listener])

    async def _answer(self, stream: trio.SocketStream) -> None:
        with trio.move_on_after(REQUEST_SECONDS), contextlib.suppress(trio.BrokenResourceError):
            line = b""
            while not line.endswith(b"\n") and len(line) < control.MAX_LINE:
                piece = await stream.receive_some(4096)
                if not piece:
                    return
                line += piece
            try:
                request = msgspec.json.decode(line, type=control.Request)
            except (msgspec.MsgspecError, UnicodeDecodeError) as e:
                log.warning("control socket: %s", e)
                return
            if request.do == "refresh":
                await self._let_go()
            if request.do in ("stats", "refresh"):
                await stream.send_all(msgspec.json.encode(self.stats()) + b"\n")
            else:
                log.warning("control socket: asked for %r, which this version does not know", request.do)

    def stats(self) -> control.DaemonStats:
        """Return what this daemon says of itself."""
        view = self._transport.view
        counters = view.counters
        return control.DaemonStats(
            pid=os.getpid(),
            mountpoint=session.printable(self._plan.mountpoint),
            transport=self._lease.info.transport,
            uptime=time.monotonic() - self._began,
            memory=_memory(),
            requests={kind: each.summary() for kind, each in self._transport.latencies.items() if each.count},
            bytes_read=counters.bytes_read,
            chunk_hits=counters.chunk_hits,
            chunk_reads=counters.chunk_reads,
            manifest_hits=counters.manifest_hits,
            manifest_reads=counters.manifest_reads,
            damaged=counters.damaged,
            cached_bytes=view.cached_bytes,
        )


def _memory() -> int:
    """Return the resident memory of this process in bytes, without what is only mapped from files."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def notify(message: str) -> None:
    """Tell systemd, where it asked to be told (sd_notify(3)); its absence is no error."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.sendto(message.encode(), address)
    except OSError as e:
        print(f"cidfs: cannot notify {where}: {e.strerror}", file=sys.stderr)
