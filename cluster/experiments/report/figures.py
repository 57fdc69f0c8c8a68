"""How figures look, and what becomes of them: SVG with texts to hover over, and PNG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import UserError

# Okabe and Ito's colours for all kinds of sight; markers and dashes differ too, for greyscale.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS, DASHES = "os^Dv*P", ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 3)))
STYLE: Any = {
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 6,
    "svg.fonttype": "none",
    "svg.hashsalt": "lockstep",
    "xtick.minor.bottom": False,
    "ytick.minor.left": False,
}
COLUMNS, PANEL = 3, (3.7, 3.1)  # panels side by side, and each one's size in inches


@dataclass
class Figure:
    """A figure of a report. `plot` is matplotlib's; `tips` are texts of its artists by their id."""

    name: str
    title: str
    caption: str
    plot: Any
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, artist: Any, text: str) -> None:
        """Show `text` while the pointer is on an artist."""
        name = f"{self.name}-{len(self.tips)}"
        artist.set_gid(name)
        self.tips[name] = text

    def svg(self) -> str:
        """The figure as an element to put into a page."""
        buffer = io.StringIO()
        with drawing():
            self.plot.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :].replace("<svg ", '<svg class="figure" role="img" ', 1)

        def told(found: re.Match[str]) -> str:
            said = html.escape(self.tips.get(found[1], ""))
            return f'{found[0][:-1]} class="tip"><title>{said}</title>' if said else found[0]

        return re.sub(r'<g id="([\w-]+)">', told, text)

    def save(self, folder: Path) -> list[Path]:
        """Write it as SVG and as PNG; returns the files."""
        files = [folder / f"{self.name}.svg", folder / f"{self.name}.png"]
        files[0].write_text(self.svg())
        self.plot.savefig(files[1], dpi=150)
        return files


@contextmanager
def drawing() -> Iterator[Any]:
    """matplotlib in our style, without a screen. UserError where it is not installed."""
    try:
        import matplotlib
        from matplotlib import figure
    except ImportError as error:
        right = "install it with `pip install matplotlib`, or leave out what draws figures"
        raise UserError(f"figures need matplotlib, which is not installed; {right}") from error
    with matplotlib.rc_context(STYLE):
        yield figure.Figure


def panels(make: Any, count: int) -> tuple[Any, list[Any]]:
    """A figure with `count` axes in rows."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    plot = make(figsize=(PANEL[0] * columns, PANEL[1] * rows))
    return plot, [plot.add_subplot(rows, columns, number + 1) for number in range(count)]


def batch_axis(axes: Any, batches: Sequence[float]) -> None:
    """The batch from left to right in powers of two, each labelled where there is room."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch")
    low, high = min(batches), max(batches)
    axes.set_xlim(low / 1.5, high * 1.5)
    octaves = range((int(low) - 1).bit_length(), int(high).bit_length())
    every = -(-len(octaves) // (5 if high < 1e4 else 4))
    axes.set_xticks([2**octave for octave in octaves][::every])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def log_axis(axes: Any, name: str = "y") -> None:
    """Numbers along one axis on a log scale, at least three of them labelled."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = sorted(axis.get_view_interval())
    subs = (1.0,) if high / low > 300 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number in at most three digits and a letter."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == ' k' else size):.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
