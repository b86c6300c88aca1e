"""Training: settings, losses, schedule, the loop, and the run folder it writes."""

from utnetv2_fast.training.config import TrainingConfig, default_training
from utnetv2_fast.training.loop import train
from utnetv2_fast.training.run_folder import RunConfig, RunFolder

__all__ = ["RunConfig", "RunFolder", "TrainingConfig", "default_training", "train"]
