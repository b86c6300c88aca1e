"""A study goes on by the same command, takes more of the same, and refuses to mix."""

from __future__ import annotations

from pathlib import Path

import pytest

from utnetv2_fast.errors import InputError
from utnetv2_fast.study.folder import Budget, Study, StudyFolder, Trial, trials
from utnetv2_fast.training.recipe import recipe_for_preset


@pytest.fixture
def study() -> Study:
    return Study(data="data", prepared="prepared", recipe=recipe_for_preset("tiny-2d"), minutes=2)


def test_what_is_written_is_read_again(study: Study, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.begin(study)
    assert folder.read() == study


def begin_a_trial(folder: StudyFolder) -> None:
    run = folder.run(Trial("utnetv2", 0, 0))
    run.path.mkdir(parents=True)
    run.config_file.touch()
    run.environment_file.touch()


def test_other_settings_are_refused_by_name(study: Study, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.begin(study)
    folder.begin(study.model_copy(update={"minutes": 1}))  # nothing is lost yet
    folder.begin(study)
    begin_a_trial(folder)
    folder.begin(study)
    with pytest.raises(InputError, match=r"other settings \(recipe, minutes\); give those"):
        folder.begin(Study(data="data", prepared="prepared", recipe=recipe_for_preset("tiny-3d"), minutes=3))


def test_weights_to_begin_with_can_be_added(study: Study, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.begin(study.model_copy(update={"pretrained": {"swinunet": "a"}}))
    begin_a_trial(folder)
    folder.begin(study.model_copy(update={"pretrained": {"transunet": "b"}}))
    assert folder.read().pretrained == {"swinunet": "a", "transunet": "b"}


@pytest.mark.parametrize("content", ["", "data: [1", "data: a\nextra: 1\n", "- 1"])
def test_a_damaged_study_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(InputError, match=r"study\.yaml: damaged"):
        StudyFolder(tmp_path).read()


def test_budgets_are_kept_and_a_damaged_one_named(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.budget("utnetv2") is None
    folder.write_budget("utnetv2", Budget(device="cpu", threads=1, seconds_per_step=0.5, steps_per_epoch=20))
    assert folder.budget("utnetv2") == Budget(device="cpu", threads=1, seconds_per_step=0.5, steps_per_epoch=20)
    folder.budget_file("utnetv2").write_text("{}")
    with pytest.raises(InputError, match="budget-utnetv2"):
        folder.budget("utnetv2")


def test_every_trial_has_a_folder_of_its_own_where_it_is_found(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    wanted = trials(["utnetv2", "unet++"], [0, 1], [0, 2], [0.05, 1.0])
    assert len({folder.run(trial).path for trial in wanted}) == len(wanted) == 16
    for trial in wanted:
        folder.run(trial).path.mkdir(parents=True)
        folder.run(trial).config_file.touch()
    assert {run.path for run in folder.runs()} == {folder.run(trial).path for trial in wanted}
    assert folder.run(Trial("utnetv2", 1, 2, 0.05)).path.relative_to(tmp_path) == Path(
        "utnetv2/patients-5/seed-1/fold-2"
    )


def test_all_networks_come_once_before_any_twice() -> None:
    order = [trial.network for trial in trials(["a", "b", "c"], [0, 1], [0])]
    assert order[:3] == order[3:] == ["a", "b", "c"]
