"""Secrets: hidden wherever they stand and however they are spelled; ordinary text stays."""

import base64
import io
import json
import os
import sys
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.recipe.redaction import HIDDEN, Veil, gives_away, hidden, hidden_in
from trainer.run_folder import journal as journals
from trainer.run_folder import layout
from trainer.tracking.progress import TrackingProgress

PLANTED = "pl@nted/'pass' w%rd"


@pytest.fixture
def environment(monkeypatch):
    """An environment with nothing secret in it but what a test plants."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "name",
    [
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "PGPASSWORD",
        "MYSQL_PWD",
    ],
)
@pytest.mark.parametrize("spelled", [str, lambda it: quote(it, safe=""), repr, json.dumps])
def test_a_value_of_the_environment_is_hidden_however_it_is_spelled(environment, name, spelled):
    environment.setenv(name, PLANTED)
    said = hidden(f"before {spelled(PLANTED)} after")
    assert HIDDEN in said
    assert not any(piece in said for piece in ("nted", "pass'", "w%"))
    assert said.startswith("before ")
    assert said.endswith(" after")


@pytest.mark.parametrize(
    "password", ["plain-planted", "with@at-planted", "with/slash-planted", "with:colon-planted"]
)
def test_the_password_of_an_address_in_the_environment_is_hidden_alone_too(environment, password):
    environment.setenv("SOME_DATABASE", f"postgresql://me:{password}@host:5432/db?x=1")
    basic = base64.b64encode(f"me:{password}".encode()).decode()
    for text in (os.environ["SOME_DATABASE"], f"for user {password}!", f"Authorization: Basic {basic}"):
        assert "planted" not in hidden(text)
        assert basic not in hidden(text)


def test_the_content_of_a_file_that_a_variable_names_is_hidden_and_its_path_is_not(environment, tmp_path):
    (tmp_path / "file").write_text("planted-0123456789\n")
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert hidden(f"{tmp_path}/file holds planted-0123456789") == f"{tmp_path}/file holds {HIDDEN}"


@pytest.mark.parametrize(
    "text",
    [
        "http://me:planted@host/x",
        "s3://bucket/key?X-Amz-Signature=planted&x=1",
        "https://host/f?sv=1&sig=planted",
        "https://host/f?token=planted",
        "https://planted@github.com/x",
        "connect failed: password=planted host=x",
        "{'api_key': 'planted'}",
        "Authorization: Bearer planted-planted",
        'FATAL: authentication failed for user "planted"',
    ],
)
def test_a_secret_is_known_by_its_form(environment, text):
    assert "planted" not in hidden(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8080/path@v1",
        "runs/quickstart-001 is in mlflow.db; open it with `lockstep ui`",
        "batch.size=512 tokens=5 optimizer.key: lamb",
        "ModuleNotFoundError: No module named 'psycopg'",
        "sqlite:////home/me/mlflow.db",
        "http://127.0.0.1:5000/#/runs?searchFilter=x&orderByKey=metrics.loss",
    ],
)
def test_ordinary_text_stays(environment, text):
    environment.setenv("RAY_AUTH_MODE", "token")
    environment.setenv("SSH_AUTH_SOCK", "/tmp/agent")
    assert hidden(text) == text
    assert gives_away(text) is None


@given(
    before=st.text(max_size=20),
    secret=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=8),
    after=st.text(max_size=20),
)
def test_whatever_the_value_of_a_token_is_it_is_not_in_the_text(before, secret, after):
    from unittest import mock

    with mock.patch.dict(os.environ, {"PLANTED_TOKEN": secret}):
        value = os.environ["PLANTED_TOKEN"]
        if not os.path.exists(value) and value.lower() not in ("disabled",):
            assert value not in hidden(before + value + after).replace(HIDDEN, "")


def test_a_stream_hides_what_comes_in_pieces(environment):
    environment.setenv("PLANTED_TOKEN", "planted-value")
    file = io.StringIO()
    veil = Veil(file)
    for piece in ("a plan", "ted-va", "lue and\nan", "other planted-value"):
        veil.write(piece)
    veil.flush()
    assert file.getvalue() == f"a {HIDDEN} and\nanother {HIDDEN}"
    assert Veil(sys.stderr).encoding == sys.stderr.encoding


def test_journal_and_progress_hold_none_and_the_files_are_their_owners_alone(environment, tmp_path):
    environment.setenv("PLANTED_TOKEN", "planted-value")
    journal = journals.Journal(tmp_path)
    journal.write("accepted", changes=["x: planted-value"])
    journal.write("end", status="FAILED", reason="http://a:planted@b", metrics={"loss": 0.5})
    journal.close()
    TrackingProgress("http://a:planted@b", error="planted-value").save(tmp_path)
    kept = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(kept) == 2
    assert not [path for path in kept if b"planted" in path.read_bytes()]
    assert (tmp_path / layout.TRACKING).stat().st_mode & 0o777 == 0o600
    assert layout.make_private(tmp_path / layout.LOG).stat().st_mode & 0o777 == 0o600
    assert journals.last(tmp_path)["metrics"] == {"loss": 0.5}


def test_nested_values_are_hidden(environment):
    environment.setenv("PLANTED_TOKEN", "planted-value")
    assert hidden_in({"a": ["planted-value", 1, None], "b": ("x",)}) == {"a": [HIDDEN, 1, None], "b": ["x"]}
