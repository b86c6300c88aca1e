"""What comes from elsewhere cannot run code, leave its folder or fill the memory: no pickles, links or bombs."""

from __future__ import annotations

import ast
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import utnetv2_fast
from utnetv2_fast.data.dataset import read_dataset
from utnetv2_fast.data.phantom import write_phantom
from utnetv2_fast.data.plan import IntensityStatistics, Plan
from utnetv2_fast.data.prepare import Prepared, prepare
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import lies_inside, read_bounded
from utnetv2_fast.models import PRESETS, UTNetV2, UTNetV2Config
from utnetv2_fast.training import RunConfig, RunFolder, default_training

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in (Path(utnetv2_fast.__file__).parent, ROOT / "kernels", ROOT / "bench")
    for file in folder.rglob("*.py")
)
RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def dangers(source: str) -> Iterator[str]:
    """Every place where this code could load a pickle, or run what it has read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in RUNS_CODE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE:
            yield from (alias.name for alias in node.names if alias.name != "UnpicklingError")
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
                yield name
            if name in ("torch.load", "torch.jit.load") and keywords.get("weights_only") != "True":
                yield name
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
                yield name
            if name.startswith("yaml.") and "load" in name and "_PlainLoader" not in map(ast.unparse, node.args):
                yield name


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_source_can_load_a_pickle(file: Path) -> None:
    assert list(dangers(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle as n",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.full_load(text)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert list(dangers(code))


STATISTICS = IntensityStatistics(mean=0, std=1, median=0, minimum=-1, maximum=1, percentile_00_5=-1, percentile_99_5=1)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder of a small network, with weights."""
    torch.manual_seed(0)
    small = {"channels": (4, 8, 8, 8, 8), "heads": (2, 2, 2), "fusion_channels": 8, "fusion_heads": 2}
    model = UTNetV2Config(**PRESETS["tiny-2d"].fields | small, in_channels=1, num_classes=2)
    plan = Plan(
        dataset="x",
        dimensions=2,
        labels={"background": 0, "a": 1},
        channels=("MRI",),
        axes=(0, 1, 2),
        spacing=(None, 1.0, 1.0),
        median_shape=(4, 32, 32),
        normalisation=("zscore",),
        intensities=(STATISTICS,),
    )
    config = RunConfig(
        preset="tiny-2d",
        data="data",
        prepared="prepared",
        fold=0,
        train_cases=("a",),
        held_out_cases=("b",),
        plan=plan,
        patch_size=(32, 32),
        model=model,
        training=default_training("tiny-2d"),
    )
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)
    folder.save_weights("last", UTNetV2(model).state_dict())
    return folder


