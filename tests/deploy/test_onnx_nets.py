"""ONNX of the U-Nets, deployed: of fixed sizes, and one file for any batch, height and width."""

import pytest
import torch
from hypothesis import settings
from torch import nn

from claritycore.blocks import reparameterize_model
from tests.small_nets import LOCAL_HERSR, made, small_harmonic, small_hersr, small_rsfmoe, small_swin_unet
from tests.strategies import normal

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from claritycore.deploy.onnx_ops import to_onnx  # noqa: E402  (after what it needs is known to be there)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

NETS = {
    "SwinUNet": lambda: small_swin_unet(scale=2, depths=(1, 1), refinement=0),
    "HERSR with a Fourier transform, one expert an image": lambda: small_hersr(scale=2, k=1),
    "HERSR with a cosine transform, one expert a window": lambda: small_hersr(
        **{**LOCAL_HERSR, "scale": 2, "kernel_size": 3, "window_size": 2, "k": 1}
    ),
    "HARMONIC": lambda: small_harmonic(scale=2),
    # All experts: at near ties rounding would decide on the choice.
    "RSFMoENet": lambda: small_rsfmoe(scale=2, depths=(1,), k=4, warm_up=0),
}
# What torch reasons about open sizes takes a minute for a net of a thousand operators.
ALL_OPEN = list(NETS) if settings.get_current_profile_name() == "nightly" else list(NETS)[:2]
SIZES = [(1, 3, 7, 10), (2, 3, 8, 5)]
# RSFMoENet has two thousand operators.
FIXED = [(name, size) for name in NETS for size in SIZES[: 1 if name == "RSFMoENet" else 2] if name not in ALL_OPEN]


def check(net: nn.Module, example: tuple[int, ...], others: list[tuple[int, ...]], **options) -> None:
    program = to_onnx(net, (normal(example),), **options)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for shape in others:
        image = normal(shape, seed=1)
        (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        with torch.no_grad():
            expected = net(image)
        tolerance = 1e-5 * expected.abs().max().clamp(max=1).item()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "size"), FIXED)
def test_a_file_of_one_size(name, size):
    check(reparameterize_model(made(NETS[name])), size, [size])


@pytest.mark.parametrize("name", ALL_OPEN)
def test_a_file_of_any_size(name):
    # Torch takes what is 1 in its example for a constant: more than one window of experts each way there.
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    others = [(1, 3, 13, 31), (3, 3, 40, 22)]
    check(reparameterize_model(made(NETS[name])), (2, 3, 16, 20), others, dynamic_shapes={"image": sizes})
