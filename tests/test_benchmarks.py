"""The benchmark runner: what it refuses, what it leaves out, and what it writes. No test asserts a time."""

import ast
import csv
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks import machine, report, runner  # noqa: E402
from benchmarks.agreement import disagreement, leaves  # noqa: E402
from benchmarks.machine import Ceilings, Stamp, Work  # noqa: E402
from benchmarks.report import Result, _places, read_csv, write_csv  # noqa: E402
from benchmarks.runner import Benchmark, main  # noqa: E402

# Files that are run as benchmarks; `scaling` runs others' declarations at other sizes.
RUN = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "raise SystemExit" in path.read_text())
DECLARED = [path for path in RUN if path.stem != "scaling"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Known ceilings, the shortest of repeats, and afterwards the threads and the TF32 switch as before."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name, rate in {"copy": 1e9, "matmul": 1e12, "exp": 1e10}.items():
        known = cached_property(lambda self, rate=rate: rate)
        known.__set_name__(Ceilings, name)
        monkeypatch.setattr(Ceilings, name, known)
    monkeypatch.setattr(machine, "SHORTEST_REPEAT", 1e-5)
    monkeypatch.setattr(machine, "WARM_UP", 1e-5)
    # To look through what thousands of tests have left takes a second, each time.
    monkeypatch.setattr(machine.gc, "collect", lambda: 0)
    yield
    torch.set_num_threads(threads)


@dataclass
class Pair:
    tensor: torch.Tensor
    number: int


class HalvedGradient(torch.autograd.Function):
    """x squared, with half of its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def square(x):
    return x * x


def vector(case, device, dtype):
    return (torch.randn(case["size"], device=device, dtype=dtype),)


def squares(**changes):
    options = {
        "name": "square",
        "cases": [{"size": 8}, {"size": 16}],
        "inputs": lambda case, device, dtype: {"x": torch.randn(case["size"], device=device, dtype=dtype)},
        "providers": {"reference": square, "power": lambda x: x**2},
        "work": lambda case, dtype, backward: Work(bytes=2 * case["size"] * dtype.itemsize),
    }
    return Benchmark(**options | changes)


def rows_of(folder):
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(benchmark, folder, *flags):
    code = main(benchmark, argv=["--device", "cpu", "--quick", "--csv", str(folder), *flags])
    return code, {(row["stage"], row["provider"]): row for row in rows_of(folder)}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: x * x + 1e-2, "output 0 is off by"),
        (lambda x: x * x * torch.nan, "output 0 is off by nan"),
        (lambda x: torch.cat([x[:-1] ** 2, x[-1:] / 0]), "output 0 is off by inf"),
        (lambda x: (x * x)[None], "output 0 is torch.float32 (1, 8); the reference's torch.float32 (8,)"),
        (lambda x: (x * x).double(), "output 0 is torch.float64"),
        (lambda x: (x * x, x), "gives 2 tensors; the reference gives 1"),
    ],
)
def test_a_provider_that_disagrees_is_refused_and_not_timed(wrong, reason, tmp_path, capsys):
    code, rows = run(squares(providers={"reference": square, "wrong": wrong, "power": lambda x: x**2}), tmp_path)
    row = rows["forward", "wrong"]
    assert code == 1
    assert (row["status"], row["median_s"], row["vs_reference"]) == ("refused", "", "")
    assert row["reason"].startswith(reason)
    assert rows["forward", "power"]["status"] == rows["forward", "reference"]["status"] == "timed"
    assert "wrong         refused: " in capsys.readouterr().out


def test_a_wrong_gradient_is_refused_though_the_output_is_right(tmp_path):
    providers = {"reference": square, "halved": HalvedGradient.apply}
    code, rows = run(squares(inputs=vector, providers=providers, backward=True), tmp_path)
    assert code == 1
    assert rows["forward", "halved"]["status"] == "timed"
    assert rows["forward+backward", "halved"]["status"] == "refused"
    assert rows["forward+backward", "halved"]["reason"].startswith("gradient of input 0 is off by 5.0e-01")


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_compared_is_not_timed(backward, tmp_path):
    """Of two ways to cut a map in two the sums are compared, with their gradients."""
    calls = []

    def summed(parts):
        calls.append(parts)
        return torch.add(*parts)

    providers = {"reference": lambda x: (0.5 * x, 0.5 * x), "other": lambda x: (0.1 * x, 0.9 * x)}
    rows = run(squares(providers=providers, compared=summed, backward=backward), tmp_path)[1]
    assert {row["status"] for row in rows.values()} == {"timed"}
    assert len(calls) == 2 * (1 + backward)
    wrong = squares(providers=providers | {"other": lambda x: (0.1 * x, x)}, compared=summed)
    assert run(wrong, tmp_path)[1]["forward", "other"]["status"] == "refused"
    assert run(squares(providers=providers), tmp_path)[1]["forward", "other"]["status"] == "refused"


def test_a_gradient_that_is_cut_off_is_refused(tmp_path):
    benchmark = squares(providers={"reference": square, "detached": lambda x: x.detach() ** 2})
    code, rows = run(benchmark, tmp_path, "--backward")
    assert code == 1
    assert rows["forward+backward", "detached"]["reason"].startswith("gradient of input x is off by 1.0e+00")


def test_gradients_of_parameters_are_compared(tmp_path):
    benchmark = squares(
        inputs=vector,
        build=lambda case: nn.Linear(case["size"], 3),
        providers={
            "reference": lambda layer: layer,
            "same": lambda layer: lambda x: layer.weight @ x + layer.bias,
            "cut": lambda layer: lambda x: layer.weight @ x + layer.bias.detach(),
        },
        backward=True,
    )
    code, rows = run(benchmark, tmp_path)
    assert code == 1
    assert rows["forward+backward", "same"]["status"] == "timed"
    assert rows["forward+backward", "cut"]["reason"].startswith("gradient of parameter bias is off")


def test_parameters_at_their_start_value_hide_no_mistake(tmp_path):
    """A norm starts with a weight of one and a bias of zero: without them it would look right."""
    norm = {
        "reference": lambda norm: norm,
        "bare": lambda norm: lambda x: nn.functional.layer_norm(x, norm.normalized_shape),
    }
    benchmark = squares(inputs=vector, build=lambda case: nn.LayerNorm(case["size"]), providers=norm)
    code, rows = run(benchmark, tmp_path)
    assert code == 1
    assert rows["forward", "bare"]["status"] == "refused"


def test_a_provider_may_change_its_module_and_its_inputs(tmp_path):
    def doubled(layer):
        layer.weight.data.mul_(2)
        return lambda x: layer(x.mul_(0.5))

    providers = {"reference": lambda layer: layer, "doubled": doubled, "same": lambda layer: layer}
    _, rows = run(squares(inputs=vector, build=lambda case: nn.Linear(8, 3), providers=providers), tmp_path)
    assert [row["status"] for row in rows.values()] == ["timed"] * 3


def test_a_reference_that_is_not_finite_judges_nobody(tmp_path):
    infinite = {"reference": lambda x: x / 0, "same": lambda x: x / 0}
    code, rows = run(squares(providers=infinite), tmp_path)
    assert code == 1
    assert [row["status"] for row in rows.values()] == ["refused", "refused"]
    assert rows["forward", "same"]["reason"] == "there is no reference to agree with"


def test_absent_providers_are_listed_with_their_reason(tmp_path, capsys):
    def lacking(x):
        raise NotImplementedError("no such kernel\nfor this CPU")

    providers = {"reference": square, "peer": "not_installed.ops:square", "gpu": square, "lacking": lacking}
    code, rows = run(squares(providers=providers, peer="peer", cuda_only=["gpu"]), tmp_path)
    reasons = {name: (row["status"], row["reason"]) for (_, name), row in rows.items() if row["status"] != "timed"}
    assert code == 0
    assert reasons == {
        "peer": ("absent", "No module named 'not_installed'"),
        "gpu": ("absent", "needs CUDA tensors"),
        "lacking": ("absent", "no such kernel for this CPU"),
    }
    assert rows["forward", "reference"]["vs_peer"] == ""
    assert "absent: No module named 'not_installed'" in capsys.readouterr().out


def test_a_provider_that_raises_is_a_failure(tmp_path):
    code, rows = run(squares(providers={"reference": square, "broken": lambda x: x @ torch.ones(3)}), tmp_path)
    assert code == 1
    assert rows["forward", "broken"]["status"] == "failed"
    assert rows["forward", "broken"]["reason"].startswith("RuntimeError: ")


@pytest.mark.parametrize(("spreads", "kept", "noisy"), [([40, 3], 3, ""), ([40, 30, 60, 1], 30, "noisy"), ([9], 9, "")])
def test_a_noisy_case_is_clocked_again_and_marked_where_it_stays_noisy(spreads, kept, noisy, monkeypatch, tmp_path):
    """Of three attempts at most the calmest counts; three times around 1 have a spread of half their range."""
    turns = iter([1 - 0.01 * spread, 1.0, 1 + 0.01 * spread] for spread in spreads)

    def clocked(steps, *_):
        return dict.fromkeys(steps, next(turns))

    monkeypatch.setattr(runner, "time_in_turns", clocked)
    benchmark = squares(cases=[{"size": 8}])
    assert main(benchmark, argv=["--device", "cpu", "--csv", str(tmp_path)]) == 0
    for row in rows_of(tmp_path):
        assert float(row["iqr_percent"]) == pytest.approx(kept)
        assert (row["status"], row["reason"]) == ("timed", noisy)


def test_a_string_provider_is_imported(tmp_path):
    code, rows = run(squares(providers={"reference": square, "torch": "torch:square"}), tmp_path)
    assert (code, rows["forward", "torch"]["status"]) == (0, "timed")


def test_ratios_come_from_medians_and_spread_from_quartiles(tmp_path, monkeypatch):
    times = {"reference": [8.0, 9.0, 100.0, 7.0, 8.0], "power": [1.0, 2.0, 3.0, 4.0, 50.0]}
    monkeypatch.setattr(runner, "time_in_turns", lambda steps, *_: {name: times[name] for name in steps})
    _, rows = run(squares(peer="power"), tmp_path)
    reference, power = rows["forward", "reference"], rows["forward", "power"]
    assert (float(reference["median_s"]), float(power["median_s"])) == (8.0, 3.0)
    assert (float(power["vs_reference"]), float(reference["vs_reference"])) == (8 / 3, 1)
    assert (float(reference["vs_peer"]), float(power["vs_peer"])) == (3 / 8, 1)
    assert float(power["iqr_percent"]) == pytest.approx(100 * (4 - 2) / 3)
    assert int(power["repeats"]) == 5
    floor = 2 * 8 * 4 / 1e9
    assert (float(power["floor_s"]), power["bound_by"], float(power["over_floor"])) == (floor, "copy", 3 / floor)


def test_providers_are_clocked_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ABC"}
    machine.time_in_turns(calls, torch.device("cpu"), 4, 1.0)
    turns = [name for place, name in enumerate(order) if place == 0 or order[place - 1] != name]
    assert "".join(turns)[-12:] == "ABC" * 4


@pytest.mark.parametrize(
    ("work", "bound_by", "seconds"),
    [
        (Work(bytes=4e9, flops=1e12, exps=1e10), "copy", 4.0),
        (Work(bytes=1e9, flops=5e12, exps=1e10), "matmul", 5.0),
        (Work(bytes=1e9, flops=1e12, exps=6e10), "exp", 6.0),
        (Work(bytes=2e9), "copy", 2.0),
    ],
)
def test_the_floor_is_the_largest_of_three_terms(work, bound_by, seconds):
    assert Ceilings(torch.device("cpu"), torch.float32).floor(work) == (pytest.approx(seconds), bound_by)


def test_only_the_ceilings_that_are_needed_are_measured():
    ceilings = Ceilings(torch.device("cpu"), torch.float32)
    ceilings.floor(Work(bytes=1, flops=1))
    assert ceilings.measured() == {"copy": 1e9, "matmul": 1e12}


def test_the_ceilings_count_bytes_flops_and_exponentials(monkeypatch):
    monkeypatch.undo()  # the real ones, on a clock that always says one second
    monkeypatch.setattr(machine, "best", lambda call, device, loops=1: call() is None or 1.0)
    ceilings = Ceilings(torch.device("cpu"), torch.bfloat16)
    assert ceilings.copy == 2 * 4 * 2**26
    assert ceilings.matmul == 2 * 256**3
    assert ceilings.exp == 2**16 * torch.get_num_threads()


def test_memory_counts_outputs_and_what_lies_between():
    x = torch.ones(2**20)
    peak = machine.peak_bytes(lambda: (x + 1).mul(2).sum(), torch.device("cpu"))
    assert 2 * x.nbytes <= peak <= 2 * x.nbytes + 4096


def test_csv_is_stamped_and_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_commit", lambda: "0123abcd-dirty")
    monkeypatch.setattr(machine, "_cpu_model", lambda: "Fast CPU (R) @ 3 GHz")
    code, rows = run(squares(), tmp_path, "--threads", "2", "--dtype", "float64")
    (path,) = tmp_path.iterdir()
    row = rows["forward", "power"]
    assert (code, path.name) == (0, "square-float64-fast-cpu-r-3-ghz-2t-0123abcd-dirty.csv")
    assert set(row) == {field.name for kind in (Result, Stamp) for field in fields(kind)} | {
        "copy_per_s",
        "matmul_per_s",
        "exp_per_s",
    }
    assert (row["machine"], row["commit"], row["threads"]) == ("Fast CPU (R) @ 3 GHz", "0123abcd-dirty", "2")
    assert (row["dtype"], row["device"], row["case"]) == ("float64", "cpu", "size=8")
    optional = {"peer", "vs_peer", "matmul_per_s", "exp_per_s"}
    assert row["reason"] in ("", "noisy")
    assert {name for name, value in row.items() if not value} - {"reason"} == optional


def test_a_checkout_without_git_is_uncommitted(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine._commit() == "uncommitted"


def test_check_times_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "time_in_turns", None)
    assert main(squares(), argv=["--device", "cpu", "--check"]) == 0
    assert "power         agrees: not timed" in capsys.readouterr().out
    assert (
        main(squares(providers={"reference": square, "wrong": lambda x: x}), argv=["--device", "cpu", "--check"]) == 1
    )
    assert not list(tmp_path.iterdir())


def test_quick_takes_the_smallest_case_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    assert main(squares(), argv=["--device", "cpu", "--quick"]) == 0
    captured = capsys.readouterr()
    assert "size=8" in captured.out
    assert "size=16" not in captured.out
    assert "size=8, forward: timing\n" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_run_writes_one_csv_per_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    assert main(squares(), squares(name="again"), argv=["--device", "cpu"]) == 0
    names = sorted(path.name.split("-")[0] for path in tmp_path.glob("*.csv"))
    assert names == ["again", "square"]


@pytest.mark.parametrize("stages", [[], ["--backward"]])
def test_the_plot_is_a_png(stages, tmp_path):
    main(squares(), argv=["--device", "cpu", "--plot", "--csv", str(tmp_path), *stages])
    (path,) = tmp_path.glob("*.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_can_be_drawn_later_from_the_csv(tmp_path):
    results = [
        Result(
            "square", f"net=a size={size}", "forward", "reference", "timed", "", "float32", "cpu", "", 0.5, 1.0, 3, 8
        )
        for size in (8, 16)
    ] + [Result("square", "net=a size=8", "forward", "other", "absent", "needs CUDA tensors", "float32", "cpu")]
    path = tmp_path / "square.csv"
    write_csv(results, Stamp.take(torch.device("cpu")), {}, path)
    assert read_csv(path) == results
    assert _places(["net=a size=8", "net=a size=16"]) == {"net=a size=8": 8, "net=a size=16": 16}
    assert _places(["n=1 c=2", "n=2 c=b"]) == {"n=1 c=2": 0, "n=2 c=b": 1}


def test_only_picks_cases_and_providers_and_keeps_the_reference(tmp_path):
    three = {"reference": square, "power": lambda x: x**2, "torch": torch.square}
    main(squares(providers=three), argv=["--device", "cpu", "--csv", str(tmp_path), "--only", "size=16/power"])
    assert [(row["case"], row["provider"]) for row in rows_of(tmp_path)] == [
        ("size=16", "reference"),
        ("size=16", "power"),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "size=99"], "--only size=99: no case and provider"),
        (["--only", "/nobody"], "--only /nobody: no case and provider"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_bad_flags_are_told(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(squares(), argv=["--device", "cpu", *flags])
    assert message in capsys.readouterr().err


def test_bad_declarations_are_told():
    with pytest.raises(ValueError, match=r"providers of 'square' must have 'reference', got \['ours'\]"):
        squares(providers={"ours": square})
    with pytest.raises(ValueError, match="must have 'rival'"):
        squares(peer="rival")
    with pytest.raises(ValueError, match=r"cases of 'square' must not be empty, got \[\]"):
        squares(cases=[])


def test_the_table_fits_120_columns(tmp_path, capsys):
    wide = squares(
        cases=[{f"a_long_key_{i}": 10**6 + i for i in range(9)} | {"size": 4}],
        providers={"reference": square, "a_provider_with_a_long_name": square, "absent": "no.such." * 20 + "module:f"},
        peer="a_provider_with_a_long_name",
    )
    run(wide, tmp_path, "--backward")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert any(line.removesuffix("  noisy").endswith("x") for line in lines)


def test_tensors_are_found_in_nested_results():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in leaves({"x": (a, [b]), "aux": Pair(c, 3), "y": None})] == [1, 2, 3]


def test_integers_must_be_equal_and_empty_tensors_are():
    three, four, none = torch.tensor([3]), torch.tensor([4]), torch.ones(0)
    assert disagreement([("index", four)], [("index", three)], 1e9)
    assert not disagreement([("index", three), ("empty", none)], [("index", three), ("empty", none)], 0)


def test_a_map_must_be_in_the_memory_format_of_the_references():
    planes = torch.randn(2, 3, 4, 5)
    last = planes.contiguous(memory_format=torch.channels_last)
    message = "output 0 is not in contiguous_format as the reference's is, but has strides (60, 1, 15, 3)"
    assert disagreement([("output 0", last)], [("output 0", planes)], 0) == message
    assert "not in channels_last" in disagreement([("output 0", planes)], [("output 0", last)], 0)
    assert "not in contiguous_format" in disagreement(
        [("output 0", planes[..., ::2])], [("output 0", planes[..., :3].clone())], 1e9
    )


def test_memory_formats_are_not_asked_where_they_mean_nothing():
    planes = torch.randn(2, 3, 4, 5)
    last, single = planes.contiguous(memory_format=torch.channels_last), torch.randn(2, 1, 4, 5)
    for name, got, want in [
        ("gradient of input 0", last, planes),
        ("output 0", planes[0].movedim(0, -1).contiguous().movedim(-1, 0), planes[0]),
        ("output 0", single.contiguous(memory_format=torch.channels_last), single),
        ("output 0", planes.contiguous(), planes.transpose(2, 3).contiguous().transpose(2, 3)),
    ]:
        assert disagreement([(name, got)], [(name, want)], 0) == ""


def test_a_provider_that_changes_the_memory_format_is_refused(tmp_path):
    benchmark = squares(
        inputs=lambda case, device, dtype: (torch.randn(1, 3, case["size"], case["size"]),),
        providers={"reference": square, "last": lambda x: square(x).contiguous(memory_format=torch.channels_last)},
    )
    code, rows = run(benchmark, tmp_path)
    assert (code, rows["forward", "last"]["status"]) == (1, "refused")
    assert rows["forward", "last"]["reason"].startswith("output 0 is not in contiguous_format")


def test_a_ratio_has_two_decimals_whatever_its_size():
    assert [report._ratio(value) for value in (None, 0.996, 1.0, 33.68)] == ["-", "1.00x", "1.00x", "33.68x"]


@pytest.mark.parametrize("folder", ["taken", "taken/below"])
def test_a_csv_folder_that_is_a_file_is_told(folder, tmp_path, capsys):
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match="2"):
        main(squares(), argv=["--device", "cpu", "--quick", "--csv", str(tmp_path / folder)])
    assert "must be a folder, or one that can be made; there is a file in its place" in capsys.readouterr().err


@pytest.mark.parametrize("path", DECLARED, ids=lambda path: path.stem)
def test_a_declaration_takes_at_most_25_lines(path):
    """The declaration is the call of `Benchmark`; the functions that it names are not counted."""
    every = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    calls = [node for node in every if isinstance(node.func, ast.Name) and node.func.id == "Benchmark"]
    assert calls, f"{path.name} declares no Benchmark"
    assert max(node.end_lineno - node.lineno + 1 for node in calls) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("path", DECLARED, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_the_providers_of_every_benchmark_agree(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.stem, "--check", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{path.stem}", run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    assert re.search("reference +agrees: not timed", printed)


@pytest.mark.slow
def test_a_benchmark_runs_in_quick_mode():
    command = [sys.executable, "-m", "benchmarks.normalization", "--quick", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert "vs reference" in done.stdout
