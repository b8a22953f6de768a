"""The daemon behind a mount: one trio nursery with the file system, the control socket and the housekeeping.

A child of the mount's parent process, which does for it what must be done in the host's mount namespace.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import trio

from cidfs import control
from cidfs.board import Board
from cidfs.errors import CidfsError, MountFailed
from cidfs.local.leases import HOLDER, Lease
from cidfs.local.store import LocalStore
from cidfs.mount import session
from cidfs.mount.acts import Link
from cidfs.mount.growth import Growth
from cidfs.mount.mountinfo import mounted_at, printable
from cidfs.mount.plan import MountPlan
from cidfs.mount.transport.pyfuse3 import Pyfuse3Transport
from cidfs.mount.view import StoreView
from cidfs.mount.watch import OverlayWatch

log = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 5.0  # for a request to come
STEP_SECONDS: Final = 30.0  # for what is asked to be done
HOUSEKEEPING_SECONDS: Final = 60.0
GROWTH_SECONDS: Final = 0.5


def run(plan: MountPlan, link: Link, board: Board, ready: Callable[[Path], None]) -> None:
    """Mount and serve until the mount ends.

    ready is called with the path of the control socket when requests are being answered. Raises the errors of
    the start. Must be called before any thread has started in this process.
    """
    session.check_mountpoint(plan.mountpoint)
    with contextlib.ExitStack() as stack:
        LocalStore.open(
            plan.state, create=True, store_dir=plan.store_dir, lock_timeout=plan.lock_timeout
        ).close()
        store = stack.enter_context(LocalStore.open(plan.state))
        lease = store.lease("mount", mountpoint=printable(plan.mountpoint), transport="pyfuse3")
        stack.callback(lease.release)
        complaint: list[str] = []
        watch: OverlayWatch | None = None  # set before the first request is taken
        view = StoreView(
            store,
            list_root=plan.list_root,
            under_overlay=lambda: watch is not None and bool(watch.standing()),
        )
        transport = Pyfuse3Transport(view)
        try:
            with session.captured_stderr(complaint):
                transport.mount(str(plan.mountpoint), session.options(plan.state))
        except RuntimeError as e:
            raise MountFailed(f"{plan.mountpoint}: the mount failed: {' '.join(complaint) or e}") from e
        isolation: session.Isolation | None = None
        mount = mounted_at(plan.mountpoint)  # in an own namespace it is out of sight
        device = mount.device if mount is not None else ""
        try:
            watch = OverlayWatch(plan.mountpoint)
            stack.callback(watch.close)
            isolation = session.isolate(plan.mountpoint, plan.state, plan.store_dir)
            listener = _listen(lease)
            stack.callback(_remove, lease.socket_path)
            growth = Growth(store, view.absences, watch, link, board, transport.forget_names)
            trio.run(
                _Daemon(plan, store, transport, device, lease, listener, growth, watch, board, ready).run
            )
        finally:
            if isolation is not None:
                isolation.unmount(mount)
            else:
                session.take_from_sight(mount)
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
        growth: Growth,
        watch: OverlayWatch,
        board: Board,
        ready: Callable[[Path], None],
    ) -> None:
        self._plan = plan
        self._store = store
        self._transport = transport
        self._device = device
        self._lease = lease
        self._listener = listener
        self._growth = growth
        self._watch = watch
        self._board = board
        self._ready = ready
        self._began = time.monotonic()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals)
            nursery.start_soon(self._housekeeping)
            nursery.start_soon(self._grow)
            nursery.start_soon(self._serve_control)
            nursery.start_soon(self._announce)
            await self._transport.serve()
            log.info("%s: unmounted", self._plan.mountpoint)
            nursery.cancel_scope.cancel()

    async def _announce(self) -> None:
        await self._transport.answering.wait()
        session.raise_read_ahead(self._device)
        self._ready(self._lease.socket_path)

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

    async def _grow(self) -> None:
        while True:
            await self._growth.step()
            await trio.sleep(GROWTH_SECONDS)

    async def _serve_control(self) -> None:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
        await trio.serve_listeners(self._answer, [listener])

    async def _answer(self, stream: trio.SocketStream) -> None:
        with trio.move_on_after(REQUEST_SECONDS) as patience, contextlib.suppress(trio.BrokenResourceError):
            line = b""
            while not line.endswith(b"\n") and len(line) < control.MAX_LINE:
                piece = await stream.receive_some(65536)
                if not piece:
                    return
                line += piece
            try:
                request = msgspec.json.decode(line, type=control.Request)
            except (msgspec.MsgspecError, UnicodeDecodeError) as e:
                log.warning("control socket: %s", e)
                return
            patience.deadline = trio.current_time() + STEP_SECONDS
            if request.do == "stats":
                answer = msgspec.json.encode(self.stats())
            elif request.do == "refresh":
                answer = msgspec.json.encode(control.Done(await self._growth.step()))
            elif request.do == "unveil":
                answer = msgspec.json.encode(control.Done(await self._growth.unveil(request.names)))
            else:
                log.warning("control socket: asked for %r, which this version does not know", request.do)
                return
            await stream.send_all(answer + b"\n")

    def stats(self) -> control.DaemonStats:
        """Return what this daemon says of itself."""
        view = self._transport.view
        counters = view.counters
        return control.DaemonStats(
            pid=os.getpid(),
            mountpoint=printable(self._plan.mountpoint),
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
            overlays=control.OverlayStats(
                above=[overlay.mountpoint for overlay in self._watch.standing()],
                remounts=self._growth.remounts,
                unveiled=self._growth.unveiled,
                confirmed=self._board.confirmed,
                absent_names=len(view.absences),
                complaint=self._growth.complaint,
            ),
            nix=self._nix_stats(),
        )

    def _nix_stats(self) -> control.NixStats | None:
        """Return what the metadata process has noted on the board; None where there is none."""
        board = self._board
        where = printable(self._plan.mountpoint)
        leases = [info for _, info in self._store.state.leases() if info.kind == HOLDER]
        sockets = [i.nix_socket for i in leases if i.pid == os.getppid() and i.mountpoint == where]
        if not sockets or not sockets[0]:
            return None
        return control.NixStats(
            pid=board.nix,
            socket=sockets[0],
            restarts=board.restarts,
            connections=board.connections,
            connections_total=board.connections_total,
            requests=board.requests,
            refused=board.refused,
            broken=board.broken,
            withheld=board.withheld,
        )


def _memory() -> int:
    """Return the resident memory of this process in bytes, without what is only mapped from files."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0
