"""docs/recipe.md and docs/sweep.md say what the models say."""

from pathlib import Path

import pytest

from trainer.recipe import reference

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "expected"),
    [("recipe", reference.markdown()), ("sweep", reference.markdown_of_sweeps())],
    ids=["recipe", "sweep"],
)
def test_the_page_is_the_one_that_the_models_give(page, expected):
    cure = f"python -m trainer.recipe.reference {page} > docs/{page}.md"
    assert (DOCS / f"{page}.md").read_text(encoding="utf-8") == expected, cure
