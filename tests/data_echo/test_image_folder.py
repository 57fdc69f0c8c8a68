"""Folders of images: one list of classes for all splits, whatever else lies there."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_echo import DataError, ExampleError, ImageFolderSource, InlinePreparer, PrepareRequest

NOISE = [".ipynb_checkpoints/a.jpg", "__MACOSX/cat/a.jpg", "@eaDir/a.jpg", ".cat/a.jpg", "cat/._0.jpg"]
NOISE += ["cat/.hidden/a.jpg", "cat/Thumbs.db", "desktop.ini", "aaa/notes.txt", "cat/list.csv", "a.jpg", "0/"]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_bytes(name.encode())
    return folder


def labels(source: ImageFolderSource) -> dict[str, int]:
    """Labels by the name of the class's folder."""
    return {
        Path(source.origin(index)).parent.name: int(source[index]["label"]) for index in range(len(source))
    }


@given(in_training=st.sets(st.sampled_from(NOISE)), in_validation=st.sets(st.sampled_from(NOISE)))
def test_labels_do_not_depend_on_what_else_lies_there(
    tmp_path_factory: pytest.TempPathFactory, in_training: set[str], in_validation: set[str]
) -> None:
    root = tmp_path_factory.mktemp("data")
    fill(root / "train", "cat/0.jpg", "dog/0.jpg", "horse/0.png", *in_training)
    fill(root / "val", "cat/0.jpg", "horse/0.png", *in_validation)  # without dogs
    training, validation = ImageFolderSource(root / "train"), ImageFolderSource(root / "val")
    assert training.classes == validation.classes == ("cat", "dog", "horse")
    assert labels(training) == {"cat": 0, "dog": 1, "horse": 2}
    assert labels(validation) == {"cat": 0, "horse": 2}
    assert len(training) == 3
    assert bool(training.skipped) == bool(in_training), "what is left out is said"


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    assert ImageFolderSource(fill(tmp_path / "train", "cat/0.jpg", *NOISE)).skipped == (
        "hidden or system names: 8 (.cat, .ipynb_checkpoints, @eaDir, ...)",
        "files that are no images of a class: 3 (a.jpg, aaa/notes.txt, cat/list.csv)",
        "folders without images: 2 (0, aaa)",
    )


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/0.jpg", "train/dog/0.jpg", "val/cat/0.jpg", "val/Dog/0.jpg")
    with pytest.raises(
        DataError, match=r"images: \S*/val/Dog: 'Dog' is none of the 2 classes; cat, dog \(of"
    ):
        ImageFolderSource(tmp_path / "val")
    with pytest.raises(DataError, match="'dog' is none of the 1 classes; cat"):
        ImageFolderSource(tmp_path / "train", classes=["cat"])


def test_the_classes_may_be_given(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/0.jpg", "train/dog/0.jpg", "val/dog/0.jpg")
    source = ImageFolderSource(tmp_path / "val", classes=["wolf", "dog", "cat"])
    assert labels(source) == {"dog": 1}
    assert source.classes == ("wolf", "dog", "cat")
    for wrong in ("dog", ["dog", "dog"]):
        with pytest.raises(DataError, match=r"images: classes: .*; a list of names, each once"):
            ImageFolderSource(tmp_path / "val", classes=wrong)


def test_the_training_split_is_beside_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "training/cat/0.jpg", "training/dog/0.jpg", "held-out/dog/0.jpg", "alone/x/dog/0.jpg")
    assert labels(ImageFolderSource(tmp_path / "held-out")) == {"dog": 1}
    assert labels(ImageFolderSource(tmp_path / "alone/x")) == {"dog": 0}
    monkeypatch.chdir(tmp_path / "held-out")
    assert labels(ImageFolderSource(".")) == {"dog": 1}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert labels(ImageFolderSource("~/held-out")) == {"dog": 1}


def test_links_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    fill(tmp_path, "store/cats/1.jpg", "store/2.jpg", "train/cat/0.jpg")
    (tmp_path / "train/dog").symlink_to(tmp_path / "store/cats")
    (tmp_path / "train/cat/9.jpg").symlink_to(tmp_path / "store/2.jpg")
    source = ImageFolderSource(tmp_path / "train")
    assert [int(source[index]["label"]) for index in range(3)] == [0, 0, 1]
    (tmp_path / "train/cat/8.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"images: \S*cat/8.jpg: a link to nothing"):
        ImageFolderSource(tmp_path / "train")
    (tmp_path / "train/cat/8.jpg").unlink()
    (tmp_path / "train/cat/again").symlink_to(tmp_path / "train")
    with pytest.raises(DataError, match=r"a link that leads back to \S*; folders without circles"):
        ImageFolderSource(tmp_path / "train")


def test_what_only_looks_like_an_image_is_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "cat/0.jpg", "cat/folder.jpg/", "cat/full.jpg/1.jpg")
    os.mkfifo(tmp_path / "cat/pipe.jpg")  # reading it would wait for ever
    source = ImageFolderSource(tmp_path)
    assert [Path(source.origin(index)).name for index in range(len(source))] == ["0.jpg", "1.jpg"]
    assert source.skipped == ("files that are no images of a class: 1 (cat/pipe.jpg)",)


def test_an_image_that_vanishes_is_named(tmp_path: Path) -> None:
    class Task:
        def source(self, split: str) -> ImageFolderSource:
            return ImageFolderSource(tmp_path)

        def prepare(self, example: dict, draw: object) -> dict:
            return {"label": example["label"]}

    fill(tmp_path, "cat/0.jpg", "cat/1.jpg")
    preparer = InlinePreparer(Task(), 0)
    preparer.collect(PrepareRequest("train", np.zeros(1, int), np.array([0])))
    (tmp_path / "cat/1.jpg").unlink()
    with pytest.raises(ExampleError, match=r"train: example 1 \(\S*cat/1.jpg\): FileNotFoundError"):
        preparer.collect(PrepareRequest("train", np.zeros(1, int), np.array([1])))
