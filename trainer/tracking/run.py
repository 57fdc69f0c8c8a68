"""A run in MLflow: recipe, metrics of its steps, and the trained model."""

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.errors import first_line
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.run_folder.journal import PLANNED, Line
from trainer.tracking.metrics import entry
from trainer.tracking.tracker import Tracker, logger


class RunTracker(Tracker):
    """Brings one run into MLflow."""

    kind, worth = "run", "step"

    def __init__(self, folder: Path, recipe: Recipe, keep_trying: Callable[[], bool] = lambda: False) -> None:
        super().__init__(folder, recipe.track, keep_trying)
        self.recipe = recipe

    def begins(self, line: Line) -> bool:
        """A command's first line."""
        return line["kind"] == "stage" and line["name"] == PLANNED

    def describe(self) -> None:
        """The recipe as parameters and as a file, and the plan."""
        self.log(params=self.recipe.flat())
        for name in (layout.RECIPE, layout.PLAN):
            self.artifact(name)

    def take(self, lines: Sequence[Line]) -> None:
        """Metrics and tags."""
        found = entry(lines, self.progress)
        self.log(metrics=found.metrics, tags=found.tags)

    def conclude(self, end: Line) -> None:
        """The full journal, the profile, and the model of a finished run."""
        self.artifact(layout.JOURNAL)
        if (self.folder / layout.PROFILE).exists():
            self.client.log_artifacts(self.run_id, str(self.folder / layout.PROFILE), layout.PROFILE)
        if end["status"] == "FINISHED" and (self.folder / layout.MODEL).exists():
            self.artifact(layout.MODEL)
            self.log(tags={"lockstep.model": self._log_model()})

    def _log_model(self) -> str:
        """Log the model as a graph, which loads without pickle or anybody's code; say what came of it.

        One that is there is not logged again; what an interrupted upload left of one is removed.
        """
        import mlflow

        from trainer.tracking.model_export import log_graph, logged_before, trained_model

        mlflow.set_tracking_uri(self.uri)
        try:
            if logged_before(self.client, self.run_id):
                return "logged"
            model, inputs = trained_model(self.folder, self.recipe)
            with mlflow.start_run(self.run_id):
                log_graph(model, inputs)
        except Exception as error:
            logger.warning("the model was not logged", exc_info=True)
            self.progress.note = f"has the model's weights, not its graph: {first_line(error)}"
            return f"only its weights: {first_line(error)}"
        return "logged"
