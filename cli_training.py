"""The verbs of the command line that train and measure; each parses its arguments and calls one function."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from .deploy.progress import ProgressLine, one_line
from .nets import AutoConfig, BaseConfig
from .parsing import parse, taken
from .training.estimator_files import EstimatorOptions, train_estimator_on_folder
from .training.evaluate_folder import EvaluateOptions, evaluate_folder
from .training.interruption import TrainingInterrupted
from .training.presets import find_preset, preset_names
from .training.run_config import read_config
from .training.run_files import CHECKPOINT, WEIGHTS, RunState, read_state
from .training.settings import TrainingSettings

# Of the processes of a run on one machine the first speaks; whoever starts several says which each is.
FIRST = os.environ.get("LOCAL_RANK", "0") == "0"


def train(arguments: Sequence[str]) -> None:
    """Train a net: claritycore train --model NAME [options], the options of the net among them."""
    model, rest = _last(arguments, "--model")
    file, rest = _last(rest, "--config")
    config = AutoConfig.from_name(model) if model else None
    settings = TrainingSettings()
    if file:
        config, settings = read_config(file, config, settings)
    if config is None:
        names = ", ".join(preset_names())
        if not {"-h", "--help"} & set(arguments):
            raise ValueError("give --model NAME (claritycore list names them), or --config FILE")
        print(f"{train.__doc__}\n\ntrain --model NAME --help lists them. Presets are verbs of their own: {names}")
        return
    _run("train", train, config, settings, rest)


def preset(name: str, arguments: Sequence[str]) -> None:
    """Train a net as its preset says: claritycore PRESET [options]."""
    file, rest = _last(arguments, "--config")
    config, settings = find_preset(name)
    if file:
        config, settings = read_config(file, config, settings)
    _run(name, preset, config, settings, rest)


def resume(arguments: Sequence[str]) -> None:
    """Go on with a run that was interrupted: claritycore resume FOLDER [options]."""
    if {"-h", "--help"} & set(arguments[:1]):
        print(f"{resume.__doc__}\n\nThe options are those of train; what is not given stays as it was.")
        return
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("give the folder of a run: claritycore resume FOLDER")
    folder, *rest = arguments
    if Path(folder).name == CHECKPOINT:
        folder = str(Path(folder).parent)
    state = read_state(folder)
    place = Path(folder).resolve()
    settings = replace(state.settings, runs=str(place.parent), name=place.name)
    _run("resume", resume, state.config, settings, rest, state)


def train_estimator(arguments: Sequence[str]) -> None:
    """Train an estimator of noise, blur and JPEG quality: claritycore train-estimator --data FOLDER [options]."""
    options = parse(EstimatorOptions, "train-estimator", train_estimator, arguments)
    line = ProgressLine(sys.stderr)

    def tell(text: str) -> None:
        line.clear()
        print(one_line(text), flush=True)

    try:
        path = train_estimator_on_folder(
            options, progress=lambda done, total: line.show(f"{done} of {total} steps"), tell=tell
        )
    finally:
        line.clear()
    print(path)


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a net on a folder of clean images: claritycore evaluate --model CHECKPOINT --data FOLDER [options]."""
    options = parse(EvaluateOptions, "evaluate", evaluate, arguments)
    line = ProgressLine(sys.stderr)
    try:
        found = evaluate_folder(
            options,
            progress=lambda done, total: line.show(f"{done} of {total} pictures"),
            note=lambda text: print(one_line(text), file=sys.stderr),
        )
    finally:
        line.clear()
    print(found)
    if options.csv:
        print(f"\n{found.write_csv(options.csv, overwrite=options.overwrite)}")


def interrupted(interrupt: KeyboardInterrupt) -> int:
    """Say what Ctrl-C or SIGTERM left, and give the exit status."""
    if isinstance(interrupt, TrainingInterrupted):
        # What starts the processes of a run takes all down, with SIGKILL, where one ends otherwise than well.
        if not FIRST:
            return 0
        print(f"claritycore: {one_line(interrupt)}", file=sys.stderr)
        return interrupt.status
    print("claritycore: interrupted; what is written is whole", file=sys.stderr)
    return 128 + signal.SIGINT


VERBS = {"train": train, "train-estimator": train_estimator, "resume": resume, "evaluate": evaluate}


def _run(
    verb: str,
    described: Any,
    config: BaseConfig,
    settings: TrainingSettings,
    arguments: Sequence[str],
    state: RunState | None = None,
) -> None:
    kind = make_dataclass(
        "Train",
        [
            ("net", tyro.conf.OmitArgPrefixes[type(config)], field(default_factory=lambda: config)),
            ("training", tyro.conf.OmitArgPrefixes[TrainingSettings], field(default_factory=lambda: settings)),
        ],
        kw_only=True,
    )
    given = parse(kind, verb, described, arguments)
    if state is not None and given.net != state.config:
        raise ValueError("a run goes on with the net that it was begun with: leave the options of the net out")
    from .training.loop import train as begin

    line = ProgressLine(sys.stderr)

    def tell(text: str) -> None:
        line.clear()
        if FIRST:
            print(one_line(text), flush=True)  # at once, in a file too

    folder = begin(given.net, given.training, state=state, line=line, tell=tell)
    tell(f"{folder / WEIGHTS}: {given.training.steps} steps done")


def _last(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Take a flag that decides what the others are out of the arguments."""
    values, rest = taken(arguments, flag)
    return (values[-1] if values else None), rest
