"""Sends metrics, parameters and tags of a run under names that MLflow takes, in as few requests as may be.

What MLflow refuses is left out and said in a tag.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.errors import first_line
from trainer.recipe.redaction import hidden
from trainer.tracking.names import fit, fit_value
from trainer.tracking.refusals import send_in_parts

Point = tuple[str, float, int, int]  # name, value, milliseconds, step
MOST = {"tags": 100, "params": 100, "metrics": 800}  # of a request, which may hold 1000 in all
LONGEST_VALUE = 5000
RENAMED, REFUSED = "lockstep.renamed", "lockstep.refused"  # tags of our own

logger = logging.getLogger("lockstep.tracking")


def log(
    client: Any,
    run_id: str,
    *,
    metrics: Sequence[Point] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log entries to a run, what fits into one request with that one."""
    from mlflow.entities import Metric, Param, RunTag

    params, tags = params or {}, tags or {}
    sent = {name: fit(name) for name in dict.fromkeys([*(name for name, *_ in metrics), *params, *tags])}
    refused = _send(
        client,
        run_id,
        {
            "tags": [RunTag(sent[key], stored(text)) for key, text in tags.items()],
            "params": [Param(sent[key], stored(text)) for key, text in params.items()],
            "metrics": [Metric(sent[name], value, at_ms, step) for name, value, at_ms, step in metrics],
        },
    )
    note(client, run_id, RENAMED, [f"{there}: {name}" for name, there in sent.items() if there != name])
    note(client, run_id, REFUSED, refused)


def note(client: Any, run_id: str, tag: str, lines: Iterable[str]) -> None:
    """Add lines to a tag, each once."""
    from mlflow.entities import RunTag

    if lines := list(lines):
        before = client.get_run(run_id).data.tags.get(tag, "").splitlines()
        text = stored("\n".join(dict.fromkeys([*before, *lines])))
        _send(client, run_id, {"tags": [RunTag(tag, text)]})


def stored(text: str) -> str:
    """The text of a parameter or a tag as MLflow takes it, without secrets."""
    return fit_value(hidden(text), LONGEST_VALUE)


def _send(client: Any, run_id: str, entries: dict[str, list[Any]]) -> list[str]:
    """A line for each entry that is refused."""

    def send(some: list[tuple[str, Any]]) -> None:
        together: dict[str, list[Any]] = {}
        for what, one in some:
            together.setdefault(what, []).append(one)
        client.log_batch(run_id, **together)

    refused: list[str] = []
    while any(entries.values()):
        some = [(what, one) for what, each in entries.items() for one in each[: MOST[what]]]
        entries = {what: each[MOST[what] :] for what, each in entries.items()}
        for (what, lost), error in send_in_parts(some, send):
            refused.append(f"{what}: {lost.key}: {first_line(error)}")
            logger.warning("MLflow refused %s", refused[-1])
    return refused
