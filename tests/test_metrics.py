"""The record of a run."""

import io
import json
import struct
import sys
import types
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from uta_jax import UserError
from uta_jax.metrics import Meter, Writer, read


def test_a_resumed_run_stands_in_the_file_once(tmp_path):
    writer = Writer(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    writer = Writer(tmp_path, 3)  # the checkpoint was that of step 3
    writer.write(4, {"loss": 40.0})
    writer.close()
    rows = read(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_half_written_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read(path) == [{"step": 1}]
    assert read(tmp_path / "absent.jsonl") == []


def test_a_row_without_its_newline_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read(path) == [{"step": 1}, {"step": 2}]


class Events:
    """What a TensorBoard file of ``folder`` holds: (step, tag, value) of every summary."""

    def __init__(self, folder):
        (path,) = folder.glob("events.out.tfevents.*")
        data, self.found = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            self.found += [(event.step, value.tag, value) for value in event.summary.value]


def test_pictures_go_to_the_boards_and_nowhere_else(tmp_path, monkeypatch):
    """Weights & Biases by what it is told."""
    told = []

    def init(**options):
        log = types.SimpleNamespace(log=lambda values, step: told.append((step, values)))
        log.finish = lambda: told.append(options)
        return log

    fake = types.SimpleNamespace(init=init, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = Writer(tmp_path, 0, wandb="project")
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    writer.write(3, {"loss": 0.5, "ended": "complete"})
    writer.picture(3, "pictures", pixels)
    writer.close()
    (_, _, loss), (step, tag, shown) = Events(tmp_path).found
    assert loss.simple_value == 0.5 and (step, tag) == (3, "pictures")
    image = Image.open(io.BytesIO(shown.image.encoded_image_string))
    assert np.array_equal(np.asarray(image), pixels)
    assert told[:2] == [(3, {"loss": 0.5}), (3, {"pictures": (5, 7, 3)})]
    assert (told[2]["project"], told[2]["name"]) == ("project", tmp_path.name)
    assert [row.keys() for row in read(tmp_path / "metrics.jsonl")] == [{"step", "loss", "ended"}]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_service_that_is_down_stops_nothing(tmp_path, monkeypatch, capfd, fails):
    happened = []

    def call(name, /, *args, **kwargs):
        happened.append(name)
        if name == fails:
            raise ConnectionError("no route to host\nand more")
        return types.SimpleNamespace(log=partial(call, "log"), finish=partial(call, "finish"))

    fake = types.SimpleNamespace(init=partial(call, "init"), Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = Writer(tmp_path, 0, wandb="project")
    for step in (1, 2):
        writer.write(step, {"loss": 0.5})
        writer.picture(step, "pictures", np.zeros((5, 7, 3), np.uint8))
    writer.close()
    assert happened.count(fails) == 1  # it is not asked again
    assert len(read(tmp_path / "metrics.jsonl")) == 2 and len(Events(tmp_path).found) == 4
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Weights & Biases failed and is left out from here on (ConnectionError")


@pytest.mark.parametrize("bad", ['{"step": 2, "lo', "", "12", "[]", '{"loss": 1.0}', "\0\0"])
def test_a_damaged_row_is_named_and_nothing_is_dropped(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'
    path.write_text(text)
    with pytest.raises(UserError, match="metrics.jsonl: line 2 is damaged") as error:
        Writer(tmp_path, 3)
    assert "\n" not in str(error.value) and path.read_text() == text


def test_a_kill_while_the_file_is_cut_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("uta_jax.metrics.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Writer(tmp_path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    monkeypatch.undo()
    Writer(tmp_path, 1).close()
    assert read(path) == [{"step": 1}]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_meter_means_and_rate(monkeypatch):
    now = iter([0.0, 12.0, 12.0])
    monkeypatch.setattr("uta_jax.metrics.time.perf_counter", lambda: next(now))
    meter = Meter(batch_size=8)
    meter.add({"loss": 1.0}, 0.1)
    meter.add({"loss": 3.0}, 0.3)
    meter.pause(8.0)
    means = meter.read()
    assert means == {
        "loss": 2.0,
        "seconds": 4.0,
        "images_per_s": 4.0,
        "data_wait_ms": pytest.approx(200.0),
        "data_wait_ms_by_step": [100.0, 300.0],
    }


def test_lists_stand_in_the_file_alone(tmp_path):
    """TensorBoard has no place for them."""
    writer = Writer(tmp_path, 0)
    writer.write(2, {"loss": 1.0, "data_wait_ms_by_step": [0.1, 0.2]})
    writer.close()
    assert read(tmp_path / "metrics.jsonl")[0]["data_wait_ms_by_step"] == [0.1, 0.2]
