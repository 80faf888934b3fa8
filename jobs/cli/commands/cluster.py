"""Commands on a cluster: ``submit``, and ``jobs`` with what became of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.commands.jobs import Changes, SpecPath, parse_changes
from jobs.cli.options import Json, Store, print_json
from jobs.errors import ClusterError, GateError
from workers.errors import WorkError

if TYPE_CHECKING:
    from jobs.cluster.client import Cluster
    from jobs.cluster.record import JobRecord
    from jobs.cluster.submit import JobState

Address = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The head's dashboard, http://head:8265.")
]
Reached = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Where the head's dashboard is reached now; by default where the job was submitted to.",
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's digest, or its first six or more digits.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: nestquant submit resnet18.yaml --address http://head:8265 --wait")(submit)
    jobs = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="What became of submitted jobs; their record stands in the store.",
    )
    jobs.command(name="ls", epilog="Example: nestquant jobs ls --store s3://models")(ls)
    jobs.command(epilog="Example: nestquant jobs status 3f9a2c --store s3://models")(status)
    jobs.command(epilog="Example: nestquant jobs logs 3f9a2c -f --store s3://models")(logs)
    jobs.command(epilog="Example: nestquant jobs wait 3f9a2c --store s3://models")(wait)
    jobs.command(epilog="Example: nestquant jobs cancel 3f9a2c --store s3://models")(cancel)
    jobs.command(epilog="Example: nestquant jobs retry 3f9a2c --store s3://models")(retry)
    jobs.command(epilog="Example: nestquant jobs result 3f9a2c --store s3://models --json")(result)
    app.add_typer(jobs, name="jobs")


def submit(
    spec: SpecPath,
    *,
    address: Address,
    store: Annotated[str | None, typer.Option("--store", envvar="NESTQUANT_STORE", help="Overrides store.uri.")] = None,
    change: Changes = None,
    wait_for_end: Annotated[bool, typer.Option("--wait", help="Wait for the end; the exit code is the job's.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            help="Ask the head and a worker first for store, inputs and packages; submit nothing if it fails."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Submit a job to a running cluster. The same job submitted twice is one job."""
    from jobs.cluster import submit as service
    from jobs.spec.file import load_spec

    changes = parse_changes(change)
    if store is not None:
        changes["store.uri"] = store
    if check and not as_json:
        typer.echo(f"asking the head and a worker of {address} ...", err=True)
    record, attempt, new = service.submit(load_spec(spec, changes=changes), address, check=check)
    if wait_for_end:
        _wait(record, address, as_json=as_json)
        return
    if as_json:
        print_json({"job": record.request, "attempt": attempt.number, "submission": attempt.submission_id, "new": new})
        return
    outcome = "submitted" if new else "was submitted already"
    typer.echo(f"{record.request} {outcome}, attempt {attempt.number}")
    typer.echo(f"nestquant jobs logs {record.request.removeprefix('sha256:')[:12]} -f --store '{record.store.uri}'")


def ls(*, store: Store, address: Reached = None, as_json: Json = False) -> None:
    """List the submitted jobs."""
    from jobs.cluster.record import JobRecord, requests
    from jobs.cluster.submit import job_state
    from storage.stores.uri import open_existing_store

    opened, cluster = open_existing_store(store), _cluster(address)
    rows = []
    for request in requests(opened):
        record = JobRecord(opened, request)
        rows.append({**_document(record, job_state(record, cluster)), "name": record.spec().name})
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"No jobs in {opened.uri}: 'nestquant submit' puts their records there.", err=True)
    for row in rows:
        typer.echo(
            f"{row['job'].removeprefix('sha256:')[:12]}  {row['status']:<9}  attempt {row['attempt']}  {row['name']}"
        )


def status(job: Job, *, store: Store, address: Reached = None, as_json: Json = False) -> None:
    """Say how a job stands."""
    from jobs.cluster.submit import job_state

    record = _record(store, job)
    _print_state(record, job_state(record, _cluster(address)), as_json=as_json)


