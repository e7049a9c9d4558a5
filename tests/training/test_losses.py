"""Losses of pixels and of SSIM against their formulas, what all losses share, and sums of losses from text."""

import re

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from claritycore.images import ssim
from claritycore.training.adversarial import AdversarialLoss
from claritycore.training.frequency_losses import FFTLoss, FocalFrequencyLoss, LaplacianLoss
from claritycore.training.losses import LOSSES, LossTerm, WeightedLoss
from claritycore.training.perceptual import LPIPSLoss, VGGLoss
from claritycore.training.pixel_losses import CharbonnierLoss, ImageLoss, L1Loss, L2Loss, PSNRLoss, SSIMLoss

ANY_SIZE = {
    "l1": L1Loss(),
    "l2": L2Loss(),
    "charbonnier": CharbonnierLoss(),
    "psnr": PSNRLoss(),
    "fft": FFTLoss(),
    "fft complex": FFTLoss("complex"),
    "hf": FFTLoss(cutoff=0.25),
    "focal": FocalFrequencyLoss(),
    "laplacian": LaplacianLoss(),
    "lf": LaplacianLoss(first=2),
}
ALL = ANY_SIZE | {"ssim": SSIMLoss()}
AT_EQUALITY = {"charbonnier": 1e-3, "psnr": -50.0}  # others are zero
SIZES = [(1, 1), (1, 7), (6, 1), (2, 2), (5, 8), (33, 17)]


