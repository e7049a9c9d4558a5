"""Runs in processes: one that is killed goes on to the bit, and two are one with the same global batch."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from claritycore.nets import AutoModel
from claritycore.training.loop import train
from claritycore.training.run_files import read_state
from tests.training.test_loop import assert_same_run, log_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

# One process imports what a run needs, and divides for each command line that it reads: it tells the process, and then
# the status that it ended with.
NURSERY = """
import json, os, sys, lightning.fabric, torch
import claritycore.training.loop
from claritycore.cli import main

torch.set_num_threads(1)
for line in sys.stdin:
    command, environment = json.loads(line)
    if not (child := os.fork()):
        os.dup2(2, 1)
        os.environ.update(environment)
        os._exit(main(command))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def opened_nursery(**options) -> subprocess.Popen:
    command = [sys.executable, "-c", NURSERY]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def begin(nursery: subprocess.Popen, *command: str, **environment: str) -> None:
    nursery.stdin.write(json.dumps([command, environment]) + "\n")
    nursery.stdin.flush()


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_bit(make_settings, config, tmp_path):
    """SIGKILL at random moments, again and again, until the run is done."""
    whole = train(config, make_settings(name="whole", steps=300, save_every=3, log_every=100, ema=True))
    flags = (
        "--scale 2 --num-feat 8 --num-block 1 --kernel-size 5 --dropout 0.1 --patch-size 16 --batch-size 4 --lr 1e-3"
    )
    common = ["--steps", "300", "--save-every", "3", "--log-every", "100", "--ema", "--no-amp", "--device", "cpu"]
    first = ["train", "--model", "plksr", *flags.split(), "--data", str(make_settings().data), "--workers", "0"]
    first += ["--runs", str(tmp_path / "runs"), "--name", "killed", *common]
    folder = whole.parent / "killed"
    draw, kills = random.Random(0), 0
    with opened_nursery(stderr=subprocess.DEVNULL) as nursery:
        while True:
            begun = (folder / "last.ckpt").exists()
            step = read_state(folder).step if begun else 0
            begin(nursery, *(["resume", str(folder)] if begun else first))
            child = int(nursery.stdout.readline())
            while kills < 20 and lives(child):
                if (folder / "last.ckpt").exists() and read_state(folder).step > step:
                    time.sleep(draw.random() * 0.05)
                    os.kill(child, signal.SIGKILL)
                    break
                time.sleep(0.002)
            status = int(nursery.stdout.readline())
            kills += status == -signal.SIGKILL
            if status != -signal.SIGKILL:
                break
        nursery.stdin.close()
    assert status == 0
    assert kills == 20
    assert_same_run(whole, folder)


@pytest.fixture(scope="module")
def nurseries():
    """Two processes that divide for each run: to import what it needs takes longer than a short one."""
    with opened_nursery() as first, opened_nursery() as second:
        yield first, second
        first.stdin.close()
        second.stdin.close()


def in_processes(nurseries, *command: str) -> None:
    """Run a command in as many processes, which learn of each other as those of a cluster do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for rank, nursery in enumerate(nurseries):
        begin(nursery, *command, "--devices", str(len(nurseries)), LOCAL_RANK=str(rank), **place)
    assert [[int(nursery.stdout.readline()) for _ in range(2)][1] for nursery in nurseries] == [0] * len(nurseries)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "net"), [("ddp", "plksr"), ("fsdp", "plksr"), ("fsdp", "span")])
def test_two_processes_are_one_with_the_same_global_batch(nurseries, photos, tmp_path, strategy, net):
    """Ten steps, which the two processes make in two goes: weights, average and figures are those of one process."""
    sizes = "--scale 2 --num-feat 8 --num-block 1 --patch-size 16 --batch-size 8 --lr 1e-3"
    sizes += " --kernel-size 5" if net == "plksr" else ""
    files = ["--data", str(photos), "--validation", str(photos), "--runs", str(tmp_path)]
    often = "--save-every 4 --validate-every 10 --log-every 1 --schedule constant --ema --clip 0.1"
    plain = ["--no-amp", "--device", "cpu", "--workers", "0", "--strategy", strategy]
    common = ["train", "--model", net, *sizes.split(), *files, *often.split(), *plain]
    in_processes(nurseries[:1], *common, "--name", "one", "--steps", "10")
    in_processes(nurseries, *common, "--name", "two", "--steps", "4")
    in_processes(nurseries, "resume", str(tmp_path / "two"), "--steps", "10")
    first, second = read_state(tmp_path / "one"), read_state(tmp_path / "two")
    for name in ("net", "average"):
        for key, value in getattr(first, name).items():
            torch.testing.assert_close(getattr(second, name)[key], value, rtol=1e-3, atol=1e-6)
    lines = [log_of(tmp_path / run) for run in ("one", "two")]
    losses = [[line["loss"] for line in log if "loss" in line] for log in lines]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    figures = [[line for line in log if "validation_psnr" in line][-1] for log in lines]
    for key in ("validation_psnr", "validation_ssim", "validation_lf_psnr"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=1e-4)
    assert [line["step"] for line in lines[1] if "loss" in line] == list(range(1, 11))
    assert AutoModel.from_pretrained(tmp_path / "two" / "model.safetensors").config.num_feat == 8
