"""A sweep in MLflow: one run for it, and below that a run for each of its trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError, first_line
from trainer.recipe.schema import TrackSection, flattened
from trainer.run_folder import layout
from trainer.run_folder.journal import Line, read
from trainer.tracking import entries, trials
from trainer.tracking.names import fit_title
from trainer.tracking.refusals import send_in_parts
from trainer.tracking.tracker import KIND, SOURCE, Tracker

PARENT, TRIAL = "mlflow.parentRunId", "lockstep.trial"
PAGE = 1000  # runs that a search gives at a time


@dataclass
class _Child:
    """A trial's run in MLflow."""

    run_id: str
    trained_steps: int
    is_done: bool = False


class SweepTracker(Tracker):
    """Brings one sweep into MLflow."""

    kind, worth = "sweep", "trial"

    def __init__(self, folder: Path, keep_trying: Callable[[], bool] = lambda: False) -> None:
        told = [line for line in read(folder) if line["kind"] == "sweep"]
        if not told:
            raise UserError(f"{layout.relative_to_cwd(folder)}: its sweep has not begun; resume it")
        self.sweep = told[-1]
        first: Line = next(iter(self.sweep.get("recipes", {}).values()), {})
        super().__init__(folder, TrackSection.model_validate(first.get("track", {})), keep_trying)
        self._children: dict[tuple[str, str], _Child] = {}

    def begins(self, line: Line) -> bool:
        """A command's first line."""
        return line["kind"] == "sweep"

    def end(self) -> Line | None:
        """Its last end, unless it was resumed; what is written about a finished sweep may follow."""
        found = [line for line in read(self.folder) if line["kind"] in ("sweep", "end")]
        return found[-1] if found[-1]["kind"] == "end" else None

    def prepare(self) -> None:
        """The sweep's run, and which trials it has."""
        super().prepare()
        self._children = self._known_children()

    def describe(self) -> None:
        """What stays the same when a sweep is extended."""
        self.log(params=flattened({"name": self.sweep["name"], "target": self.sweep["target"]}))

    def take(self, lines: Sequence[Line]) -> None:
        """A run for each trial, and what all of them say together."""
        newest = {trials.trial_key(line): line for line in lines if line["kind"] == "trial"}
        found = trials.of_the_sweep(lines)
        self.log(metrics=found.metrics, tags=found.tags)
        refused = send_in_parts(list(newest.values()), self._log_trials)
        said = [f"{trials.title(line, self.sweep)}: {first_line(error)}" for line, error in refused]
        entries.note(self.client, self.run_id, entries.REFUSED, said)

    def conclude(self, end: Line) -> None:
        """Mean steps, the sweep, its journal and trials, and what was made of them."""
        self.log(metrics=trials.mean_steps(read(self.folder)))
        for name in (layout.SWEEP, layout.JOURNAL, layout.REPORT, layout.RECOMMENDED):
            self.artifact(name)
        self.client.log_text(self.run_id, trials.table(read(self.folder)), "trials.csv")

    def _log_trials(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._trial(line)

    def _trial(self, line: Line) -> None:
        """Make the run of a trial, once. One that was trained again, for longer, takes the other's place."""
        key, trained = trials.trial_key(line), line["trained_steps"]
        known = self._children.get(key)
        if known and (known.trained_steps > trained or (known.trained_steps == trained and known.is_done)):
            return
        if known and known.trained_steps < trained:
            self.client.delete_run(known.run_id)
            known = None
        child = known or self._child(line)
        self._children[key] = child
        points = trials.metrics(line, self.sweep)
        entries.log(self.client, child.run_id, metrics=points, params=trials.params(line))
        status = trials.STATUS.get(line["end"], "FINISHED")
        self.client.set_terminated(child.run_id, status, end_time=round(line["time"] * 1000))
        child.is_done = True

    def _child(self, line: Line) -> _Child:
        tags = {
            **SOURCE,
            KIND: "trial",
            PARENT: self.run_id,
            TRIAL: " ".join([*trials.trial_key(line), str(line["trained_steps"])]),
            "lockstep.end": line["end"],
        }
        began_ms = round((line["time"] - line["seconds"]) * 1000)
        name = fit_title(trials.title(line, self.sweep))
        made = self.client.create_run(self.experiment_id, began_ms, tags, run_name=name)
        return _Child(made.info.run_id, line["trained_steps"])

    def _known_children(self) -> dict[tuple[str, str], _Child]:
        """The trials that MLflow has of the sweep."""
        found: dict[tuple[str, str], _Child] = {}
        wanted, token = f"tags.`{PARENT}` = '{self.run_id}' AND tags.`{KIND}` = 'trial'", None
        while True:
            page = self.client.search_runs([self.experiment_id], wanted, max_results=PAGE, page_token=token)
            for run in page:
                key, stage, trained = run.data.tags[TRIAL].split()
                found[key, stage] = _Child(run.info.run_id, int(trained), run.info.status != "RUNNING")
            if not (token := page.token):
                return found
