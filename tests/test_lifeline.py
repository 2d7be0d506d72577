"""The line between processes: roll call, values, who failed first, who fell silent."""

import json
import re
import socket
import threading
import time
from queue import Queue

import pytest

from uta_jax import UserError, processes
from uta_jax.lifeline import END, Lifeline, Member
from uta_jax.places import Place
from uta_jax.rollcall import call_the_roll


def member(index, count=3, host="here", version="1"):
    return Member(index, count, host, 100 + index, version)


# The line, between threads of this process


def connected():
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        return listener.accept()[0], far


class Party:
    """A line of three; ``words`` gets (number, what it said last, exit code)."""

    def __init__(self, heartbeat_s, shutdown_s):
        self.words, members = Queue(), [member(i) for i in range(3)]
        pairs = {i: connected() for i in (1, 2)}
        first = {i: near for i, (near, _) in pairs.items()}
        self.sockets = [first, *({0: far} for _, far in pairs.values())]
        self.lines = [
            Lifeline(members, i, wires, heartbeat_s, shutdown_s, self._noting(i))
            for i, wires in enumerate(self.sockets)
        ]

    def _noting(self, index):
        return lambda words, code: self.words.put((index, words.strip(), code))

    def all_say(self, *numbers):
        """What these said last, which must be the same words after their names, and the codes."""
        said = sorted(self.words.get(timeout=10) for _ in numbers)
        assert [number for number, _, _ in said] == list(numbers)
        causes = set()
        for number, words, _ in said:
            head, cause = words.split("\n", 1)
            assert head == f"{member(number)} ends with the run, because of:"
            causes.add(cause)
        (cause,) = causes
        return cause, [code for _, _, code in said]


@pytest.fixture
def party():
    """Makes parties, and closes them."""
    made = []

    def make(heartbeat_s=1.0, shutdown_s=60.0):
        made.append(Party(heartbeat_s, shutdown_s))
        return made[-1]

    yield make
    at_once([line.close for one in made for line in one.lines])


def at_once(functions):
    """What each returned, or raised, called in threads of their own."""
    found = {}

    def call(number, function):
        try:
            found[number] = function()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return [found.get(number, "did not return") for number in range(len(threads))]


def test_every_process_learns_what_each_brings(party):
    lines = party().lines
    for turn in range(3):
        brought = at_once([lambda x=x, t=turn: x.gather("a", [x.index, t]) for x in lines])
        assert brought == [[[0, turn], [1, turn], [2, turn]]] * 3


def test_a_large_value_arrives_whole(party):
    text = "x" * 300_000
    assert at_once([lambda x=x: x.gather("a", text) for x in party().lines]) == [[text] * 3] * 3


def test_processes_that_are_not_at_the_same_place_fail(party):
    lines = party().lines
    threading.Thread(target=lines[1].gather, args=("saving", 1), daemon=True).start()
    threading.Thread(target=lines[2].gather, args=("scores", 1), daemon=True).start()
    with pytest.raises(RuntimeError, match="come apart.*1: 'saving', 2: 'scores'"):
        lines[0].gather("saving", 1)


@pytest.mark.parametrize("index", [0, 1])
def test_a_failure_is_the_last_word_of_all_others_with_its_exit_code(index, party):
    these = party()
    these.lines[index].fail("process X: what went wrong", 3)
    others = [i for i in range(3) if i != index]
    assert these.all_say(*others) == ("process X: what went wrong", [3, 3])


def test_the_first_failure_is_not_followed_by_others(party):
    """The end of a process that failed is no news, and neither are its echoes."""
    these = party()
    these.lines[2].fail("the first", 2)
    these.sockets[2][0].shutdown(socket.SHUT_RDWR)
    assert these.all_say(0, 1) == ("the first", [2, 2])
    time.sleep(1.5)  # more than a beat
    assert these.words.empty()


@pytest.mark.parametrize("index", [0, 2])
def test_a_connection_that_ends_is_a_process_that_was_killed(index, party):
    these = party()
    these.lines[index]._ending.acquire()  # it is dead, and has no words
    for sock in these.sockets[index].values():
        sock.shutdown(socket.SHUT_RDWR)
    cause = f"{member(index)} ended without a word: killed, or its host lost"
    assert these.all_say(*(i for i in range(3) if i != index)) == (cause, [1, 1])


def test_silence_is_noticed_and_beats_are_no_silence(party, monkeypatch):
    these = party()
    time.sleep(2.5)
    assert these.words.empty()
    monkeypatch.setattr(these.lines[1], "_beat", lambda: None)
    cause, codes = these.all_say(0, 1, 2)
    assert codes == [1, 1, 1]
    assert f"{member(1)} has been silent for 1 s (processes.heartbeat_s=1)" in cause


def test_one_that_ends_long_before_the_others(party):
    these = party(shutdown_s=1.0)
    for i in (1, 2):
        threading.Thread(target=these.lines[i].gather, args=(END, None), daemon=True).start()
    cause, codes = these.all_say(0, 1, 2)
    assert codes == [1, 1, 1]
    assert "came to its end 1 s ago" in cause and f"but not {member(0)}" in cause


def test_leaving_together_is_no_failure(party):
    these = party()
    assert at_once([lambda x=x: x.gather(END, None) for x in these.lines]) == [[None] * 3] * 3
    at_once([x.close for x in these.lines])
    assert these.words.empty()


