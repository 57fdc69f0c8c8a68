"""The task: the model, its data and its loss, as the user's own class, found by `package.module:Class`."""

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_echo.errors import users_line
from trainer.errors import Problem, RecipeError, UserError, with_advice
from trainer.recipe.schema import TaskSection
from trainer.task_calls import checked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_echo import Draws, Source

SPLITS = ("train", "validation", "test")
METHODS = ("model", "source", "prepare", "augment", "loss", "metrics")
PACKAGES = ("cluster", "data_echo", "optim", "trainer")


class Task(Protocol):
    """What a user writes. A batch is a dict of arrays of any dtype, example first, ragged ones padded."""

    def model(self) -> "nn.Module":
        """A new model, its weights drawn from torch's global generator, which the trainer has seeded."""

    def source(self, split: str) -> "Source":
        """Random access to the raw examples of "train", "validation" or "test"."""

    def prepare(self, example: Any, draw: "Draws") -> dict[str, Any]:
        """One example's arrays. Runs in the pool, on CPU, before the echo."""

    def augment(self, batch: "dict[str, Tensor]", draw: "Draws") -> "dict[str, Tensor]":
        """A whole micro-batch at once, on the device, anew for each echo. Not called in evaluation."""

    def loss(self, model: "nn.Module", batch: "dict[str, Tensor]") -> "tuple[Tensor, Tensor]":
        """(sum, count): a step follows the gradient of sum of sums / sum of counts over the global batch."""

    def metrics(self, model: "nn.Module", batch: "dict[str, Tensor]") -> "dict[str, tuple[Tensor, Tensor]]":
        """By name, (sum, count), so that parts add."""


def load(section: TaskSection) -> Task:
    """The task that a recipe names; RecipeError when it cannot be imported or made."""
    factory = _find(section)
    _check_arguments(factory, section)
    try:
        task = factory(**section.with_)
    except (Exception, SystemExit) as error:
        wrong, right = with_advice(error, "fix its arguments or its code")
        place = users_line(error, [getattr(sys.modules.get(factory.__module__), "__file__", "")])
        wrong = f"{section.use} raised {type(error).__name__}: {wrong}" + (f" ({place})" if place else "")
        raise _wrong("task.with", wrong, right) from error
    missing = [name for name in METHODS if not callable(getattr(task, name, None))]
    if missing:
        right = "a task has all methods of trainer.task.Task"
        raise _wrong("task.use", f"{section.use} has no {', '.join(missing)}", right)
    return checked(task)


def make(use: str, with_: dict[str, Any]) -> Task:
    """`load` with plain arguments: `functools.partial(make, use, with_)` travels to other processes."""
    return load(TaskSection.model_validate({"use": use, "with": with_}))


def refuse_shadows(folder: Path) -> None:
    """Refuse a folder of the user's whose modules would be imported instead of Lockstep's own packages."""
    for name in PACKAGES:
        ours = Path(__file__).resolve().parents[1] / name
        for shadow in (folder / name, folder / f"{name}.py"):
            is_module = shadow.is_file() or (shadow / "__init__.py").is_file()
            if is_module and shadow.resolve() != ours:
                is_checkout = all((folder / package / "__init__.py").is_file() for package in PACKAGES)
                cure = "install this checkout with `pip install -e .`" if is_checkout else "rename it"
                raise UserError(
                    f"{shadow}: has the name of Lockstep's own package {name} and would be imported instead; "
                    f"{cure}, or run from another folder"
                )


def _find(section: TaskSection) -> Any:
    """What the section's `use` names, once its module is imported."""
    module_name, _, class_name = section.use.partition(":")
    folder = Path.cwd()
    refuse_shadows(folder)
    if str(folder) not in sys.path:  # as `python -m` has it: the user's module lies in the working folder
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            wrong = f"is {section.use}, and there is no module {error.name} in {folder} or installed"
            raise _wrong("task.use", wrong, "run from the folder that holds it, or install it") from error
        if error.name is None:  # raised by hand, with words of its own
            raise _wrong(
                "task.use", f"{module_name} cannot be imported: {error}", "see to that first"
            ) from error
        raise _wrong("task.use", f"{module_name} needs {error.name}", f"install {error.name}") from error
    except (Exception, SystemExit) as error:
        wrong = f"importing {module_name} raised {type(error).__name__}: {error}"
        raise _wrong("task.use", wrong, "fix the module") from error
    if not hasattr(module, class_name):
        near = difflib.get_close_matches(class_name, vars(module), n=1)
        right = f"did you mean {module_name}:{near[0]}?" if near else "name one of the module's classes"
        raise _wrong("task.use", f"is {section.use}, and {module.__file__} has no {class_name}", right)
    return getattr(module, class_name)


def _check_arguments(factory: Any, section: TaskSection) -> None:
    """Refuse unknown and missing keyword arguments before the class sees them."""
    if not callable(factory):
        right = "name a class with the methods of trainer.task.Task"
        raise _wrong("task.use", f"{section.use} is no class", right)
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    problems = []
    for key in section.with_.keys() - parameters.keys():
        near = difflib.get_close_matches(key, parameters, n=1)
        right = f"did you mean {near[0]}?" if near else f"its arguments are {', '.join(parameters) or 'none'}"
        problems.append(Problem(None, None, f"task.with.{key}", f"is unknown to {section.use}", right))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in section.with_:
            problems.append(Problem(None, None, f"task.with.{name}", "is missing", f"{section.use} needs it"))
    if problems:
        raise RecipeError(problems)


def _wrong(key: str, wrong: str, right: str) -> RecipeError:
    return RecipeError([Problem(None, None, key, wrong, right)])
