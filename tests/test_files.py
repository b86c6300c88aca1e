"""A file appears at its name whole, on the disk, and readable as any other; or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from utnetv2_fast.files import atomic_write, remove_unfinished, write_text_atomically


def test_content_is_on_the_disk_before_the_name_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name shows the old content until then."""
    synced = []
    file = tmp_path / "a.json"
    write_text_atomically(file, "old")
    fsync, replace = os.fsync, os.replace

    def note(opened: object) -> None:
        fsync(opened)  # type: ignore[arg-type]
        synced.append(os.fstat(opened.fileno()).st_ino)  # type: ignore[attr-defined]

    def check(source: Path, target: Path) -> None:
        assert synced == [source.stat().st_ino]
        assert target.read_text() == "old"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    write_text_atomically(file, "new")
    assert file.read_text() == "new"


def test_a_failure_keeps_the_old_file_and_names_it(tmp_path: Path) -> None:
    file = tmp_path / "scan.nii.gz"
    file.write_text("old")
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(file) as temporary:  # noqa: PT012
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(file)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text_atomically(tmp_path / "atomic", "")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_only_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "deep" / "kept.txt", "")
    (tmp_path / ".hidden").touch()
    left = []
    for folder in (tmp_path, tmp_path / "deep"):
        with atomic_write(folder / "a.pt") as temporary:
            left.append(temporary.with_name(temporary.name.replace("a.", "a.killed.")))
            left[-1].touch()
        (folder / "a.pt").unlink()
    remove_unfinished(tmp_path)
    assert not any(file.exists() for file in left)
    assert {file.name for file in tmp_path.rglob("*")} == {".hidden", "deep", "kept.txt"}
