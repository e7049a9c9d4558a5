"""Tiles against the whole image: equal where that is promised, told where it is not, and whole when memory runs out."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from claritycore.blocks import NoiseField, NoiseInjection
from claritycore.blocks.padding import pad_to_multiple
from claritycore.deploy import SelfEnsemble, restore_tiled
from claritycore.deploy.canvas import Box, Canvas
from claritycore.deploy.tile import exact_overlap, is_out_of_memory
from tests.small_nets import NETS, made, small_rsfmoe
from tests.strategies import normal

EXACT_NETS = {name: build for name, build in NETS.items() if build(scale=2).tile_safe}


class Blur(nn.Module):
    """A mean over 2 r + 1 pixels each way, enlarged; it counts its calls and keeps the sizes that it saw."""

    def __init__(self, radius: int = 2, scale: int = 1, limit: int | None = None) -> None:
        super().__init__()
        self.tile_safe, self.receptive_radius, self.tile_multiple = True, radius, 1
        self.scale, self.limit, self.seen = scale, limit, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        if self.limit is not None and x.numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        side = 2 * self.receptive_radius + 1
        x = F.avg_pool2d(x, side, stride=1, padding=self.receptive_radius)
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


class Folded(nn.Module):
    """A 3x3 convolution over cells of 4 x 4 pixels: a stride, and a radius for which images can be small."""

    tile_safe, receptive_radius, tile_multiple = True, 7, 4

    def __init__(self, scale: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.conv = scale, nn.Conv2d(16, 16 * scale**2, 3, padding=1, dtype=torch.float64)

    def forward(self, x):
        height, width = (self.scale * side for side in x.shape[2:])
        cells = F.pixel_unshuffle(pad_to_multiple(x, 4), 4)
        return F.pixel_shuffle(self.conv(cells), 4 * self.scale)[..., :height, :width]


class Contrast(nn.Module):
    """Sees the whole map, and does not say anything about tiles."""

    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


# Long and narrow: a net that sees 80 pixels far still needs several tiles for it.
SIZES = st.tuples(st.integers(1, 240), st.integers(1, 12), st.booleans()).map(
    lambda drawn: drawn[:2] if drawn[2] else drawn[1::-1]
)
TILES = st.one_of(st.integers(1, 60), st.tuples(st.integers(3, 60), st.integers(3, 60)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("build", EXACT_NETS.values(), ids=EXACT_NETS.keys())
@settings(max_examples=15)
@given(size=SIZES, tile=TILES, scale=st.sampled_from([1, 2, 3, 4, 8]), samples=st.integers(1, 2), last=st.booleans())
def test_tiles_equal_the_whole_image(build, dtype, tolerance, size, tile, scale, samples, last):
    net = made(build, scale=scale).to(dtype)
    image = normal((samples, 3, *size), dtype=dtype, seed=size[0])
    with torch.no_grad():
        expected = net(image)
    if last:
        image = image.contiguous(memory_format=torch.channels_last)
    restored = restore_tiled(net, image, tile, batch=3)
    assert restored.dtype == dtype
    torch.testing.assert_close(restored, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


@given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), tile=st.integers(1, 30), scale=st.integers(1, 2))
@pytest.mark.parametrize("ensemble", [False, True])
def test_strides_fall_where_they_do_without_tiles(ensemble, size, tile, scale):
    net = SelfEnsemble(Folded(scale)) if ensemble else Folded(scale)
    image = normal((1, 1, *size), dtype=torch.float64)
    with torch.no_grad():
        expected = net(image)
    torch.testing.assert_close(restore_tiled(net, image, tile), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("less", [0, 1])
def test_one_pixel_less_than_the_radius_is_not_enough(less):
    """The pixel that a window lacks is the one that the blur's corner would have read."""
    net, image = Blur(3), normal((1, 1, 24, 24), dtype=torch.float64)
    restored = restore_tiled(net, image, 8, overlap=3 - less, blend="crop")
    assert torch.allclose(restored, net(image), rtol=0, atol=1e-12) == (less == 0)


def test_the_net_reads_the_overlap_and_nothing_beyond_the_border():
    net = Blur(2)
    restore_tiled(net, torch.zeros(1, 3, 20, 30), 10)
    assert sorted(net.seen) == sorted([(1, 3, 12, 12), (1, 3, 12, 14), (1, 3, 12, 12)] * 2)