def pair(*shape, seed=0, dtype=torch.float64, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (target + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype), target.to(dtype)


# Against the formulas


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (L1Loss(), lambda d: np.abs(d).mean()),
        (L2Loss(), lambda d: (d**2).mean()),
        (CharbonnierLoss(), lambda d: np.sqrt(d**2 + 1e-6).mean()),
        (CharbonnierLoss(0.2), lambda d: np.sqrt(d**2 + 0.04).mean()),
        (PSNRLoss(1e-12), lambda d: np.mean([10 * np.log10((image**2).mean() + 1e-12) for image in d])),
        (PSNRLoss(), lambda d: np.mean([10 * np.log10((image**2).mean() + 1e-5) for image in d])),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_losses_of_pixels_equal_their_formulas(loss, formula, size):
    a, b = pair(2, 3, *size)
    np.testing.assert_allclose(loss(a, b).item(), formula(a.numpy() - b.numpy()), rtol=1e-13)


@pytest.mark.parametrize("shape", [(1, 1, 11, 11), (2, 3, 11, 30), (1, 2, 24, 13)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_ssim_equals_scikit_image(shape, noise):
    a, b = pair(*shape, noise=noise)
    planes = zip(a.flatten(0, 1).numpy(), b.flatten(0, 1).numpy(), strict=True)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1, "full": True}
    expected = np.mean([structural_similarity(x, y, **options)[1][5:-5, 5:-5] for x, y in planes])
    np.testing.assert_allclose(SSIMLoss()(a, b).item(), 1 - expected, rtol=1e-9)
    np.testing.assert_allclose(SSIMLoss()(a, b).item(), 1 - ssim(a, b, depth=None).mean().item(), rtol=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_ssim_keeps_its_figures_in_float32_where_images_are_flat_and_nearly_equal(level, noise):
    """The usual form, which subtracts the means of a and b from those of their squares, is off by half at worst."""
    a, b = pair(1, 3, 40, 40, noise=noise)
    a, b = (level + 0.01 * (b - 0.5) + (a - b)).float(), (level + 0.01 * (b - 0.5)).float()
    torch.testing.assert_close(SSIMLoss()(a, b).double(), SSIMLoss()(a.double(), b.double()), rtol=5e-4, atol=0)


# What all share


@pytest.mark.parametrize("name", ALL)
def test_a_loss_is_least_at_equality_and_symmetric(name):
    a, b = pair(2, 3, 19, 14, dtype=torch.float32)
    at_equality = torch.tensor(AT_EQUALITY.get(name, 0.0))
    torch.testing.assert_close(ALL[name](a, a), at_equality, rtol=1e-6, atol=0)
    torch.testing.assert_close(ALL[name](a, b), ALL[name](b, a), rtol=1e-6, atol=0)
    assert ALL[name](a, b) > at_equality


# The weights of the focal loss are constants to the gradient: test_losses_frequency.py has its formula.
@pytest.mark.parametrize("name", sorted(set(ALL) - {"focal"}))
def test_the_gradient_is_that_of_the_loss(name):
    size = (13, 12) if name == "ssim" else (5, 6)
    a, b = (x.requires_grad_() for x in pair(1, 2, *size))
    assert torch.autograd.gradcheck(ALL[name], (a, b))


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_finite_at_equality(name):
    image = pair(1, 3, 16, 15, dtype=torch.float32)[1]
    image[:, :, :, 8:] = 0  # flat, too
    restored = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ALL[name](restored, image), restored)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(name, dtype):
    a, b = pair(2, 3, 13, 16, dtype=dtype)
    a.requires_grad_()
    loss = ALL[name](a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ALL[name](a.float(), b.float()), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing_and_float64_stays(name):
    a, b = pair(2, 3, 13, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ALL[name](a, b)
    assert torch.equal(inside, ALL[name](a, b))
    wide = ALL[name](a.double(), b)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, inside.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ANY_SIZE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 12])
def test_any_size_and_any_number_of_channels(name, size, channels):
    a, b = pair(1, channels, *size)
    a.requires_grad_()
    loss = ANY_SIZE[name](a, b)
    (gradient,) = torch.autograd.grad(loss, a)
    assert loss.shape == ()
    assert loss.isfinite()
    assert gradient.isfinite().all()
    # A mean: a batch of the same pair twice, and twice the channels, are worth the same.
    many = (torch.cat([torch.cat([x, x], 1)] * 2).detach() for x in (a, b))
    torch.testing.assert_close(ANY_SIZE[name](*many), loss.detach())


@pytest.mark.parametrize("name", ALL)
def test_the_memory_format_does_not_matter(name):
    a, b = pair(2, 3, 16, 13)
    last = a.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ALL[name](last, b), ALL[name](a, b))


@pytest.mark.parametrize("name", ["charbonnier", "hf", "focal", "laplacian", "ssim"])
def test_a_loss_compiles_whole(name):
    torch.compiler.reset()
    a, b = pair(1, 3, 16, 13, dtype=torch.float32)
    compiled = torch.compile(ALL[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), ALL[name](a, b))


@pytest.mark.parametrize("name", ALL)
def test_a_loss_moves_an_image_towards_the_target(name):
    image, target = pair(1, 3, 16, 16, dtype=torch.float32, noise=0.3)
    image.requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.01)
    before = ALL[name](image, target).item()
    for _ in range(30):
        optimizer.zero_grad()
        ALL[name](image, target).backward()
        optimizer.step()
    after = ALL[name](image, target).item()
    assert after < (before + 10 * np.log10(0.6) if name == "psnr" else 0.6 * before)  # the one is a logarithm


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_pair_of_images_is_told(name):
    kind = type(ALL[name]).__name__
    a = torch.rand(1, 3, 16, 16)
    with pytest.raises(TypeError, match=rf"{kind} takes floating-point images, got torch.uint8 and torch.float32"):
        ALL[name](a.to(torch.uint8), a)
    message = rf"{kind} takes two images \(B, C, H, W\) of one shape with B, C, H, W >= 1, got shapes "
    for b in (a[:, :1], a[0], a[:0], a[..., :0]):
        with pytest.raises(ValueError, match=message + re.escape(f"{tuple(a.shape)} and {tuple(b.shape)}")):
            ALL[name](a, b)
    for b in (a[0], a[:0], a[..., :0]):
        with pytest.raises(ValueError, match=message):
            ALL[name](b, b)


@pytest.mark.parametrize("loss", [CharbonnierLoss, PSNRLoss])
@pytest.mark.parametrize("eps", [0, -1e-3, 1e-13, float("inf"), float("nan"), "small"])
def test_an_eps_whose_square_vanishes_is_told(loss, eps):
    with pytest.raises(ValueError, match=r"eps must be a number of at least 1e-12, got"):
        loss(eps)


@pytest.mark.parametrize("loss", [CharbonnierLoss, PSNRLoss])
def test_the_smallest_eps_keeps_the_gradient_finite(loss):
    image = torch.rand(1, 3, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(1e-12)(image, image.detach()), image)
    assert torch.equal(gradient, torch.zeros_like(image))


def test_to_the_psnr_each_image_counts_by_its_ratio():
    target = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    restored = target + torch.tensor([0.1, 0.01])[:, None, None, None] * torch.randn_like(target)
    by_ratio = restored.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(PSNRLoss(1e-12)(by_ratio, target), by_ratio)
    # The derivative along the error: one that grows by a hundredth costs the same dB in either image.
    along = (gradient * (restored - target)).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.full_like(along, 10 / np.log(10)), rtol=1e-6, atol=0)


def test_images_smaller_than_the_window_of_ssim_are_told():
    with pytest.raises(ValueError, match=r"SSIMLoss takes images of at least 11 x 11 pixels, got 10 x 40"):
        SSIMLoss()(torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40))


