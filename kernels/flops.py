"""FLOPs of a call of each of our operators, by the shapes of its tensors, as torch's flop counter wants them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .depthwise_conv2d import depthwise_conv2d_flops
from .expert_routing import expert_mlp_flops, route_top_k_flops
from .expert_routing.operands import DIFFERENTIABLE
from .frequency_split import blur_split_flops, haar_split_flops
from .modulated_conv import noise_bias_act_flops
from .noise_field import noise_field_flops
from .selective_scan import selective_scan_flops
from .selective_scan_2d import selective_scan_2d_flops
from .window_attention import window_attention_flops
from .window_attention.operands import Layout, Operands

Shape = tuple[int, ...]
# Flops of one call from the shapes of its tensors, as torch.utils.flop_counter calls it; a product and a sum are two.
Formula = Callable[..., int]


def scan(u: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::selective_scan`: 9 flops for each state and step, by the convention of VMamba."""
    batch, channels, length = u
    return selective_scan_flops(batch, channels, length, A[1])


def scan_2d(x: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::selective_scan_2d`: the same for each direction."""
    batch, height, width, channels = x
    return selective_scan_2d_flops(batch, height, width, channels, A[2], directions=A[0])


def scan_backward(u: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """Backward of `claritycore::selective_scan`: about 22 flops for each state and step."""
    return scan(u, delta, A) * 22 // 9


def scan_2d_backward(x: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    """Backward of `claritycore::selective_scan_2d`."""
    return scan_2d(x, delta, A) * 22 // 9


def depthwise(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::depthwise_conv2d`: a product and a sum for each output element and tap."""
    return depthwise_conv2d_flops(*x, *weight[2:])


def depthwise_backward(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    y: Shape | None,
    grad_y: Shape,
    activation: str | None,
    wanted: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Backward of `claritycore::depthwise_conv2d`: as many for each gradient, and for what is recomputed."""
    return depthwise(x, weight) * (sum(wanted[:2]) + (activation is not None and y is None))


def blur(x: Shape, *inputs: Any, **_: Any) -> int:
    """`claritycore::blur_split` and its adjoint: a product and a sum for each tap along each side, and a difference."""
    return blur_split_flops(*x, sigma=max(inputs[-2]))


def haar(x: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::haar_split`: 12 flops for 4 pixels."""
    return haar_split_flops(*x)


def haar_back(ll: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::haar_merge`: the same back."""
    batch, channels, height, width = ll
    return haar_split_flops(batch, channels, 2 * height, 2 * width)


def noise(samples: Shape, seed: int, layer: int, size: Sequence[int], *_: Any, **__: Any) -> int:
    """`claritycore::noise_field`: 5 flops for each number."""
    return noise_field_flops(*samples, *size)


def epilogue(x: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::noise_bias_act`: 6 flops for each element."""
    return noise_bias_act_flops(*x)


def epilogue_backward(x: Shape, *_: Any, **__: Any) -> int:
    """Backward of `claritycore::noise_bias_act`: the same once more, and as many for the gradients."""
    return 2 * epilogue(x)


def windows(*inputs: Any, **_: Any) -> int:
    """`claritycore::window_attention`: the logits and the mean of values, for the keys that each query sees."""
    qkv, kv, _, _, tokens, *layout = inputs
    batch, height, width, channels = qkv
    channels //= 3 if kv is None else 1
    sizes = batch, height, width, channels
    return window_attention_flops(Layout(*layout[: len(Layout._fields)]), *sizes, tokens=tokens[1] if tokens else 0)


def windows_backward(*inputs: Any, **_: Any) -> int:
    """Backward of `claritycore::window_attention`: five products of matrices in the place of two."""
    operands, layout = inputs[: len(Operands._fields)], inputs[len(Operands._fields) + 3 :]
    return windows(*operands, *layout) * 5 // 2


def route(logits: Shape, bias: Shape | None, k: int, *_: Any, **__: Any) -> int:
    """`claritycore::route_top_k`: a softmax, and k comparisons a logit."""
    tokens, experts = logits
    return route_top_k_flops(tokens, experts, k)


def route_backward(logits: Shape, indices: Shape, *_: Any, **__: Any) -> int:
    """Backward of `claritycore::route_top_k`: as much as its softmax."""
    return route(logits, None, 0)


def experts(x: Shape, weights: Shape, indices: Shape, w1: Shape, *_: Any, **__: Any) -> int:
    """`claritycore::expert_mlp`: two products of matrices, for the experts of each token as if none were skipped."""
    tokens, channels = x
    return expert_mlp_flops(tokens, channels, w1[1], indices[1])


def experts_backward(x: Shape, weights: Shape, indices: Shape, w1: Shape, *inputs: Any, **_: Any) -> int:
    """Backward of `claritycore::expert_mlp`: the first layer again, and a product for each gradient that takes one."""
    needed = dict(zip(DIFFERENTIABLE, inputs[-2], strict=True))
    of_hidden = any(needed[name] for name in ("x", "weights", "w1", "b1"))
    return experts(x, weights, indices, w1) // 2 * (1 + of_hidden + needed["x"] + needed["w1"] + needed["w2"])


def kernel_flops() -> dict[Any, Formula]:
    """The table, for `torch.utils.flop_counter.FlopCounterMode(custom_mapping=...)`: a kernel adds a row or two.

    >>> kernel_flops()[torch.ops.claritycore.depthwise_conv2d]((1, 8, 10, 10), (8, 1, 3, 3))
    14400
    """
    ours = torch.ops.claritycore
    return {
        ours.depthwise_conv2d: depthwise,
        ours.depthwise_conv2d_backward: depthwise_backward,
        ours.blur_split: blur,
        ours.blur_split_adjoint: blur,
        ours.expert_mlp: experts,
        ours.expert_mlp_backward: experts_backward,
        ours.haar_split: haar,
        ours.haar_merge: haar_back,
        ours.route_top_k: route,
        ours.route_top_k_backward: route_backward,
        ours.noise_bias_act: epilogue,
        ours.noise_bias_act_backward: epilogue_backward,
        ours.noise_field: noise,
        ours.selective_scan: scan,
        ours.selective_scan_backward: scan_backward,
        ours.selective_scan_2d: scan_2d,
        ours.selective_scan_2d_backward: scan_2d_backward,
        ours.window_attention: windows,
        ours.window_attention_backward: windows_backward,
    }