def test_tiles_start_on_multiples_and_are_even():
    net = made(NETS["RRDBNet nearest+conv"], scale=1)
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    restore_tiled(net, torch.zeros(1, 3, 65, 9), 30, overlap=5)
    # 65 rows are 3 tiles of 24, 24 and 17; the overlap of 5 becomes 8, and 12 columns hold all 9.
    assert sorted(seen) == [(25, 9), (32, 9), (40, 9)]


def test_tiles_of_equal_size_run_together():
    net = Blur(2)
    restored = restore_tiled(net, image := normal((2, 1, 50, 10)), 10, batch=2)
    assert sorted(net.seen) == [(2, 1, 14, 10), (4, 1, 12, 10), (4, 1, 14, 10)]
    torch.testing.assert_close(restored, net(image))


def test_a_small_image_runs_whole():
    net = Blur(2)
    restore_tiled(net, torch.zeros(1, 3, 9, 12), 12)
    assert net.seen == [(1, 3, 9, 12)]


@pytest.mark.parametrize("tile", [5, 8, 11])
@pytest.mark.parametrize("overlap", [1, 4, 7, 20])
def test_feathers_sum_to_one_and_leave_no_seam(overlap, tile):
    """What the net makes of a window differs from tile to tile by a constant: crops step, feathers slide."""
    image = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    ones = restore_tiled(nn.Identity(), image + 1, 512, blend="linear")
    assert torch.equal(ones, image + 1)

    class Numbered(nn.Module):
        tile_safe, receptive_radius, calls = True, 100, 0

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    restored = restore_tiled(Numbered(), image, (tile, 40), overlap=overlap)
    steps = restored.diff(dim=2).abs().max().item()
    cropped = restore_tiled(Numbered(), image, (tile, 40), overlap=overlap, blend="crop").diff(dim=2).abs().max().item()
    assert cropped >= 1
    assert steps <= (cropped / overlap if overlap <= tile else cropped) + 1e-12
    exact = restore_tiled(Blur(1), image + 1, tile, overlap=overlap, blend="linear")
    torch.testing.assert_close(exact[..., 1:-1, 1:-1], (image + 1)[..., 1:-1, 1:-1], rtol=0, atol=1e-15)


def test_feathers_are_a_weighted_mean_of_windows_by_an_explicit_loop():
    net, image, overlap = Blur(6), normal((1, 2, 23, 1), dtype=torch.float64), 4
    restored = restore_tiled(net, image, (8, 1), overlap=overlap)
    total, weights = torch.zeros(2, 23, dtype=torch.float64), torch.zeros(23, dtype=torch.float64)
    for start, end in [(0, 8), (8, 16), (16, 23)]:
        first, last = max(0, start - overlap), min(23, end + overlap)
        part = net(image[..., first:last, :])[0, :, :, 0]
        for row in range(first, last):
            near = 1.0 if first == 0 else (row - first + 0.5) / overlap - 0.5
            far = 1.0 if last == 23 else (last - row - 0.5) / overlap - 0.5
            weight = min(max(min(near, far), 0), 1)
            total[:, row] += weight * part[:, row - first]
            weights[row] += weight
    torch.testing.assert_close(restored[0, :, :, 0], total / weights, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("overlap", "feathers"), [(None, False), (6, False), (5, True)])
def test_auto_crops_where_that_is_exact_and_feathers_elsewhere(overlap, feathers):
    net, image = Blur(6), normal((1, 1, 40, 40), dtype=torch.float64)
    by_name = restore_tiled(net, image, 16, overlap=overlap, blend="linear" if feathers else "crop")
    assert torch.equal(restore_tiled(net, image, 16, overlap=overlap), by_name)


def test_a_net_that_is_not_tile_safe_says_so():
    image = normal((1, 3, 80, 40))
    with pytest.warns(UserWarning, match=r"^Contrast sees the whole image or does not say .*: its tiles differ"):
        restored = restore_tiled(Contrast(), image, 32)
    assert tuple(restored.shape) == (1, 3, 80, 40)
    net = Blur(2)
    net.tile_safe = False
    with pytest.warns(UserWarning, match=r"^Blur sees the whole image or does not say"):
        restore_tiled(net, image, 40)
    assert sorted(net.seen) == [(1, 3, 72, 40), (1, 3, 72, 40)]  # 32 pixels around
    restore_tiled(Contrast(), image, 80)  # whole: nothing to say


