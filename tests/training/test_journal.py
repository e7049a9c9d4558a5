"""The journal of a run: what it follows, and what it drops when a run goes on from a checkpoint."""

import io
import json

import pytest

from claritycore.deploy.progress import ProgressLine
from claritycore.training import journal, read_state, train
from claritycore.training.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def steps_in(log) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [1000.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    return now


def test_without_a_terminal_a_run_is_told_at_once_and_then_once_a_minute(tmp_path, clock):
    told = []
    kept = Journal(tmp_path, 1000, ProgressLine(io.StringIO()), told.append, first_step=10)
    kept.start()
    for step in range(11, 211):
        clock[0] += 1.0
        kept.follow(step, 0.5)
    assert [text.split(",")[0] for text in told] == [f"step {n} of 1000" for n in (11, 71, 131, 191)]
    assert told[-1] == "step 191 of 1000, loss 0.5, 0:13:29 left"


def test_on_a_terminal_one_line_follows(tmp_path, clock):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    told, terminal = [], Terminal()
    kept = Journal(tmp_path, 4, ProgressLine(terminal), told.append)
    for step in (1, 2):
        clock[0] += 5
        kept.follow(step, 0.25)
    assert told == []
    assert terminal.getvalue().endswith("step 2 of 4, loss 0.25, 0:00:10 left")


def test_what_is_later_than_the_checkpoint_is_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 3, 4, 5)]
    log.write_text("".join(lines) + '{"step": 3, "lo')
    Journal(tmp_path, 10, first_step=3).close()
    assert log.read_text() == "".join(lines[:4])
    Journal(tmp_path, 10, first_step=1, silent=True).close()
    assert steps_in(log) == [1, 2, 3, 3]
    Journal(tmp_path, 10).close()
    assert log.read_text() == ""


def test_a_run_that_was_killed_after_its_checkpoint_logs_every_step_once(make_settings, config, photos):
    validated = {"validation": str(photos), "validate_every": 2, "pictures": 0, "schedule": "constant"}
    whole = train(config, make_settings(name="whole", **validated))
    folder = train(config, make_settings(name="killed", steps=4, **validated))
    state = read_state(folder)
    with (folder / "log.jsonl").open("a") as log:  # as a process does that is killed before its next checkpoint
        log.write('{"step": 5, "loss": 0.1}\n{"step": 6, "loss": 0.1}\n{"st')
    settings = make_settings(name="killed", **validated)
    train(config, settings, state=state)
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_tensorboard_shows_every_step_once(make_settings, config):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = train(config, make_settings(steps=5, save_every=2))
    (folder / "last.ckpt").unlink()
    train(config, make_settings(steps=3))
    events = reading.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
