"""The demo dataset: a short-axis cardiac MR phantom as NIfTI in nnU-Net's raw layout, the same bytes every time."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from utnetv2_fast.data.dataset import Dataset, read_dataset
from utnetv2_fast.files import atomic_write, write_text_atomically
from utnetv2_fast.progress import Track, silent

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}

Array = NDArray[np.floating[Any]]
Integer = TypeVar("Integer", np.int16, np.uint8)


@dataclass(frozen=True)
class _Vendor:
    """How a scanner shows tissue: intensities relative to blood, and the flaws of its pictures."""

    name: str
    myocardium: float
    fat: float
    liver: float
    blur_mm: float  # sigma of the point spread in the slice
    noise: float  # standard deviation in either channel of the complex signal
    shading: float  # logarithm of the brightest over the mean coil sensitivity
    scale: float  # stored value of blood


_VENDORS = (
    _Vendor("A", myocardium=0.33, fat=0.95, liver=0.42, blur_mm=0.7, noise=0.035, shading=0.25, scale=900),
    _Vendor("B", myocardium=0.42, fat=1.15, liver=0.50, blur_mm=1.0, noise=0.05, shading=0.45, scale=260),
    _Vendor("C", myocardium=0.27, fat=0.75, liver=0.33, blur_mm=0.6, noise=0.07, shading=0.35, scale=1800),
    _Vendor("D", myocardium=0.48, fat=0.85, liver=0.60, blur_mm=1.2, noise=0.04, shading=0.6, scale=480),
)


@dataclass(frozen=True)
class _Heart:
    """A heart at one phase of its beat; millimetres and radians, in the plane of the slices."""

    radius: float  # of the left ventricle's outer surface at the base
    wall: float
    length: float  # from base to apex
    rv_width: float  # from the septum to the free wall at the base
    rv_height: float  # half of it
    angle: float  # towards the right ventricle
    ripple: Array  # (4,) relative amplitudes and phases of the deviation from a circle
    thickening: Array  # (2,) relative amplitude and phase of the wall's variation around the ventricle
    papillary: Array  # (2, 3) angle (from the septum), distance (relative to the cavity) and radius of two muscles


@dataclass(frozen=True)
class _Stored:
    """One scan with its label map, as they are written."""

    phase: str
    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: Array


def write_phantom(folder: Path, patients: int = 20, seed: int = 0, track: Track = silent) -> Dataset:
    """Write `patients` patients at end diastole (ED) and end systole (ES) to `folder` and return them as a dataset.

    Files are those of nnU-Net's raw layout, and `cases.csv` with the columns case, patient, vendor, phase and subset;
    they depend on `patients` and `seed` alone. Voxels are 1.2 to 1.9 mm in slices 8 to 10 mm apart. Some scans lie
    obliquely in the scanner, some are stored with flipped axes. For studies of unseen domains, the subset "testing" has
    every patient of the last two vendors and every third one of the others.
    """
    folder = Path(folder)
    rows = []
    for patient in track(range(patients), "Making the demo scans"):
        name, vendor = f"patient{patient + 1:03d}", _VENDORS[patient % len(_VENDORS)]
        for scan in _scan_patient(np.random.default_rng((seed, patient)), vendor):
            case = f"{name}_{scan.phase}"
            _write_nifti(folder / "imagesTr" / f"{case}_0000.nii.gz", scan.image, scan.affine)
            _write_nifti(folder / "labelsTr" / f"{case}.nii.gz", scan.label, scan.affine)
            rows.append((case, name, vendor.name, scan.phase, _subset(patient)))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("case", "patient", "vendor", "phase", "subset"), *rows])
    write_text_atomically(folder / "cases.csv", table.getvalue())
    # Last, because without it the folder is no dataset.
    write_text_atomically(
        folder / "dataset.json",
        json.dumps(
            {
                "name": "CardiacPhantom",
                "channel_names": {"0": "MR"},
                "labels": LABELS,
                "numTraining": len(rows),
                "file_ending": ".nii.gz",
            },
            indent=2,
        ),
    )
    return read_dataset(folder)


def _subset(patient: int) -> str:
    round_, vendor = divmod(patient, len(_VENDORS))
    return "testing" if vendor >= len(_VENDORS) // 2 or round_ % 3 == 2 else "training"


def _write_nifti(file: Path, array: NDArray[np.int16] | NDArray[np.uint8], affine: Array) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    with atomic_write(file) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


@dataclass(frozen=True)
class _Grid:
    """Voxel centres in mm, z along the heart from the apex (negative) to the base (0) and beyond."""

    x: Array
    y: Array
    z: Array
    shift: Array  # (2, slices): breath-holds differ, so slices do not quite line up

    def coordinates(self) -> tuple[Array, Array, Array]:
        """x and y (Z, Y, X), z (Z, 1, 1)"""
        x = self.x[None, None, :] + self.shift[0][:, None, None]
        y = self.y[None, :, None] + self.shift[1][:, None, None]
        x, y = np.broadcast_arrays(x, y)
        return x, y, self.z[:, None, None]


@dataclass(frozen=True)
class _Chest:
    """What surrounds the heart, in mm; the same at both phases."""

    centre: Array  # (2,) of the body's outline
    half: Array  # (2,) its half axes
    fat: float  # thickness of the layer under the skin
    muscle: float
    diaphragm: float  # height under the heart
    slope: float
    aorta: Array  # (3,) x, y, radius
    stomach: Array  # (5,) x, y, half axes, brightness
    coarse: Array  # (Z, Y, X) smooth random field of unit variance
    fine: Array  # (Z, Y, X) rougher


def _scan_patient(rng: np.random.Generator, vendor: _Vendor) -> list[_Stored]:
    """Both phases of a patient, on one grid."""
    in_plane, between = rng.uniform(1.2, 1.9), rng.uniform(8, 10)
    size = 8 * int(np.clip(round(rng.uniform(180, 210) / in_plane / 8), 14, 18))
    diastole = _draw_heart(rng)
    slices = math.ceil(diastole.length / between) + 1  # one beyond the base
    grid = _Grid(
        x=(np.arange(size) - size / 2) * in_plane + rng.uniform(-12, 12),
        y=(np.arange(size) - size / 2) * in_plane + rng.uniform(-12, 12),
        z=-diastole.length + (rng.uniform(0.1, 0.6) + np.arange(slices)) * between,
        shift=rng.normal(0, 1.2, (2, slices)),
    )
    chest = _draw_chest(rng, diastole, grid, in_plane)
    affine, orientation = _draw_pose(rng, np.array([in_plane, in_plane, between]), (size, size, slices))
    scans = []
    for phase, heart, base in (
        ("ED", diastole, 0.0),
        ("ES", _contract(diastole, rng.uniform(0.35, 0.65)), -0.12 * diastole.length),
    ):
        # A slice shows the mean over its thickness; the contours are those of its middle, with an observer's error.
        depths = (-0.3 * between, 0.0, 0.3 * between)
        signal = np.mean([_paint(heart, base, chest, grid, depth, vendor) for depth in depths], axis=0)
        label = _contours(heart, base, grid, rng.normal(0, 0.35, (3, 5, slices, 1, 1)))
        image = _acquire(signal, grid, in_plane, vendor, rng)
        scans.append(_Stored(phase, _stored(image, orientation), _stored(label, orientation), affine))
    return scans


def _stored(array: NDArray[Integer], orientation: NDArray[np.float64]) -> NDArray[Integer]:
    """(Z, Y, X) as the scanner stores it."""
    return np.ascontiguousarray(orientations.apply_orientation(array.transpose(2, 1, 0), orientation))


def _draw_heart(rng: np.random.Generator) -> _Heart:
    radius = rng.uniform(28, 36)
    return _Heart(
        radius=radius,
        wall=rng.uniform(8, 11),
        length=rng.uniform(58, 74),
        rv_width=rng.uniform(24, 36),
        rv_height=radius * rng.uniform(1.05, 1.3),
        angle=rng.uniform(-0.1, 0.6),
        ripple=np.array([rng.uniform(0, 0.05), rng.uniform(0, 0.025), *rng.uniform(0, 2 * np.pi, 2)]),
        thickening=np.array([rng.uniform(0, 0.18), rng.uniform(0, 2 * np.pi)]),
        papillary=np.column_stack([rng.normal([1.9, -1.9], 0.25), rng.uniform(0.5, 0.7, 2), rng.uniform(3, 5, 2)]),
    )


def _contract(heart: _Heart, ejection: float) -> _Heart:
    """The heart after it has ejected this fraction of the left ventricle's blood; the muscle keeps its volume."""
    shortening = 0.88
    cavity = (heart.radius - heart.wall) * math.sqrt((1 - ejection) / shortening)
    muscle = (heart.radius**2 - (heart.radius - heart.wall) ** 2) / shortening
    radius = math.sqrt(cavity**2 + muscle)
    return replace(
        heart,
        radius=radius,
        wall=radius - cavity,
        length=heart.length * shortening,
        rv_width=heart.rv_width * (1 - 0.5 * ejection),
        rv_height=heart.rv_height * 0.9,
    )