class Noisy(nn.Module):
    """Adds the noise that it is asked for, in cells of four pixels, and counts its calls."""

    tile_safe, receptive_radius, tile_multiple = True, 3, 4

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit, self.calls = limit, 0

    def forward(self, x, *, noise_seed: int | NoiseField):
        self.calls += 1
        if self.limit is not None and x.numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        field = NoiseField(noise_seed) if isinstance(noise_seed, int) else noise_seed
        assert all(place % 4 == 0 for place in field.offset)
        return x + field(x)


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("limit", [None, 2 * 24 * 24])
@pytest.mark.parametrize("tile", [13, (9, 40), 60])
def test_a_pixel_has_the_noise_of_the_whole_image_in_any_tile(tile, limit):
    image, net = normal((2, 1, 50, 37), dtype=torch.float64), Noisy(limit)
    whole = Noisy()(image, noise_seed=7)
    assert torch.equal(restore_tiled(net, image, tile, noise_seed=7), whole)
    assert net.calls > 1 or tile == 60
    assert not torch.equal(restore_tiled(net, image, tile, noise_seed=8), whole)
    blended = restore_tiled(net, image, tile, overlap=4, blend="linear", noise_seed=7)
    torch.testing.assert_close(blended, whole, rtol=0, atol=1e-14)


class Prompted(nn.Module):
    """An RSFMoENet that sees no further than its blocks, since it is told the prompt."""

    tile_safe = True

    def __init__(self) -> None:
        super().__init__()
        fields = {"depths": (1,), "global_mixer": "window", "split": "haar", "k": 4, "bypass": 0.0}
        self.net = made(small_rsfmoe, noise=True, severe_blur=1.0, **fields)
        self.receptive_radius, self.tile_multiple = self.net.receptive_radius, self.net.tile_multiple

    def forward(self, image, *, noise_seed=None):
        return self.net(image, prompt=image.new_ones(len(image), 4), noise_seed=noise_seed)


NOISY_NETS = {
    "HERSR": lambda: made(NETS["HERSR local"]),
    "HARMONIC": lambda: made(NETS["HARMONIC fast path"]),
    "RSFMoENet": Prompted,
}


@pytest.mark.parametrize("build", NOISY_NETS.values(), ids=NOISY_NETS.keys())
def test_nets_with_noise_have_that_of_the_whole_image_in_tiles(build):
    net = build().double()
    for part in net.modules():
        if isinstance(part, NoiseInjection):
            nn.init.ones_(part.weight)
        elif hasattr(part, "router"):  # one that is unsure lets no noise through
            nn.init.normal_(part.router.linear.weight)
    image = normal((1, 3, 2 * net.receptive_radius + 30, 12), dtype=torch.float64)
    with torch.no_grad():
        whole, plain = net(image, noise_seed=7), net(image)
    assert not torch.allclose(whole, plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(restore_tiled(net, image, 20, noise_seed=7), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (Blur(), {"noise_seed": 7}, "^noise_seed must be None for Blur, which takes none$"),
        (SelfEnsemble(Noisy()), {"noise_seed": 7}, "^noise_seed must be None for SelfEnsemble, which takes none$"),
        (Noisy(), {"noise_seed": 7, "batch": 2}, "^batch must be 1 with a noise_seed: each tile has a place of its ow"),
        (Noisy(), {"noise_seed": -1}, r"^seed must be an integer from 0 to 2\^63 - 1, got -1$"),
    ],
)
def test_noise_that_cannot_be_is_refused(net, options, message):
    with pytest.raises(ValueError, match=message):
        restore_tiled(net, torch.zeros(1, 1, 8, 8), 4, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 6.00 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
    ids=str,
)
def test_errors_of_memory_are_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("blend", ["crop", "linear"])
def test_when_memory_runs_out_the_tile_is_halved_and_nothing_is_lost(blend):
    image = normal((1, 1, 100, 90), dtype=torch.float64)
    expected = Blur(2)(image)
    net = Blur(2, limit=33 * 33)
    done = []
    with pytest.warns(UserWarning, match=r"^out of memory") as told:
        restored = restore_tiled(net, image, 100, overlap=4, blend=blend, progress=lambda *seen: done.append(seen))
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-12)
    assert [str(warning.message) for warning in told] == [
        "out of memory: continuing with tiles of 45 x 50 pixels",
        "out of memory: continuing with tiles of 23 x 25 pixels",
    ]
    assert [whole for _, whole in done] == [9000] * len(done)
    assert [pixels for pixels, _ in done] == sorted({pixels for pixels, _ in done})
    assert done[-1] == (9000, 9000)


