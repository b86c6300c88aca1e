"""What an experiment chooses by looking at the data."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from utnetv2_fast.data.dataset import Case, Dataset
from utnetv2_fast.experiment import suggest_preset


def test_slices_are_thick_whichever_way_they_lie(tmp_path: Path, short_axis_affines: list[NDArray[np.float64]]) -> None:
    for thickness, expected in ((1.0, "tiny-2d"), (0.2, "tiny-3d")):
        cases = []
        for number, affine in enumerate(short_axis_affines):
            file = tmp_path / f"{expected}{number}.nii.gz"
            nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), affine * [1, 1, thickness, 1]), file)
            cases.append(Case(file.name, (file,), None, file.name))
        dataset = Dataset(tmp_path, "hearts", ("MRI",), {"background": 0, "LV": 1}, tuple(cases))
        assert suggest_preset(dataset, torch.device("cpu")) == expected