def test_a_loss_of_ones_own_says_how_it_compares():
    class Nothing(ImageLoss):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing does not override compare\(\)"):
        Nothing()(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))


# Sums


def told(loss):
    return [(term.name, type(term.loss), term.weight, term.start, term.ramp) for term in loss.terms]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("l1", [("l1", L1Loss, 1.0, 0, 0)]),
        ("l1+0.1*fft", [("l1", L1Loss, 1.0, 0, 0), ("fft", FFTLoss, 0.1, 0, 0)]),
        (
            " 1e+1 * l1 + .5*ssim @ 100 : 20 +2.*l2@7",
            [("l1", L1Loss, 10.0, 0, 0), ("ssim", SSIMLoss, 0.5, 100, 20), ("l2", L2Loss, 2.0, 7, 0)],
        ),
        ("lf+0.1*hf@0:5", [("lf", LaplacianLoss, 1.0, 0, 0), ("hf", FFTLoss, 0.1, 0, 5)]),
        ("l1+l1()", [("l1", L1Loss, 1.0, 0, 0), ("l1-2", L1Loss, 1.0, 0, 0)]),
    ],
)
def test_text_says_which_terms(text, terms):
    assert told(WeightedLoss(text)) == terms


def test_text_says_the_options_of_a_loss():
    loss = WeightedLoss("charbonnier( eps = 1e-6 ) + fft(form=complex,cutoff=.5)+laplacian(levels=3, first=1)+hf+lf")
    charbonnier, fft, laplacian, hf, lf = (term.loss for term in loss.terms)
    assert charbonnier.eps == 1e-6
    assert (fft.form, fft.cutoff) == ("complex", 0.5)
    assert (laplacian.levels, laplacian.first) == (3, 1)
    assert (hf.form, hf.cutoff) == ("magnitude", 0.25)
    assert (lf.levels, lf.first) == (5, 2)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"vgg", "lpips"}))
def test_every_name_makes_a_loss(name):
    options = "(width=4)" if name in ("gan", "hinge", "lsgan", "relativistic") else ""
    total, values = WeightedLoss(name + options)(*pair(1, 3, 16, 16, dtype=torch.float32))
    assert total.isfinite()
    assert list(values) == [name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"loss '' must be a sum of terms such as .*; none starts at ''"),
        ("l1+", r"loss 'l1\+' must be a sum of terms such as .*; none starts at ''"),
        ("l1 fft", r"must be a sum of terms such as .*; none starts at 'l1 fft'"),
        ("l1+0.1 fft", r"must be a sum of terms such as .*; none starts at '0.1 fft'"),
        ("l1-0.1*fft", r"must be a sum of terms such as .*; none starts at 'l1-0.1\*fft'"),
        ("l1+fft(cutoff=0.5", r"must be a sum of terms such as .*; none starts at 'fft\(cutoff=0.5'"),
        ("l1@-5", r"must be a sum of terms such as .*; none starts at 'l1@-5'"),
        ("l1+cabonnier", r"there is no loss 'cabonnier'; did you mean charbonnier\?"),
        ("L1", r"there is no loss 'L1'; did you mean l1\?"),
        ("x", r"there is no loss 'x'; known are charbonnier, fft, focal, gan, .*, vgg"),
        ("fft(cutof=0.5)", r"loss fft has no option 'cutof'; did you mean cutoff\?"),
        ("l1(eps=1)", r"loss l1 has no option 'eps'; known are none"),
        ("fft(cutoff)", r"option cutoff of loss fft must have one value, got 'cutoff'"),
        ("fft(cutoff=)", r"option cutoff of loss fft must have one value, got 'cutoff='"),
        ("fft(cutoff=1,cutoff=2)", r"option cutoff of loss fft must have one value, got 'cutoff=1,cutoff=2'"),
        ("fft(cutoff=-1)", r"loss fft\(cutoff=-1\): cutoff must be positive and finite, got -1"),
        ("fft(form=phase)", r"loss fft\(form=phase\): form must be one of magnitude, complex, got 'phase'"),
        ("gan(width=wide)", r"loss gan\(width=wide\): width must be an integer of at least 1, got 'wide'"),
        ("0*l1", r"the weight of l1 must be positive and finite, got 0.0"),
        ("-1*l1", r"the weight of l1 must be positive and finite, got -1.0"),
        ("1e999*l1", r"the weight of l1 must be positive and finite, got inf"),
        ("l1@5+l2@9:3", r"a term must start in step 0, got l1 in step 5, l2 in step 9"),
        ("l1+vgg", r"loss vgg\(\): VGGLoss needs weights=FILE, vgg19 or vgg16 .*https://.*/vgg19-dcbb9e9d.pth"),
        ("l1+vgg(weights=3)", r"loss vgg\(weights=3\): "),
        ("lpips", r"loss lpips\(\): LPIPSLoss needs weights=FILE, alexnet or vgg16 .*https://.*/alexnet"),
        ("vgg(layers=conv5_4)", r"layers must map names to weights, got 'conv5_4'"),
    ],
)
def test_text_that_is_no_sum_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        WeightedLoss(text)


