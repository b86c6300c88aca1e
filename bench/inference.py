"""Predicting a large CT: time and peak memory of the whole way, and of the export beside skimage's (nnU-Net's)."""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.measure import in_a_process, largest_size, machine, table
from utnetv2_fast.data.dataset import list_scans
from utnetv2_fast.data.fingerprint import IntensityStatistics
from utnetv2_fast.data.plan import Plan
from utnetv2_fast.data.preprocess import Geometry, restore_label, target_shape
from utnetv2_fast.inference.predict import Predictor, predict_files
from utnetv2_fast.memory import keep_freed_memory

GIB = 2**30
SPACING = (1.0, 0.8, 0.8)  # mm, (z, y, x) of the scan
PLANNED = (1.2, 0.9, 0.9)  # mm, of the network's grid: no axis is left alone
STATISTICS = IntensityStatistics(
    mean=80, std=130, median=90, minimum=-900, maximum=1500, percentile_00_5=-700, percentile_99_5=900
)
# Where two classes are equal to rounding they may be told apart differently.
TOLERATED = 1e-4


class Bands(nn.Module):
    """A network that takes next to no time: class k where the intensity is nearest to its centre."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, classes).view(1, -1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.centres).square_().mul_(-8)


def make_plan(classes: int) -> Plan:
    return Plan(
        dataset="synthetic CT",
        dimensions=3,
        labels={"background": 0} | {f"organ {index}": index for index in range(1, classes)},
        channels=("CT",),
        axes=(0, 1, 2),
        spacing=PLANNED,
        median_shape=(128, 128, 128),
        normalisation=("ct",),
        intensities=(STATISTICS,),
    )


def write_scan(file: str, size: tuple[int, int, int]) -> None:
    """An int16 CT of `size` (x, y, z): smooth structures with noise, which compresses as scans do."""
    rng = np.random.default_rng(0)
    x, y, z = (np.sin(np.arange(n)[:, None] * rng.uniform(0.01, 0.06, 3) + rng.uniform(0, 6, 3)) for n in size)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(size)
    header.set_sform(np.diag([*SPACING[::-1], 1]), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(header.binaryblock + bytes(4))
        for index in range(size[2]):
            plane = (x * z[index]) @ y.T * 300 + rng.normal(60, 15, size[:2])
            stream.write(plane.astype(np.int16).tobytes(order="F"))


def predict(scan: str, folder: str, classes: int, window: tuple[int, int, int]) -> dict[str, float]:
    """The way that `utnetv2-fast predict` takes, from file to file, with a network that takes next to no time."""
    keep_freed_memory()
    predictor = Predictor([Bands(classes).eval()], make_plan(classes), window, torch.device("cpu"))
    before = largest_size()
    started = time.perf_counter()
    predict_files(predictor, list_scans([Path(scan)], 1), Path(folder), overwrite=True)
    return {"seconds": time.perf_counter() - started, "peak": largest_size(), "before": before}


class Scores:
    """Logits of ellipsoid organs on the network's grid, (K, D, H, W) float32, computed plane by plane or by class."""

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        rng = np.random.default_rng(1)
        self.along = np.zeros((classes, shape[0]), dtype=np.float32)
        self.in_plane = np.zeros((classes, *shape[1:]), dtype=np.float32)  # background: 0
        for index in range(1, classes):
            d, h, w = (
                ((np.arange(n) / n - rng.uniform(0.2, 0.8)) / rng.uniform(0.05, 0.25)).astype(np.float32) ** 2
                for n in shape
            )
            self.along[index] = 8 - 8 * d
            self.in_plane[index] = -8 * np.add.outer(h, w)

    def planes(self) -> Iterator[Tensor]:
        in_plane = torch.from_numpy(self.in_plane)
        for values in torch.from_numpy(self.along.T.copy()):
            yield in_plane + values[:, None, None]

    def volume(self, index: int) -> NDArray[np.float32]:
        return np.add.outer(self.along[index], self.in_plane[index])


def _geometry(size: tuple[int, int, int]) -> Geometry:
    x, y, z = size
    return Geometry(scan_shape=(z, y, x), axes=(0, 1, 2), crop=((0, z), (0, y), (0, x)), cropped_spacing=SPACING)


