"""Training: settings, recipes, losses, schedule, the loop, and the run folder it writes."""

from utnetv2_fast.training.config import EvaluationConfig, TrainingConfig
from utnetv2_fast.training.loop import train
from utnetv2_fast.training.recipe import Recipe, default_training, load_recipe
from utnetv2_fast.training.run_folder import RunConfig, RunFolder

__all__ = [
    "EvaluationConfig",
    "Recipe",
    "RunConfig",
    "RunFolder",
    "TrainingConfig",
    "default_training",
    "load_recipe",
    "train",
]