def test_a_file_of_weights_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no checkpoint {tmp_path / 'vgg19.pth'}")):
        WeightedLoss("l1+vgg(weights=~/vgg19.pth)")


@pytest.mark.parametrize(
    ("start", "ramp", "factors"),
    [
        (0, 0, {0: 1, 1: 1, 10**9: 1}),
        (3, 0, {0: 0, 2: 0, 3: 1, 4: 1}),
        (0, 3, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1}),
        (5, 1, {0: 0, 4: 0, 5: 0.5, 6: 1, 7: 1}),
    ],
)
def test_a_term_grows_from_its_start_to_its_weight(start, ramp, factors):
    term = LossTerm("l2", L2Loss(), weight=0.2, start=start, ramp=ramp)
    assert {step: term.factor(step) for step in factors} == pytest.approx({k: 0.2 * v for k, v in factors.items()})


def test_a_sum_weighs_its_terms_and_tells_each():
    a, b = pair(2, 3, 16, 16, dtype=torch.float32)
    loss = WeightedLoss("2*l1+0.5*ssim@10:1+l2@20")
    a.requires_grad_()
    l1, l2, similarity = L1Loss()(a, b), L2Loss()(a, b), SSIMLoss()(a, b)
    for step, expected, names in [
        (0, 2 * l1, ["l1"]),
        (9, 2 * l1, ["l1"]),
        (10, 2 * l1 + 0.25 * similarity, ["l1", "ssim"]),
        (11, 2 * l1 + 0.5 * similarity, ["l1", "ssim"]),
        (20, 2 * l1 + 0.5 * similarity + l2, ["l1", "ssim", "l2"]),
    ]:
        total, values = loss(a, b, step)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.autograd.grad(total, a), torch.autograd.grad(expected, a, retain_graph=True))
        assert list(values) == names
        assert not any(value.requires_grad for value in values.values())
        torch.testing.assert_close(values["l1"], l1.detach())


def test_a_term_that_has_not_started_costs_nothing():
    class Refuses(nn.Module):
        def forward(self, restored, target):
            raise RuntimeError("called")

    loss = WeightedLoss([LossTerm("l1", L1Loss()), LossTerm("late", Refuses(), start=5)])
    loss(*pair(1, 3, 4, 4), 4)
    with pytest.raises(RuntimeError, match="called"):
        loss(*pair(1, 3, 4, 4), 5)


def test_terms_of_ones_own_are_checked():
    with pytest.raises(TypeError, match=r"terms must be text or a sequence of LossTerm, got \[L1Loss\(\)\]"):
        WeightedLoss([L1Loss()])
    with pytest.raises(ValueError, match=r"terms must have different names, got l1, l1"):
        WeightedLoss([LossTerm("l1", L1Loss()), LossTerm("l1", L1Loss())])
    with pytest.raises(ValueError, match=r"a term must start in step 0, got none"):
        WeightedLoss([])
    with pytest.raises(ValueError, match=r"start and ramp of l1 must be at least 0, got -1 and 0"):
        LossTerm("l1", L1Loss(), start=-1)
    with pytest.raises(ValueError, match=r"the weight of l1 must be positive and finite, got nan"):
        LossTerm("l1", L1Loss(), weight=float("nan"))


def test_the_discriminators_of_a_sum_are_found():
    loss = WeightedLoss("l1+0.1*hinge(width=4,high_pass=2,feature_matching=0.5)@3")
    (term,) = loss.adversarial
    adversary = term.loss
    assert isinstance(adversary, AdversarialLoss)
    assert (term.name, term.weight, term.start) == ("hinge", 0.1, 3)
    assert (adversary.kind, adversary.high_pass, adversary.feature_matching) == ("hinge", 2, 0.5)
    assert adversary.discriminator.in_channels == 3
    assert {id(p) for p in loss.parameters()} == {id(p) for p in adversary.discriminator.parameters()}
    assert WeightedLoss("l1").adversarial == []
    assert {LOSSES["vgg"], LOSSES["lpips"]} == {VGGLoss, LPIPSLoss}
