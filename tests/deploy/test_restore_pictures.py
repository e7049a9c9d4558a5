"""Restoring pictures: colour and grey, alpha and what it hides, tiles."""

import pytest
import torch
from torch import nn

from claritycore.deploy import SelfEnsemble, restore_picture
from claritycore.deploy.restore import OUTPUT_SIDE, choose_tiles, spread
from claritycore.images import Picture, imresize
from claritycore.nets import AutoModel


def values(height, width, channels, seed=0):
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(seed))


def through(net, image):
    with torch.no_grad():
        return net(image).clamp(0, 1)


def test_rgb_is_what_the_net_makes_of_it(make_net):
    net, picture = make_net(), Picture(values(7, 9, 3), depth=16, exif=b"II*\0....")
    restored = restore_picture(net, picture)
    torch.testing.assert_close(restored.pixels, through(net, picture.pixels), rtol=0, atol=1e-6)
    assert restored.pixels.min() >= 0
    assert (restored.depth, restored.exif, restored.alpha) == (16, picture.exif, None)


def test_grey_through_a_net_of_three_channels_is_the_mean(make_net):
    net, picture = make_net(), Picture(values(7, 9, 1))
    expected = net(picture.pixels.repeat(1, 3, 1, 1)).mean(1, keepdim=True).clamp(0, 1)
    torch.testing.assert_close(restore_picture(net, picture).pixels, expected.detach(), rtol=0, atol=1e-6)


def test_a_net_of_one_channel_takes_grey_as_it_is_and_rgb_by_channel(make_net):
    net, pixels = make_net(channels=1), values(7, 9, 3)
    channels = [through(net, pixels[:, i : i + 1]) for i in range(3)]
    grey = restore_picture(net, Picture(pixels[:, :1])).pixels
    torch.testing.assert_close(grey, channels[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(restore_picture(net, Picture(pixels)).pixels, torch.cat(channels, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_is_enlarged_or_restored_or_dropped(make_net, channels):
    net = make_net(channels=channels)
    alpha = values(7, 9, 1, seed=1) * 0.9 + 0.1
    picture = Picture(values(7, 9, 3), alpha)
    bicubic = restore_picture(net, picture)
    expected = imresize(alpha, 2, intermediate="float").clamp(0, 1)
    torch.testing.assert_close(bicubic.alpha, expected, rtol=0, atol=0)
    by_net = restore_picture(net, picture, alpha="model")
    torch.testing.assert_close(by_net.alpha, restore_picture(net, Picture(alpha)).pixels, rtol=0, atol=1e-6)
    assert restore_picture(net, picture, alpha="drop").alpha is None
    torch.testing.assert_close(bicubic.pixels, restore_picture(net, Picture(picture.pixels)).pixels)


def test_colours_that_nobody_sees_do_not_bleed(make_net):
    alpha = torch.ones(1, 1, 12, 12)
    alpha[..., 6:] = 0
    seen = values(12, 12, 3)
    restored = []
    for hidden in (0.0, 1.0):
        pixels = seen.clone()
        pixels[..., 6:] = hidden
        restored.append(restore_picture(make_net(), Picture(pixels, alpha)).pixels)
    assert torch.equal(*restored)
    dropped = [restore_picture(make_net(), Picture(seen * a, alpha), alpha="drop").pixels for a in (alpha, 1)]
    assert not torch.equal(*dropped)


def test_hidden_pixels_take_the_colour_of_the_smallest_cell_with_a_visible_one():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 13, 10, generator=generator, dtype=torch.float64)
    alpha = (torch.rand(1, 1, 13, 10, generator=generator) > 0.9).double() * 0.3
    filled = spread(pixels, alpha)

    def mean(top, left, side):
        """The mean colour of the visible quarters of a cell; None if none is visible."""
        if top >= 13 or left >= 10:
            return None
        if side == 1:
            return pixels[0, :, top, left] if alpha[0, 0, top, left] > 0 else None
        half = side // 2
        quarters = [mean(top + i, left + j, half) for i in (0, half) for j in (0, half)]
        quarters = [quarter for quarter in quarters if quarter is not None]
        return sum(quarters) / len(quarters) if quarters else None

    for row in range(13):
        for column in range(10):
            cells = (mean(row // side * side, column // side * side, side) for side in (1, 2, 4, 8, 16))
            expected = next(cell for cell in cells if cell is not None)
            torch.testing.assert_close(filled[0, :, row, column], expected, rtol=0, atol=1e-14)
    for same in (torch.zeros_like(alpha), torch.ones_like(alpha)):
        assert torch.equal(spread(pixels, same), pixels)


@pytest.mark.parametrize("options", [{"tile": 9}, {"tile": 9, "batch": 3}, {}], ids=str)
def test_tiles_and_the_self_ensemble_go_together(make_net, options):
    net = SelfEnsemble(make_net(upsampler="nearest+conv"))
    picture = Picture(values(70, 21, 3), values(70, 21, 1, seed=2) * 0.9 + 0.1)
    expected = through(net, picture.pixels)
    seen = []
    restored = restore_picture(net, picture, progress=lambda *now: seen.append(now), **options)
    torch.testing.assert_close(restored.pixels, expected, rtol=0, atol=1e-5)
    assert seen[-1] == (70 * 21, 70 * 21)


def test_tiles_are_chosen_by_the_size_of_the_result(make_net):
    net = make_net(scale=4)
    assert net.receptive_radius < 72
    small = Picture(torch.zeros(1, 1, 512, 512))
    assert choose_tiles(net, small) == (512, net.receptive_radius)
    large = Picture(torch.zeros(1, 1, 512, 513))
    tile, overlap = choose_tiles(net, large)
    assert (tile + 2 * overlap, overlap) == (OUTPUT_SIDE // 4, net.receptive_radius)
    assert choose_tiles(net, large, 100, 7) == (100, 7)
    deep = make_net(scale=8, num_block=6)
    assert deep.receptive_radius > 72
    assert choose_tiles(deep, large) == (OUTPUT_SIDE // 8 - 144, 72)
    assert choose_tiles(AutoModel.from_pretrained("claritycore-x4"), large)[1] == 65  # all that it sees: exact
    assert choose_tiles(nn.ReLU(), Picture(torch.zeros(1, 1, 2048, 2049))) == (2048 - 64, 32)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Conv2d(12, 12, 1), "^Conv2d takes images of 12 channels, and pictures have 1 or 3$"),
        (nn.Conv2d(3, 4, 1), "^Conv2d makes 4 channels of 3: a picture needs as many$"),
        (nn.Threshold(2.0, float("nan")), "^Threshold makes NaN or infinity of it in this dtype$"),
    ],
)
def test_nets_that_do_not_fit_pictures_raise(net, message):
    with pytest.raises(ValueError, match=message):
        restore_picture(net, Picture(values(4, 4, 3)))


def test_an_unknown_alpha_raises():
    with pytest.raises(ValueError, match=r"^alpha must be one of bicubic, model, drop, got 'cubic'$"):
        restore_picture(nn.ReLU(), Picture(values(4, 4, 3)), alpha="cubic")
