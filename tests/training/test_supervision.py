"""Estimates in training: what was drawn is the target, a run makes it a loss, and an estimator alone learns."""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from claritycore.blocks import DegradationEstimate, DegradationEstimator, FiLM, KernelPrior
from claritycore.cli import main
from claritycore.nets import (
    AutoConfig,
    AutoModel,
    Aux,
    BaseConfig,
    RestorationNet,
    RestorationOutput,
    load_estimator,
    register_config,
    save_estimator,
)
from claritycore.training import (
    ImageFolder,
    Recipe,
    degradation_targets,
    degrade,
    evaluate_estimator,
    supervise,
    train,
    train_estimator,
)
from claritycore.training.blur_kernels import gaussian_kernels
from claritycore.training.blur_stage import Blur
from claritycore.training.data import mixed
from claritycore.training.stages import Downsample, Noise
from claritycore.training.supervision import estimate_losses, kernel_loss, structure_target

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

SEEDS = list(range(40))


def drawn(recipe, scale=1):
    return degrade(torch.full((len(SEEDS), 3, 16, 16), 0.5), recipe, SEEDS, scale=scale).report


def test_targets_are_what_was_drawn():
    report = drawn("joint")
    targets = degradation_targets(report)
    torch.testing.assert_close(targets.noise, report["noise_sigma"])
    assert not targets.noise[~report["noise"]].any()
    torch.testing.assert_close(targets.quality[report["jpeg"]], report["jpeg_quality"][report["jpeg"]] / 100)
    assert (targets.quality[~report["jpeg"]] == 1).all()
    assert not targets.blur[~report["blur"]].any()
    small = report["blur"] & (report["blur_sigma_x"] > 0.6)  # below, pixels are too coarse for the kernel
    torch.testing.assert_close(targets.blur[small], report["blur_sigma_x"][small], rtol=0.03, atol=0)
    torch.testing.assert_close(degradation_targets(drawn("joint", 2), scale=2).blur, targets.blur / 2)


def test_blur_is_the_mean_variance_of_both_axes():
    kernel = gaussian_kernels(31, torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([0.4])).float()
    targets = degradation_targets({"order": torch.zeros(1, 1), "blur_kernel": kernel})
    assert targets.blur.item() == pytest.approx(math.sqrt((1 + 9) / 2), rel=0.01)


def test_what_the_report_does_not_tell_is_unknown():
    poisson = Recipe("counts", (Downsample(), Noise(sigma=(0.1, 0.1), poisson=0.5)))
    report = drawn(poisson)
    targets = degradation_targets(report)
    counted = report["noise_poisson"] > 0
    assert counted.any()
    assert torch.equal(targets.noise.isnan(), counted)
    assert targets.blur.isnan().all()
    assert targets.quality.isnan().all()
    with pytest.raises(ValueError, match="recipe must have a stage named noise, blur or jpeg, its report has order"):
        degradation_targets(drawn("clean"))


def test_losses_are_means_over_what_is_known():
    estimate = DegradationEstimate(*torch.tensor([[0.1, 0.3], [1.0, 2.0], [0.5, 0.5]]).requires_grad_())
    targets = DegradationEstimate(torch.tensor([0.0, math.nan]), torch.full((2,), math.nan), torch.tensor([1.0, 0.5]))
    losses = estimate_losses(estimate, targets)
    assert {name: pytest.approx(loss.item(), abs=1e-6) for name, loss in losses.items()} == {
        "noise": 1.0,
        "blur": 0.0,
        "quality": 0.25,
    }
    gradients = torch.autograd.grad(sum(losses.values()), estimate)
    assert [gradient.tolist() for gradient in gradients[:2]] == [[pytest.approx(10), 0], [0, 0]]


def test_kernels_are_compared_where_both_are():
    kernels, targets = torch.rand(2, 7, 7), torch.rand(2, 5, 5)
    padded = torch.zeros(2, 7, 7)
    padded[:, 1:6, 1:6] = targets
    assert kernel_loss(kernels, targets).item() == pytest.approx((kernels - padded).abs().sum().item() / 2, rel=1e-5)
    with pytest.raises(ValueError, match="kernel_size of the prior must be at least that of the recipe, 7, got 5"):
        kernel_loss(targets, kernels)


