"""What MLflow refuses: one entry, everything until somebody changes something, or everything just now."""

import re
from collections.abc import Callable
from typing import TypeVar

from trainer.errors import first_line

Entry = TypeVar("Entry")
ENTRY_CODES = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE"}
GONE = "RESOURCE_DOES_NOT_EXIST"

# What the text of a lasting refusal matches, and what would be right.
_LASTING = (
    (
        r"experiment .* must be in the 'active' state",
        "the experiment is deleted; restore it with `mlflow experiments restore`, or set track.experiment",
    ),
    (
        r"run .* must be in the 'active' state",
        "the run was deleted in MLflow; restore it with `mlflow runs restore`, or begin another with "
        "`lockstep sync`",
    ),
    (
        "maintenance mode",
        "MLflow serves no folder of files any more; move it over with `mlflow migrate-filestore`, or set "
        "track.uri to sqlite:///mlflow.db",
    ),
    (
        "out-of-date database schema|Can't locate revision",
        "another version of MLflow made the database; use that one, or `mlflow db upgrade` after a backup",
    ),
    (
        "unsupported URI|Could not parse SQLAlchemy URL|Unsupported",
        "set track.uri to sqlite:///FILE or http://HOST",
    ),
    ("file is not a database", "the file is no SQLite database; move it away or set track.uri"),
    (
        "readonly database|unable to open database|Permission denied",
        "the place cannot be written; set track.uri",
    ),
    (
        r"\b401\b|\b403\b|PERMISSION_DENIED|UNAUTHENTICATED",
        "the server refuses the credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    ),
    ("ENDPOINT_NOT_FOUND|error code 404", "no MLflow server answers at the address; look at track.uri"),
)


class LastingRefusal(Exception):  # noqa: N818
    """MLflow will not take the run until somebody changes something; the text says what."""


def lasting(error: Exception) -> LastingRefusal | None:
    """The refusal that an error stands for, where trying again would not help; None for an outage."""
    if isinstance(error, LastingRefusal):
        return error
    if isinstance(error, ModuleNotFoundError):
        cure = f"install {error.name}" if error.name else "install what is missing"
        return LastingRefusal(f"{error}; {cure}, which the place of tracking needs")
    text = f"{getattr(error, 'error_code', '')} {error}"
    for pattern, cure in _LASTING:
        if re.search(pattern, text, re.IGNORECASE):
            return LastingRefusal(f"{first_line(error)}; {cure}")
    return None


def is_of_an_entry(error: Exception) -> bool:
    """Whether MLflow refuses something in a request, and not the request because of where it came at."""
    code, too_large = getattr(error, "error_code", None), re.search(r"\b413\b|too large", str(error))
    return lasting(error) is None and (code in ENTRY_CODES or bool(too_large))


def is_gone(error: Exception) -> bool:
    """Whether there is no such run in this MLflow."""
    return getattr(error, "error_code", None) == GONE


def send_in_parts(
    entries: list[Entry], send: Callable[[list[Entry]], object]
) -> list[tuple[Entry, Exception]]:
    """Send entries in one request; where one is refused, all others still go. Returns the refused ones."""
    if not entries:
        return []
    try:
        send(entries)
    except Exception as error:
        if not is_of_an_entry(error):
            raise
        if len(entries) == 1:
            return [(entries[0], error)]
        half = len(entries) // 2
        return send_in_parts(entries[:half], send) + send_in_parts(entries[half:], send)
    return []
