"""docs/recipe.md says what the models say."""

from pathlib import Path

from trainer.recipe import reference


def test_the_page_is_the_one_that_the_models_give():
    page = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"
    assert page.read_text(encoding="utf-8") == reference.markdown(), (
        "python -m trainer.recipe.reference > docs/recipe.md"
    )