def test_pairs_have_no_target_and_leave_a_gradient_of_zero():
    values = torch.rand(3, 2, requires_grad=True)
    aux = Aux(degradation=DegradationEstimate(*values), kernels=values[:, :, None])
    supervise(aux, None)
    assert {name: loss.item() for name, loss in aux.losses.items()} == {
        "degradation.noise": 0,
        "degradation.blur": 0,
        "degradation.quality": 0,
        "degradation.kernel": 0,
    }
    aux.total().backward()
    assert not values.grad.any()


@pytest.mark.parametrize(("scale", "size"), [(1, (8, 12)), (1, (5, 7)), (2, (6, 10)), (4, (4, 4))])
def test_structure_is_held_against_the_means_of_the_clean_image(scale, size):
    clean = torch.rand(2, 3, *(scale * side for side in size))
    half = [(side + 1) // 2 for side in size]
    structure = torch.rand(2, 3, *half, requires_grad=True)
    aux = Aux(structure=structure)
    supervise(aux, None, scale=scale)
    assert aux.losses == {}
    supervise(aux, None, scale=scale, weight=0.5, clean=clean)
    inside = [side // 2 for side in size]  # cells that the clean image fills
    cell = 2 * scale
    means = clean[..., : cell * inside[0], : cell * inside[1]].unfold(2, cell, cell).unfold(3, cell, cell).mean((4, 5))
    target = structure_target(clean, scale=scale)
    torch.testing.assert_close(target[..., : inside[0], : inside[1]], means)
    torch.testing.assert_close(aux.losses["structure"], 0.5 * (structure - target).abs().mean())
    aux.total().backward()
    assert structure.grad.all()


class Conditioned(RestorationNet):
    """A convolution that is told of noise, blur and quality, and of the blur around."""

    def __init__(self, config):
        super().__init__(config)
        self.scale, self.in_channels = 1, 3
        self.tile_safe, self.receptive_radius, self.tile_multiple = False, 0, 1
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.estimator, self.prior = DegradationEstimator(widths=(4, 6), hidden=8), KernelPrior(8, kernel_size=13)
        self.film, self.deblur = FiLM(8, 3), FiLM(8, 8)

    def forward(self, image, *, return_aux=False):
        estimate, x = self.estimator(image), self.stem(image)
        code = self.prior(x)
        restored = image + self.last(self.deblur(self.film(x, estimate.condition()), code))
        aux = Aux(degradation=estimate, kernels=self.prior.reconstruct(code))
        return RestorationOutput(restored, aux) if return_aux else restored


@pytest.fixture
def conditioned():
    @register_config("conditioned")
    @dataclass(frozen=True)
    class ConditionedConfig(BaseConfig):
        scale: int = 1

        def build(self):
            return Conditioned(self)

    return ConditionedConfig()


def test_a_run_supervises_both_through_aux(make_settings, conditioned):
    folder = train(conditioned, make_settings(name="joint", steps=3, recipe="joint", loss="l1", log_every=1))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    with_loss = [line for line in lines if "loss" in line]
    assert len(with_loss) == 3
    for line in with_loss:
        estimates = [line[f"degradation.{name}"] for name in ("noise", "blur", "quality", "kernel")]
        assert all(value > 0 for value in estimates)
        assert line["loss"] == pytest.approx(line["l1"] + sum(estimates), rel=1e-4)


def test_every_parameter_of_such_a_net_has_a_gradient(conditioned):
    net = AutoModel.from_config(conditioned)
    with torch.no_grad():  # off their zeros
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    degraded, report = degrade(torch.rand(2, 3, 16, 16), "joint", [0, 1])
    output = net(degraded, return_aux=True)
    supervise(output.aux, report)
    (output.image.square().mean() + output.aux.total()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_a_kernel_prior_learns_the_kernel():
    torch.manual_seed(0)
    prior = KernelPrior(3, cell=8, kernel_size=13)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    noise, losses = torch.rand(16, 3, 32, 32), []
    for _ in range(60):
        degraded, report = degrade(noise, Recipe("soft", (Blur(sigma=(0.3, 2.0), sizes=(13,)),)), range(16))
        aux = Aux(kernels=prior.reconstruct(prior(degraded - 0.5)))
        supervise(aux, report)
        optimizer.zero_grad()
        aux.total().backward()
        optimizer.step()
        losses.append(aux.total().item())
    assert losses[-1] < 0.5 * losses[0]


def test_an_estimator_learns_the_noise_and_repeats_to_the_bit(photos):
    recipe = Recipe("noisy", (Downsample(), Noise(sigma=(0.0, 0.2))))
    images, found = ImageFolder(photos), []
    for _ in range(2):
        torch.manual_seed(0)
        estimator = DegradationEstimator(widths=(6, 8), hidden=8)
        before = evaluate_estimator(estimator, images, recipe=recipe, draws=4)
        losses = []
        follow = lambda step, loss, losses=losses: losses.append((step, loss))  # noqa: E731
        train_estimator(
            estimator, images, recipe=recipe, steps=120, batch_size=4, patch_size=32, lr=1e-2, follow=follow
        )
        assert [step for step, _ in losses] == list(range(1, 121))
        after = evaluate_estimator(estimator, images, recipe=recipe, draws=4)
        assert after.keys() == {"noise"}
        assert after["noise"] < 0.5 * before["noise"]
        found.append(losses)
    assert found[0] == found[1]


def test_steps_shrink_to_nothing(photos):
    estimator = DegradationEstimator(widths=(4,), hidden=4)
    states = [torch.cat([p.detach().flatten() for p in estimator.parameters()])]
    follow = lambda step, loss: states.append(torch.cat([p.detach().flatten() for p in estimator.parameters()]))  # noqa: E731
    train_estimator(estimator, ImageFolder(photos), steps=20, batch_size=2, patch_size=16, follow=follow)
    moved = [(after - before).abs().max().item() for before, after in itertools.pairwise(states)]
    assert moved[0] == pytest.approx(2e-3, rel=0.01)
    assert 0 < moved[-1] < 0.1 * moved[0]


def test_errors_are_means_over_images_and_draws(photos):
    images = ImageFolder(photos)
    constant = DegradationEstimate(*torch.tensor([[0.05], [1.0], [0.7]]))
    errors = []
    for number, draw in itertools.product(range(len(images)), range(3)):
        clean = images[number][None] / 255
        targets = degradation_targets(degrade(clean, "joint", [mixed(4, 6, number, draw)]).report)
        errors.append([abs(a.item() - b.item()) for a, b in zip(constant, targets, strict=True)])
    found = evaluate_estimator(lambda image: constant, images, draws=3, seed=4)
    assert list(found.values()) == pytest.approx(np.mean(errors, 0).tolist(), rel=1e-5)


def test_losses_of_a_net_are_weighted():
    kernels = torch.full((1, 3, 3), 1 / 9)
    middle = torch.zeros(1, 3, 3)
    middle[:, 1, 1] = 1
    aux = Aux(kernels=kernels)
    supervise(aux, {"order": torch.zeros(1, 1), "blur_kernel": middle}, weight=0.3)
    assert aux.losses["degradation.kernel"].item() == pytest.approx(0.3 * 16 / 9)


def test_an_estimator_is_trained_from_the_command_line_and_loaded(photos, tmp_path, capsys):
    path = tmp_path / "deep" / "estimator.safetensors"
    call = ["train-estimator", "--data", str(photos), "--output", str(path), "--steps", "3", "--batch-size", "2"]
    call += ["--patch-size", "16", "--device", "cpu"]
    assert main([*call, "--validation", str(photos), "--draws", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 3: loss ")
    assert printed[1].startswith("mean errors: noise 0.")
    assert printed[2] == str(path)
    torch.manual_seed(0)
    again = train_estimator(DegradationEstimator(), ImageFolder(photos), steps=3, batch_size=2, patch_size=16).eval()
    image = torch.rand(1, 3, 20, 24)
    assert all(map(torch.equal, load_estimator(path)(image), again(image)))
    for arguments, message in {
        (): f"{path} exists: give --overwrite to replace it, or another name",
        ("--output", "estimator.pth"): "output must end in .safetensors, got estimator.pth",
        (
            "--overwrite",
            "--recipe",
            "clean",
        ): "recipe must have a stage named noise, blur or jpeg, clean has downsample",
        ("--overwrite", "--recipe", "jont"): "there is no recipe 'jont'; did you mean joint?",
        ("--overwrite", "--steps", "0"): "steps must be an integer of at least 1, got 0",
        ("--overwrite", "--patch-size", "64"): "patch_size must be at most that of the images, 56 x 48 for ",
    }.items():
        assert main([*call, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_estimators_of_any_size_are_saved_and_other_files_refused(tmp_path):
    estimator = DegradationEstimator(1, widths=(4, 6), hidden=5)
    loaded = load_estimator(save_estimator(estimator, tmp_path / "small.safetensors"))
    assert not loaded.training
    assert repr(loaded) == repr(estimator)
    image = torch.rand(2, 1, 9, 7)
    assert all(map(torch.equal, loaded(image), estimator(image)))
    net = AutoModel.from_config(AutoConfig.from_name("rrdbnet", num_feat=4, num_block=1))
    path = net.save_pretrained(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"net\.safetensors must be a file of save_estimator, it is one of rrdbnet"):
        load_estimator(path)
    with pytest.raises(ValueError, match=r"small\.safetensors describes a net that cannot be made: there is no net"):
        AutoModel.from_pretrained(tmp_path / "small.safetensors")


def test_a_step_that_gives_nan_is_not_taken(photos):
    estimator = DegradationEstimator(widths=(4,), hidden=4)
    torch.nn.init.constant_(estimator.head.bias, math.nan)
    before = estimator.hidden.weight.clone()
    with pytest.raises(RuntimeError, match=r"step 1 gave NaN or infinity: try a lower lr than 0\.002"):
        train_estimator(estimator, ImageFolder(photos), steps=2, batch_size=2, patch_size=16)
    assert torch.equal(estimator.hidden.weight, before)


def test_bad_arguments_raise(photos):
    estimator, images = DegradationEstimator(widths=(4,)), ImageFolder(photos)
    for name in ("steps", "batch_size", "patch_size"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            train_estimator(estimator, images, **{name: 0})
    for lr in (0, math.inf):
        with pytest.raises(ValueError, match=f"lr must be positive and finite, got {lr}"):
            train_estimator(estimator, images, lr=lr)
    with pytest.raises(ValueError, match=r"patch_size must be at most that of the images, 56 x 48 for .*png, got 128"):
        train_estimator(estimator, images)
    with pytest.raises(ValueError, match="recipe must have a stage named noise, blur or jpeg, clean has downsample"):
        evaluate_estimator(estimator, images, recipe="clean")
    with pytest.raises(ValueError, match="draws must be an integer of at least 1, got 0"):
        evaluate_estimator(estimator, images, draws=0)
    with pytest.raises(ValueError, match="recipe must have a stage named noise, blur or jpeg"):
        train_estimator(estimator, images, recipe="clean", steps=1, batch_size=1, patch_size=16)


@pytest.mark.parametrize("recipe", ["clean", "camera", "real-esrgan"])
def test_recipes_without_the_stages_of_an_estimate_teach_nothing_and_stop_nothing(recipe):
    said = torch.full((2,), 0.3, requires_grad=True)
    aux = Aux(degradation=DegradationEstimate(said, said, said))
    supervise(aux, degrade(torch.rand(2, 3, 32, 32), recipe, [0, 1]).report)
    total = sum(aux.losses.values())
    assert total.item() == 0
    total.backward()
    assert said.grad.tolist() == [0, 0]
