"""`lockstep report`: which parts were asked for, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.experiments.report import page, parts, run, text
from cluster.experiments.report.parts import Part
from cluster.experiments.trials import Study
from trainer.errors import UserError
from trainer.run_folder import layout

FORMATS = {"text": text.terminal, "md": text.markdown, "csv": text.comma_separated}


def report(
    names: Sequence[str],
    directory: str,
    reference: str | None = None,
    form: str = "text",
    html: Path | None = None,
    figures: Path | None = None,
) -> str:
    """What to print of sweeps and runs, by name or folder, and of the reference tables.

    The page and the figures are written first. UserError where there is nothing to report, or a file cannot
    be written.
    """
    found = [_part(layout.named(directory, name)) for name in names]
    found += [parts.of_references()] if reference else []
    if not found:
        raise UserError("report: nothing to report on; name sweeps or runs, or give --reference mlperf")
    said = []
    if html:
        _write(html, page.page(found))
        said.append(f"{html} written")
    if figures:
        drawn = [path for each in found for path in _drawn(each, figures)]
        said.append(f"{figures}: {len(drawn)} files written")
    return "\n".join(said) if said and form == "text" else FORMATS[form](found)


def _part(folder: Path) -> Part:
    return parts.of_sweep(Study.read(folder)) if layout.is_sweep(folder) else run.of_run(folder)


def _drawn(part: Part, folder: Path) -> list[Path]:
    below = folder / part.title
    try:
        below.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--figures {folder}: cannot be made ({error.strerror}); give a folder") from error
    return [path for figure in part.figures() for path in figure.save(below)]


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}); give a file's path") from error
