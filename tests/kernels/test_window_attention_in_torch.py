"""Window attention as torch sees it: compile, export, vmap, autocast, gradient checks, and what it refuses."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from claritycore.deploy import flop_formulas
from claritycore.kernels import overlapping_window_attention, window_attention
from claritycore.kernels.window_attention import KERNEL, window_attention_bytes, window_attention_flops
from claritycore.kernels.window_attention.operands import Layout, Operands
from claritycore.kernels.window_attention.reference import attend as attend_reference
from tests.kernels.closeness import CPU, error
from tests.kernels.test_window_attention import TENSORS, Case, attend, pixels_seen, tensors

OP, BACKWARD = torch.ops.claritycore.window_attention, torch.ops.claritycore.window_attention_backward
MIXED = Case(3, 4, (2, 3), (1, 2), batch=2, tokens=2, logit_scale=True)
COSINE = Case(3, 2, (2, 2), (1, 0), (1, 2), heads=1, head_dim=2, cosine=True, other_map=True, logit_scale=True)
OVERLAPPING = Case(3, 2, (2, 1), heads=1, head_dim=2, beyond=(1, 2))
ZERO_BORDER = Case(3, 2, (2, 1), heads=1, head_dim=2, beyond=(1, 2), zero_border=True)
TINY = Case(1, 2, (2, 2), (1, 1), heads=1, head_dim=2, tokens=1, logit_scale=True)
EVERY = [MIXED, COSINE, OVERLAPPING, ZERO_BORDER]


def split(inputs):
    """The tensors, by name, and the options."""
    return tensors(inputs), {name: value for name, value in inputs.items() if name not in TENSORS}


def leaves_of(case, device=CPU, dtype=torch.float32):
    named, options = split(case.inputs(device, dtype))
    return {name: value.requires_grad_() for name, value in named.items()}, options


@pytest.mark.parametrize("case", [*EVERY, TINY], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_everything(backend, case):
    named, options = leaves_of(case, dtype=torch.float64)

    def y(*leaves):
        return attend(**dict(zip(named, leaves, strict=True)), **options, backend=backend)

    assert gradcheck(y, list(named.values()), fast_mode=case is MIXED)
    if backend == "reference":
        assert gradgradcheck(y, list(named.values()), fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused(backend, device):
    named, options = leaves_of(TINY, device if backend == "triton" else CPU)
    y = attend(**named, **options, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), named["qkv"], create_graph=True)
    with pytest.raises(RuntimeError, match=r'window_attention can be .* twice only with backend="reference"'):
        gradient.sum().backward()


def layout_of(case):
    rows, columns = case.window
    down, across = case.beyond or (0, 0)
    keys = [rows + 2 * down, columns + 2 * across]
    return Layout(
        *([rows, columns], keys, list(case.shift), list(case.dilation), case.heads, 0.5, case.cosine, case.zero_border)
    )


@pytest.mark.parametrize("case", [COSINE, ZERO_BORDER, TINY], ids=str)
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_it_meets_the_rules_of_torch(form, case, device):
    named, _ = leaves_of(case, device if form == "triton" else CPU)
    operands, layout = [named.get(name) for name in TENSORS], layout_of(case)
    opcheck(OP, (*operands, *layout, form))
    operands = [None if x is None else x.detach() for x in operands]
    results, wanted = OP(*operands, *layout, form), [x is not None for x in operands]
    opcheck(BACKWARD, (*operands, *results, results[0], *layout, wanted, form))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph(backend, dynamic, device):
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    sizes = ((2, 3), (3, 5)) if backend == "auto" else ((2, 2), (3, 2))
    for size in sizes:
        case = Case(*size, (2, 2), (1, 1), heads=1 if backend == "triton" else 2, tokens=2)
        named, options = leaves_of(case, CPU if backend == "auto" else device)
        y, expected = (call(**named, **options, backend=backend) for call in (compiled, attend))
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        gradients, wanted = (torch.autograd.grad(x.sum(), list(named.values())) for x in (y, expected))
        assert all(torch.equal(got, want) for got, want in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"window": (4, 4), "shift": (2, 2), "tokens": 3, "logit_scale": True},
        {"window": (3, 2), "dilation": (2, 3), "cosine": True},
        {"window": (4, 4), "beyond": (1, 1)},
    ],
    ids=str,
)
def test_it_exports_with_any_size(options, strict):
    def case(*size, batch):
        return split(Case(*size, batch=batch, **options).inputs(dtype=torch.float32))

    named, settings = case(6, 7, batch=2)

    class Attention(torch.nn.Module):
        def forward(self, qkv, bias_table, logit_scale=None, tokens=None):
            more = {"logit_scale": logit_scale, "tokens": tokens}
            more = {name: value for name, value in more.items() if value is not None}
            return attend(qkv=qkv, bias_table=bias_table, **more, **settings)

    batch, height, width = (torch.export.Dim(name, min=1) for name in ("batch", "height", "width"))
    shapes = {"qkv": {0: batch, 1: height, 2: width}, "bias_table": {}, "logit_scale": {0: batch}, "tokens": {0: batch}}
    dynamic = {name: shapes[name] for name in named}
    program = torch.export.export(Attention(), (), named, dynamic_shapes=dynamic, strict=strict)
    assert [node.target for node in program.graph.nodes].count(OP.default) == 1
    for *size, count in ((1, 1, 1), (13, 4, 3)):
        named, _ = case(*size, batch=count)
        assert torch.equal(program.module()(**named), Attention()(**named))


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_it_runs_on_meta(case):
    named, options = split(case.inputs(dtype=torch.float32))
    y = attend(**{name: value.to("meta").requires_grad_() for name, value in named.items()}, **options)
    assert (y.shape, y.dtype) == ((case.batch, case.height, case.width, case.heads * case.head_dim), torch.float32)
    y.sum().backward()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_reference_makes_nothing_beside_the_device_of_the_map(case):
    with torch.no_grad():
        named = {name: x.to("meta") for name, x in tensors(case.inputs(dtype=torch.float32)).items()}
        y = attend_reference(Operands(**dict.fromkeys(TENSORS) | named), layout_of(case))
    assert (y.device.type, y.shape) == ("meta", (case.batch, case.height, case.width, case.heads * case.head_dim))


MAPPED = [
    (MIXED, {"qkv": 0, "bias_table": 1, "logit_scale": None, "tokens": 2}),
    (MIXED, {"qkv": None, "bias_table": 0, "logit_scale": 2, "tokens": None}),
    (MIXED, {"qkv": 4, "bias_table": None, "logit_scale": 0, "tokens": 3}),
    (COSINE, {"qkv": 1, "bias_table": 2, "logit_scale": None, "kv": None}),
    (COSINE, {"qkv": None, "bias_table": None, "logit_scale": 0, "kv": 4}),
    (ZERO_BORDER, {"qkv": 2, "bias_table": 0}),
]


@pytest.mark.parametrize(("case", "dims"), MAPPED, ids=str)
def test_vmap_keeps_calls_apart(case, dims):
    named, options = split(case.inputs())
    many = {n: x if dims[n] is None else torch.stack([x, x * 0.5, x * 2], dims[n]) for n, x in named.items()}

    def results(backend):
        leaves = [x.clone().requires_grad_() for x in many.values()]

        def call(*x):
            return attend(**dict(zip(many, x, strict=True)), **options, backend=backend)

        y = torch.vmap(call, in_dims=tuple(dims[n] for n in many))(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        return y, *torch.autograd.grad(y, leaves, weights)

    for got, want in zip(results("torch"), results("reference"), strict=True):
        assert error(got, want) <= 1e-12


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_vmap_over_gradients_keeps_those_of_parameters_apart(case):
    named, options = leaves_of(case, dtype=torch.float64)
    wanted = [x for name, x in named.items() if name != "qkv"]

    def gradients(backend):
        y = attend(**named, **options, backend=backend)
        upstream = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
        return torch.vmap(lambda g: torch.autograd.grad(y, wanted, g, retain_graph=True))(upstream)

    for got, want in zip(gradients("torch"), gradients("reference"), strict=True):
        assert error(got, want) <= 1e-12


def test_vmap_keeps_calls_of_triton_apart(device):
    named, options = split(TINY.inputs(device, torch.float32))
    many = {name: torch.stack([x, x * 0.5]) for name, x in named.items()}

    def results(backend):
        leaves = [x.clone().requires_grad_() for x in many.values()]
        y = torch.vmap(lambda *x: attend(**dict(zip(many, x, strict=True)), **options, backend=backend))(*leaves)
        return y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), device=device).view(y.shape))

    for got, want in zip(results("triton"), results("reference"), strict=True):
        assert error(got, want) <= 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_maps_alone(compiled):
    call = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    named, options = leaves_of(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(**named, **options)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.sum(), list(named.values()))} == {torch.float32}
    cast = named | {name: named[name].bfloat16() for name in ("qkv", "tokens")}
    assert torch.equal(y, attend(**cast, **options))


def test_autocast_leaves_float64_and_the_reference_right():
    doubles, options = leaves_of(MIXED, dtype=torch.float64)
    floats, _ = leaves_of(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(**doubles, **options)
        reference, fast = (attend(**floats, **options, backend=backend) for backend in ("reference", "torch"))
    assert torch.equal(y, attend(**doubles, **options))
    assert reference.dtype == fast.dtype == torch.bfloat16
    assert error(fast, reference) <= 1e-2


def test_backward_under_autocast_is_no_less_exact():
    named, options = leaves_of(MIXED)
    y = attend(**named, **options, backend="torch")
    expected = torch.autograd.grad(y.sum(), list(named.values()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(y.sum(), list(named.values()))
    assert all(torch.equal(got, want) for got, want in zip(gradients, expected, strict=True))


def test_the_environment_may_ask_for_the_reference(monkeypatch):
    monkeypatch.setenv("CLARITYCORE_BACKEND", "reference")
    named, options = leaves_of(TINY)
    (gradient,) = torch.autograd.grad(attend(**named, **options).sum(), named["qkv"], create_graph=True)
    gradient.sum().backward()  # which only the reference can do
    assert named["qkv"].grad is not None


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", [TINY, COSINE], ids=str)
def test_mixed_dtypes_follow_qkv(backend, case, device):
    named, options = leaves_of(case, device if backend == "triton" else CPU)
    others = {name: x.double() for name, x in named.items() if name != "qkv"}
    y = attend(qkv=named["qkv"], **others, **options, backend=backend)
    assert y.dtype == torch.float32
    assert error(y, attend(**named, **options, backend=backend)) <= 1e-6
    doubled = attend(**named | {"qkv": named["qkv"].double()}, **options, backend=backend)
    assert doubled.dtype == torch.float64
    assert {g.dtype for g in torch.autograd.grad(doubled.sum(), list(named.values()))} == {torch.float32}


@pytest.mark.parametrize("shape", [(1, 2), (2,)])
def test_one_logit_scale_serves_all_images(shape):
    inputs = MIXED.inputs()
    scale = torch.tensor([0.5, 2.0]).double().requires_grad_()
    same, each = (
        attend(**inputs | {"logit_scale": x}) for x in (scale.view(shape), scale.expand(inputs["qkv"].shape[0], 2))
    )
    assert torch.equal(same, each)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), scale)[0] for y in (same, each)))


def test_one_number_is_height_and_width():
    inputs = Case(5, 6, (3, 3), (1, 1), (2, 2)).inputs()
    assert torch.equal(attend(**inputs), attend(**inputs | {"window_size": 3, "shift": 1, "dilation": 2}))


def test_the_scales_by_default():
    inputs = Case(3, 4, (2, 2), head_dim=4).inputs()
    assert torch.equal(attend(**inputs), attend(**inputs | {"scale": 0.5}))
    cosine = inputs | {"cosine": True}
    assert torch.equal(attend(**cosine), attend(**cosine | {"scale": 1.0}))
    assert torch.equal(attend(**inputs | {"scale": 0.0}), attend(**inputs | {"qkv": no_queries(inputs["qkv"])}))


def no_queries(qkv):
    return torch.cat([torch.zeros_like(qkv[..., :8]), qkv[..., 8:]], -1)


PLAIN = {"qkv": torch.zeros(1, 3, 4, 12), "num_heads": 2, "window_size": 2}
TABLE = torch.zeros(9, 2)
REFUSED = [
    ({"qkv": torch.zeros(3, 4, 12)}, ValueError, r"qkv must be \(B, H, W, 3C\), got shape \(3, 4, 12\)"),
    ({"qkv": torch.zeros(1, 3, 4, 8)}, ValueError, r"qkv must have 3 \* 2 \* d channels for num_heads=2, got 8"),
    ({"qkv": torch.zeros(1, 3, 4, 0)}, ValueError, "qkv must have 3 .* channels for num_heads=2, got 0"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    (
        {"num_heads": 5, "kv": torch.zeros(1, 3, 4, 24)},
        ValueError,
        "num_heads must divide the 12 channels of the queries, got 5",
    ),
    (
        {"kv": torch.zeros(1, 3, 5, 24)},
        ValueError,
        r"kv must be \(B, H, W, 2C\) = \(1, 3, 4, 24\), got shape \(1, 3, 5, 24\)",
    ),
    ({"window_size": 0}, ValueError, r"window_size must be two integers of at least 1, got \(0, 0\)"),
    ({"window_size": (2, 2, 2)}, ValueError, r"window_size must be an integer or a pair of them, got \(2, 2, 2\)"),
    ({"shift": -1}, ValueError, r"shift must be two integers of at least 0, got \(-1, -1\)"),
    ({"shift": (1, 2)}, ValueError, r"shift must be less than window_size \(2, 2\), got \(1, 2\)"),
    ({"dilation": (1, 0)}, ValueError, r"dilation must be two integers of at least 1, got \(1, 0\)"),
    (
        {"bias_table": torch.zeros(9, 3)},
        ValueError,
        r"bias_table must be an offset a row, a head a column = \(9, 2\), got shape \(9, 3\)",
    ),
    ({"bias_table": torch.zeros(25, 2)}, ValueError, r"bias_table must be .* = \(9, 2\), got shape \(25, 2\)"),
    (
        {"logit_scale": torch.zeros(1, 2, 1)},
        ValueError,
        r"logit_scale must be \(B, num_heads\) = \(1, 2\), got shape \(1, 2, 1\)",
    ),
    (
        {"logit_scale": torch.zeros(1, 3)},
        ValueError,
        r"logit_scale must be \(B, num_heads\) = \(1, 2\), got shape \(1, 3\)",
    ),
    ({"tokens": torch.zeros(1, 8)}, ValueError, r"tokens must be \(B, G, 2C\), got shape \(1, 8\)"),
    ({"tokens": torch.zeros(2, 5, 8)}, ValueError, r"tokens must be \(B, G, 2C\) = \(1, 5, 8\), got shape \(2, 5, 8\)"),
    ({"qkv": None}, TypeError, "qkv must be a tensor, got None"),
    ({"qkv": torch.zeros(1, 3, 4, 12, dtype=torch.uint8)}, TypeError, "qkv must be floating-point, got torch.uint8"),
    ({"bias_table": TABLE.to(torch.complex64)}, TypeError, "bias_table must be real, got torch.complex64"),
    ({"bias_table": TABLE.to("meta")}, ValueError, "bias_table must be on the device of qkv, cpu, got meta"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
]
REFUSED_OVERLAPS = [
    ({"key_window_size": (3, 4)}, r"key_window_size must be window_size \(2, 2\) plus an even number, got \(3, 4\)"),
    ({"key_window_size": (4, 0)}, r"key_window_size must be window_size \(2, 2\) plus an even number, got \(4, 0\)"),
    ({"key_window_size": 4, "bias_table": TABLE}, r"bias_table must be .* = \(25, 2\), got shape \(9, 2\)"),
    (
        {"key_window_size": 4, "qkv": torch.zeros(1, 3, 4, 8)},
        r"qkv must have 3 \* 2 \* d channels for num_heads=2, got 8",
    ),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("change", "kind", "message"), REFUSED, ids=[message[:50] for _, _, message in REFUSED])
def test_bad_input_is_named(change, kind, message, backend):
    with pytest.raises(kind, match=message):
        window_attention(**PLAIN | {"backend": backend} | change)


@pytest.mark.parametrize(("change", "message"), REFUSED_OVERLAPS, ids=[message[:50] for _, message in REFUSED_OVERLAPS])
def test_bad_overlaps_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        overlapping_window_attention(**PLAIN | change)


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="window_attention cannot run with backend='triton': its tensors are on cpu"):
        window_attention(**PLAIN, backend="triton")


COUNTED = [
    Case(7, 9, (3, 4), (1, 2), batch=2),
    Case(7, 9, (3, 4), (1, 2), (2, 3), tokens=5),
    Case(2, 3, (8, 8), (4, 5)),
    Case(7, 9, (3, 4), beyond=(2, 1)),
    Case(5, 6, (3, 4), other_map=True),
]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_the_counter_of_torch_counts_the_pairs_that_see_each_other(case):
    pairs = 1
    for axis, length in enumerate((case.height, case.width)):
        reach = case.beyond[axis] if case.beyond else 0
        seen = [
            pixels_seen(i, length, case.window[axis], case.shift[axis], case.dilation[axis], reach)[0]
            for i in range(length)
        ]
        pairs *= sum(int(((pixels >= 0) & (pixels < length)).sum()) for pixels in seen)
    pairs += (case.tokens or 0) * case.height * case.width
    one = 4 * case.batch * case.heads * case.head_dim * pairs  # a product and a sum for logits, and for values
    named, options = leaves_of(case)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as forward, torch.no_grad():
        attend(**named, **options, backend="torch")
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as both:
        attend(**named, **options, backend="torch").sum().backward()
    assert forward.get_total_flops() == one
    assert both.get_total_flops() == one + one * 5 // 2
    sizes = case.batch, case.height, case.width, case.heads * case.head_dim
    assert window_attention_flops(layout_of(case), *sizes, tokens=case.tokens or 0) == one


def test_it_counts_its_bytes():
    assert KERNEL.name == "window_attention"
    assert window_attention_bytes(2, 3, 5, 7) == 4 * (2 * 3 * 5 * 7) * 4  # qkv, and y
    assert window_attention_bytes(2, 3, 5, 7, itemsize=2, backward=True) == 2 * (2 * 3 * 5 * 7) * 12
