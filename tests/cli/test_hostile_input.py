"""Corrupted files, by the hundred: each is refused with exit code 2 and one sentence, or does no harm.

What does no harm is decided without the readers under test. A compressed scan, the weights and the state of a training
carry checksums: a run that accepts one of them corrupted must give the result of the whole file, bit by bit. A plain
.nii, dataset.json and config.yaml carry none, and a change may leave another valid file: what is accepted must then
also be one to nibabel, to `json`, and give a complete label map on the scan's grid. Nothing ever ends in another
exception, lasts longer than some seconds, takes much memory, or leaves a part of a file behind.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from utnetv2_fast.cli import app
from utnetv2_fast.data.plan import IntensityStatistics, Plan
from utnetv2_fast.models import PRESETS, UTNetV2, UTNetV2Config
from utnetv2_fast.training import RunConfig, RunFolder, TrainingConfig
from utnetv2_fast.training.state import TrainingState

MANY = settings(
    max_examples=85,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,  # what fails here fails for everybody
    phases=(Phase.explicit, Phase.generate),  # to make a failure smaller would take minutes
)
SECONDS = 20
MEMORY = 2**30  # bytes by which this process may grow over all of it

STATISTICS = IntensityStatistics(mean=0, std=1, median=0, minimum=-1, maximum=1, percentile_00_5=-1, percentile_99_5=1)
AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Ended:
    """Run `utnetv2-fast ARGUMENTS` in this process; whatever it raises but an exit, or a hang, fails the test."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with (
            mock.patch.object(sys, "argv", ["utnetv2-fast", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                app.main()
            except SystemExit as ended:
                return Ended(int(ended.code or 0), out.getvalue(), err.getvalue())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError("main returns by SystemExit")


def accepted(ended: Ended, out: Path | None = None) -> bool:
    """Whether a command did its work; else it must have refused in one sentence, and left nothing in `out`."""
    if ended.code == 0:
        return True
    assert ended.code == 2, ended
    *messages, error = ended.err.splitlines()
    assert error.startswith("error: "), ended
    assert error.endswith("."), ended
    assert len(error) < 2000, ended
    assert not any(words in message for message in messages for words in ("error:", "Traceback")), ended
    assert ended.out == ""
    assert out is None or not out.exists() or not list(out.iterdir())
    return False


@pytest.fixture(autouse=True, scope="module")
def _memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@dataclass(frozen=True)
class World:
    """A run folder, a dataset of three cases, and what `predict` makes of the first scan: all of it whole."""

    folder: Path
    run: RunFolder
    dataset: Path
    scan: Path
    label: np.ndarray

    def predict(self, scan: Path, run: Path) -> tuple[Ended, Path]:
        """`predict` into a folder that was not there, and that folder."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        return call("predict", run, "-i", scan, "-o", out, "--device", "cpu"), out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    dataset = folder / "data"
    names = ["a", "b", "c"]
    for sub in ("imagesTr", "labelsTr"):
        (dataset / sub).mkdir(parents=True)
    for seed, name in enumerate(names):
        rng = np.random.default_rng(seed)
        image = rng.normal(100, 30, (14, 12, 3)).astype(np.int16)
        nib.save(nib.Nifti1Image(image, AFFINE), dataset / f"imagesTr/{name}.nii.gz")
        nib.save(
            nib.Nifti1Image(rng.integers(0, 3, image.shape).astype(np.uint8), AFFINE),
            dataset / f"labelsTr/{name}.nii.gz",
        )
    labels = {"background": 0, "left": 1, "right": 2}
    content = {
        "name": "things",
        "channel_names": {"0": "MRI"},
        "labels": labels,
        "file_ending": ".nii.gz",
        "training": [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in names],
    }
    (dataset / "dataset.json").write_text(json.dumps(content, indent=1))

    torch.manual_seed(0)
    small = {"channels": (4, 8, 8, 8, 8), "heads": (2, 2, 2), "fusion_channels": 8, "fusion_heads": 2}
    model = UTNetV2Config(**PRESETS["tiny-2d"].fields | small, in_channels=1, num_classes=3, impl="reference")
    plan = Plan(
        dataset="things",
        dimensions=2,
        labels=labels,
        channels=("MRI",),
        axes=(0, 1, 2),
        spacing=(None, 2.0, 2.0),
        median_shape=(3, 12, 14),
        normalisation=("zscore",),
        intensities=(STATISTICS,),
    )
    training = TrainingConfig(epochs=1, steps_per_epoch=1, batch_size=1, learning_rate=1e-3, precision="float32")
    run = RunFolder(folder / "run")
    run.write_config(
        RunConfig(
            preset="tiny-2d",
            data=str(dataset),
            prepared=str(folder / "prepared"),
            fold=0,
            train_cases=("a", "b"),
            held_out_cases=("c",),
            plan=plan,
            patch_size=(16, 16),
            model=model,
            training=training,
        )
    )
    run.save_weights("last", UTNetV2(model).state_dict())
    run.append_environment({})
    scan = dataset / "imagesTr/a.nii.gz"
    whole = World(folder, run, dataset, scan, np.empty(0))
    ended, out = whole.predict(scan, run.path)
    assert ended.code == 0, ended
    label = np.asarray(nib.load(out / "a.nii.gz").dataobj)
    assert len(np.unique(label)) > 1, "the network must draw something"
    return World(folder, run, dataset, scan, label)


# --- corruptions -----------------------------------------------------------------------------------------------------


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut short, with bits flipped, bytes overwritten, left out or added."""
    places = st.integers(0, len(content) - 1)

    def flip(flips: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, mask in flips:
            changed[place] ^= mask
        return bytes(changed)

    return st.one_of(
        places.map(lambda end: content[:end]),
        st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=6).map(flip),
        st.tuples(places, st.binary(min_size=1, max_size=40)).map(
            lambda change: content[: change[0]] + change[1] + content[change[0] + len(change[1]) :]
        ),
        st.tuples(places, st.integers(1, 60)).map(lambda cut: content[: cut[0]] + content[cut[0] + cut[1] :]),
        st.tuples(places, st.binary(min_size=1, max_size=40)).map(
            lambda added: content[: added[0]] + added[1] + content[added[0] :]
        ),
    ).filter(lambda changed: changed != content)


HOSTILE_NUMBERS = [0, 1, -1, 2, 7, 255, 32767, -32768, 1e9, -1e9, 1e30, float("nan"), float("inf")]
# (offset, struct code) of dim, intent, datatype, bitpix, pixdim, vox_offset, scaling, units, q- and sform, magic.
HEADER_FIELDS = [
    *((0, "i"), *((40 + 2 * i, "h") for i in range(8)), (68, "h"), (70, "h"), (72, "h")),
    *((76 + 4 * i, "f") for i in range(8)),
    *((108, "f"), (112, "f"), (116, "f"), (123, "b"), (252, "h"), (254, "h")),
    *((256 + 4 * i, "f") for i in range(6)),
    *((280 + 4 * i, "f") for i in range(12)),
    *((344, "i"), (348, "i"), (352, "i"), (356, "i")),
]


def hostile_headers(content: bytes) -> st.SearchStrategy[bytes]:
    """A few fields of a NIfTI-1 header set to what they cannot or should not be."""

    def change(fields: list[tuple[tuple[int, str], float]]) -> bytes:
        changed = bytearray(content)
        for (offset, code), number in fields:
            bits = {"b": 8, "h": 16, "i": 32}.get(code)
            if bits is not None:  # wrapped into the type
                number = int(max(-1e18, min(1e18, number))) if number == number else 0
                number = (number + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
            struct.pack_into("<" + code, changed, offset, number)
        return bytes(changed)

    fields = st.tuples(st.sampled_from(HEADER_FIELDS), st.sampled_from(HOSTILE_NUMBERS))
    return st.lists(fields, min_size=1, max_size=4).map(change)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places_in(item, (*path, key))


HOSTILE_VALUES = [
    *(None, True, -1, 0, 3, 10**6, 10**30, 1e300, float("nan"), float("inf"), 1e-9, -0.5),
    *("", "x" * 3000, "a\0b", "\x1b[2J\n", "../../etc/passwd", "/etc/passwd", "background", "1"),
    *([], {}, [[[]]], [1, 2, 3], {"a": {"b": []}}, ["x"] * 300),
]


def changed_values(content: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """One or two values replaced by hostile ones, or left out."""

    def change(changes: list[tuple[tuple[Any, ...], Any]]) -> dict[str, Any]:
        changed = json.loads(json.dumps(content))
        for (*parents, key), value in changes:
            target = changed
            with contextlib.suppress(LookupError, TypeError):  # where the first change took it away
                for parent in parents:
                    target = target[parent]
                if value is ...:
                    del target[key]
                else:
                    target[key] = value
        return changed

    one = st.tuples(st.sampled_from(list(places_in(content))), st.sampled_from([..., *HOSTILE_VALUES]))
    return st.lists(one, min_size=1, max_size=2).map(change)


# --- the readers -----------------------------------------------------------------------------------------------------


def complete_label(out: Path, scan: Path, classes: int) -> np.ndarray:
    """The one label map in `out`, on the grid of `scan` as nibabel reads it, with values below `classes`."""
    (file,) = out.iterdir()
    label, image = nib.load(file), nib.load(scan)
    assert label.get_data_dtype() == np.uint8
    assert label.shape == image.shape
    np.testing.assert_allclose(label.affine, image.affine, rtol=1e-4, atol=1e-4)
    values = np.asarray(label.dataobj)
    assert values.max() < classes
    return values


@MANY
@given(data=st.data())
def test_compressed_scans_that_were_damaged_on_the_way(world: World, data: st.DataObject) -> None:
    scan = world.folder / "a.nii.gz"
    scan.write_bytes(data.draw(damaged(world.scan.read_bytes())))
    ended, out = world.predict(scan, world.run.path)
    if accepted(ended, out):
        (file,) = out.iterdir()
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), world.label)


@MANY
@given(data=st.data(), compress=st.booleans())
def test_scans_of_another_content(world: World, data: st.DataObject, compress: bool) -> None:
    content = gzip.decompress(world.scan.read_bytes())
    changed = data.draw(st.one_of(damaged(content), hostile_headers(content), hostile_headers(content)))
    scan = world.folder / ("a.nii.gz" if compress else "a.nii")
    scan.write_bytes(gzip.compress(changed, 1) if compress else changed)
    ended, out = world.predict(scan, world.run.path)
    if accepted(ended, out):
        assert np.isfinite(np.asarray(nib.load(scan).dataobj, dtype=np.float32)).all()
        complete_label(out, scan, classes=3)


@MANY
@given(data=st.data())
def test_descriptions_of_datasets(world: World, data: st.DataObject) -> None:
    file = world.dataset / "dataset.json"
    whole = file.read_bytes()
    content = json.loads(whole)

    def files(changed: Any) -> set[Path]:
        """Without a list of files all are meant. Which label belongs to which image, nothing but the list tells."""
        entries = changed.get("training") or content["training"]
        return {Path(entry[kind]) for entry in entries for kind in ("image", "label")}

    def is_a_valid_one(changed: Any) -> bool:
        """Names are free, cases may be left out, and there are parts that nobody reads."""
        channels = changed.get("channel_names") or changed["modality"]
        values = sorted(changed["labels"].values())
        return values == [0, 1, 2] and len(channels) == 1 and files(changed) <= files(content)

    nested = st.sampled_from([b"[" * 100_000, b'{"labels":' * 50_000])
    changed = data.draw(
        st.one_of(damaged(whole), changed_values(content).map(lambda c: json.dumps(c).encode()), nested)
    )
    try:
        file.write_bytes(changed)
        out = world.folder / "prepared-anew"
        shutil.rmtree(out, ignore_errors=True)
        if accepted(call("prepare", world.dataset, "--out", out, "--dimensions", 2), out):
            assert is_a_valid_one(json.loads(changed))
    finally:
        file.write_bytes(whole)


@MANY
@given(data=st.data())
def test_plans_and_configurations(world: World, data: st.DataObject) -> None:
    """config.yaml holds the plan. It is there to be edited, so another valid one is no corruption."""
    whole = world.run.config_file.read_bytes()
    content = yaml.safe_load(whole)
    changed = data.draw(
        st.one_of(damaged(whole), *[changed_values(content).map(lambda c: yaml.safe_dump(c).encode())] * 2)
    )
    try:
        world.run.config_file.write_bytes(changed)
        ended, out = world.predict(world.scan, world.run.path)
        if accepted(ended, out):
            complete_label(out, world.scan, classes=len(world.run.config.plan.labels))
    finally:
        world.run.config_file.write_bytes(whole)


@MANY
@given(data=st.data())
def test_weights(world: World, data: st.DataObject) -> None:
    file = world.run.weights_file("last")
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    head = damaged(whole[: 8 + header]).map(lambda start: start + whole[8 + header :])
    try:
        file.write_bytes(data.draw(st.one_of(damaged(whole), head)))
        ended, out = world.predict(world.scan, world.run.path)
        if accepted(ended, out):
            (label,) = out.iterdir()
            np.testing.assert_array_equal(np.asarray(nib.load(label).dataobj), world.label)
    finally:
        file.write_bytes(whole)


@MANY
@given(data=st.data())
def test_states_of_trainings(world: World, data: st.DataObject) -> None:
    """`train --resume` up to where the state is restored; what it goes on from must be what was saved."""
    state = TrainingState(world.run.config, torch.device("cpu"))
    if not world.run.resume_file.exists():
        world.run.save_state(state.state_dict())
    whole = world.run.resume_file.read_bytes()
    restored: list[dict[str, Any]] = []

    def go_no_further(run: RunFolder, *arguments: object, **options: object) -> None:
        restored.append(run.load_state() or {})
        raise SystemExit(0)

    try:
        world.run.resume_file.write_bytes(data.draw(damaged(whole)))
        with mock.patch("utnetv2_fast.experiment.run_fold", go_no_further):
            resumed = accepted(call("train", "--resume", "--out", world.run.path, "--device", "cpu"))
        if resumed:
            whole_state = state.state_dict()
            assert restored[-1].keys() == whole_state.keys()
            for name, tensor in whole_state["model"].items():
                assert torch.equal(restored[-1]["model"][name], tensor)
    finally:
        world.run.resume_file.write_bytes(whole)
