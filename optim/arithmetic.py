"""What a rule's functions are written with, besides torch's own operations."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


def add(
    x: Tensor, y: Tensor, *factors: Any, times: Tensor | None = None, over: Tensor | None = None
) -> Tensor:
    """Add the product of factors, y, `times` and 1 / `over` to x in place; return x.

    One pass over memory, where `x + factor * y` without a compiler takes two and a fresh array; none where a
    factor is the plain number 0.

    Args:
        x: the array that is changed: never the gradient.
        y: an array like x.
        factors: numbers, or tensors that broadcast to x: `h` has numbers of the host, tensors of one number
            or columns with a number for each row, as the engine has it.
        times: an array like x; not together with `over`.
        over: an array like x.
    """
    number, tensor = _product(factors)
    if number == 0:
        return x
    if times is None and over is None:
        return x.add_(y, alpha=number) if tensor is None else x.addcmul_(y, tensor, value=number)
    if tensor is not None:
        y = y * tensor
    if times is not None:
        return x.addcmul_(y, times, value=number)
    assert over is not None
    return x.addcdiv_(y, over, value=number)


def plus(x: Tensor, y: Tensor, *factors: Any) -> Tensor:
    """Return x + product of factors * y; x itself where a factor is the plain number 0. Arguments: `add`."""
    number, tensor = _product(factors)
    if number == 0:
        return x
    return x.add(y, alpha=number) if tensor is None else x.addcmul(y, tensor, value=number)


def _product(factors: Sequence[Any]) -> tuple[float, Tensor | None]:
    """The product of the plain numbers, and that of the tensors if there are any."""
    number, tensor = 1.0, None
    for factor in factors:
        if isinstance(factor, Tensor):
            tensor = factor if tensor is None else tensor * factor
        else:
            number *= factor
    return number, tensor


class Marginal(NamedTuple):
    """An array whose numbers are joined along the dimensions in which the array that it is for has size 1."""

    of: Tensor
    how: str
    """ "sum" or "amax"."""


def total(x: Tensor) -> Marginal:
    """The sums of x."""
    return Marginal(x, "sum")


def largest(x: Tensor) -> Marginal:
    """The greatest numbers of x, all of which are at least 0."""
    return Marginal(x, "amax")


Values = Mapping[str, Tensor | Marginal | tuple[Tensor, Tensor]]
"""What a function of numbers returns, by name."""
