"""What `data_echo` exports, under its present and its former names."""

import pytest

import data_echo


def test_exported_names_resolve() -> None:
    for name in data_echo.__all__:
        assert getattr(data_echo, name).__name__ == name


@pytest.mark.parametrize(
    ("former", "name"), [("Deal", "ShuffledOrder"), ("Feed", "EchoLoader"), ("Order", "PrepareRequest")]
)
def test_former_names_resolve(former: str, name: str) -> None:
    assert getattr(data_echo, former) is getattr(data_echo, name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        data_echo.Unknown  # noqa: B018
