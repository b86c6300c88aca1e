"""Recipes are whole, checked, and the only place of a preset's defaults; the paper's are the authors' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from utnetv2_fast.data.plan import Preparation
from utnetv2_fast.data.splits import SplitRules
from utnetv2_fast.errors import InputError
from utnetv2_fast.models import PRESETS
from utnetv2_fast.training import EvaluationConfig, default_training, load_recipe
from utnetv2_fast.training.recipe import change_training, recipe_for_preset, shipped_recipes, with_leaks

RECIPES = shipped_recipes()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with a recipe for both protocols."""
    file = tmp_path / "mine.yaml"
    file.write_text((Path(__file__).parents[2] / "utnetv2_fast/recipes/acdc-2d.yaml").read_text())
    return file


def test_every_preset_has_a_recipe() -> None:
    assert set(RECIPES) == {name.removesuffix("-medformer") for name in PRESETS}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_for_its_preset_and_leaks_in_no_protocol(name: str) -> None:
    clean, paper = load_recipe(name), load_recipe(name, "paper")
    assert (clean.protocol, clean.preset) == ("clean", name)
    assert (paper.protocol, paper.preset.removesuffix("-medformer")) == ("paper", name)
    for recipe in (clean, paper):
        assert (recipe.evaluation.weights, recipe.evaluation.grid) == ("last", "native")
        assert recipe.preparation.crop != "label"
        assert recipe.patch_size in (None, PRESETS[recipe.preset].input_size)


@pytest.mark.parametrize("name", RECIPES)
def test_clean_is_what_holds_where_nobody_says_otherwise(name: str) -> None:
    recipe = load_recipe(name)
    by_rule = recipe.preparation.model_copy(update={"spacing": None})
    assert by_rule == Preparation()
    assert recipe.evaluation == EvaluationConfig()
    assert default_training(name) == recipe.training == recipe_for_preset(name).training
    lengths = ("epochs", "steps_per_epoch", "batch_size", "learning_rate", "warmup_epochs")
    assert recipe.training == type(recipe.training)(**{field: getattr(recipe.training, field) for field in lengths})


@pytest.mark.parametrize(
    ("name", "rate", "length", "batch", "spacing"),
    [
        ("acdc-2d", 5e-4, (200, 48), 32, (None, 1.5625, 1.5625)),
        ("acdc-3d", 1e-3, (150, 201), 3, (5.0, 1.5625, 1.5625)),
        ("bcv-3d", 6e-4, (150, 301), 3, (3.0, 0.75, 0.75)),
        ("lits-3d", 4e-4, (200, 501), 2, (1.0, 0.767578125, 0.767578125)),
    ],
)
def test_the_paper_protocol_has_the_authors_settings(
    name: str, rate: float, length: tuple[int, int], batch: int, spacing: tuple[float | None, ...]
) -> None:
    recipe = load_recipe(name, "paper")
    training, preparation = recipe.training, recipe.preparation
    assert recipe.preset == f"{name}-medformer"
    assert (training.epochs, training.steps_per_epoch) == length
    assert (training.learning_rate, training.batch_size, preparation.spacing) == (rate, batch, spacing)
    assert (training.schedule, training.warmup_epochs, training.dice) == ("epochwise", 5, "adaptive")
    assert (training.clip_norm, training.foreground_fraction, training.norm_statistics) == (None, 0, "latest")
    assert (training.weight_decay, training.ema_decay, training.auxiliary_weight) == (0.05, 0.99, 0.5)
    assert training.class_weights == ((0.5, 1, 3) if name == "lits-3d" else (0.5, 1))
    assert (preparation.resampling, preparation.crop) == ("nearest_across", "none")
    assert preparation.normalisation == ("percentile_98" if name.startswith("acdc") else "nnunet")
    assert (preparation.window is None) == name.startswith("acdc")
    assert (recipe.evaluation.weighting, recipe.evaluation.missing_class) == ("uniform", "500mm")
    assert recipe.split == SplitRules(scheme="authors")


def test_a_preset_alone_takes_nothing_of_its_dataset() -> None:
    for name in PRESETS:
        for protocol in ("clean", "paper"):
            recipe = recipe_for_preset(name, protocol)
            preparation, split = recipe.preparation, recipe.split
            assert (recipe.preset, recipe.patch_size, recipe.protocol) == (name, None, protocol)
            assert (preparation.spacing, preparation.window, preparation.label_context) == (None, None, None)
            assert (split.held_out, split.left_out) == (None, None)
    with pytest.raises(InputError, match="no preset 'unet'"):
        recipe_for_preset("unet")


