"""Training and measuring nets: degradations, samples, losses, the loop, presets and validation.

Nothing here loads Lightning or TensorBoard before a run begins.
"""

from .adversarial import AdversarialLoss
from .data import ImageFolder, TrainingSamples
from .degradations import Degraded, Recipe, degrade, find_recipe, list_recipes, register_recipe
from .discriminators import UNetDiscriminator
from .estimator import evaluate_estimator, train_estimator
from .evaluation import Evaluation
from .frequency_losses import FFTLoss, FocalFrequencyLoss, LaplacianLoss
from .inception import Inception
from .interruption import TrainingInterrupted
from .loop import TrainingStopped, train
from .losses import LossTerm, WeightedLoss
from .perceptual import LPIPSLoss, VGGLoss
from .pixel_losses import CharbonnierLoss, L1Loss, L2Loss, PSNRLoss, SSIMLoss
from .presets import Preset, find_preset, preset_names
from .run_files import read_state
from .settings import TrainingSettings
from .supervision import degradation_targets, supervise
from .validation import evaluate

__all__ = [
    "AdversarialLoss",
    "CharbonnierLoss",
    "Degraded",
    "Evaluation",
    "FFTLoss",
    "FocalFrequencyLoss",
    "ImageFolder",
    "Inception",
    "L1Loss",
    "L2Loss",
    "LPIPSLoss",
    "LaplacianLoss",
    "LossTerm",
    "PSNRLoss",
    "Preset",
    "Recipe",
    "SSIMLoss",
    "TrainingInterrupted",
    "TrainingSamples",
    "TrainingSettings",
    "TrainingStopped",
    "UNetDiscriminator",
    "VGGLoss",
    "WeightedLoss",
    "degradation_targets",
    "degrade",
    "evaluate",
    "evaluate_estimator",
    "find_preset",
    "find_recipe",
    "list_recipes",
    "preset_names",
    "read_state",
    "register_recipe",
    "supervise",
    "train",
    "train_estimator",
]
