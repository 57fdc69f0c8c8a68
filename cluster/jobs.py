"""Recipes as jobs on a Ray cluster, through the Ray Jobs API of its head.

Who may submit a job may run anything on the cluster. So a token is asked for, and it never travels over
plain HTTP to another machine. Nothing from this process's environment enters a job: credentials for storage
and tracking are the cluster's own.
"""

import asyncio
import ipaddress
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster import driver
from cluster.package import IGNORE, JOB_BYTES, Listing, packed
from cluster.ray_cluster import code_for_workers
from cluster.reach import refuse_silent_head
from trainer.errors import RunFailed, UserError
from trainer.recipe.redaction import hidden
from trainer.recipe.schema import Recipe
from trainer.task import refuse_shadows

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

HOME_ADDRESS = "http://127.0.0.1:8265"
STOPPING_S = 30  # what a run may take to mark itself and end, once it is told to stop


def submit(
    path: str, overrides: Sequence[str], address: str | None, say: Callable[[str], object] = print
) -> str:
    """Submit a recipe or a sweep with its working folder, once it was said what goes; the job's id."""
    told = job(path, overrides)
    with connected(address) as client, packed(Path.cwd(), JOB_BYTES, say) as archive:
        told["runtime_env"] |= code_for_workers(archive)
        return client.submit_job(**told)


def job(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A job that trains a recipe or a sweep: what the cluster is told besides the files, no credentials."""
    command, name, recipe = _read(path, overrides)
    folder = Path.cwd()
    refuse_shadows(folder)
    if not Path(path).resolve().is_relative_to(folder):
        raise UserError(
            f"{path}: lies outside the working folder {folder}, which is what the job takes along"
        )
    if not Path(recipe.checkpoint.dir).is_absolute():
        raise UserError(
            f"checkpoint.dir: is {recipe.checkpoint.dir}, and a job's working folder ends with the job; "
            "give an absolute path that all nodes share"
        )
    inside = Path(path).resolve().relative_to(folder)
    if inside.as_posix() not in Listing.of(folder).files:
        raise UserError(f"{path}: is not taken along; take it out of {IGNORE}, or give it another name")
    database = (recipe.track.uri or "").removeprefix("sqlite:///")
    if database != (recipe.track.uri or "") and not Path(database).is_absolute():
        raise UserError(
            f"track.uri: is {recipe.track.uri}, and a job's working folder ends with the job; give a "
            "server's address, or sqlite:////FOLDER/mlflow.db on storage that all nodes share"
        )
    settings = [argument for override in overrides for argument in ("--set", override)]
    return {
        "entrypoint": shlex.join(["python", "-m", "cluster.cli", command, str(inside), *settings]),
        "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING_S)}},
        "metadata": {"recipe": name},
    }


def _read(path: str, overrides: Sequence[str]) -> tuple[str, str, Recipe]:
    """The command that trains a file, its name, and the recipe that says where things are kept."""
    from cluster.experiments import plan as plans

    if not plans.is_sweep(path):
        recipe = driver.read(path, overrides)
        return "train", recipe.name, recipe
    plan = plans.read(path, overrides)
    return "sweep", plan.sweep.name, plan.first_recipe


def statuses(address: str | None) -> list[str]:
    """One line per job, the newest first."""
    with connected(address) as client:
        jobs = sorted(client.list_jobs(), key=lambda each: each.start_time or 0, reverse=True)
    return [_line(each) for each in jobs if each.submission_id]


def status(job_id: str, address: str | None) -> str:
    """One job's line, and what the cluster has to say about it."""
    with connected(address) as client:
        details = client.get_job_info(job_id)
    return hidden("\n".join(filter(None, [_line(details), details.message])))


def logs(job_id: str, address: str | None) -> str:
    """What a job has written so far."""
    with connected(address) as client:
        return hidden(client.get_job_logs(job_id))


def follow_logs(job_id: str, address: str | None) -> Iterator[str]:
    """What a job has written and writes, until it ends."""
    with connected(address) as client:
        client.get_job_status(job_id)  # an unknown one has no log, and no end
        pieces = client.tail_job_logs(job_id)
        with asyncio.Runner() as runner:
            while (piece := runner.run(anext(pieces, None))) is not None:
                yield hidden(piece)


def stop(job_id: str, address: str | None) -> str:
    """Stop a job and wait until it has ended; returns its line."""
    with connected(address) as client:
        client.stop_job(job_id)
        deadline = time.monotonic() + STOPPING_S + 10
        while not client.get_job_status(job_id).is_terminal():
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{job_id}: was told to stop and has not ended; look at `lockstep logs {job_id}`"
                )
            time.sleep(0.5)
        return _line(client.get_job_info(job_id))


@contextmanager
def connected(address: str | None) -> Iterator["JobSubmissionClient"]:
    """A client of the head at `address`; what goes wrong between us becomes a message."""
    url = head_url(address or os.environ.get("RAY_API_SERVER_ADDRESS") or HOME_ADDRESS)
    refuse_silent_head(url)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # uploads and sockets are no news to the user
    try:
        yield JobSubmissionClient(url)
    except AuthenticationError as error:
        raise UserError(
            f"{url}: wants a token; give the cluster's in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"{url}: no Ray head answers there; give --address http://HOST:PORT of its dashboard"
        ) from error
    except RuntimeError as error:
        raise _refusal(str(error)) from error
    finally:
        logging.disable(logging.NOTSET)


def _refusal(text: str) -> Exception:
    """What a head has refused, as it says it, with the cure where there is one."""
    if (unknown := re.search(r"[Jj]ob (\S+) (?:does not exist|not found)", text)) is not None:
        return UserError(f"{unknown[1]}: there is no such job; `lockstep status` lists them")
    if re.search(r"\b413\b|Too Large|exceeds the maximum size", text):
        return UserError(f"the head takes no archive as large as this one; name what stays here in {IGNORE}")
    return RunFailed(text.strip().splitlines()[-1] if text.strip() else "the head refused without a word")


def head_url(address: str) -> str:
    """The head's URL. UserError of plain HTTP to another machine: the token would travel in the open."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address: is {address}; give http://HOST:PORT of the head's dashboard")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        port = parts.port or 8265
        raise UserError(
            f"--address: {url} would send the cluster's token in the open; use https, or a tunnel: "
            f"`ssh -N -L {port}:127.0.0.1:{port} {parts.hostname}` and --address http://127.0.0.1:{port}"
        )
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _line(details: Any) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((details.start_time or 0) / 1000))
    recipe = (details.metadata or {}).get("recipe", "")
    return f"{details.submission_id}  {details.status.value:<9}  {began}  {recipe}"