def test_each_leak_has_a_switch_of_its_own() -> None:
    recipe = load_recipe("bcv-3d", "paper")
    assert with_leaks(recipe, []) == recipe
    best, crop, grid = (with_leaks(recipe, [leak]) for leak in ("best-epoch", "label-crop", "resampled-grid"))
    assert best.evaluation == recipe.evaluation.model_copy(update={"weights": "best"})
    assert grid.evaluation == recipe.evaluation.model_copy(update={"grid": "resampled"})
    assert crop.preparation == recipe.preparation.model_copy(update={"crop": "label"})
    assert best.preparation == grid.preparation == recipe.preparation
    assert crop.evaluation == recipe.evaluation
    with pytest.raises(InputError, match="needs a recipe with label_context"):
        with_leaks(load_recipe("acdc-2d"), ["label-crop"])


def test_training_is_changed_by_checked_values() -> None:
    recipe = load_recipe("tiny-2d")
    changed = change_training(recipe, {"epochs": 3, "augmentation": "none"})
    assert (changed.training.epochs, changed.training.augmentation) == (3, "none")
    assert changed.training.batch_size == recipe.training.batch_size
    with pytest.raises(InputError, match="augmentation cannot be 'wild'"):
        change_training(recipe, {"augmentation": "wild"})


def test_a_file_is_read_for_either_protocol(written: Path) -> None:
    assert load_recipe(str(written)) == load_recipe("acdc-2d")
    assert load_recipe(str(written), "paper") == load_recipe("acdc-2d", "paper")
    written.write_text(written.read_text().replace("protocol: clean", "protocol: paper"))
    assert load_recipe(str(written)) == load_recipe("acdc-2d", "paper")
    assert load_recipe(str(written), "clean") == load_recipe("acdc-2d")


def test_a_short_file_takes_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "short.yml"
    file.write_text(
        "preset: tiny-3d\ntraining: {epochs: 2, steps_per_epoch: 3, batch_size: 1, learning_rate: 1.0e-3}\n"
    )
    recipe = load_recipe(str(file))
    assert (recipe.preparation, recipe.evaluation, recipe.split) == (Preparation(), EvaluationConfig(), SplitRules())
    with pytest.raises(InputError, match=r"short\.yml: has no settings for the protocol paper"):
        load_recipe(str(file), "paper")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("preset: acdc-2d\n", "preset: acdc-2d\ncolour: blue\n", "colour: no such setting"),
        ("  epochs: 200\n", "  epoch: 200\n", "training.epoch"),
        ("  epochs: 200\n", "  epochs: 200\n  batch-size: 3\n", "training.batch-size: no such setting"),
        ("  crop: nonzero\n", "  crops: nonzero\n", r"preparation\.crops: no such setting"),
        ("    crop: none\n", "    crops: none\n", r"paper\.preparation\.crops: no such setting"),
        ("      shear:", "      sheer:", r"paper\.training\.augmentation\.sheer: no such setting"),
        ("low: -0.3", "low: 0.4", r"paper\.training\.augmentation\.shear: .*exceeds"),
        ("augmentation: nnunet", "augmentation: wild", r"training\.augmentation: Input should be"),
        ("  epochs: 200", "  epochs: none", r"training\.epochs: Input should be"),
        ("  epochs: 200\n", "", r"training\.epochs: Field required"),
        ("protocol: clean", "protocol: dirty", "protocol: Input should be"),
        ("preset: acdc-2d\n", "preset: acdc\n", "no preset 'acdc'"),
        ("[256, 256]", "[16, 256, 256]", "patch_size: 3 axes for acdc-2d"),
        ("\npaper:\n", "\npaper: 3\nx:\n", "x: no such setting"),
        ("preset:", "- preset:", "not valid YAML"),
        ("preset:", "preset: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(written: Path, old: str, new: str, words: str) -> None:
    assert old in written.read_text()
    written.write_text(written.read_text().replace(old, new, 1))
    for protocol in (None, "clean", "paper"):
        with pytest.raises(InputError, match=words) as caught:
            load_recipe(str(written), protocol)
        assert "\n" not in str(caught.value)
        assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"text", b"\xff\xfe", b"a: !!python/object:os.system {}"])
def test_what_is_no_recipe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.yaml: "):
        load_recipe(str(file))


def test_a_section_paper_that_is_no_section(written: Path) -> None:
    before, _, _ = written.read_text().partition("\npaper:\n")
    written.write_text(f"{before}\npaper: yes\n")
    with pytest.raises(InputError, match=r"mine\.yaml: paper: not settings"):
        load_recipe(str(written))


def test_absent_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe 'acdc'; choose one of acdc-2d"):
        load_recipe("acdc")
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(InputError, match="no recipe"):
        load_recipe("../recipes/acdc-2d")


def test_the_cardiac_recipe_holds_the_test_patients_of_mnms_out() -> None:
    for protocol in ("clean", "paper"):
        split = load_recipe("cardiac-2d", protocol).split
        assert split.held_out == {"dataset": ("MnMs",), "subset": ("validation", "testing")}
        assert split.left_out == {"dataset": ("MnMs2",), "subset": ("validation", "testing")}