def test_what_is_done_stays_when_memory_runs_out_later():
    class Filling(Blur):
        """Its memory is full after three calls: from then on only small windows fit."""

        def forward(self, x):
            self.limit = None if len(self.seen) < 3 else 24 * 24
            return super().forward(x)

    net, image = Filling(2), normal((1, 1, 64, 64), dtype=torch.float64)
    with pytest.warns(UserWarning, match="tiles of 16 x 16 pixels"):
        restored = restore_tiled(net, image, 32)
    assert [shape[2:] for shape in net.seen] == [(34, 34)] * 4 + [(20, 20), (20, 18), (18, 20), (18, 18)]
    torch.testing.assert_close(restored, Blur(2)(image), rtol=0, atol=1e-12)


def test_a_batch_is_halved_before_the_tile():
    net, image = Blur(2, limit=2 * 20 * 20), normal((1, 1, 96, 16), dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"continuing with batches of 2 tile\(s\)"):
        restored = restore_tiled(net, image, 16, batch=5)
    torch.testing.assert_close(restored, Blur(2)(image), rtol=0, atol=1e-12)


def test_too_little_memory_for_the_smallest_tile_raises():
    with (
        pytest.warns(UserWarning, match=r"^out of memory: continuing"),
        pytest.raises(RuntimeError, match=r"^out of memory even with tiles of 16 x 16 pixe"),
    ):
        restore_tiled(Blur(2, limit=10), normal((1, 1, 100, 40)), 100)
    with pytest.raises(
        RuntimeError, match=r"^out of memory even with tiles of 4 x 4 pixels and 2 around each: give a sm"
    ):
        restore_tiled(Blur(2, limit=10), normal((1, 1, 100, 40)), 4)


def test_other_errors_are_not_taken_for_it():
    class Broken(Blur):
        def forward(self, x):
            raise RuntimeError("expected a scalar")

    with pytest.raises(RuntimeError, match=r"^expected a scalar$"):
        restore_tiled(Broken(), torch.zeros(1, 1, 9, 9), 4)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_come_back_and_eval_is_what_runs(fails):
    class Moody(Blur):
        def __init__(self):
            super().__init__()
            self.inner, self.modes = nn.Dropout(), []

        def train(self, mode=True):
            raise AssertionError("it must not be called: it may do more than setting a mode")

        def forward(self, x):
            self.modes += [self.training, self.inner.training, torch.is_inference_mode_enabled()]
            if fails:
                raise KeyError("stop")
            return super().forward(x)

    net = Moody()
    net.inner.training = False
    if fails:
        with pytest.raises(KeyError):
            restore_tiled(net, torch.zeros(1, 1, 9, 9), 4)
    else:
        restored = restore_tiled(net, torch.zeros(1, 1, 9, 9, requires_grad=True), 4)
        assert not restored.is_inference()
        assert not restored.requires_grad
    assert net.modes[:3] == [False, False, True]
    assert net.training
    assert not net.inner.training


def test_a_half_precision_net_takes_a_float32_image():
    net = nn.Conv2d(3, 3, 3, padding=1)
    net.tile_safe, net.receptive_radius = True, 1
    image = normal((1, 3, 20, 20))
    exact = net(image)
    restored = restore_tiled(net.bfloat16(), image, 8)
    assert restored.dtype == torch.float32
    torch.testing.assert_close(restored, exact, rtol=0, atol=0.05)
    assert restore_tiled(net, image.half(), 8, overlap=0).dtype == torch.float16


def test_channels_last_stays_so():
    image = normal((2, 3, 20, 20)).contiguous(memory_format=torch.channels_last)
    for blend in ("crop", "linear"):
        restored = restore_tiled(Blur(2, scale=2), image, 8, blend=blend)
        assert restored.is_contiguous(memory_format=torch.channels_last)
        assert restore_tiled(Blur(2), image.contiguous(), 8, blend=blend).is_contiguous()


