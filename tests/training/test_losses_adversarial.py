"""Adversarial losses against explicit expressions, and the discriminator: its shape, its gradients, its norms."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from claritycore.training.adversarial import (
    KINDS,
    AdversarialLoss,
    discriminator_objective,
    feature_matching,
    generator_objective,
)
from claritycore.training.critic import Critic
from claritycore.training.discriminators import UNetDiscriminator
from claritycore.training.losses import WeightedLoss
from claritycore.training.pyramid import texture
from claritycore.training.settings import TrainingSettings

R = np.array([[2.0, -0.5, 0.3], [1.2, 0.9, -3.0]])
F = np.array([[-1.0, 0.4, 2.5], [-0.2, -1.7, 0.1]])


def log_sigmoid(x):
    return np.log(1 / (1 + np.exp(-x)))


DISCRIMINATOR = {
    "vanilla": -log_sigmoid(R).mean() - log_sigmoid(-F).mean(),
    "hinge": np.maximum(0, 1 - R).mean() + np.maximum(0, 1 + F).mean(),
    "lsgan": 0.5 * ((R - 1) ** 2).mean() + 0.5 * (F**2).mean(),
    "relativistic": -log_sigmoid(R - F.mean()).mean() - np.log(1 - 1 / (1 + np.exp(-(F - R.mean())))).mean(),
}
GENERATOR = {
    "vanilla": -log_sigmoid(F).mean(),
    "hinge": -F.mean(),
    "lsgan": 0.5 * ((F - 1) ** 2).mean(),
    "relativistic": -np.log(1 - 1 / (1 + np.exp(-(R - F.mean())))).mean() - log_sigmoid(F - R.mean()).mean(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_objectives_equal_their_formulas(kind):
    real, fake = torch.from_numpy(R), torch.from_numpy(F)
    np.testing.assert_allclose(discriminator_objective(real, fake, kind).item(), DISCRIMINATOR[kind], rtol=1e-12)
    np.testing.assert_allclose(generator_objective(real, fake, kind).item(), GENERATOR[kind], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [discriminator_objective, generator_objective])
def test_objectives_are_finite_and_wide_with_extreme_logits(kind, objective):
    real, fake = (torch.tensor([x, -x], dtype=torch.float16, requires_grad=True) for x in (200.0, 60000.0))
    loss = objective(real, fake, kind)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, (real, fake), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_hinge_is_content_beyond_its_margin():
    real, fake = torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -5.0])
    assert discriminator_objective(real, fake, "hinge") == 0


def test_feature_matching_equals_its_formula_and_leaves_real_maps():
    generator = torch.Generator().manual_seed(0)
    real, fake = ([torch.randn(2, c, c, 3, generator=generator).requires_grad_() for c in (2, 5)] for _ in range(2))
    expected = sum(np.abs((f - r).detach().numpy()).mean() for r, f in zip(real, fake, strict=True))
    loss = feature_matching(real, fake)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)
    loss.backward()
    assert [r.grad for r in real] == [None, None]
    assert all(f.grad.abs().max() > 0 for f in fake)


# The loss with its discriminator


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    restored, target = torch.rand(2, *shape, generator=generator).unbind(0)
    return restored.requires_grad_(), target.requires_grad_()


def small(channels=3):
    torch.manual_seed(0)
    return UNetDiscriminator(channels, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_loss_of_the_net_reaches_the_restored_image_alone(kind, weight):
    restored, target = images(2, 3, 16, 13)
    discriminator = small().eval()
    loss = AdversarialLoss(discriminator, kind=kind, feature_matching=weight)(restored, target)
    real, fake = discriminator.features(target.detach()), discriminator.features(restored.detach())
    expected = generator_objective(real[-1], fake[-1], kind)
    if weight:
        expected = expected + weight * feature_matching(real[:-1], fake[:-1])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert restored.grad.abs().max() > 0
    assert target.grad is None
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_discriminator_reaches_all_of_it_and_no_image(kind):
    restored, target = images(2, 3, 16, 13)
    discriminator = small()
    loss = AdversarialLoss(discriminator, kind=kind).discriminator_loss(restored, target)
    discriminator.eval()
    torch.testing.assert_close(
        loss, discriminator_objective(discriminator(target), discriminator(restored), kind), rtol=1e-2, atol=1e-3
    )
    loss.backward()
    assert restored.grad is None
    assert target.grad is None
    for name, parameter in discriminator.named_parameters():
        # What is added to every logit changes no relativistic verdict, nor one of the hinge within its margins.
        blind = kind in ("relativistic", "hinge") and name == "last.bias"
        assert blind or parameter.grad.abs().max() > 0, name


def test_parameters_are_thawed_when_the_discriminator_fails_and_stay_frozen_when_they_were():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.trained, self.fixed = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, image):
            raise RuntimeError(f"frozen: {not self.trained.requires_grad}")

    discriminator = Fails()
    with pytest.raises(RuntimeError, match="frozen: True"):
        AdversarialLoss(discriminator)(*images(1, 3, 4, 4))
    assert (discriminator.trained.requires_grad, discriminator.fixed.requires_grad) == (True, False)


def test_a_high_pass_judges_texture_alone():
    discriminator = small().eval()
    restored, target = (x.detach() for x in images(1, 3, 16, 16))
    loss = AdversarialLoss(discriminator, high_pass=2)
    expected = AdversarialLoss(discriminator)(texture(restored, 2), target)
    torch.testing.assert_close(loss(restored, target), expected)
    torch.testing.assert_close(loss(restored + 0.2, target), expected, rtol=1e-5, atol=1e-6)


def test_a_discriminator_learns_and_a_net_misleads_it():
    generator = torch.Generator().manual_seed(0)
    target, restored = torch.rand(4, 1, 16, 16, generator=generator), torch.full((4, 1, 16, 16), 0.5)
    restored = (restored + 0.01 * torch.randn(restored.shape, generator=generator)).requires_grad_()
    loss = AdversarialLoss(small(1), kind="hinge")
    step = torch.optim.Adam(loss.discriminator.parameters(), lr=1e-2)
    before = loss.discriminator_loss(restored, target).item()
    for _ in range(30):
        step.zero_grad()
        loss.discriminator_loss(restored, target).backward()
        step.step()
    learnt = loss.discriminator_loss(restored, target).item()
    assert learnt < 0.1 * before
    step = torch.optim.Adam([restored], lr=0.02)
    for _ in range(20):
        step.zero_grad()
        loss(restored, target).backward()
        step.step()
    assert loss.discriminator_loss(restored, target).item() > learnt + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_are_cast_to_the_discriminator(dtype):
    loss = AdversarialLoss(small(), kind="hinge", feature_matching=1.0)
    restored, target = (x.detach().to(dtype) for x in images(1, 3, 9, 9))
    assert loss(restored, target).dtype == torch.float32
    loss.double()
    assert loss(restored, target).dtype == torch.float64
    assert loss.discriminator_loss(restored, target).dtype == torch.float64


def test_autocast_keeps_the_objective_wide_and_the_power_iteration_finite():
    loss = AdversarialLoss(small(), kind="relativistic")
    restored, target = images(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generator, discriminator = loss(restored, target), loss.discriminator_loss(restored, target)
    for value in (generator, discriminator):
        assert value.dtype == torch.float32
        value.backward()
    assert all(p.grad.isfinite().all() for p in loss.discriminator.parameters())
    assert all(b.isfinite().all() and b.dtype == torch.float32 for b in loss.discriminator.buffers())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AdversarialLoss(small(), kind="wgan"),
            r"kind must be one of vanilla, hinge, lsgan, relativistic, got",
        ),
        (lambda: AdversarialLoss(small(), high_pass=-1), r"high_pass must be an integer of at least 0, got -1"),
        (lambda: AdversarialLoss(small(), feature_matching=-1), r"feature_matching must be at least 0 and finite, got"),
        (
            lambda: AdversarialLoss(nn.Conv2d(3, 1, 3), feature_matching=1),
            r"feature_matching needs a discriminator with features\(\), got Conv2d",
        ),
        (lambda: generator_objective(torch.ones(1), torch.ones(1), "wgan"), r"kind must be one of .*, got 'wgan'"),
        (lambda: discriminator_objective(torch.ones(1), torch.ones(1), "wgan"), r"kind must be one of .*, got 'wgan'"),
        (
            lambda: AdversarialLoss(small())(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 5)),
            r"two images \(B, C, H, W\)",
        ),
        (
            lambda: AdversarialLoss(small()).discriminator_loss(torch.ones(1, 3, 4, 4), torch.ones(3, 4, 4)),
            r"AdversarialLoss takes two images \(B, C, H, W\) of one shape",
        ),
        (lambda: UNetDiscriminator(0), r"in_channels must be an integer of at least 1, got 0"),
        (lambda: UNetDiscriminator(3, 0), r"width must be an integer of at least 1, got 0"),
        (lambda: small()(torch.rand(1, 1, 8, 8)), r"UNetDiscriminator takes \(B, C, H, W\) with C = 3 channels"),
    ],
)
def test_what_cannot_be_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The discriminator


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (8, 8), (17, 24)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_judged_whatever_the_size(size, channels):
    discriminator = small(channels)
    image = torch.rand(2, channels, *size).requires_grad_()
    logits = discriminator(image)
    assert logits.shape == (2, 1, *size)
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_weights_have_spectral_norm_1():
    discriminator = UNetDiscriminator(3, 8)
    for parameter in discriminator.parameters():
        parameter.data.mul_(7)
    for _ in range(200):  # each forward pass in training is a step of the power iteration
        discriminator(torch.rand(1, 3, 8, 8))
    normalized = [*discriminator.down, *discriminator.up, *discriminator.after]
    norms = [torch.linalg.matrix_norm(conv.weight.detach().flatten(1).double(), 2).item() for conv in normalized]
    assert len(norms) == 8
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_the_network_is_that_of_real_esrgan():
    """Written out: width 64 has the parameters of its ten convolutions, and the forward pass is this one."""
    shapes = [(64, 3, 3), (128, 64, 4), (256, 128, 4), (512, 256, 4), (256, 512, 3), (128, 256, 3), (64, 128, 3)]
    shapes += [(64, 64, 3), (64, 64, 3), (1, 64, 3)]
    with torch.device("meta"):
        full = UNetDiscriminator()
    assert sum(p.numel() for p in full.parameters()) == sum(o * i * k * k for o, i, k in shapes) + 64 + 1

    d = small().eval()
    f = nn.functional
    image = torch.rand(1, 3, 16, 24)
    x0 = f.leaky_relu(f.conv2d(image, d.first.weight, d.first.bias, 1, 1), 0.2)
    x1 = f.leaky_relu(f.conv2d(x0, d.down[0].weight, None, 2, 1), 0.2)
    x2 = f.leaky_relu(f.conv2d(x1, d.down[1].weight, None, 2, 1), 0.2)
    x3 = f.leaky_relu(f.conv2d(x2, d.down[2].weight, None, 2, 1), 0.2)
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    x4 = f.leaky_relu(f.conv2d(up(x3), d.up[0].weight, None, 1, 1), 0.2) + x2
    x5 = f.leaky_relu(f.conv2d(up(x4), d.up[1].weight, None, 1, 1), 0.2) + x1
    x6 = f.leaky_relu(f.conv2d(up(x5), d.up[2].weight, None, 1, 1), 0.2) + x0
    x7 = f.leaky_relu(f.conv2d(x6, d.after[0].weight, None, 1, 1), 0.2)
    x8 = f.leaky_relu(f.conv2d(x7, d.after[1].weight, None, 1, 1), 0.2)
    logits = f.conv2d(x8, d.last.weight, d.last.bias, 1, 1)
    for found, expected in zip(d.features(image), (x0, x1, x2, x3, x4, x5, x6, x7, x8, logits), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(d(image), logits)


def critic(scaler):
    """A critic on processes whose precision has this scaler."""
    precision = SimpleNamespace(precision=SimpleNamespace(scaler=scaler))
    fabric = SimpleNamespace(strategy=precision, device=torch.device("cpu"), world_size=1, autocast=nullcontext)
    torch.manual_seed(0)
    return Critic(WeightedLoss("gan(width=4)"), TrainingSettings(lr=1e-3, batch_size=1), fabric)


def learned(critic, steps, images):
    for step in range(steps):
        critic.begin(step)
        critic.look(images, images.flip(0), step)
        critic.step()
    return [parameter.detach().clone() for parameter in critic.parameters]


def test_scaled_gradients_teach_what_plain_ones_do_whatever_the_nets_scaler_does():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    nets = torch.amp.GradScaler("cpu", init_scale=2.0)
    plain, scaled = critic(None), critic(nets)
    assert plain.state_dict()["scaler"] == {}
    for expected, found in zip(learned(plain, 3, images), learned(scaled, 3, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    again = critic(nets)
    again.load_state_dict(scaled.state_dict())
    assert again.state_dict()["scaler"] == scaled.state_dict()["scaler"]
    before, scale = [parameter.detach().clone() for parameter in scaled.parameters], scaled.scaler.get_scale()
    scaled.begin(3)
    scaled.look(images, images.flip(0), 3)
    scaled.parameters[0].grad[0] = float("inf")
    scaled.step()
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters, strict=True))
    assert scaled.scaler.get_scale() == scale / 2
