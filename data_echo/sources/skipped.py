"""What never is data, whatever else it looks like: names that are hidden or belong to a system."""

from __future__ import annotations

from collections.abc import Iterable

_SYSTEM = frozenset(
    {
        "__macosx",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "@eadir",
        "lost+found",
        "$recycle.bin",
        "system volume information",
    }
)
_SHOWN = 3  # names of a sentence


def is_hidden(path: str) -> bool:
    """Whether a part of a path, which `/` divides, is hidden (`.git`, `._a.jpg`) or a system's."""
    parts = path.split("/")
    return any(part.lower() in _SYSTEM or (part[:1] == "." and part not in (".", "..")) for part in parts)


def skipped_line(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """One line on names that were left out, with a few of them; none where there are no names."""
    found = sorted(name.encode(errors="surrogateescape").decode(errors="replace") for name in names)
    if not found:
        return ()
    more = ", ..." if len(found) > _SHOWN else ""
    return (f"{what}: {len(found)} ({', '.join(found[:_SHOWN])}{more})",)
