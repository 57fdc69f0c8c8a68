"""Parameter groups of a model: who decays, who is adapted by layer, whose learning rate is multiplied."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

Patterns = str | Sequence[str] | None

_NORMALISATION = re.compile(r"(Batch|Layer|Group|Instance|RMS|Scale|Local|Global\w*)Norm")
"""Class names of normalisations: torch's, and those that timm, transformers and others write themselves."""


@dataclass(frozen=True)
class Grouping:
    """What `group_parameters` made: the groups for an optimizer's constructor, and what it did in words."""

    groups: list[dict[str, Any]]
    report: str


class _Treatment(NamedTuple):
    decay: bool
    adapt: bool
    lr_multiplier: float


def group_parameters(
    model: nn.Module,
    *,
    no_decay: Patterns = "default",
    no_adapt: Patterns = "default",
    lr_multipliers: Mapping[str, float] | None = None,
) -> Grouping:
    """Split a model's trainable parameters into groups by three independent flags.

    Args:
        model: its parameters keep their order inside each group; tied ones appear once.
        no_decay: who gets `weight_decay=0.0`: "default" (biases and normalisation parameters), None or [] for
            nobody, or patterns of parameter names ("*.bias", "head.*").
        no_adapt: who gets `adapt=False`, in the same form: no layerwise ratio (LARS, LAMB), AdamW (Muon);
            other rules ignore it.
        lr_multipliers: pattern to factor, kept in the group as `lr_multiplier`; whoever sets `lr` applies it.
            The first pattern that matches counts.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names = [name for name, _ in named]
    multipliers = dict(lr_multipliers or {})
    _refuse_idle("lr_multipliers", list(multipliers), names)
    decay_free = _chosen("no_decay", no_decay, model, names)
    adapt_free = _chosen("no_adapt", no_adapt, model, names)

    members: dict[_Treatment, list[tuple[str, nn.Parameter]]] = {}
    for name, p in named:
        factor = next((f for pattern, f in multipliers.items() if fnmatchcase(name, pattern)), 1.0)
        treatment = _Treatment(name not in decay_free, name not in adapt_free, factor)
        members.setdefault(treatment, []).append((name, p))
    groups = [_group(treatment, of) for treatment, of in members.items()]
    return Grouping(groups, "\n".join(_line(treatment, of) for treatment, of in members.items()))


def layer_decay(model: nn.Module, decay: float, *, blocks: str | None = None) -> dict[str, float]:
    """Learning rates that decay from the head to the input, for `lr_multipliers` of `group_parameters`: 1 for
    what follows the blocks, `decay` for the last block, and so on down; what precedes them is one layer more.
    Clark et al. 2020, arXiv:2003.10555 (ELECTRA); Bao et al. 2021, arXiv:2106.08254 (BEiT).

    Args:
        model: its parameters in the order of the forward pass, as they are registered.
        decay: from 0 to 1; 0.65 to 0.9 are usual.
        blocks: the name of the list of blocks ("encoder.layer"); the longest `ModuleList` or `Sequential` of
            modules of one class where it is None.

    Raises:
        ValueError: there is no such list.
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"layer_decay: Invalid decay value: {decay}")
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(block) for block in module}) == 1
    }
    if blocks is None and stacks:
        blocks = max(stacks, key=lambda name: len(stacks[name]))
    if blocks not in stacks:
        raise ValueError(
            f"layer_decay: no list of blocks {blocks!r}; there are {', '.join(stacks) or 'none'}"
        )
    last, passed, depths = len(stacks[blocks]) + 1, False, {}
    for name, _ in model.named_parameters():
        inside = name.startswith(f"{blocks}.")
        passed = passed or inside
        number = int(name.removeprefix(f"{blocks}.").partition(".")[0]) + 1 if inside else last * passed
        depths[name] = number
    return {name: decay ** (last - depth) for name, depth in depths.items()}


def _group(treatment: _Treatment, of: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    group: dict[str, Any] = {"params": [p for _, p in of], "names": [name for name, _ in of]}
    if not treatment.decay:
        group["weight_decay"] = 0.0
    if not treatment.adapt:
        group["adapt"] = False
    if treatment.lr_multiplier != 1.0:
        group["lr_multiplier"] = treatment.lr_multiplier
    return group


def _line(treatment: _Treatment, of: list[tuple[str, nn.Parameter]]) -> str:
    words = ["decay" if treatment.decay else "no decay", "adapted" if treatment.adapt else "not adapted"]
    if treatment.lr_multiplier != 1.0:
        words.append(f"lr x {treatment.lr_multiplier:g}")
    numbers = sum(p.numel() for _, p in of)
    shown = ", ".join(name for name, _ in of[:3]) + (", …" if len(of) > 3 else "")
    return f"{len(of)} parameters, {numbers:,} numbers: {', '.join(words)} ({shown})"


def _chosen(key: str, choice: Patterns, model: nn.Module, names: list[str]) -> set[str]:
    """The names that a choice means."""
    if choice is None:
        return set()
    if choice == "default":
        return _biases_and_normalisations(model)
    patterns = [choice] if isinstance(choice, str) else list(choice)
    _refuse_idle(key, patterns, names)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _biases_and_normalisations(model: nn.Module) -> set[str]:
    """Biases by their name, everything of a normalisation by its module's class or bases."""
    chosen = set()
    for prefix, module in model.named_modules():
        normalises = any(_NORMALISATION.search(base.__name__) for base in type(module).__mro__)
        for name, _ in module.named_parameters(prefix=prefix, recurse=False):
            last = name.rpartition(".")[2]
            if normalises or last == "bias" or last.endswith("_bias"):
                chosen.add(name)
    return chosen


def _refuse_idle(key: str, patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"group_parameters: {key}: {pattern!r} matches no parameter; "
                f"the model has {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
            )