def export(file: str, size: tuple[int, int, int], classes: int) -> dict[str, float]:
    """Scores -> label map, as this package does it."""
    keep_freed_memory()
    plan, geometry = make_plan(classes), _geometry(size)
    scores = Scores(classes, target_shape(geometry, plan))
    started = time.perf_counter()
    label = restore_label(scores.planes(), geometry, plan)
    seconds = time.perf_counter() - started
    np.save(file, label)
    return {"seconds": seconds, "peak": largest_size()}


def export_by_skimage(file: str, size: tuple[int, int, int], classes: int) -> dict[str, float]:
    """The same with nnU-Net's resampling of logits (order 1), beside the label map in `file`.

    Only `resize` is timed. One class is in memory at a time, where nnU-Net holds all of them.
    """
    from skimage.transform import resize

    plan, geometry = make_plan(classes), _geometry(size)
    scores = Scores(classes, target_shape(geometry, plan))
    best = np.full(geometry.scan_shape, -np.inf, dtype=np.float32)
    label = np.zeros(geometry.scan_shape, dtype=np.uint8)
    seconds = 0.0
    for index in range(classes):
        volume = scores.volume(index).astype(float)
        started = time.perf_counter()
        resized = resize(volume, geometry.scan_shape, order=1, mode="edge", anti_aliasing=False)
        seconds += time.perf_counter() - started
        for plane, value, winner in zip(best, resized, label, strict=True):
            winner[value >= plane] = index
            np.maximum(plane, value, out=plane)
    ours = np.load(file, mmap_mode="r")
    differing = sum(np.count_nonzero(a != b) for a, b in zip(ours, label, strict=True)) / label.size
    return {"seconds": seconds, "peak": largest_size(), "differing": differing}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__)
    parser.add_argument("--size", nargs=3, type=int, default=(512, 512, 800), metavar=("X", "Y", "Z"))
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the tables here")
    arguments = parser.parse_args()
    size, classes = tuple(arguments.size), arguments.classes
    command = shlex.join(["python", "-m", "bench.inference", *sys.argv[1:]])

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        scan, label = f"{folder}/scan.nii.gz", f"{folder}/label.npy"
        say("writing the scan")
        in_a_process("bench.inference", "write_scan", scan, size)
        rows = []
        for count, window in ((classes, (128, 128, 128)), (classes, (32, 128, 128)), (2, (32, 128, 128))):
            say(f"predicting it: {count} classes, window {window}")
            found = in_a_process("bench.inference", "predict", scan, f"{folder}/out", count, window)
            rows.append(
                [
                    str(count),
                    " x ".join(map(str, window)),
                    f"{found['seconds']:.0f}",
                    f"{found['peak'] / GIB:.2f}",
                    f"{found['before'] / GIB:.2f}",
                ]
            )
            say(json.dumps(found))
        text = table(["classes", "window", "seconds", "peak GiB", "of which before"], rows) + "\n\n"
        say("export")
        ours = in_a_process("bench.inference", "export", label, size, classes)
        say(json.dumps(ours))
        exports = [[f"this package, {classes} classes", f"{ours['seconds']:.1f}", "1", f"{ours['peak'] / GIB:.2f}"]]
        try:
            version = importlib.metadata.version("scikit-image")
        except importlib.metadata.PackageNotFoundError:
            say("scikit-image is not installed: no row of it")
        else:
            say("export by skimage")
            theirs = in_a_process("bench.inference", "export_by_skimage", label, size, classes)
            say(json.dumps(theirs))
            assert theirs["differing"] < TOLERATED, f"{theirs['differing']:.2g} of the voxels differ"
            exports.append(
                [
                    f"skimage {version}, {classes} classes one by one",
                    f"{theirs['seconds']:.1f}",
                    f"{theirs['seconds'] / ours['seconds']:.1f}",
                    f"{theirs['peak'] / GIB:.2f}",
                ]
            )
            all_at_once = classes * (
                8 * math.prod(target_shape(_geometry(size), make_plan(classes))) + 4 * math.prod(size)
            )
            exports.append(["nnU-Net's arrays for it, computed", "", "", f"{all_at_once / GIB:.2f}"])
        text += table(["export", "seconds", "times ours", "peak GiB"], exports) + "\n\n"
    facts = machine() | {"command": command}
    text += "\n".join(f"* {key}: {value}" for key, value in facts.items()) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
