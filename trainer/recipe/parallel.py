"""How a model is spread over the workers: `run.parallel` with options."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from trainer.recipe.durations import Names, Section, refuse

WORD_OR_SECTION = ("(word)", "(section)")  # what pydantic calls the two forms of the key; no part of its name


class FsdpSection(Section):
    """Each worker holds its rows of every layer, of its gradient and of the optimizer's state (FSDP2)."""

    units: Names | None = Field(
        default=None,
        description="name patterns of the modules whose layers are gathered together for a pass; null: each "
        "block of the model's repeated ones",
    )


class DdpSection(Section):
    """Each worker holds the whole model."""

    shard_state: bool = Field(
        default=False,
        description="each worker keeps the optimizer's state of its rows of every layer (ZeRO 1)",
    )


class Parallel(Section):
    """How the model is spread over the workers, with options: one of the two."""

    ddp: DdpSection | None = Field(default=None, description="each worker holds the whole model")
    fsdp: FsdpSection | None = Field(default=None, description="each worker holds its rows of every layer")

    @model_validator(mode="after")
    def _is_one(self) -> "Parallel":
        if (self.ddp is None) == (self.fsdp is None):
            wrong = "gives none of ddp and fsdp" if self.ddp is None else "gives ddp and fsdp"
            raise refuse(wrong, "give one of them", "")
        return self


ModeOrSection = Annotated[
    Annotated[Literal["ddp", "fsdp"], Tag(WORD_OR_SECTION[0])] | Annotated[Parallel, Tag(WORD_OR_SECTION[1])],
    Discriminator(lambda value: WORD_OR_SECTION[isinstance(value, dict | Section)]),
]


def section_of(parallel: str | Parallel) -> Parallel:
    """A mode with its options."""
    if isinstance(parallel, Parallel):
        return parallel
    return Parallel(fsdp=FsdpSection()) if parallel == "fsdp" else Parallel(ddp=DdpSection())
