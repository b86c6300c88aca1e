"""How a network is trained: the settings of a run, and what they are for each preset where nobody says otherwise."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt


class TrainingConfig(BaseModel):
    """Settings of one training. Unknown fields are refused.

    The optimiser is AdamW as in the paper, with the weight decay and eps of the authors' code.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: PositiveInt
    steps_per_epoch: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Literal["polynomial", "exponential"] = "polynomial"
    warmup_epochs: NonNegativeFloat = Field(default=1.0, description="but at most a tenth of a short training")
    weight_decay: NonNegativeFloat = 0.05
    clip_norm: PositiveFloat = Field(default=12.0, description="largest norm of all gradients together (nnU-Net: 12)")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="of the averaged weights, which are the ones kept")
    background_weight: PositiveFloat = Field(default=0.5, description="of class 0 in the cross-entropy; others have 1")
    auxiliary_weight: float = Field(default=0.5, ge=0, lt=1, description="share of the auxiliary output in the loss")
    foreground_fraction: float = Field(default=1 / 3, ge=0, le=1, description="share of patches forced to foreground")
    augmentation: Literal["none", "paper", "nnunet", "nnunet-no-mirroring"] = "nnunet"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = Field(default=False, description="torch.compile the network's training steps")
    checkpoint_minutes: NonNegativeFloat = Field(
        default=10.0,
        description="between checkpoints within an epoch; each epoch ends with one (0: one after each step)",
    )
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return round(min(self.warmup_epochs, self.epochs / 10) * self.steps_per_epoch)


# The paper's lengths and batches, the learning rates of the authors' code; the small ones suit two CPU cores.
_RECIPES: dict[str, dict[str, float]] = {
    "acdc-2d": {"epochs": 200, "steps_per_epoch": 50, "batch_size": 32, "learning_rate": 5e-4, "warmup_epochs": 5},
    "acdc-3d": {"epochs": 200, "steps_per_epoch": 200, "batch_size": 3, "learning_rate": 1e-3, "warmup_epochs": 5},
    "bcv-3d": {"epochs": 150, "steps_per_epoch": 300, "batch_size": 3, "learning_rate": 6e-4, "warmup_epochs": 5},
    "lits-3d": {"epochs": 200, "steps_per_epoch": 500, "batch_size": 2, "learning_rate": 4e-4, "warmup_epochs": 5},
    "cardiac-2d": {"epochs": 150, "steps_per_epoch": 250, "batch_size": 32, "learning_rate": 5e-4, "warmup_epochs": 5},
    "tiny-2d": {"epochs": 12, "steps_per_epoch": 40, "batch_size": 8, "learning_rate": 3e-3},
    "tiny-3d": {"epochs": 30, "steps_per_epoch": 100, "batch_size": 2, "learning_rate": 2e-3},
}


def default_training(preset: str) -> TrainingConfig:
    """The settings for `preset` where nobody says otherwise; a `-medformer` twin has those of the paper's network."""
    return TrainingConfig.model_validate(_RECIPES[preset.removesuffix("-medformer")])
