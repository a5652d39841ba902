"""A network of hosts on one machine, whose wires a test can cut, slow down and make lossy.

A host is a network namespace, and with it names, process numbers and if wanted a clock of its own,
so that nothing but packets tells one host of another. Each has a TUN device, and this process has
one as well. What any of them sends is read by the switch, a process of its own, which hands it on,
drops it or keeps it for a while, each direction of each pair by its own rule. The kernel's own
means (netem) are not in every kernel; these are where there is /dev/net/tun, and all is gone when
the processes are.

It takes root, or CAP_NET_ADMIN and CAP_SYS_ADMIN. This process is the last host, `Network.here`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import multiprocessing
import os
import random
import secrets
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_CLONE_NEWNET: Final = 0x40000000
_PACKET_BYTES_MAX: Final = 65536

MTU: Final = 32_000
"""Large, so that the switch has few packets to handle."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What happens to packets of one host for another.

    Attributes:
        cut: They are dropped.
        delay_s: They arrive so much later.
        jitter_s: And at random up to so much more, so that they may overtake each other.
        loss: The share of them that is dropped at random.
    """

    cut: bool = False
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0


GOOD: Final = Wire()


def missing() -> str:
    """Why there can be no network here; "" if there can."""
    for command in ("ip", "unshare", "nsenter"):
        if shutil.which(command) is None:
            return f"there is no command {command} (Debian: iproute2, util-linux)"
    try:
        os.close(_tun(""))
    except OSError as error:
        return f"network devices cannot be made here: {error}"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else f"hosts cannot be made here: {done.stderr.strip()}"


def _tun(name: str) -> int:
    """A TUN device in the present network namespace, which ends with the descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    except OSError:
        os.close(fd)
        raise
    return fd


def _switch(pipe: Connection, device: str, places: dict[str, str]) -> None:
    """The switch's process.

    Args:
        pipe: Rules come by it; closed at the end.
        device: Name of all its devices.
        places: By IPv4 address, the path of each host's network namespace.
    """
    libc: Any = ctypes.CDLL(None, use_errno=True)
    fds: dict[bytes, int] = {}
    for address, path in places.items():
        with open(path) as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {path}")
        fds[socket.inet_aton(address)] = _tun(device)
    pipe.send("ready")
    sources = {fd: address for address, fd in fds.items()}
    wires: dict[tuple[bytes, bytes], Wire] = {}
    waiting: list[tuple[float, int, int, bytes]] = []
    numbers = itertools.count()
    draw = random.Random().random
    poll = select.poll()
    for fd in (*sources, pipe.fileno()):
        poll.register(fd, select.POLLIN)
    while True:
        wait_ms = max(0.0, waiting[0][0] - time.monotonic()) * 1000 if waiting else None
        for fd, _ in poll.poll(wait_ms):
            if fd == pipe.fileno():
                try:
                    rules = pipe.recv()
                except EOFError:
                    return
                wires.update(rules)
                pipe.send("done")
                continue
            for _ in range(64):
                try:
                    packet = os.read(fd, _PACKET_BYTES_MAX)
                except OSError:
                    break
                target = fds.get(packet[16:20])
                if packet[0] >> 4 != 4 or target is None:
                    continue
                wire = wires.get((sources[fd], packet[16:20]), GOOD)
                if wire.cut or (wire.loss and draw() < wire.loss):
                    continue
                if not (wire.delay_s or wire.jitter_s):
                    _deliver(target, packet)
                    continue
                at_s = time.monotonic() + wire.delay_s + wire.jitter_s * draw()
                heapq.heappush(waiting, (at_s, next(numbers), target, packet))
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, target, packet = heapq.heappop(waiting)
            _deliver(target, packet)


def _deliver(fd: int, packet: bytes) -> None:
    # A queue that is full drops, as any wire does.
    with contextlib.suppress(OSError):
        os.write(fd, packet)


