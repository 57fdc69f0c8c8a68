"""Names and values as MLflow takes them: what a name holds that MLflow refuses stands there as `_xHEX_`.

`recall@1` becomes `recall_x40_1`, and `unfit` gives `recall@1` back. Only a name that is too long loses
its end, for a digest of the whole.
"""

import hashlib
import re

LONGEST_NAME, LONGEST_EXPERIMENT = 250, 500
LARGEST_INTEGER = 2**63 - 1  # of a step or of a time
_REFUSED = re.compile(
    r"""[^\w.\-\ :/]                         # no letter, digit, or one of these
    |_(?=x[0-9a-f]*(?:_|[^\w\-\ :]))         # what would be read as the start of an escape
    |^/|/\Z|/(?=/)                           # a path that could be written without it
    |\A\.(?=\.)|(?<![^/])\.(?=\.?(?:/|\Z))|(?<=(?<![^/])\.)\.(?=/|\Z)  # the same: the dots of "." and ".."
    |\A\Z""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"_x([0-9a-f]*)_")
_DIGEST = 16


def fit(name: str, longest: int = LONGEST_NAME) -> str:
    """The name of a metric, a parameter or a tag as MLflow takes it."""
    return _shortened(_REFUSED.sub(_escaped, name), longest)


def unfit(name: str) -> str:
    """The name that `fit` was given, unless it was too long."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else "", name)


def fit_title(title: str, longest: int = LONGEST_EXPERIMENT) -> str:
    """The name of an experiment or a run as MLflow takes it: any text of a bounded length."""
    return _shortened(fit_value(title, 10 * longest) or _escape(""), longest)


def fit_value(value: str, longest: int) -> str:
    """The text of a parameter or a tag, with what no database takes written out."""
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")[:longest]


def _escaped(match: re.Match[str]) -> str:
    return _escape(match[0])


def _escape(character: str) -> str:
    return f"_x{ord(character):x}_" if character else "_x_"


def _shortened(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]
    return f"{name[: longest - _DIGEST - 1]}_{digest}"
