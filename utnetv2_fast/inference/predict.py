"""From a scan to its label map on the scan's own grid, with the networks of one run or the average of several."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from utnetv2_fast.data.dataset import Case
from utnetv2_fast.data.dicom import read_series, series_files
from utnetv2_fast.data.nifti import (
    Grid,
    Scan,
    label_to_native,
    read_remark,
    read_scan,
    scan_from_array,
    write_label,
)
from utnetv2_fast.data.plan import Plan
from utnetv2_fast.data.preprocess import Geometry, preprocess_image, restore_label
from utnetv2_fast.devices import autocast_dtype, resolve_device
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import digest
from utnetv2_fast.inference.sliding_window import Weighting, sliding_window
from utnetv2_fast.ops.self_check import check_kernels
from utnetv2_fast.progress import Track, silent
from utnetv2_fast.training.run_folder import RunFolder, Weights

# Windows share a batch up to this many voxels. A GPU wants much at once: sixteen slices of 256 x 256, or one volume of
# 128^3. A CPU is busy with one such slice, and larger tensors only leave its caches.
_VOXELS_PER_BATCH_ON_CPU = 2**16
_VOXELS_PER_BATCH_ON_GPU = 2**20

# Raise it when predictions become others than before: label maps written earlier are then no longer kept.
_FORMAT = 1


@dataclass(frozen=True)
class Predictor:
    """Segments scans as `plan` prepares them, in windows of the size the networks were trained on.

    `models` lie on `device`, in evaluation mode; the probabilities of several are averaged. They run under autocast to
    `autocast`, or in float32 when it is None. `batch_size` counts windows; None fits it to the window. With `mirror`
    the predictions for every combination of flips are averaged, which takes 4 (2D) or 8 (3D) times as long.
    `identity` is a digest of all that a label map depends on beside the scan, None where nobody knows.
    """

    models: Sequence[nn.Module]
    plan: Plan
    patch_size: tuple[int, ...]
    device: torch.device
    autocast: torch.dtype | None = None
    batch_size: int | None = None
    weighting: Weighting = "gaussian"
    mirror: bool = False
    identity: str | None = None

    def __post_init__(self) -> None:
        if not self.models or any(model.training for model in self.models):
            raise ValueError("models must be one or more networks in evaluation mode")

    @classmethod
    def load(
        cls,
        runs: Sequence[str | Path],
        *,
        weights: Weights = "last",
        device: str = "auto",
        batch_size: int | None = None,
        weighting: Weighting = "gaussian",
        mirror: bool = False,
    ) -> Predictor:
        """The predictor of a run folder, or of several (the folds of one dataset, say) as an ensemble.

        Runs under autocast where the device does it well, unless the run was trained in float32.
        Raises InputError for what is no run folder, runs of different plans or window sizes, and an absent device.
        """
        if not runs:
            raise InputError("No run to predict with; name a run folder that `train` wrote.")
        target = resolve_device(device)
        folders = [RunFolder(Path(run)) for run in runs]
        configs = [folder.config for folder in folders]
        first = configs[0]
        for folder, config in zip(folders, configs, strict=True):
            if (config.model.num_classes, config.model.in_channels) != (
                config.plan.num_classes,
                len(config.plan.channels),
            ):
                raise InputError(
                    f"{folder.config_file}: the network has other classes or channels than the plan; train anew."
                )
            if (config.plan, config.patch_size) != (first.plan, first.patch_size):
                raise InputError(
                    f"{folder.path}: its classes, channels, spacing or window differ from those of {folders[0].path}; "
                    "average only runs of one prepared dataset."
                )
        models = [folder.load_model(weights).to(target) for folder in folders]
        exact = any(config.training.precision == "float32" for config in configs)
        autocast = None if exact else autocast_dtype(target)
        members = sorted(
            (digest([folder.weights_file(weights)]), config.model.model_dump_json(exclude={"impl"}))
            for folder, config in zip(folders, configs, strict=True)
        )
        identity = json.dumps([_FORMAT, first.plan.model_dump(), first.patch_size, weighting, mirror, members])
        predictor = cls(
            models, first.plan, first.patch_size, target, autocast, batch_size, weighting, mirror, _hash(identity)
        )
        for model in models:
            if model.config.impl != "reference":
                check_kernels(model, predictor.window_shape, target, autocast)
        return predictor

    def __call__(self, scan: Scan) -> NDArray[np.uint8]:
        """The label map (Z, Y, X) of a scan, on its canonical grid."""
        return self.segment(*preprocess_image(scan, self.plan))

    def segment(self, image: NDArray[np.float32], geometry: Geometry) -> NDArray[np.uint8]:
        """What `preprocess_image` made of a scan -> its label map (Z, Y, X), on its canonical grid.

        Beside these two, memory for one slab is needed: the probabilities of as many planes as a window is deep.
        """
        return restore_label(self.probabilities(image), geometry, self.plan)

    def probabilities(self, image: NDArray[np.float32]) -> Iterator[Tensor]:
        """Preprocessed image (C, D, H, W) -> D planes of class probabilities (K, H, W) float32, for K classes.

        Each is valid until the next one is asked for. They lie on the predictor's device if it has room, else on the
        CPU.
        """
        in_slices = self.plan.dimensions == 2
        return sliding_window(
            [partial(self._logits, model) for model in self.models],
            torch.from_numpy(image).to(self._device_for_sums(image.shape)),
            (1, *self.patch_size) if in_slices else self.patch_size,
            weighting=self.weighting,
            batch_size=self.window_shape[0],
            mirror_axes=range(1 if in_slices else 0, 3) if self.mirror else (),
        )

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Of a batch of windows, (N, C, *window)."""
        return (self.batch_size or self._fitting_batch_size(), len(self.plan.channels), *self.patch_size)

    def _fitting_batch_size(self) -> int:
        voxels = _VOXELS_PER_BATCH_ON_CPU if self.device.type == "cpu" else _VOXELS_PER_BATCH_ON_GPU
        return max(1, voxels // math.prod(self.patch_size))

    def _logits(self, model: nn.Module, windows: Tensor) -> Tensor:
        """(N, C, *window) on any device -> (N, K, *window) on the predictor's; the windows of a 2D network are flat."""
        in_slices = self.plan.dimensions == 2
        windows = windows.to(self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits: Tensor = model(windows.squeeze(2) if in_slices else windows)
        return logits.unsqueeze(2) if in_slices else logits

    def _device_for_sums(self, shape: tuple[int, ...]) -> torch.device:
        """The GPU if its free memory is at least twice what the image (C, D, H, W) and one slab of scores take."""
        if self.device.type == "cuda":
            _, depth, height, width = shape
            window_depth = 1 if self.plan.dimensions == 2 else min(depth, self.patch_size[0])
            free, _ = torch.cuda.mem_get_info(self.device)
            if 2 * 4 * (math.prod(shape) + self.plan.num_classes * window_depth * height * width) > free:
                return torch.device("cpu")
        return self.device


def predict_files(
    predictor: Predictor, cases: Sequence[Case], folder: Path, track: Track = silent, *, overwrite: bool = False
) -> tuple[list[Path], list[Path]]:
    """Write the label map of every case to `folder/CASE.nii.gz`, on the scan's own grid: those written, those kept.

    Each appears under its name when it is complete. One that is there already is kept if it was made from the same
    scan by the same weights in the same way: its header holds a digest of them. So a prediction that was stopped goes
    on where it was when called again. With `overwrite` all are made anew.

    Raises InputError, before anything is predicted, when a file would replace an input, or (without `overwrite`) a
    file that was made otherwise. A scan that cannot be read does not stop the others: InputError names all of those at
    the end.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, where the label maps need a folder; name another.")
    targets = {case.name: folder / f"{case.name}.nii.gz" for case in cases}
    inputs = {file.resolve() for case in cases for file in case.images}
    for target in targets.values():
        if target.resolve() in inputs:
            raise InputError(f"{target}: the prediction would replace a scan; write to another folder.")
    existing = [] if overwrite else [case for case in cases if targets[case.name].exists()]
    kept: list[Path] = []
    for case in track(existing, "Checking"):
        target = targets[case.name]
        if (remark := _remark(predictor, case)) is None or read_remark(target) != remark:
            raise InputError(
                f"{target}: exists already, and not as these weights would make it of this scan; write to another "
                "folder, or replace it with --overwrite."
            )
        kept.append(target)
    written, problems = [], []
    for case in track([case for case in cases if targets[case.name] not in kept], "Predicting"):
        try:
            image, geometry, grid = read_and_preprocess(case, predictor.plan)
        except InputError as problem:
            problems.append(str(problem))
            continue
        write_label(targets[case.name], predictor.segment(image, geometry), grid, _remark(predictor, case))
        written.append(targets[case.name])
    if problems:
        done = f"{len(problems)} of {len(cases)} scans could not be predicted, the others are in {folder}: "
        raise InputError((done if written or kept else "") + " ".join(problems))
    return written, kept


def read_and_preprocess(case: Case, plan: Plan) -> tuple[NDArray[np.float32], Geometry, Grid]:
    """The network's input, and what leads back; the scan itself is not held any longer."""
    scan = _read(case.images, plan)
    return *preprocess_image(scan, plan), scan.grid


def _read(images: Sequence[Path], plan: Plan) -> Scan:
    """NIfTI files, or the folder of a DICOM series."""
    if len(images) == 1 and len(plan.channels) == 1 and images[0].is_dir():
        return read_series(images[0])
    return read_scan(images, len(plan.channels))


def _remark(predictor: Predictor, case: Case) -> str | None:
    """What the header of the case's label map says about its making."""
    if predictor.identity is None:
        return None
    files = [part for image in case.images for part in (series_files(image) if image.is_dir() else [image])]
    return f"utnetv2-fast {_hash(predictor.identity + digest(files))}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def predict(
    run: str | Path | Sequence[str | Path],
    image: str | Path | Sequence[str | Path] | NDArray[np.generic],
    affine: NDArray[np.floating] | None = None,
    *,
    weights: Weights = "last",
    device: str = "auto",
    weighting: Weighting = "gaussian",
    mirror: bool = False,
) -> NDArray[np.uint8]:
    """Segment one scan: its label map uint8, voxel for voxel on the image's own grid and in its own orientation.

    Args:
        run: a run folder, or several, whose probabilities are averaged.
        image: a NIfTI file, one file per channel, the folder of a DICOM series, or an array (X, Y, Z) or (C, X, Y, Z)
            as nibabel loads it.
        affine: (4, 4), voxel to world in mm; needed with an array, absent with files.
        weights: the network at the end of training, or where it scored best on its validation fold.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        weighting: how overlapping windows are averaged.
        mirror: average over all flips too.

    Raises InputError for an image or a run that cannot be used. For many scans load a `Predictor` once.
    """
    if isinstance(image, np.ndarray) == (affine is None):
        raise TypeError("predict needs an affine with an array, and none with files")
    runs = [run] if isinstance(run, str | Path) else run
    predictor = Predictor.load(runs, weights=weights, device=device, weighting=weighting, mirror=mirror)
    channels = predictor.plan.channels
    if isinstance(image, np.ndarray):
        assert affine is not None
        scan = scan_from_array(image, affine)
        if len(scan.image) != len(channels):
            raise InputError(
                f"The image has {len(scan.image)} channels, but the run was trained on {', '.join(channels)}; "
                "give those."
            )
    else:
        files = [image] if isinstance(image, str | Path) else image
        scan = _read([Path(file) for file in files], predictor.plan)
    return label_to_native(predictor(scan), scan.grid)
