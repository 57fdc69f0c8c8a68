"""What travels with a job: our own list of the working folder's files, in one archive, and our packages.

Nothing is decided by git's ignore file or by Ray. Left out are what `.lockstepignore` names (a pattern a
line, as in git's), what is never needed, files that hold secrets by their name, and links that lead out of
the folder.
"""

import fnmatch
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import UserError

IGNORE = ".lockstepignore"
NEVER = (
    *("/runs/", "/mlruns/", "/mlflow.db*", ".git/", ".hg/", ".svn/", ".venv/", "/venv/", "__pycache__/"),
    *(".ipynb_checkpoints/", ".DS_Store", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/"),
)
SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".htpasswd", ".npmrc"),
    *(".pypirc", ".git-credentials", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key"),
    *("*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*credentials*.json", "*secret*.json"),
    *("*secrets.y*ml", "*secrets.toml", "credentials", "auth_token", "*.token", ".databrickscfg", ".s3cfg"),
    *("kaggle.json", ".boto", "*.tfvars", "*.tfstate", ".secrets/", ".ssh/", ".aws/", ".azure/", ".gcloud/"),
    *(".kube/", ".gnupg/", ".docker/"),
)
JOB_BYTES, CLUSTER_BYTES = 100 << 20, 500 << 20  # the largest archive that a head, and a cluster, takes
MOST_SHOWN = 5


@dataclass
class Listing:
    """The files that travel, relative to the folder, with their sizes; those that do not, with the reason."""

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Listing":
        """The files of a folder, in order."""
        found, folder = cls(folder.resolve()), folder.resolve()
        patterns = _own_patterns(folder)
        for parent, folders, names in os.walk(folder):
            place = Path(parent).relative_to(folder)
            for name in sorted(folders):
                reason = found._reason(place / name, patterns, is_folder=True)
                if reason is None and (folder / place / name).is_symlink():
                    reason = "a link to a folder"  # its files travel from where they are, if they are inside
                if reason is not None:
                    found.left_out[f"{(place / name).as_posix()}/"] = reason
            folders[:] = [it for it in sorted(folders) if f"{(place / it).as_posix()}/" not in found.left_out]
            for name in sorted(names):
                path = place / name
                reason = found._reason(path, patterns, is_folder=False)
                if reason is None:
                    found.files[path.as_posix()] = (folder / path).stat().st_size
                else:
                    found.left_out[path.as_posix()] = reason
        return found

    def _reason(self, path: Path, patterns: list[str], is_folder: bool) -> str | None:
        """Why a file or a folder stays; None: it travels."""
        whole = self.folder / path
        if _matches(path, NEVER, is_folder):
            return "never needed"
        if _matches(path, SECRET_FILES, is_folder):
            return "may hold secrets"
        if _ignored(path, patterns, is_folder):
            return f"named in {IGNORE}"
        if whole.is_symlink() and not whole.resolve().is_relative_to(self.folder):
            return "a link out of the folder"
        if whole.is_symlink() and self._is_secret(whole.resolve()):
            return "may hold secrets"
        if not is_folder and not whole.is_file():
            return "no file"
        return None

    def _is_secret(self, target: Path) -> bool:
        inside = target.relative_to(self.folder)
        return any(_matches(part, SECRET_FILES, part != inside) for part in (inside, *inside.parents))

    def lines(self) -> list[str]:
        """What travels and what stays, as it is shown before it goes."""
        total = sum(self.files.values())
        shown = [f"taking along {len(self.files):,} files of {self.folder}, {_megabytes(total)}"]
        largest = sorted(self.files.items(), key=lambda item: -item[1])[:MOST_SHOWN]
        shown += [f"  {name}  {_megabytes(size)}" for name, size in largest]
        if len(self.files) > MOST_SHOWN:
            shown.append(f"  and {len(self.files) - MOST_SHOWN:,} more")
        said = {name: reason for name, reason in self.left_out.items() if reason != "never needed"}
        shown += [f"  left here: {name} ({reason})" for name, reason in list(said.items())[:MOST_SHOWN]]
        if len(said) > MOST_SHOWN:
            shown.append(f"  left here: {len(said) - MOST_SHOWN:,} more")
        return shown

    def pack(self, path: Path, most_bytes: int) -> None:
        """Write the archive that Ray unpacks: the same files make the same bytes.

        Raises:
            UserError: it becomes larger than `most_bytes`.
        """
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in self.files:
                info = zipfile.ZipInfo(name)  # with a time that is always the same
                info.external_attr = (self.folder / name).stat().st_mode << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                with (self.folder / name).open("rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target)
                if path.stat().st_size > most_bytes:
                    raise self._too_large(most_bytes)
        if path.stat().st_size > most_bytes:
            raise self._too_large(most_bytes)

    def _too_large(self, most_bytes: int) -> UserError:
        largest = max(self.files, key=lambda name: self.files[name])
        cure = f"name what stays here in {IGNORE}, such as {largest} ({_megabytes(self.files[largest])})"
        return UserError(
            f"{self.folder}: holds {_megabytes(sum(self.files.values()))}, and at most "
            f"{_megabytes(most_bytes)} are taken along, compressed; {cure}"
        )


@contextmanager
def packed(folder: Path, most_bytes: int, say: Callable[[str], object]) -> Iterator[Path]:
    """The archive of a folder, for as long as the body runs; what is in it is said first."""
    listing = Listing.of(folder)
    say("\n".join(listing.lines()))
    with tempfile.TemporaryDirectory(prefix="lockstep-package-") as place:
        archive = Path(place) / "folder.zip"
        listing.pack(archive, most_bytes)
        yield archive


def in_job() -> bool:
    """Whether this process is the entry point of a Ray job, which has brought its code with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _own_patterns(folder: Path) -> list[str]:
    try:
        lines = (folder / IGNORE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / IGNORE}: cannot be read ({error}); it holds a pattern a line") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _ignored(path: Path, patterns: list[str], is_folder: bool) -> bool:
    """As in git, the last pattern that matches decides, and `!` takes one back."""
    ignored = False
    for pattern in patterns:
        if _matches(path, [pattern.removeprefix("!")], is_folder):
            ignored = not pattern.startswith("!")
    return ignored


def _matches(path: Path, patterns: tuple[str, ...] | list[str], is_folder: bool) -> bool:
    """Whether a pattern names a path: with a slash inside from the folder on, otherwise at any depth."""
    return any(_match(path, pattern, is_folder) for pattern in patterns)


def _match(path: Path, pattern: str, is_folder: bool) -> bool:
    if pattern.endswith("/") and not is_folder:
        return False
    pattern = pattern.rstrip("/")
    if "/" in pattern:
        return any(fnmatch.fnmatchcase(path.as_posix(), it) for it in _spelled(pattern.lstrip("/")))
    return fnmatch.fnmatchcase(path.name.lower(), pattern.lower())


def _spelled(pattern: str) -> Iterator[str]:
    """A pattern, and without its `**/`, which stands for any depth, none included."""
    yield pattern
    if "**/" in pattern:
        yield from _spelled(pattern.replace("**/", "", 1))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
