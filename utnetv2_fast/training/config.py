"""How a network is trained and its run is scored: plain settings, whatever protocol they came from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from utnetv2_fast.data.augment import AugmentationProfile


class TrainingConfig(BaseModel):
    """Settings of one training. Unknown fields are refused.

    The optimiser is AdamW as in the paper, with the weight decay and eps of the authors' code.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: PositiveInt
    steps_per_epoch: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Literal["polynomial", "exponential", "epochwise"] = "polynomial"
    warmup_epochs: NonNegativeFloat = Field(default=1.0, description="but at most a tenth of a short training")
    weight_decay: NonNegativeFloat = 0.05
    clip_norm: PositiveFloat | None = Field(
        default=12.0, description="largest norm of all gradients together (nnU-Net: 12; null: any)"
    )
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="of the averaged weights, which are the ones kept")
    norm_statistics: Literal["refitted", "latest"] = Field(
        default="refitted", description="of batch norms under averaged weights; latest: those of the latest weights"
    )
    dice: Literal["soft", "adaptive"] = Field(default="soft", description="the overlap term of the loss")
    class_weights: tuple[PositiveFloat, ...] = Field(
        default=(0.5, 1.0), min_length=1, description="in the cross-entropy; the last one holds for all further classes"
    )
    auxiliary_weight: float = Field(default=0.5, ge=0, lt=1, description="share of the auxiliary output in the loss")
    foreground_fraction: float = Field(default=1 / 3, ge=0, le=1, description="share of patches forced to foreground")
    augmentation: Literal["none", "paper", "nnunet", "nnunet-no-mirroring"] | AugmentationProfile = "nnunet"
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


class EvaluationConfig(BaseModel):
    """How the held-out scans of a run are predicted and scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["last", "best"] = Field(default="last", description="best: chosen on the held-out scans, a leak")
    weighting: Literal["gaussian", "uniform"] = Field(default="gaussian", description="of overlapping windows")
    grid: Literal["native", "resampled"] = Field(
        default="native", description="resampled: the network's own grid, on which the reference is resampled, a leak"
    )
    missing_class: Literal["diagonal", "500mm"] = Field(
        default="diagonal", description="the scores of a class that one of the two label maps lacks"
    )
