"""Writing: whole or not at all, and never over what is no file of ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

import pocketsam
from pocketsam.bundle import read_bundle
from pocketsam.errors import BundleError, ImageError, OutputError, UnknownName
from pocketsam.files import cache_root, check_writable, sha256_path, size_of, staged_file, staged_folder
from pocketsam.folders import check_output
from pocketsam.images import photos_in
from pocketsam.labels import stem_of

FOLDER = "result"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that is there already."""
    path = tmp_path / FOLDER
    path.mkdir()
    (path / "a").write_text("old")
    return path


def put(folder: Path, text: str = "new") -> None:
    with staged_folder(folder) as staging:
        (staging / "a").write_text(text)


def held(folder: Path) -> dict[str, str]:
    """What is in the folder, which has no leftovers beside it."""
    assert [p.name for p in folder.parent.iterdir()] == [FOLDER]
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_a_folder_takes_the_place_of_another(old: Path) -> None:
    put(old)
    assert held(old) == {"a": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_rename_loses_nothing(old: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException],
                                             step: int) -> None:
    rename, calls = Path.rename, []

    def stops(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stops)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        put(old)
    assert held(old) == {"a": "old"}


def test_the_folder_that_one_stands_in(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    put(Path())
    assert held(old) == {"a": "new"}


def test_a_linked_folder_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / FOLDER).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / FOLDER)
    put(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert held(tmp_path / "disk" / FOLDER) == {"a": "new"}


def test_a_mount_point_is_refused_before_the_work(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == old)
    with pytest.raises(OutputError, match="mount point"), staged_folder(old):
        raise AssertionError("the work was begun")
    assert held(old) == {"a": "old"}


def test_errors_of_the_work_are_not_called_errors_of_the_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / FOLDER):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(OutputError, match="No space left"), staged_folder(tmp_path / FOLDER):
        raise OSError(28, "No space left on device")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="no regular file"), staged_file(pipe):
        pass
    assert pipe.is_fifo()


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("あ" * 80 + ".json")
    with staged_file(path) as staged:
        staged.write_text("x")
    assert path.read_text() == "x"


def test_names_that_are_too_long_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    for write in (staged_file, staged_folder):
        with pytest.raises(OutputError, match="File name too long"), write(path):
            pass
    with pytest.raises(OutputError, match="File name too long"):
        check_writable(path)
    with pytest.raises(OutputError, match="File name too long"):
        check_output(path)
    with pytest.raises(BundleError, match=r"File name too long|does not exist"):
        read_bundle(path)
    with pytest.raises(ImageError, match=r"File name too long|does not exist"):
        photos_in(path)
    with pytest.raises(UnknownName, match="unknown model"):
        pocketsam.load("x" * 300)


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    check_writable(tmp_path / "mine")
    check_writable(tmp_path / "new/folder/file.json")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(OutputError, match="is no folder"):
        check_writable(tmp_path / "mine/file.json")
    with pytest.raises(OutputError, match="which is a folder"):
        check_writable(tmp_path)


def test_what_is_written_has_the_rights_of_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged_file(tmp_path / "f") as staged:
            staged.write_text("x")
        put(tmp_path / FOLDER)
    finally:
        assert os.umask(before) == 0o027
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o750


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("POCKETSAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_root().is_dir()
    assert cache_root() == cache_root()


def test_what_macos_leaves_beside_files_is_no_part_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "encoder.ir"
    folder.mkdir()
    (folder / "model.xml").write_text("x")
    before = sha256_path(folder), size_of(folder)
    for name in (".DS_Store", "._model.xml"):
        (folder / name).write_text("litter")
    assert (sha256_path(folder), size_of(folder)) == before
    Image.new("RGB", (2, 2)).save(folder / "a.png")
    (folder / "._a.png").write_text("litter")
    assert photos_in(folder) == [folder / "a.png"]


def test_names_are_cut_between_characters() -> None:
    assert stem_of("\u5199" * 81 + ".jpg").startswith("\u5199" * 66 + "-")
