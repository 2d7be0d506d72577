"""The line between the processes of a run: who is there, who fell silent, what ended the first.

Every process holds one TCP connection to process 0. It carries the roll call before JAX's own
runtime starts, small values that all must know, a beat, and the cause when a process fails. JAX
alone lets the others wait for minutes, and then ends them with a stack of C++.

The port is the coordinator's own: the roll call (``rollcall.py``) is over before JAX listens there.
What arrives is JSON and never executed; like JAX's own port, it belongs inside a private network.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

SEND_S = 5.0  # longest wait for a peer to take a message
_MAX_BYTES = 1 << 24  # of one message
END = "the end of the run"


@dataclass(frozen=True)
class Member:
    """One process, as it introduces itself."""

    index: int
    count: int  # how many it believes there are
    host: str
    pid: int
    version: str  # of the code and its libraries

    def __str__(self) -> str:
        return f"process {self.index} (host {self.host}, pid {self.pid})"


class Wire:
    """A socket that carries one JSON object a line."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(SEND_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.heard = sock, time.monotonic()
        self._rest, self._lock = b"", threading.Lock()

    def send(self, **message) -> None:
        with self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """The messages that are complete by now; EOFError at the end of the connection."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_BYTES:
            raise EOFError
        return [json.loads(line) for line in lines]

    def first(self) -> dict:
        """Wait for one message, and read nothing after it, as long as the time-out lets it."""
        line = b""
        while not line.endswith(b"\n") and len(line) < _MAX_BYTES:
            if not (byte := self.socket.recv(1)):
                raise EOFError
            line += byte
        return json.loads(line)


class Lifeline:
    """This process's end of the line; ``wires`` lead to process 0, or from it to all others.

    From its creation on a thread watches: it ends this process, saying why, when another one fails,
    falls silent for ``heartbeat_s``, or has been at the end for ``shutdown_s`` and this one or a
    third has not.
    """

    def __init__(
        self,
        members: list[Member],
        index: int,
        wires: dict[int, socket.socket],
        heartbeat_s: float,
        shutdown_s: float,
        last_words: Callable[[str, int], None] | None = None,
    ):
        self.members, self.index = members, index
        self._wires = {peer: Wire(sock) for peer, sock in wires.items()}
        self._heartbeat_s, self._shutdown_s = heartbeat_s, shutdown_s
        self._last_words = last_words or end_process
        self._values: dict[int, tuple[str, object]] = {}  # process 0: what each has brought
        self._gathered: list | None = None
        self._arrived = threading.Condition()
        self._ending = threading.Lock()  # only one thread has the last word
        self._at_end: dict[int, float] = {}
        self._left: set[int] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def gather(self, label: str, value) -> list:
        """What every process brings, in their order; all must call it alike. Values are JSON.

        Raises RuntimeError where the processes are not at the same ``label``.
        """
        if label == END:
            self._at_end[self.index] = time.monotonic()
        if self.index:
            self._wires[0].send(gather=label, value=value)
            return self._wait(lambda: self._gathered is not None)
        with self._arrived:
            self._values[0] = (label, value)
        self._wait(lambda: len(self._values) == len(self.members))
        values, self._values = self._values, {}
        labels = {i: label for i, (label, _) in sorted(values.items())}
        if len(set(labels.values())) > 1:
            raise RuntimeError(f"the processes have come apart: {labels}")
        ordered = [values[i][1] for i in range(len(self.members))]
        for wire in self._wires.values():
            wire.send(gathered=ordered)
        return ordered

    def _wait(self, ready: Callable[[], bool]) -> list | None:
        with self._arrived:
            self._arrived.wait_for(ready)
            found, self._gathered = self._gathered, None
        return found

    def fail(self, cause: str, code: int) -> None:
        """Tell the others what ended this process, and the exit code for all; the caller ends it.

        Returns when they know.
        """
        self._ending.acquire()  # never released: the thread that watches must not speak any more
        self._tell(cause, self.index, code)

    def _tell(self, cause: str, index: int, code: int) -> None:
        for peer, wire in self._wires.items():
            if peer not in self._left:
                with suppress(OSError):
                    wire.send(fail=cause, process=index, code=code)
        if not self.index:  # with it goes JAX's service, which ends the others less clearly
            time.sleep(1)

    def close(self) -> None:
        """Leave; for when all have come to the end."""
        self._closed = True
        for wire in self._wires.values():
            with suppress(OSError):
                wire.send(bye=True)
        self._thread.join(timeout=5)
        for wire in self._wires.values():
            wire.socket.close()

    # The thread that watches

    def _watch(self) -> None:
        pause = self._heartbeat_s / 5
        turn = beat = time.monotonic()
        with selectors.DefaultSelector() as ready:
            for peer, wire in self._wires.items():
                ready.register(wire.socket, selectors.EVENT_READ, peer)
            while not self._closed:
                for key, _ in ready.select(timeout=min(pause, 0.5)):
                    self._hear(key.data, ready)
                now = time.monotonic()
                if now - turn > self._heartbeat_s / 2:  # it is this process that was away
                    for wire in self._wires.values():
                        wire.heard = now
                turn = now
                if now - beat >= pause:
                    beat = now
                    self._beat()
                self._judge(now)

    def _hear(self, peer: int, ready: selectors.BaseSelector) -> None:
        wire = self._wires[peer]
        try:
            messages = wire.receive()
        except TimeoutError:
            return
        except (OSError, EOFError, ValueError):
            ready.unregister(wire.socket)
            if peer not in self._left and not self._closed:
                self._end(
                    peer, f"{self.members[peer]} ended without a word: killed, or its host lost"
                )
            return
        for message in messages:
            self._take(peer, message)

    def _take(self, peer: int, message: dict) -> None:
        if "fail" in message:
            self._end(message["process"], message["fail"], message["code"])
        elif "bye" in message:
            self._left.add(peer)
        with self._arrived:
            if "gather" in message:
                self._values[peer] = (message["gather"], message["value"])
                if message["gather"] == END:
                    self._at_end[peer] = time.monotonic()
            elif "gathered" in message:
                self._gathered = message["gathered"]
            self._arrived.notify_all()

    def _beat(self) -> None:
        for peer, wire in self._wires.items():
            if peer not in self._left:
                with suppress(OSError):  # reading says what is wrong
                    wire.send(beat=True)

    def _judge(self, now: float) -> None:
        for peer, wire in self._wires.items():
            silent = now - wire.heard
            if silent > self._heartbeat_s and peer not in self._left:
                self._end(
                    peer,
                    f"{self.members[peer]} has been silent for {silent:.0f} s ("
                    f"processes.heartbeat_s={self._heartbeat_s:g}): stopped, or lost",
                )
        if not self.index and self._at_end and now - min(self._at_end.values()) > self._shutdown_s:
            here = min(self._at_end, key=self._at_end.get)
            late = [str(m) for m in self.members if m.index not in self._at_end]
            if late:
                self._end(
                    here,
                    f"{self.members[here]} came to its end {self._shutdown_s:g} s ago "
                    f"(processes.shutdown_s), but not {', '.join(late)}: they ran different "
                    "numbers of steps",
                )

    def _end(self, index: int, cause: str, code: int = 1) -> None:
        """Say what happened to process ``index``, pass it on, and end this process."""
        if not self._ending.acquire(blocking=False):
            return
        self._tell(cause, index, code)
        words = f"\n{self.members[self.index]} ends with the run, because of:\n{cause}"
        self._last_words(words, code)


def end_process(words: str, code: int) -> NoReturn:
    """End this process at once, from whatever thread, with ``words`` as its last."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(os.dup(2), "w") as stderr:
            # Threads of JAX's runtime, which fails at the same time, have nothing to add to them.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            print(words, file=stderr, flush=True)
    finally:  # whoever read what was printed may be gone
        os._exit(code)
