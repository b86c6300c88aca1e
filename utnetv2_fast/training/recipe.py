"""Recipes: all settings of an experiment in one YAML file, for the protocol `clean` and, in a section, for `paper`.

A protocol is nothing but other settings. Once a recipe is read, no code asks which one it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from utnetv2_fast import plain_yaml
from utnetv2_fast.data.plan import Preparation
from utnetv2_fast.data.splits import SplitRules
from utnetv2_fast.errors import InputError
from utnetv2_fast.files import read_bounded
from utnetv2_fast.models import PRESETS, find_network, get_preset
from utnetv2_fast.training.config import EvaluationConfig, TrainingConfig

Protocol = Literal["clean", "paper"]
Leak = Literal["best-epoch", "label-crop", "resampled-grid"]

_FOLDER = Path(__file__).parents[1] / "recipes"
_LARGEST_FILE = 2**20  # bytes

# What belongs to one dataset, and is not taken over when only the network of a recipe is used.
_OF_THE_DATASET = {"spacing": None, "window": None, "label_context": None}


class Recipe(BaseModel):
    """The settings of an experiment on one dataset, under one protocol. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: Protocol = "clean"
    preset: str
    network: str = "utnetv2"  # or one that it is compared with, on the same data in the same way
    patch_size: tuple[PositiveInt, ...] | None = None  # None: that of the preset
    preparation: Preparation = Preparation()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    split: SplitRules = SplitRules()


def shipped_recipes() -> list[str]:
    """The names of the recipes in this package, one for every preset but the `-medformer` twins."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_recipe(name_or_file: str, protocol: Protocol | None = None) -> Recipe:
    """The recipe of this name, or in this YAML file, under `protocol` (None: the one that it names itself).

    A file has the fields of `Recipe`, and under `paper:` those that the protocol `paper` changes, section by section.
    Both protocols are checked, whichever is asked for. Raises InputError, naming file and field, for what is absent,
    unknown or of the wrong kind.
    """
    file = _recipe_file(name_or_file)
    content = _read(file)
    paper = content.pop("paper", None)
    written = _validated(file, content)
    variants: dict[Protocol, Recipe] = {written.protocol: written}
    if paper is not None:
        if not isinstance(paper, dict):
            raise InputError(f"{file}: paper: not settings; put those there that the protocol paper changes.")
        variants = {
            "clean": _validated(file, content | {"protocol": "clean"}),
            "paper": _validated(file, _merged(content, paper) | {"protocol": "paper"}, "paper."),
        }
    wanted = protocol or written.protocol
    if wanted not in variants:
        raise InputError(f"{file}: has no settings for the protocol {wanted}, only for {written.protocol}; add them.")
    return variants[wanted]


def recipe_for_preset(preset: str, protocol: Protocol = "clean") -> Recipe:
    """How to train the network `preset` on any dataset: its recipe without spacing, window and split of its dataset."""
    get_preset(preset)
    recipe = load_recipe(preset.removesuffix("-medformer"), protocol)
    return recipe.model_copy(
        update={
            "preset": preset,
            "patch_size": None,
            "preparation": recipe.preparation.model_copy(update=_OF_THE_DATASET),
            "split": recipe.split.model_copy(update={"held_out": None, "left_out": None}),
        }
    )


def default_training(preset: str) -> TrainingConfig:
    """The settings for `preset` where nobody says otherwise; a `-medformer` twin has those of the paper's network."""
    return recipe_for_preset(preset).training


def change_training(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """`recipe` with other training settings; InputError for values that they cannot take."""
    try:
        training = TrainingConfig.model_validate(recipe.training.model_dump() | dict(changes))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{first['loc'][0]} cannot be {first['input']!r}: {first['msg']}.") from None
    return recipe.model_copy(update={"training": training})


def with_network(recipe: Recipe, name: str) -> Recipe:
    """`recipe` for the network `name`; InputError when there is none in the preset's dimensions."""
    find_network(name, get_preset(recipe.preset).dimensions)
    return recipe.model_copy(update={"network": name})


def with_leaks(recipe: Recipe, leaks: Sequence[Leak]) -> Recipe:
    """`recipe` with what the authors' code lets the scores know of the held-out scans' label maps.

    best-epoch: the weights of the epoch that scores best on the held-out scans. label-crop: scans, held-out ones too,
    cropped to the box of their labels. resampled-grid: scores on the network's grid. Raises InputError for a crop
    whose context the recipe does not give.
    """
    evaluation, preparation = recipe.evaluation, recipe.preparation
    if "best-epoch" in leaks:
        evaluation = evaluation.model_copy(update={"weights": "best"})
    if "resampled-grid" in leaks:
        evaluation = evaluation.model_copy(update={"grid": "resampled"})
    if "label-crop" in leaks:
        if preparation.label_context is None:
            raise InputError("--leak-label-crop needs a recipe with label_context, such as bcv-3d on paper.")
        preparation = preparation.model_copy(update={"crop": "label"})
    return recipe.model_copy(update={"evaluation": evaluation, "preparation": preparation})


def _recipe_file(name_or_file: str) -> Path:
    if name_or_file.endswith((".yaml", ".yml")):
        return Path(name_or_file)
    if name_or_file not in (names := shipped_recipes()):
        raise InputError(f"There is no recipe {name_or_file!r}; choose one of {', '.join(names)}, or give a YAML file.")
    return _FOLDER / f"{name_or_file}.yaml"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = plain_yaml.load(read_bounded(file, _LARGEST_FILE).decode("utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{file}: no such recipe file; check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())}); correct it.") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no settings; write them as `preset: acdc-2d` and so on, one per line.")
    return content


def _merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`content` with the fields of every section that `changes` names."""
    merged = dict(content)
    for name, value in changes.items():
        section = merged.get(name)
        merged[name] = section | value if isinstance(section, dict) and isinstance(value, dict) else value
    return merged


def _validated(file: Path, content: dict[str, Any], prefix: str = "") -> Recipe:
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        # Where a field may be of two kinds, the error that goes deepest is that of the kind which was meant.
        deepest = max(error.errors(), key=lambda single: len(single["loc"]))
        unknown = deepest["type"] == "extra_forbidden"
        *parents, last = map(str, deepest["loc"])
        # pydantic puts the kind of field into the path too: "literal['none', ...]".
        path = [part for part in parents if part.isidentifier()] + [last] * (unknown or last.isidentifier())
        what = "no such setting" if unknown else deepest["msg"]
        raise InputError(f"{file}: {prefix}{'.'.join(path)}: {what}; correct it.") from None
    if recipe.preset not in PRESETS:
        raise InputError(f"{file}: {prefix}preset: no preset {recipe.preset!r}; choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[recipe.preset]
    try:
        find_network(recipe.network, preset.dimensions)
    except InputError as error:
        raise InputError(f"{file}: {prefix}network: {error}") from None
    if recipe.patch_size is not None and len(recipe.patch_size) != preset.dimensions:
        raise InputError(
            f"{file}: {prefix}patch_size: {len(recipe.patch_size)} axes for {recipe.preset}, which has "
            f"{preset.dimensions}; correct it."
        )
    return recipe
