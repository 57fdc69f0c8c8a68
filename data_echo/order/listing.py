"""The served sequence as text, for reading and comparing."""

from __future__ import annotations

from collections.abc import Iterator

from data_echo.order.schedule import Schedule


def order_lines(schedule: Schedule, micro_batches: int, first: int = 0) -> Iterator[str]:
    """Lines, one for each micro-batch: number, lane, and examples as `pass:index`, copies as `pass:index+1`.

    No data is read.

    Args:
        micro_batches: how many.
        first: the run's micro-batch number of the first line.
    """
    for j in range(first, first + micro_batches):
        served = schedule.micro_batch(j)
        examples = zip(served.pass_number.tolist(), served.index.tolist(), served.echo.tolist(), strict=True)
        names = (f"{number}:{index}" + (f"+{echo}" if echo else "") for number, index, echo in examples)
        yield f"{j} lane {j % schedule.lanes}: {' '.join(names)}"