# The roll call, over TCP


@pytest.fixture
def where():
    """HOST:PORT that is free."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{any_port.getsockname()[1]}"


def roll(where, *members, wait_s=10.0):
    """What the roll call of each gave or raised."""
    found = at_once([lambda m=m: call_the_roll(m, where, wait_s, str) for m in members])
    for result in found:
        if isinstance(result, tuple):
            for sock in result[1].values():
                sock.close()
    return found


def check_refused(found, words):
    for error in found:
        assert isinstance(error, UserError) and re.search(words, str(error)), error


def test_all_who_are_there_know_each_other(where):
    members = [member(i) for i in range(3)]
    found = roll(where, members[2], members[0], members[1])
    assert [them for them, _ in found] == [members] * 3
    assert [sorted(sockets) for _, sockets in found] == [[0], [1, 2], [0]]


@pytest.mark.parametrize(
    "odd, words",
    [
        (member(1, count=4), "process 1 .* started as one of 4, process 0 .* one of 3"),
        (member(3), "process 3 .*numbers go from 0 to 2"),
        (member(1, version="2"), "process 1 .* runs 2, but process 0 .* 1: install the same"),
        (member(1, host="there"), "127.0.0.1 means another machine .*process 1 .*there"),
    ],
)
def test_who_does_not_belong_is_named_to_all(odd, words, where):
    check_refused(roll(where, member(0), odd), words)


def test_a_number_is_given_once(where):
    check_refused(
        roll(where, member(0), member(1), member(1)), "process 1 .*process 1 .* same number"
    )


def test_who_is_missing_is_named_to_all(where):
    found = roll(where, member(0), member(2), wait_s=1.0)
    check_refused(found, r"waited 1 s for 1 of 3 processes: missing 1: .*processes\.start_s")


def test_the_first_process_is_missing(where):
    check_refused(roll(where, member(1), wait_s=0.5), f"nothing answers at {where} for 0.5 s")


def test_strangers_at_the_door_are_sent_away(where):
    """Before the last of us comes, so that the door is open."""
    host, port = where.split(":")

    def second():
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"index": 1}\n', b""):
            knock((host, int(port)), words)
        return roll(where, member(1, 2))[0]

    members = [member(0, 2), member(1, 2)]
    found = at_once([lambda: roll(where, members[0])[0], second])
    assert [them for them, _ in found] == [members, members]


def knock(address, words):
    """Say something to whoever listens, once somebody does."""
    for _ in range(100):
        try:
            with socket.create_connection(address) as sock:
                return sock.sendall(words)
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nobody listened")


def test_a_port_that_is_taken(where):
    with socket.create_server(("", int(where.split(":")[1]))):
        check_refused(roll(where, member(0)), "cannot listen on port .*choose another port")


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:http"])
def test_an_address_without_a_port(address):
    check_refused(roll(address, member(0)), "must be HOST:PORT")


# What processes.py makes of it


class Answered:
    """A line on which the others have said what they had to say."""

    index = 0

    def __init__(self, *others):
        self.others, self.members = others, [member(i) for i in range(len(others) + 1)]

    def gather(self, label, value):
        return json.loads(json.dumps([value, *self.others]))

    def fail(self, words, code):
        self.failed = words, code


def test_the_odd_one_is_named_with_both_values(monkeypatch):
    mine = {"config.seed": 0, "config.data.crop_scale": (0.2, 1.0)}
    monkeypatch.setattr(processes, "_line", Answered(mine, mine))
    processes.agree("what to train", mine)
    monkeypatch.setattr(processes, "_line", Answered(mine | {"config.seed": 1}, mine))
    with pytest.raises(UserError, match=r"process 1 .*config\.seed = 1, most of the 3 .* have 0"):
        processes.agree("what to train", mine)


def test_one_process_agrees_with_itself_and_speaks(capsys):
    assert processes.gather("x", {"a": 1}) == [{"a": 1}] and processes.is_first()
    processes.agree("x", {"a": 1})
    processes.say("said")
    assert capsys.readouterr().out == "said\n"


class Saved(UserError):
    exit_code = 4


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("a\n mistake"), 2, "a mistake"),
        (Saved("not saved"), 4, "not saved"),
        (ValueError("wrong"), 1, "ValueError: wrong"),
        (SystemExit(7), 7, "SystemExit: 7"),
        (SystemExit(0), 1, "SystemExit: 0"),  # the others are not done
    ],
)
def test_how_a_process_ends_and_what_the_others_are_told(error, code, words, monkeypatch):
    line, ended = Answered({}), []
    monkeypatch.setattr(processes, "_line", line)
    monkeypatch.setattr(processes, "_ECHO_S", 0)
    monkeypatch.setattr(processes, "end_process", lambda *last: ended.append(last))
    processes._fail(error)
    assert line.failed == (f"{member(0)}: {words}", code)
    assert ended == [(f"uta-jax: {member(0)}: {words}", code)]


def test_a_command_for_one_process_refuses_several(monkeypatch):
    monkeypatch.setattr(processes, "find_place", lambda: Place("Slurm", 1, 2))
    with pytest.raises(UserError, match="convert: 2 processes were started, it runs in one"):
        processes.refuse_several("convert")