def test_the_image_is_not_changed():
    image = normal((1, 1, 20, 20))
    before = image.clone()
    restored = restore_tiled(nn.Identity(), image, 64)
    restored.add_(1)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 0}, "^tile must be an integer of at least 1, got 0$"),
        ({"tile": (4, -1)}, "^tile must be an integer of at least 1, got -1$"),
        ({"tile": 2.5}, "^tile must be an integer of at least 1, got 2.5$"),
        ({"tile": (4, 4, 4)}, r"^tile must be one side or \(height, width\), got \(4, 4, 4\)$"),
        ({"overlap": -1}, "^overlap must be an integer of at least 0, got -1$"),
        ({"overlap": 1.5}, "^overlap must be an integer of at least 0, got 1.5$"),
        ({"batch": 0}, "^batch must be an integer of at least 1, got 0$"),
        ({"blend": "cubic"}, "^blend must be one of auto, crop, linear, got 'cubic'$"),
        ({"image": torch.zeros(3, 8, 8)}, r"^image must be \(B, C, H, W\), none of them 0, got shape \(3, 8, 8\)$"),
        ({"image": torch.zeros(1, 3, 0, 8)}, r"none of them 0, got shape \(1, 3, 0, 8\)$"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        restore_tiled(**{"net": Blur(), "image": torch.zeros(1, 3, 8, 8), "tile": 4, **arguments})


def test_integers_are_no_image():
    with pytest.raises(TypeError, match=r"^image must be floating point, got torch.uint8$"):
        restore_tiled(Blur(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4)


def test_a_net_that_enlarges_by_no_whole_factor_raises():
    net = nn.AvgPool2d(2)
    net.tile_safe, net.receptive_radius = True, 1
    with pytest.raises(
        ValueError, match=r"^AvgPool2d must enlarge both sides by one whole factor .* \(4, 4\) of \(8, 8"
    ):
        restore_tiled(net, torch.zeros(1, 3, 8, 8), 8)


def test_the_overlap_that_is_exact():
    net = made(NETS["RRDBNet nearest+conv"], scale=1)
    assert exact_overlap(net) == math.ceil(net.receptive_radius / 4) * 4
    assert exact_overlap(nn.ReLU()) is None
    assert exact_overlap(SelfEnsemble(net)) == exact_overlap(net)


def test_the_self_ensemble_is_the_mean_over_turns_and_mirrorings():
    net, image = made(NETS["RRDBNet"], scale=2).double(), normal((1, 3, 6, 9), dtype=torch.float64)
    with torch.no_grad():
        expected = torch.zeros(1, 3, 12, 18, dtype=torch.float64)
        for mirror in (lambda x: x, lambda x: x.flip(2)):
            for turns in range(4):
                expected += mirror(net(mirror(image).rot90(turns, (2, 3))).rot90(-turns, (2, 3))) / 8
        restored = SelfEnsemble(net)(image)
        turned = SelfEnsemble(net)(image.rot90(1, (2, 3))).rot90(-1, (2, 3))
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(turned, restored, rtol=0, atol=1e-14)


def test_the_self_ensemble_averages_in_float32():
    class Large(nn.Module):
        def forward(self, x):
            return x + 30000

    image = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    assert SelfEnsemble(Large())(image).tolist() == [[[[30000.0, 30000.0], [30000.0, 30000.0]]]]


def test_nothing_warns_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_tiled(Blur(2), torch.zeros(1, 3, 20, 20), 8)


def test_a_canvas_holds_what_a_box_says():
    box, window = Box(2, 3, 4, 6), Box(1, 1, 6, 8)
    assert (box.size, box.area, box.seen_from(window)) == ((2, 3), 6, Box(1, 2, 3, 5))
    canvas = Canvas(torch.zeros(1, 1, 8, 8), 1, 2, 0)
    canvas.image().zero_()
    canvas.put(box, window, torch.ones(1, 1, 10, 14))
    assert canvas.image().sum() == 4 * box.area


def test_a_tile_may_be_a_list():
    net, image = nn.Identity(), torch.rand(1, 1, 9, 9)
    net.tile_safe, net.receptive_radius = True, 0
    assert torch.equal(restore_tiled(net, image, [4, 5]), image)