def _draw_chest(rng: np.random.Generator, heart: _Heart, grid: _Grid, in_plane: float) -> _Chest:
    shape = (len(grid.z), len(grid.y), len(grid.x))
    return _Chest(
        centre=np.array([rng.uniform(-25, -10), rng.uniform(-15, 15)]),
        half=np.array([rng.uniform(100, 120), rng.uniform(135, 165)]),
        fat=rng.uniform(6, 18),
        muscle=rng.uniform(7, 12),
        diaphragm=-max(heart.radius, heart.rv_height) - rng.uniform(2, 10),
        slope=rng.uniform(-0.1, 0.35),
        aorta=np.array([rng.uniform(-68, -55), rng.uniform(-25, 10), rng.uniform(9, 13)]),
        stomach=np.array(
            [rng.uniform(-60, -20), rng.uniform(-85, -65), *rng.uniform(14, 28, 2), rng.choice([0.05, 0.9])]
        ),
        coarse=_field(rng, shape, 9 / in_plane),
        fine=_field(rng, shape, 2 / in_plane),
    )


def _field(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    smooth = gaussian_filter(rng.standard_normal(shape), (0.7, sigma, sigma), mode="wrap")
    return np.asarray(smooth / smooth.std())


def _draw_pose(
    rng: np.random.Generator, spacing: Array, shape: tuple[int, int, int]
) -> tuple[Array, NDArray[np.float64]]:
    """An affine for a volume with axes (x, y, z), and the orientation that it is stored in: often neither is plain."""
    oblique, flipped = rng.random(2) < 0.3
    turn = Rotation.from_rotvec(rng.uniform(-0.3, 0.3, 3) * oblique).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2 + rng.uniform(-30, 30, 3)
    orientation = np.array([[0, 1], [1, 1], [2, 1]])
    if flipped:
        orientation = np.column_stack([[*rng.permutation(2), 2], rng.choice([-1, 1], 3)])
    return affine @ np.asarray(orientations.inv_ornt_aff(orientation, shape)), orientation


def _surfaces(
    heart: _Heart, base: float, x: Array, y: Array, z: Array, error: Array | float = 0.0
) -> tuple[Array, Array, Array, Array]:
    """Distances in mm, negative inside: left ventricle outside and inside, right ventricle; t, 0 at base, 1 at apex.

    Above the base the left surfaces are those of the atrium, and the right one that of the outflow tract.
    """
    t = (base - z) / heart.length
    u = x * math.cos(heart.angle) + y * math.sin(heart.angle)  # towards the right ventricle
    v = y * math.cos(heart.angle) - x * math.sin(heart.angle)
    theta, distance = np.arctan2(v, u), np.hypot(u, v)
    waves = np.stack([np.ones_like(theta), np.cos(theta), np.sin(theta), np.cos(2 * theta), np.sin(2 * theta)])
    outer_error, inner_error, right_error = np.sum(error * waves, axis=1) if np.ndim(error) else (0.0, 0.0, 0.0)

    taper = np.sqrt(np.clip(1 - np.clip(t, 0, 1) ** 2.6, 0, 1))
    two, three, phase_two, phase_three = heart.ripple
    radius = heart.radius * taper * (1 + two * np.cos(2 * theta + phase_two) + three * np.cos(3 * theta + phase_three))
    amplitude, phase = heart.thickening
    wall = heart.wall * (1 - 0.3 * np.clip(t, 0, 1) ** 2) * (1 + amplitude * np.cos(theta + phase))
    wall = np.where(t < 0, 1.5, wall)
    outer = distance - radius + outer_error
    inner = distance - (radius - wall) + inner_error

    right_taper = np.sqrt(np.clip(1 - (np.clip(t, 0, 0.85) / 0.85) ** 2, 0, 1)) * np.where(t < 0, 0.6, 1)
    centre = 0.55 * heart.radius * taper
    half_width = heart.radius * taper - centre + heart.rv_width * right_taper
    right = _ellipse(u - centre, v - np.where(t < 0, 0.8 * heart.radius, 0), half_width, heart.rv_height * right_taper)
    return outer, inner, right + right_error, t


def _ellipse(x: Array, y: Array, a: Array | float, b: Array | float) -> Array:
    """About the distance to an ellipse with half axes a and b: exact in direction of the centre, negative inside."""
    distance = np.hypot(x, y)
    return distance - distance / np.maximum(np.hypot(x / np.maximum(a, 1e-3), y / np.maximum(b, 1e-3)), 1e-6)


def _contours(heart: _Heart, base: float, grid: _Grid, error: Array) -> NDArray[np.uint8]:
    """(Z, Y, X) labels; error (3, 5, Z, 1, 1) is how far each contour is off, in waves around the heart."""
    outer, inner, right, t = _surfaces(heart, base, *grid.coordinates(), error)
    label = np.zeros(outer.shape, np.uint8)
    label[right < 0] = LABELS["RV"]
    label[outer < 0] = LABELS["MYO"]
    label[(outer < 0) & (inner < 0)] = LABELS["LV"]
    label[np.broadcast_to((t < 0) | (t > 1), label.shape)] = LABELS["background"]
    return label


def _lay(signal: Array, value: Array | float, distance: Array) -> None:
    """Cover, in place, what lies within a surface (distance < 0) with tissue; its edge is as soft as a voxel."""
    signal += np.clip(0.5 - distance / 1.5, 0, 1) * (value - signal)


def _paint(heart: _Heart, base: float, chest: _Chest, grid: _Grid, depth: float, vendor: _Vendor) -> Array:
    """(Z, Y, X) signal of the tissue at `depth` mm from the middle of each slice, relative to blood."""
    x, y, z = grid.coordinates()
    z = z + depth
    outer, inner, right, t = _surfaces(heart, base, x, y, z)
    coarse, fine = chest.coarse, chest.fine
    signal = np.full(x.shape, 0.01)

    muscle = vendor.myocardium * 0.75 * (1 + 0.2 * fine)
    body = _ellipse(x - chest.centre[0], y - chest.centre[1], *chest.half)
    _lay(signal, vendor.fat * (1 + 0.08 * coarse), body)
    _lay(signal, muscle, body + chest.fat + 2 * coarse)
    cavity = body + chest.fat + chest.muscle + 1.5 * coarse
    _lay(signal, 0.05 + 0.5 * np.clip(fine - 2, 0, 1), cavity)  # lungs and their vessels
    abdomen = y - chest.diaphragm - chest.slope * x - 0.004 * x**2 + 2 * coarse
    _lay(signal, vendor.fat * 0.8, np.maximum(abdomen - 4, cavity))
    _lay(signal, vendor.liver * (1 + 0.12 * coarse + 0.1 * fine), np.maximum(abdomen, cavity))
    left, low, a, b, brightness = chest.stomach
    _lay(signal, brightness * (1 + 0.1 * fine), np.maximum(_ellipse(x - left, y - low, a, b), abdomen + 6))
    aorta = np.hypot(x - chest.aorta[0], y - chest.aorta[1]) - chest.aorta[2]
    _lay(signal, muscle, aorta - 2)
    _lay(signal, 0.95, aorta)

    heart_outside = np.minimum(outer, right)
    _lay(signal, vendor.fat * (0.85 + 0.1 * fine), np.where(t <= 1, heart_outside - 4 - 2.5 * coarse, 1e3))
    _lay(signal, vendor.myocardium, right - 2.5)
    trabeculae = np.clip(fine - 1.0, 0, 1) * np.clip(t + 0.2, 0, 1)
    _lay(signal, 0.93 * (1 - 0.6 * trabeculae) * (1 + 0.04 * coarse), right)
    _lay(signal, vendor.myocardium * (1 + 0.08 * fine), outer)
    _lay(signal, 1 + 0.05 * coarse, np.maximum(inner + 0.9 * np.clip(fine, -1, 2), outer))
    for angle, where, radius in heart.papillary:
        reach = where * (heart.radius - heart.wall)
        px, py = reach * math.cos(angle + heart.angle), reach * math.sin(angle + heart.angle)
        muscle_at = np.hypot(x - px, y - py) - radius
        _lay(signal, vendor.myocardium, np.maximum(muscle_at, np.where(abs(t - 0.5) < 0.25, inner, 1e3)))
    return signal


def _acquire(
    signal: Array, grid: _Grid, in_plane: float, vendor: _Vendor, rng: np.random.Generator
) -> NDArray[np.int16]:
    """What the scanner makes of `signal`: blurred, shaded by its coils, with Rician noise, as integers."""
    sigma = vendor.blur_mm / in_plane
    signal = gaussian_filter(signal, (0, sigma, sigma))
    x, y = grid.x[None, None, :] / 100, grid.y[None, :, None] / 100
    slope = rng.normal([0.7, 0.3], 0.3)  # coils lie on the chest
    sensitivity = np.exp(vendor.shading * (slope[0] * x + slope[1] * y + rng.normal(0, 0.5) * x * y))
    noise = vendor.noise * rng.standard_normal((2, *signal.shape))
    magnitude = np.hypot(signal * sensitivity + noise[0], noise[1])
    return np.asarray(np.round(magnitude * vendor.scale * rng.uniform(0.8, 1.25)), dtype=np.int16)
