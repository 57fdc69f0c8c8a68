"""Secrets, and the one way in which they are hidden: whatever a run writes, sends or shows passes `hidden`.

Secret are values of the environment whose variable says so (`…_PASSWORD`, `…_TOKEN`, `…_SECRET_…`, `…_KEY`,
and the content of a file that such a variable names), what stands before the `@` of an address, and
parameters of an address such as `token=`. The environment's values are hidden wherever they stand, the
others by their form.
"""

import base64
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
SHORTEST, SHORTEST_REFUSED = (
    4,
    8,
)  # characters of a value that is hidden, and of one that a recipe may not hold
LARGEST_FILE = 16384  # bytes of a file that may hold a secret
NO_SECRETS = {"token", "true", "false", "none", "null", "auto", "basic", "bearer", "default", "disabled"}

_SECRET = r"password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|credentials?"
_VARIABLE = re.compile(
    rf"(?:{_SECRET}|apikey|.[_-]pwd|(?:^|_)(?:key|auth|pass|sas|pat|jwt|cookie|connection_string)(?:_|$))",
    re.I,
)
_NO_VARIABLE = re.compile(r"(?:_mode|_type|_method|_enabled|_parallelism|_sock)$", re.I)
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s:/@]+:(?!\d+[/?#])[^\s@]*)@")
_QUERY = re.compile(  # MLflow's pages are ordered by a "key" that is none
    rf"([?&;](?!orderByKey=)[^=&\s]*(?:{_SECRET}|signature|sig|key|auth|pwd)=)[^&\s'\"#;,<>)]+", re.I
)
_FORMS = (
    (_USER, f"{HIDDEN}@"),
    (_QUERY, rf"\g<1>{HIDDEN}"),
    (re.compile(rf"(\b[\w.-]*(?:{_SECRET}|pwd)=)[^&\s'\"#;,<>)]+", re.I), rf"\g<1>{HIDDEN}"),
    (re.compile(rf"([\"'][\w.-]*(?:{_SECRET})[\"']\s*:\s*)([\"'])[^\"']+\2", re.I), rf"\g<1>'{HIDDEN}'"),
    (re.compile(r"(\b(?:basic|bearer)\s+)[\w+/=.~-]{8,}", re.I), rf"\g<1>{HIDDEN}"),
    (re.compile(r"(\buser(?:name)?\s*[=:]?\s*)([\"'])[^\"']+\2", re.I), rf"\g<1>'{HIDDEN}'"),
)


def hidden(text: str) -> str:
    """`text` with `***` in place of every secret in it."""
    known = _known(_environment())
    if known is not None:
        text = known.sub(HIDDEN, text)
    for form, instead in _FORMS:
        text = form.sub(instead, text)
    return text


def hidden_in(value: Any) -> Any:
    """A value of lists, dicts and plain values, with its texts as `hidden` leaves them."""
    match value:
        case str():
            return hidden(value)
        case Mapping():
            return {key: hidden_in(inner) for key, inner in value.items()}
        case list() | tuple():
            return [hidden_in(inner) for inner in value]
    return value


def gives_away(text: str) -> str | None:
    """What secret a text of a recipe holds: an address's or the environment's; None where there is none."""
    for user in _USER.findall(text):
        if ":" in user.rstrip("@"):
            return "a password"
    if _QUERY.search(text):
        return "a token"
    for name, value in _environment():
        if any(len(secret) >= SHORTEST_REFUSED and secret in text for secret in _secrets_of(name, value)):
            return f"the value of {name} in the environment"
    return None


class Veil:
    """A text stream that hides secrets, line by line, in what it passes on to another one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        """Pass on the lines that are whole."""
        whole, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self.stream.write(hidden(whole) + newline)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Pass on some texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what there is, whole or not."""
        rest, self._rest = self._rest, ""
        self.stream.write(hidden(rest))
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _environment() -> tuple[tuple[str, str], ...]:
    """The variables that may hold a secret."""
    return tuple(
        (name, value)
        for name, value in os.environ.items()
        if "://" in value or (_VARIABLE.search(name) and not _NO_VARIABLE.search(name))
    )


@functools.lru_cache(maxsize=8)
def _known(environment: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """What matches the environment's secrets, however they are spelled; None where there are none."""
    spellings = {
        spelling
        for name, value in environment
        for secret in _secrets_of(name, value)
        for spelling in _spellings(secret)
        if len(spelling) >= SHORTEST
    }
    user, password = (dict(environment).get(f"MLFLOW_TRACKING_{it}", "") for it in ("USERNAME", "PASSWORD"))
    if password:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME", user)
        spellings.add(base64.b64encode(f"{user}:{password}".encode()).decode())
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


@functools.lru_cache(maxsize=256)
def _secrets_of(name: str, value: str) -> tuple[str, ...]:
    """The secrets in one variable of the environment."""
    found: list[str] = []
    if _VARIABLE.search(name) and not _NO_VARIABLE.search(name):
        found += _content(value) if os.path.exists(value) else [value, *value.splitlines()]
    _, _, address = value.partition("://")  # with more than one "@", a password may hold one
    for user in {*_USER.findall(value), address.rpartition("@")[0]}:
        named, _, password = user.rstrip("@").partition(":")
        if "/" in named or re.match(r"\d+[/?#]", password):
            continue  # this "@" stands behind the host
        found += [password] if password else [named] if len(named) >= 2 * SHORTEST_REFUSED else []
        if password:
            found.append(base64.b64encode(unquote(f"{named}:{password}").encode()).decode())
    found += [match[0].removeprefix(match[1]) for match in _QUERY.finditer(value)]
    return tuple(it for it in found if len(it) >= SHORTEST and it.lower() not in NO_SECRETS)


def _content(path: str) -> list[str]:
    """The lines of a small file; none of another."""
    try:
        file = Path(path)
        small = file.is_file() and file.stat().st_size <= LARGEST_FILE
        return [line.strip() for line in file.read_text().splitlines()] if small else []
    except (OSError, ValueError):
        return []


def _spellings(secret: str) -> Iterator[str]:
    """A secret as addresses, Python and JSON write it."""
    for plain in {secret, unquote(secret)}:
        yield from (plain, quote(plain, safe=""), quote(plain), quote_plus(plain))
        yield from (repr(plain)[1:-1], json.dumps(plain)[1:-1])