class Host:
    """One host. `within` runs a command there, with process numbers of its own; `on_wire` only
    with its network, so that the process is a child of this one.
    """

    def __init__(self, name: str, address: str, pid: int, own_clock: bool = False) -> None:
        self.own_clock = own_clock
        self.name = name
        self.address = address
        self.pid = pid

    @property
    def on_wire(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--"] if self.pid else []

    @property
    def within(self) -> list[str]:
        if not self.pid:
            return []
        spaces = ["--net", "--uts", "--pid", "--mount", *(["--time"] if self.own_clock else [])]
        # The mount namespace keeps the working directory as it is here.
        return ["nsenter", "--target", str(self.pid), *spaces, f"--wd={os.getcwd()}", "--"]

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}>"


class Network:
    """Hosts and their wires.

    Attributes:
        hosts: Those that were asked for.
        here: This process, as one more.
    """

    def __init__(self, hosts: list[Host], here: Host, pipe: Connection) -> None:
        self.hosts = hosts
        self.here = here
        self._pipe = pipe

    def wire(self, sources: Sequence[Host], targets: Sequence[Host], wire: Wire) -> None:
        """Set what happens to packets of some hosts for others, in that direction only."""
        self._set(
            {
                (socket.inet_aton(a.address), socket.inet_aton(b.address)): wire
                for a in sources
                for b in targets
                if a is not b
            }
        )

    def both_ways(self, some: Sequence[Host], others: Sequence[Host], wire: Wire) -> None:
        """The same for both directions."""
        self.wire(some, others, wire)
        self.wire(others, some, wire)

    def heal(self) -> None:
        """All wires are good again; what is on its way arrives when it was to."""
        everybody = [*self.hosts, self.here]
        self.wire(everybody, everybody, GOOD)

    def _set(self, rules: dict[tuple[bytes, bytes], Wire]) -> None:
        self._pipe.send(rules)
        assert self._pipe.recv() == "done"


@contextlib.contextmanager
def network(names: Sequence[str], clocks_ahead_s: Sequence[int] = ()) -> Iterator[Network]:
    """A network of hosts, for the time of the block.

    Args:
        names: Of the hosts.
        clocks_ahead_s: By how much the monotonic clock of each is ahead of this machine's; all
            have the machine's own if this is empty.
    """
    subnet = f"10.{random.SystemRandom().randrange(64, 250)}.{random.SystemRandom().randrange(250)}"
    device = f"lm{secrets.token_hex(3)}"
    with contextlib.ExitStack() as stack:
        hosts = []
        for number, name in enumerate(names, start=1):
            command = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc"]
            if clocks_ahead_s:
                ahead_s = str(clocks_ahead_s[number - 1])
                command += ["--time", "--monotonic", ahead_s, "--boottime", ahead_s]
            # It ends when its standard input does, and everything within it.
            script = f"hostname {name} && echo up && exec cat"
            holder = subprocess.Popen(
                [*command, "--kill-child", "sh", "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            assert holder.stdin is not None and holder.stdout is not None
            stack.callback(holder.stdin.close)
            stack.callback(holder.stdout.close)
            assert holder.stdout.readline() == b"up\n"
            children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()
            pid = int(children.split()[0])
            hosts.append(Host(name, f"{subnet}.{number}", pid, bool(clocks_ahead_s)))
        here = Host("here", f"{subnet}.254", 0)
        places = {h.address: f"/proc/{h.pid}/ns/net" for h in hosts}
        places[here.address] = f"/proc/{os.getpid()}/ns/net"
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        switch = context.Process(target=_switch, args=(theirs, device, places), daemon=True)
        switch.start()
        theirs.close()
        stack.callback(switch.join)
        stack.callback(switch.kill)
        stack.callback(ours.close)
        assert ours.recv() == "ready"
        for host in (*hosts, here):
            for words in (
                ("link", "set", "lo", "up"),
                ("address", "add", f"{host.address}/24", "dev", device),
                ("link", "set", device, "mtu", str(MTU), "up"),
            ):
                subprocess.run([*host.on_wire, "ip", *words], check=True)
        yield Network(hosts, here, cast(Connection, ours))
