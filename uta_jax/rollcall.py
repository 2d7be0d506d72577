"""The roll call of a run: all of its processes are there, once, with the same code, or none is."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from uta_jax import UserError
from uta_jax.lifeline import SEND_S, Member, Wire

LOOPBACK = ("localhost", "127.", "[::1]", "::1")


def call_the_roll(
    me: Member, address: str, wait_s: float, say: Callable[[str], None] = print
) -> tuple[list[Member], dict[int, socket.socket]]:
    """Wait at ``address`` (HOST:PORT of process 0) until all are there: who they are, and sockets.

    Raises UserError, on every process that is there, for one that is missing after ``wait_s``
    seconds, a number given twice, another count or code, or a loopback address between hosts.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the coordinator's address {address!r} must be HOST:PORT of process 0")
    if me.index == 0:
        return _call(me, host, int(port), wait_s, say)
    return _answer(me, host, int(port), wait_s)


def _call(me: Member, host: str, port: int, wait_s: float, say) -> tuple:
    present, sockets = {0: me}, {}
    with _listen(port) as listener:
        deadline, told = time.monotonic() + wait_s, time.monotonic()
        while len(present) < me.count:
            if (now := time.monotonic()) > deadline:
                _refuse(sockets, _missing(present, me.count, wait_s, host))
            if now - told > 10:
                told = now
                say(f"waiting for {_absent(present, me.count)}")
            with suppress(TimeoutError):
                if (found := _introduced(listener)) is not None:
                    member, sock = found
                    again = member.index in present
                    sockets[-1 if again else member.index] = sock
                    if reason := _misfit(member, present, host):
                        _refuse(sockets, reason)
                    present[member.index] = member
    members = [present[i] for i in range(me.count)]
    for sock in sockets.values():
        Wire(sock).send(members=[asdict(m) for m in members])
    return members, sockets


def _listen(port: int) -> socket.socket:
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=dual, backlog=1024
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port}: {error.strerror}; end what holds it, or "
            "choose another port for the coordinator"
        ) from None
    listener.settimeout(0.5)
    return listener


def _introduced(listener: socket.socket) -> tuple[Member, socket.socket] | None:
    """The next to come; None for somebody who is not one of us."""
    sock, _ = listener.accept()
    try:
        return Member(**Wire(sock).first()), sock
    except (OSError, EOFError, TypeError, ValueError):
        sock.close()
        return None


def _misfit(member: Member, present: dict[int, Member], host: str) -> str:
    """Why ``member`` cannot be one of those ``present``; "" where it can."""
    first = present[0]
    if member.count != first.count:
        return f"{member} was started as one of {member.count}, {first} as one of {first.count}"
    if not 0 < member.index < first.count:
        return f"{member}: numbers go from 0 to {first.count - 1}"
    if member.index in present:
        return f"{member} and {present[member.index]} have the same number: give each its own"
    if member.version != first.version:
        return f"{member} runs {member.version}, but {first} {first.version}: install the same"
    if member.host != first.host and host.startswith(LOOPBACK):
        return (
            f"the coordinator's address {host} means another machine on every host, but {member} "
            f"and {first} are on two: give the name or address of the host of process 0"
        )
    return ""


def _missing(present: dict, count: int, wait_s: float, host: str) -> str:
    hint = f"; {host} can be reached from this host alone" if host.startswith(LOOPBACK) else ""
    return (
        f"waited {wait_s:g} s for {_absent(present, count)}: see why they did not start or cannot "
        f"reach process 0, or raise config.processes.start_s{hint}"
    )


def _absent(present: dict, count: int) -> str:
    gone = [str(i) for i in range(count) if i not in present]
    names = ", ".join(gone[:20]) + (", ..." if len(gone) > 20 else "")
    return f"{len(gone)} of {count} processes: missing {names}"


def _refuse(sockets: dict[int, socket.socket], reason: str) -> None:
    for sock in sockets.values():
        with sock, suppress(OSError):
            Wire(sock).send(refused=reason)
    raise UserError(reason)


def _answer(me: Member, host: str, port: int, wait_s: float) -> tuple:
    deadline = time.monotonic() + wait_s
    sock = _reach(me, host, port, wait_s, deadline)
    try:
        wire = Wire(sock)
        wire.send(**asdict(me))
        sock.settimeout(max(deadline - time.monotonic(), 0) + 2 * SEND_S)
        answer = wire.first()
    except (OSError, EOFError) as error:
        sock.close()
        raise UserError(
            f"process {me.index} of {me.count}: process 0 at {host}:{port} ended at the roll call "
            f"({type(error).__name__})"
        ) from None
    if "refused" in answer:
        sock.close()
        raise UserError(answer["refused"])
    return [Member(**member) for member in answer["members"]], {0: sock}


def _reach(me: Member, host: str, port: int, wait_s: float, deadline: float) -> socket.socket:
    """Process 0, once it listens."""
    while True:
        try:
            return socket.create_connection((host.strip("[]"), port), timeout=SEND_S)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {me.index} of {me.count}: nothing answers at {host}:{port} for "
                    f"{wait_s:g} s ({error.strerror or error}): process 0 must run there, and the "
                    "port be open to this host"
                ) from None
            time.sleep(0.2)
