"""Train a `DegradationEstimator` and hold it against formulas: `python examples/train_estimator.py TRAIN VALIDATION`.

For the estimator alone there is `claritycore train-estimator`. Its 3000 steps take about ten minutes of one core.
The formulas are those that the estimator gets as its fixed features. For a fair comparison their numbers are fitted to
the degradations of the training images by least squares: noise, blur and JPEG quality as sums of all of them, of their
logarithms and a constant.
"""

import argparse
import time

import torch

from claritycore.blocks import DegradationEstimate, DegradationEstimator
from claritycore.blocks.degradation_features import fixed_features
from claritycore.nets import save_estimator
from claritycore.training import ImageFolder, TrainingSamples, degrade, evaluate_estimator, train_estimator
from claritycore.training.supervision import degradation_targets


def formulas(image: torch.Tensor) -> torch.Tensor:
    logarithms = fixed_features(image)
    return torch.cat([logarithms, logarithms.exp(), torch.ones_like(logarithms[:, :1])], dim=1)


def fitted_formulas(images: ImageFolder, recipe: str, patch_size: int, crops: int = 2000):
    """Fit the formulas to crops by least squares."""
    samples = TrainingSamples(images, patch_size=patch_size, seed=1)
    features, targets = [], []
    for sample in map(samples.__getitem__, range(crops)):
        image, report = degrade(sample.clean[None], recipe, [sample.seed])
        features.append(formulas(image))
        targets.append(torch.stack(degradation_targets(report), dim=1))
    weights = torch.linalg.lstsq(torch.cat(features).double(), torch.cat(targets).double()).solution.float()
    return lambda image: DegradationEstimate(*(formulas(image) @ weights).unbind(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="folder of clean images")
    parser.add_argument("validation", help="folder of clean images")
    parser.add_argument("--recipe", default="joint")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--patch-size", type=int, default=128)
    parser.add_argument("--output", default="estimator.safetensors")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, validation = ImageFolder(options.train), ImageFolder(options.validation)
    start, losses = time.perf_counter(), []

    def follow(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}, {seconds:.0f} s: loss {sum(losses[-100:]) / 100:.4f}", flush=True)

    estimator = DegradationEstimator()
    sizes = {"batch_size": options.batch_size, "patch_size": options.patch_size}
    train_estimator(estimator, train, recipe=options.recipe, steps=options.steps, follow=follow, **sizes)
    save_estimator(estimator, options.output)
    formula = fitted_formulas(train, options.recipe, options.patch_size)
    for name, judged in {"formulas": formula, "estimator": estimator}.items():
        errors = evaluate_estimator(judged, validation, recipe=options.recipe, draws=5)
        print(name, {key: round(value, 4) for key, value in errors.items()})


if __name__ == "__main__":
    main()
