"""Ctrl-C and SIGTERM: the step is finished, saved and told how to go on from; a second one stops at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from claritycore.training import TrainingInterrupted, loop, read_state, train
from claritycore.training.interruption import Interruption

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_held_and_the_second_does_what_it_did(number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Interruption(silent=True) as interruption:
        signal.raise_signal(number)
        assert interruption.number == number
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_signal_is_told_at_once(capfd):
    with Interruption():
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == "\nclaritycore: finishing the step, then saving; once more stops at once\n"


def test_signals_are_left_alone_outside_the_main_thread():
    def run() -> None:
        with Interruption():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers: list = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_saves_and_goes_on_to_the_bit(make_settings, config, monkeypatch, number):
    often = {"save_every": 100, "ema": True}
    whole = train(config, make_settings(name="whole", **often))
    step = loop._Run.step

    def interrupt(run, at, batches):
        if at == 2:
            signal.raise_signal(number)
        return step(run, at, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "step", interrupt)
        told = r"interrupted after step 3 of 6, which is saved: claritycore resume .*broken goes on"
        with pytest.raises(TrainingInterrupted, match=told) as interrupted:
            train(config, make_settings(name="broken", **often))
    assert interrupted.value.status == 128 + number
    folder = whole.parent / "broken"
    state = read_state(folder)
    assert state.step == 3
    assert (folder / "model.safetensors").exists()
    train(state.config, state.settings, state=state)
    first, second = read_state(whole), read_state(folder)
    for name in ("net", "average"):
        assert all(torch.equal(value, getattr(second, name)[key]) for key, value in getattr(first, name).items())
    assert (whole / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()


def test_a_signal_in_the_last_step_changes_nothing(make_settings, config, monkeypatch):
    step = loop._Run.step

    def interrupt(run, at, batches):
        if at == 5:
            signal.raise_signal(signal.SIGINT)
        return step(run, at, batches)

    monkeypatch.setattr(loop._Run, "step", interrupt)
    assert read_state(train(config, make_settings())).step == 6


@pytest.mark.parametrize("at", [4, 6])
def test_a_validation_that_was_broken_off_is_made_up_for(make_settings, config, photos, monkeypatch, at):
    """As by a kill: in the middle of a run and at its end the same weights are the best, and the log is whole."""
    validated = {"validation": str(photos), "validate_every": 2, "pictures": 0, "save_every": 100}
    whole = train(config, make_settings(name="whole", **validated))
    validate = loop._Run.validate

    def killed(run, step, journal):
        if step == at:
            raise MemoryError
        validate(run, step, journal)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "validate", killed)
        with pytest.raises(MemoryError):
            train(config, make_settings(name="broken", **validated))
    folder = whole.parent / "broken"
    state = read_state(folder)
    assert (state.step, state.validated) == (at, at - 2)
    train(state.config, state.settings, state=state)
    for name in ("log.jsonl", "best.safetensors"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()
    assert read_state(folder).best == read_state(whole).best
    with pytest.raises(ValueError, match="has made 6 steps already"):
        train(state.config, state.settings, state=read_state(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "number", "whole_group"),
    [(1, signal.SIGINT, True), (1, signal.SIGTERM, True), (2, signal.SIGINT, True), (2, signal.SIGTERM, False)],
)
def test_the_command_is_interrupted(photos, tmp_path, devices, number, whole_group):
    """Ctrl-C goes to every process of a terminal, those that decode images included; a SIGTERM perhaps to one."""
    sizes = "--scale 2 --num-feat 8 --num-block 1 --kernel-size 5 --patch-size 16 --batch-size 4"
    place = ["--data", str(photos), "--runs", str(tmp_path), "--name", "run", "--device", "cpu", "--no-amp"]
    endless = "--steps 1000000 --save-every 1000000 --log-every 1 --workers 1"
    command = ["train", "--model", "plksr", *sizes.split(), *place, *endless.split(), "--devices", str(devices)]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "claritycore", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        wait_for(folder / "log.jsonl", process)
        os.killpg(process.pid, number) if whole_group else process.send_signal(number)
        printed, told = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, told
    step = read_state(folder).step
    assert step >= 1
    assert f"claritycore: interrupted after step {step} of 1000000, which is saved: claritycore resume {folder}" in told
    assert told.count("interrupted") == told.count("finishing the step") == 1
    assert "Traceback" not in told
    assert printed.startswith("step 1 of 1000000, loss ")  # no terminal: a line a minute, and the first at once


def wait_for(log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") > 3:
            return
        time.sleep(0.05)
    raise AssertionError(f"the run has not begun: {process.communicate()[1] if process.poll() is not None else ''}")
