"""Jobs: what a cluster is told, and to whom the token is sent."""

import json
import shlex

import pytest

from cluster import jobs
from cluster.ray_cluster import code_for_workers
from tests.cluster.commands import user_folder
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(user_folder(tmp_path))
    return tmp_path


def test_a_job_is_the_recipe_in_its_folder_with_our_packages(folder):
    (folder / "my recipes").mkdir()
    (folder / "tiny.yaml").rename(folder / "my recipes" / "tiny.yaml")
    override = "checkpoint.dir=/shared/my runs; echo"
    told = jobs.job("my recipes/tiny.yaml", [override])
    command = ["python", "-m", "cluster.cli", "train", "my recipes/tiny.yaml", "--set", override]
    assert shlex.split(told["entrypoint"]) == command
    sent = [path.rpartition("/")[2] for path in code_for_workers(folder / "folder.zip")["py_modules"]]
    assert sent == ["cluster", "data_echo", "optim", "trainer"]


SWEEP = """
name: tried
recipe: tiny.yaml
target: {metric: loss, at_most: 0.01}
batches: [16, 32]
"""


def test_a_sweep_is_a_job_too(folder):
    (folder / "sweep.yaml").write_text(SWEEP)
    overrides = ["recipe.checkpoint.dir=/shared", "seeds.report=2"]
    told = jobs.job("sweep.yaml", overrides)
    settings = ["--set", overrides[0], "--set", overrides[1]]
    assert shlex.split(told["entrypoint"]) == [
        "python",
        "-m",
        "cluster.cli",
        "sweep",
        "sweep.yaml",
        *settings,
    ]
    assert told["metadata"] == {"recipe": "tried"}
    with pytest.raises(UserError, match=r"checkpoint\.dir: is runs"):
        jobs.job("sweep.yaml", [])
    with pytest.raises(UserError, match="holds a token"):
        jobs.job("sweep.yaml", [overrides[0], "also={task.with.at: ['s3://b/x?sig=abcdef']}"])


def test_nothing_of_our_environment_enters_a_job(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "a-very-secret-thing")
    told = jobs.job("tiny.yaml", ["checkpoint.dir=/shared/runs"])
    assert "a-very-secret-thing" not in json.dumps(told)


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        ("tiny.yaml", [], r"checkpoint\.dir: is runs, and a job's working folder ends with the job"),
        ("tiny.yaml", ["checkpoint.dir=/shared", "track.uri=sqlite:///x.db"], r"track\.uri: .* ends with"),
        ("tiny.yaml", ["checkpoint.dir=/shared", "task.with.at=s3://b/x?sig=abcdef"], "holds a token"),
        ("tiny.yaml", ["track.uri=http://me:secret@host"], r"track\.uri: holds a password"),
        ("tiny.yaml", ["batch.size=31"], "batch"),
        ("../elsewhere.yaml", ["checkpoint.dir=/shared"], "lies outside the working folder"),
    ],
)
def test_what_could_not_work_is_refused_before_it_is_sent(folder, path, overrides, message):
    (folder.parent / "elsewhere.yaml").write_text((folder / "tiny.yaml").read_text())
    with pytest.raises(UserError, match=message):
        jobs.job(path, overrides)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8265",
        "http://localhost:8265",
        "http://[::1]:8265",
        "http://127.0.1.1",
        "https://head.example.com",
    ],
)
def test_the_token_travels_inside_this_machine_or_encrypted(address):
    assert jobs.head_url(address).endswith(address)


@pytest.mark.parametrize(
    "address", ["head.example.com:8265", "http://10.0.0.7:8265", "http://localhost.evil.com"]
)
def test_the_token_never_travels_in_the_open(address):
    with pytest.raises(UserError, match=r"would send the cluster's token in the open.*ssh -N -L"):
        jobs.head_url(address)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://", "file:///etc/passwd"])
def test_what_is_no_heads_address_is_refused(address):
    with pytest.raises(UserError, match="HOST:PORT of the head's dashboard"):
        jobs.head_url(address)