def logs(
    job: Job,
    *,
    store: Store,
    address: Reached = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print the log of a job's newest attempt: from the cluster while it is there, else from the store."""
    import asyncio

    from jobs.cluster.client import Cluster

    record = _record(store, job)
    attempt = record.latest()
    if attempt is None:
        raise ClusterError(
            f"{record.request} was never submitted, so there is no log; 'nestquant jobs retry' starts it."
        )
    log = record.log(attempt.number)
    if log is not None:
        typer.echo(log, nl=False)
        return
    cluster = Cluster(address or attempt.address)
    if not follow:
        typer.echo(cluster.logs(attempt), nl=False)
        return

    async def tail() -> None:
        async for lines in cluster.follow(attempt):
            typer.echo(lines, nl=False)

    asyncio.run(tail())


def wait(
    job: Job,
    *,
    store: Store,
    address: Reached = None,
    pending_timeout_s: Annotated[
        float, typer.Option("--pending-timeout", min=1, help="Stop a job that has not started after so many seconds.")
    ] = 600,
    as_json: Json = False,
) -> None:
    """Wait for the end of a job; the exit code is the job's."""
    _wait(_record(store, job), address, as_json=as_json, pending_timeout_s=pending_timeout_s)


def cancel(job: Job, *, store: Store, address: Reached = None, as_json: Json = False) -> None:
    """Stop a job. What is finished is kept, and a retry goes on from there."""
    from jobs.cluster import submit as service

    record = _record(store, job)
    _print_state(record, service.cancel(record, _cluster(address)), as_json=as_json)


def retry(
    job: Job,
    *,
    store: Store,
    address: Annotated[
        str | None, typer.Option("--address", help="Another cluster than that of the last attempt.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a job's next attempt, which skips what is finished."""
    from jobs.cluster import submit as service
    from jobs.cluster.client import Cluster
    from jobs.cluster.record import TERMINAL

    record = _record(store, job)
    state = service.job_state(record)
    if state.attempt is not None and state.status not in TERMINAL:
        raise ClusterError(f"{record.request} is {state.status}; 'nestquant jobs cancel' stops it.")
    target = address or (state.attempt.address if state.attempt else None)
    if target is None:
        raise ClusterError(f"{record.request} was never submitted; say where with --address.")
    service.retry(record, Cluster(target))
    _print_state(record, service.job_state(record), as_json=as_json)


def result(job: Job, *, store: Store, as_json: Json = False) -> None:
    """Print what a finished job found."""
    from jobs.cli import console
    from jobs.cluster.submit import job_state

    state = job_state(_record(store, job))
    if state.end is None or state.end.result is None:
        reason = f": {state.message.rstrip('.')}" if state.message else ""
        raise WorkError(f"No result: the job is {state.status}{reason}.")
    if as_json:
        print_json(state.end.result.model_dump(mode="json"))
    else:
        console.print_result(state.end.result)


def _record(store: str, job: str) -> JobRecord:
    from jobs.cluster.record import find_job
    from storage.stores.uri import open_existing_store

    return find_job(open_existing_store(store), job)


def _cluster(address: str | None) -> Cluster | None:
    """Return the cluster at an address that was given, so that it is asked instead of the one in the job's record."""
    from jobs.cluster.client import Cluster

    return None if address is None else Cluster(address)


def _wait(record: JobRecord, address: str | None, *, as_json: bool, pending_timeout_s: float = 600) -> None:
    from jobs.cluster import submit as service

    stages: list[str] = []

    def tell(state: JobState) -> None:
        stage = f" {state.progress.stage}" if state.progress else ""
        line = f"{state.status}{stage}"
        if not as_json and (not stages or stages[-1] != line):
            typer.echo(line, err=True)
            stages.append(line)

    state = service.wait(record, _cluster(address), pending_timeout_s=pending_timeout_s, on_state=tell)
    _print_state(record, state, as_json=as_json)
    if state.status != "SUCCEEDED":
        raise WorkError(f"The job ended {state.status}: {state.message or 'no reason given'}")
    if state.end is not None and state.end.error is not None:
        raise GateError(f"The version is stored, but not tagged: {state.end.error}.")


def _document(record: JobRecord, state: JobState) -> dict[str, Any]:
    progress = state.progress
    return {
        "job": record.request,
        "status": state.status,
        "attempt": 0 if state.attempt is None else state.attempt.number,
        "address": None if state.attempt is None else state.attempt.address,
        "message": state.message,
        "progress": None if progress is None else progress.model_dump(mode="json"),
    }


def _print_state(record: JobRecord, state: JobState, *, as_json: bool) -> None:
    if as_json:
        print_json(_document(record, state))
        return
    typer.echo(f"{record.request} {state.status}" + (f": {state.message}" if state.message else ""))
    if state.progress is not None:
        age = int(time.time()) - state.progress.unix_s
        typer.echo(f"{state.progress.stage} {state.progress.done} of {state.progress.total}, {age} s ago")
