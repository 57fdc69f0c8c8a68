"""What travels with a job: what the user means, nothing secret, nothing from elsewhere."""

import os
import zipfile
from pathlib import Path

import pytest

from cluster.package import Listing, packed
from trainer.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for name in ("tiny.yaml", "my_task.py", "data/labels.py", "data/part-0.bin", "deep/er/notes.txt"):
        write(folder / name)
    return folder


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_gits_ignore_file_decides_nothing(folder: Path):
    (folder / ".gitignore").write_text("data/\n*.py\n")
    (folder / "data/.gitignore").write_text("*\n")
    assert {"my_task.py", "data/labels.py", "data/part-0.bin", ".gitignore"} <= Listing.of(
        folder
    ).files.keys()


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "deep/.env.local",
        "prod.env",
        ".netrc",
        "id_rsa",
        "deep/server.pem",
        ".aws/credentials",
        "x/.ssh/config",
        "auth_token",
        "gcp-credentials.json",
        "client_secret_1.json",
        ".PYPIRC",
        "secrets.yaml",
        "kaggle.json",
    ],
)
def test_files_of_secrets_stay(folder: Path, name: str):
    write(folder / name, "planted")
    listing = Listing.of(folder)
    assert not [path for path in listing.files if "planted" in (folder / path).read_text()]
    assert "may hold secrets" in listing.left_out.values()
    assert "may hold secrets" in "\n".join(listing.lines())


def test_links_lead_nowhere_else(folder: Path, tmp_path: Path):
    write(tmp_path / "outside/file", "planted")
    write(folder / ".env", "planted")
    for name, target in {
        "to_file": tmp_path / "outside/file",
        "to_folder": tmp_path / "outside",
        "by_way": folder / "to_folder/file",
        "to_secret": folder / ".env",
        "upward": "../outside/file",
        "broken": "nowhere",
        "around": ".",
        "inside.txt": "deep/er/notes.txt",
    }.items():
        os.symlink(target, folder / name)
    os.mkfifo(folder / "pipe")
    listing = Listing.of(folder)
    assert "inside.txt" in listing.files
    assert not [name for name in listing.files if "planted" in (folder / name).read_text()]
    left = {"to_file", "to_folder/", "by_way", "to_secret", "upward", "broken", "around/", "pipe"}
    assert left <= listing.left_out.keys()


def test_the_users_own_ignore_file_is_as_gits(folder: Path):
    (folder / ".lockstepignore").write_text("# big\n*.bin\n/deep/\n!data/part-0.bin\n\n")
    write(folder / "data/part-1.bin")
    write(folder / "other/deep/kept.txt")
    files = Listing.of(folder).files
    assert {"data/part-0.bin", "other/deep/kept.txt"} <= files.keys()
    assert not {"data/part-1.bin", "deep/er/notes.txt"} & files.keys()


def test_the_archive_holds_the_list_and_is_always_the_same(folder: Path):
    said: list[str] = []
    archives = []
    for _ in range(2):
        with packed(folder, 1 << 20, said.append) as archive:
            archives.append(archive.read_bytes())
            with zipfile.ZipFile(archive) as opened:
                assert set(opened.namelist()) == Listing.of(folder).files.keys()
                assert opened.read("my_task.py") == b"x"
        assert not archive.exists()
        os.utime(folder / "my_task.py")
    assert archives[0] == archives[1]
    assert "taking along 5 files" in said[0]


def test_what_is_too_large_is_refused_with_what_could_stay(folder: Path):
    (folder / "data/huge.bin").write_bytes(os.urandom(200_000))
    with (
        pytest.raises(UserError, match=r"\.lockstepignore, such as data/huge\.bin"),
        packed(folder, 100_000, lambda _: None),
    ):
        pass
