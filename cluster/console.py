"""What the user sees of a run: stages, progress, results. Plain lines where there is no terminal."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.text import Text

from trainer.recipe.redaction import Veil, hidden
from trainer.run_folder.journal import Line, follow
from trainer.run_folder.layout import make_private

RATE_WINDOW_S = 10.0
PLAIN_INTERVAL_S = 5.0


class Console:
    """Writes to `stream`, by default the standard output, from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.rich = RichConsole(file=stream, highlight=False, soft_wrap=True)
        self._started_at = time.monotonic()
        self._waiting: Progress | None = None
        self._evaluation_at = 0.0
        self._unshown: str | None = None

    def say(self, text: str = "", style: str | None = None) -> None:
        """One line or several, as they are."""
        self.rich.print(hidden(text), style=style, markup=False)

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """On a terminal, a spinner with the time so far; it goes away at the first step."""
        text = TextColumn("{task.description} … {task.elapsed:.0f} s", style="dim")
        self._waiting = _live(self.rich, SpinnerColumn(), text)
        self._waiting.add_task(name, total=None)
        self._waiting.start()
        try:
            yield
        finally:
            self._stop_waiting()

    @contextmanager
    def following(self, folder: Path, offset: int, total_examples: int) -> Iterator[None]:
        """Show what the journal in `folder` gains after byte `offset`, while the body trains."""
        progress = _Progress(self.rich, total_examples)
        over = threading.Event()

        def show() -> None:
            for line in follow(folder, over.is_set, offset):
                self._show(line, progress)

        shower = threading.Thread(target=show, name="screen", daemon=True)
        shower.start()
        try:
            yield
        finally:
            over.set()
            shower.join()
            progress.close()

    @contextmanager
    def alone(self, log: Path) -> Iterator[None]:
        """Only this screen reaches the terminal: what else this process and its children write goes to `log`.

        Ray writes from C++ and from other processes, so it is the file descriptors that are turned.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        before, self.rich.file = self.rich.file, os.fdopen(os.dup(1), "w", buffering=1)
        with open(make_private(log), "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (Veil(stream) for stream in streams)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            self.rich.file.close()
            self.rich.file = before

    def _show(self, line: Line, progress: "_Progress") -> None:
        match line["kind"]:
            case "stage":
                self._note(line["name"], line["seconds"])
            case "step":
                self._stop_waiting()
                progress.show(line)
            case "evaluation":
                self._show_evaluation(line)
            case "rewind" if line["step"]:
                self._note(f"resuming from step {line['step']:,}")
            case "restart":
                self._note(f"the workers start again: {line['reason']}")
            case "resized":
                self._note(f"workers: {line['workers']} from here on; {line['reason']}")
            case "execution":
                self._note(f"execution: {line['reason']}")
            case "decision":
                self._note(f"decided at {line['position']:,}: {line['what']} = {line['value']}")
            case "end" if line["status"] == "FINISHED":
                self._note("finished", style="green")

    def _show_evaluation(self, line: Line) -> None:
        """Validations may come many times a second: then a terminal shows only some, and the last one."""
        is_test = line["split"] == "test"
        if is_test and self._unshown:
            self._note(self._unshown)
        text = f"{line['split']} at step {line['step']:,}: {_metrics(line['metrics'])}"
        self._unshown = None
        is_shown = not self.rich.is_terminal or line["time"] - self._evaluation_at >= PLAIN_INTERVAL_S
        if is_test or is_shown:
            self._evaluation_at = line["time"]
            self._note(text, style="bold" if is_test else None)
        else:
            self._unshown = text

    def _note(self, text: str, seconds: float | None = None, style: str | None = None) -> None:
        """A line with the time since the command began, and how long what it tells of took."""
        took = "" if seconds is None else f" ({seconds:.1f} s)"
        elapsed = f"{time.monotonic() - self._started_at:6.1f} s  "
        self.rich.print(Text.assemble((elapsed, "dim"), (hidden(text), style or ""), (took, "dim")))

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting.stop()
            self._waiting = None


class _Progress:
    """The progress bar; without a terminal, a line every few seconds."""

    def __init__(self, rich: RichConsole, total_examples: int) -> None:
        self.rich, self.total_examples = rich, total_examples
        self.recent: deque[tuple[float, int]] = deque()
        self.printed_at = 0.0
        done = TextColumn("{task.percentage:3.0f}%")
        self.bar = _live(rich, BarColumn(None), done, TextColumn("{task.description}"))
        self.task = self.bar.add_task("", total=total_examples)

    def show(self, line: Line) -> None:
        """Show one step."""
        self._remember(line)
        if self.rich.is_terminal:
            self.bar.start()
            self.bar.update(self.task, completed=line["examples"], description=self._text(line))
        elif line["time"] - self.printed_at >= PLAIN_INTERVAL_S or line["examples"] >= self.total_examples:
            self.printed_at = line["time"]
            done = line["examples"] / self.total_examples
            self.rich.print(f"{done:6.1%}  step {line['step']:,}  {self._text(line)}", markup=False)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()

    def _remember(self, line: Line) -> None:
        if self.recent and line["examples"] <= self.recent[-1][1]:  # the run was rewound
            self.recent.clear()
        self.recent.append((line["time"], line["examples"]))
        while self.recent[0][0] < line["time"] - RATE_WINDOW_S:
            self.recent.popleft()

    def _text(self, line: Line) -> str:
        (first_time, first), (last_time, last) = self.recent[0], self.recent[-1]
        rate = (last - first) / (last_time - first_time) if last_time > first_time else 0.0
        pace = f"{rate:,.0f} examples/s  " if rate else ""
        left = f"  {_duration((self.total_examples - last) / rate)} left" if rate else ""
        echo = line["examples"] / line["fresh"] if line["fresh"] else 1.0
        return f"{pace}loss {line['loss']:.4g}  lr {line['learning_rate']:.3g}  echo {echo:.2f}{left}"


def _live(console: RichConsole, *columns: ProgressColumn) -> Progress:
    """Something that moves on a terminal and goes away; nothing at all where there is no terminal.

    What others print while it moves is moved out of its way only where the console has the standard output:
    elsewhere it is noise that goes to the log.
    """
    has_output = console.file is sys.stdout
    return Progress(
        *columns,
        console=console,
        transient=True,
        expand=any(isinstance(column, BarColumn) for column in columns),
        disable=not console.is_terminal,
        redirect_stdout=has_output,
        redirect_stderr=has_output,
    )


def _metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