def refused(action: Callable[[], object]) -> str:
    """The sentence with which `action` is refused, without taking memory for it."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            action()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**26
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# --- run folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["config.yaml", "checkpoints/last.safetensors", "checkpoints"])
def test_links_out_of_a_run_folder_are_refused(what: str, run: RunFolder, tmp_path: Path) -> None:
    run.load_model()
    (run.path / what).rename(tmp_path / "outside")
    (run.path / what).symlink_to(tmp_path / "outside")
    assert "out of the run folder" in refused(run.load_model)


def test_links_within_a_run_folder_and_to_it_are_followed(run: RunFolder, tmp_path: Path) -> None:
    run.weights_file("best").symlink_to("last.safetensors")
    (tmp_path / "link").symlink_to(run.path)
    RunFolder(tmp_path / "link").load_model("best")


def test_other_files_of_a_run_are_not_read_through_links(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("{}")
    for file, read in (
        (run.metrics_file, run.read_metrics),
        (run.environment_file, run.read_environments),
        (run.resources_file, run.read_resources),
        (run.resume_file, run.load_state),
    ):
        file.symlink_to(tmp_path / "outside")
        assert "out of the run folder" in refused(read)


BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "depth": "a: " + "[" * 50_000,
    "tags": "a: !!python/object/apply:os.system ['true']",
    "a value that is none": "a: !!timestamp x",
    "a number without end": "fold: " + "9" * 10_000,
    "a number that is none": "fold: 0x_",
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_refused(name: str, run: RunFolder) -> None:
    run.config_file.write_text(BOMBS[name])
    assert "config.yaml: damaged" in refused(lambda: run.config)


def test_a_configuration_of_a_gigabyte_is_not_read(run: RunFolder) -> None:
    with run.config_file.open("r+b") as file:
        file.truncate(2**30)
    assert "bytes" in refused(lambda: run.config)


HOSTILE_CONFIGS = [
    ("patch_size: [32, 32]", "patch_size: [100000, 100000]", "patch_size"),
    ("patch_size: [32, 32]", "patch_size: [32, -32]", "patch_size"),
    ("patch_size: [32, 32]", "patch_size: [32, 32, 32]", "dimensions"),
    ("spacing: [null, 1.0, 1.0]", "spacing: [null, 0.0, 1.0]", "spacing"),
    ("spacing: [null, 1.0, 1.0]", "spacing: [null, .nan, 1.0]", "spacing"),
    ("axes: [0, 1, 2]", "axes: [0, 1, 1]", "axes"),
    ("a: 1}", "a: 70}", "labels"),
    ("normalisation: [zscore]", "normalisation: [zscore, zscore]", "normalisation"),
    ("mean: 0.0", "mean: .inf", "finite"),
    ("map_size: [3, 3]", "map_size: [90000, 90000]", "map_size"),
    ("blocks: [1, 1, 1]", "blocks: [1, 1, 100000000]", "less than"),
    ("channels: [4, 8, 8, 8, 8]", "channels: [4, 8, 8, 8, 8000000]", "impossible size"),
]


@pytest.mark.parametrize(("old", "new", "words"), HOSTILE_CONFIGS)
def test_sizes_in_a_configuration_are_refused_before_they_take_memory(
    old: str, new: str, words: str, run: RunFolder
) -> None:
    text = run.config_file.read_text()
    assert old in text, text
    run.config_file.write_text(text.replace(old, new))
    assert words in refused(run.load_model)


class Run:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.file,))


def test_a_pickle_in_a_checkpoint_is_not_run(run: RunFolder, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for content in (Run(trap), {"model": Run(trap)}):
        torch.save(content, run.resume_file)
        assert "damaged" in refused(run.load_state)
    run.weights_file("last").write_bytes(pickle.dumps(Run(trap)))
    assert "damaged" in refused(run.load_model)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Run(trap)))
    assert trap.exists(), "the trap would have worked"


def zipped(file: Path, sizes: list[int], compression: int) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for index, size in enumerate(sizes):
            archive.writestr(f"state/{index}", bytes(size))


def test_zip_bombs_are_refused(run: RunFolder) -> None:
    run.resume_file.parent.mkdir(exist_ok=True)
    zipped(run.resume_file, [2**27], zipfile.ZIP_DEFLATED)
    assert run.resume_file.stat().st_size < 2**18
    assert "damaged" in refused(run.load_state)
    # Stored, but every entry of the directory is the same file: ten thousand times a megabyte.
    zipped(run.resume_file, [2**20], zipfile.ZIP_STORED)
    content = run.resume_file.read_bytes()
    directory = content.rindex(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    entry, count = content[directory:end], 10_000
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(entry) * count, directory, 0)
    run.resume_file.write_bytes(content[:directory] + entry * count + tail)
    assert "damaged" in refused(run.load_state)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10**8) + b"{" * 100,
        struct.pack("<Q", 90)
        + json.dumps({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).ljust(90).encode(),
    ],
)
def test_headers_of_weights_that_claim_too_much_are_refused(content: bytes, run: RunFolder) -> None:
    run.weights_file("last").write_bytes(content)
    assert "weights" in refused(run.load_model)


def test_weights_that_are_not_what_was_saved_are_refused(run: RunFolder) -> None:
    """safetensors has no checksum: a flipped bit would be another network."""
    file = run.weights_file("last")
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for place in (8 + header, (8 + header + len(whole)) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "damaged" in refused(run.load_model)
    assert whole.count(b'"F32"') > 1
    file.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))
    assert "damaged" in refused(run.load_model)


def test_weights_saved_by_others_need_no_checksum_but_the_right_types(run: RunFolder) -> None:
    file = run.weights_file("last")
    tensors = load_file(file)
    save_file(tensors, file)
    run.load_model()
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32)
    save_file(tensors | {name: tensors[name].double()}, file)
    assert "damaged" in refused(run.load_model)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    assert "another network" in refused(run.load_model)


# --- datasets and prepared folders -----------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    write_phantom(tmp_path / "demo", patients=2)
    return tmp_path / "demo"


@pytest.mark.parametrize(
    "path",
    ["../secret.nii.gz", "/etc/passwd", "imagesTr/../../secret.nii.gz", "loop", "a\0b", "line\nbreak", "x" * 5000],
)
@pytest.mark.parametrize("where", ["image", "label"])
def test_paths_of_a_dataset_stay_in_it(path: str, where: str, demo: Path) -> None:
    (demo / "loop").symlink_to("loop")
    (demo.parent / "secret.nii.gz").write_bytes(b"")
    (demo / "cases.csv").unlink()
    content = json.loads((demo / "dataset.json").read_text())
    image = next((demo / "imagesTr").iterdir()).name
    entry = {"image": f"imagesTr/{image}", "label": f"labelsTr/{image.replace('_0000', '')}"} | {where: path}
    (demo / "dataset.json").write_text(json.dumps(content | {"training": [entry]}))
    message = refused(lambda: read_dataset(demo))
    assert any(words in message for words in ("outside", "cannot be printed", "longer than", "loop: no such file"))


@pytest.mark.parametrize("name", ["../up", "\x1b[2J", "a\nb", "x" * 250])
def test_names_of_cases_are_names_of_files(name: str, demo: Path) -> None:
    (demo / "cases.csv").unlink()
    content = json.loads((demo / "dataset.json").read_text())
    entry = {"images": ["imagesTr/a.nii.gz"], "label": "labelsTr/a.nii.gz"}
    (demo / "dataset.json").write_text(json.dumps(content | {"dataset": {name: entry}}))
    assert "cannot name a case" in refused(lambda: read_dataset(demo))


@pytest.mark.parametrize("file", ["dataset.json", "cases.csv"])
def test_tables_of_a_gigabyte_are_not_read(file: str, demo: Path) -> None:
    with (demo / file).open("r+b") as stream:
        stream.truncate(2**30)
    assert "bytes" in refused(lambda: read_dataset(demo))


def test_a_prepared_folder_stays_in_itself(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    prepare(read_dataset(demo), folder, 2)
    record = next((folder / "cases").glob("*.json"))
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"name": "../../outside"}))
    assert "outside" in refused(lambda: Prepared.load(folder))
    record.write_text(json.dumps(content))
    image = Prepared.load(folder).cases[0].image_file
    image.rename(tmp_path / "outside.npy")
    image.symlink_to(tmp_path / "outside.npy")
    assert "outside" in refused(lambda: Prepared.load(folder))


def test_links_are_followed_to_their_end(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    for name, target in (("loop", "loop"), ("out", ".."), ("back", "sub/../sub")):
        (inside / name).symlink_to(target)
    assert [lies_inside(inside, inside / name) for name in ("sub", "loop", "out", "back", "..", "../inside/sub")] == [
        *(True, True, False, True, False, True)
    ]


def test_a_bounded_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    with pytest.raises(InputError, match="5 bytes, more than the 4"):
        read_bounded(tmp_path / "file", 4)


def test_an_array_in_a_prepared_folder_is_no_pickle(demo: Path, tmp_path: Path) -> None:
    case = prepare(read_dataset(demo), tmp_path / "prepared", 2).cases[0]
    np.save(case.image_file, np.array([Run(tmp_path / "trap")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        case.image()
    assert not (tmp_path / "trap").exists()
