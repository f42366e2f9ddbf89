"""Jobs of a cluster, here or far away, through its dashboard's address and its token."""

import asyncio
import logging
import os
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_platform.config import suggestion
from knet_platform.errors import InterruptedSweepError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SWEEP = "knet_sweep"
"""Key of a job's metadata that holds the name of its sweep."""
_POLL_SECONDS = 1.0
_STARTING_SECONDS = 30.0
"""A cluster answers before it can take jobs, for at most this long."""
_LARGEST_NAMED = 3


class Jobs:
    """The jobs of the cluster at `RAY_API_SERVER_ADDRESS`, else `RAY_ADDRESS`, else this machine.

    Raises:
        UsageError: Nobody answers, the token is missing or wrong, or the versions of Ray differ.
    """

    def __init__(self) -> None:
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):  # they set a level of their own
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        self.address = address or DEFAULT_ADDRESS
        with self._explained("reach"):
            self._client: JobSubmissionClient = JobSubmissionClient(self.address)
        self._require_equal_versions()

    def submit(
        self, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> str:
        """Start a job and return its id.

        Raises:
            UsageError: The cluster refuses it.
        """
        deadline = time.monotonic() + _STARTING_SECONDS
        while True:
            try:
                with self._explained("submit to"):
                    return self._client.submit_job(
                        entrypoint=entrypoint,
                        runtime_env=dict(runtime_env),
                        metadata=dict(metadata),
                    )
            except UsageError as error:
                if "try again later" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)

    def follow(self, job: str) -> Iterator[str]:
        """Yield the job's log, what is there and what comes, until the job ends."""
        log = self._client.tail_job_logs(job)

        async def more() -> str | None:
            return await anext(log, None)

        with asyncio.Runner() as runner, self._explained("read a log of"):
            while (text := runner.run(more())) is not None:
                yield text

    def log(self, job: str) -> str:
        """Return the job's log so far."""
        with self._explained("read a log of"):
            return self._client.get_job_logs(job)

    def stop(self, job: str) -> bool:
        """Ask a job to end; return whether it was running."""
        with self._explained("stop a job of"):
            return self._client.stop_job(job)

    def all(self) -> list["JobDetails"]:
        """Return the jobs that were submitted, the latest first."""
        with self._explained("list the jobs of"):
            jobs = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def find(self, name: str | None) -> str:
        """Return the id of a job: the latest of a sweep by its name, or of all.

        Raises:
            UsageError: There is none.
        """
        jobs = self.all()
        if name is None:
            jobs = [job for job in jobs if SWEEP in (job.metadata or {})] or jobs
        else:
            jobs = [j for j in jobs if name in (j.submission_id, (j.metadata or {}).get(SWEEP))]
        if jobs:
            return str(jobs[0].submission_id)
        known = [job.submission_id or "" for job in self.all()]
        what = f"no job '{name}'" if name else "no job yet"
        raise UsageError(
            f"{self.address}: {what}{suggestion(name or '', known)}; expected the id or the "
            f"sweep of a job that was submitted there: see knet status"
        )

    def exit_code(self, job: str) -> int:
        """Wait for the job's end, which may come after the end of its log; return its exit code.

        Raises:
            InterruptedSweepError: It was stopped.
            UsageError: It never ran.
        """
        from ray.job_submission import JobStatus

        with self._explained("ask for a job of"):
            while not (info := self._client.get_job_info(job)).status.is_terminal():
                time.sleep(_POLL_SECONDS)
        if info.status == JobStatus.STOPPED:  # Ray keeps no exit code of those
            raise InterruptedSweepError(
                f"job {job}: stopped; the same command continues the sweep"
            )
        if info.driver_exit_code is None:
            raise UsageError(f"job {job}: {info.message or info.status}")
        # A process ended by signal N has code -N; shells say 128 + N.
        code = int(info.driver_exit_code)
        return code if code >= 0 else 128 - code

    def _require_equal_versions(self) -> None:
        import ray

        theirs = self._client._server_ray_version
        if theirs is not None and theirs != ray.__version__:
            raise UsageError(
                f"{self.address}: runs Ray {theirs}, and this is {ray.__version__}; jobs need the "
                f"same on both sides: pip install 'ray[default]=={theirs}', or start the cluster "
                f"from the image of this version"
            )

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Turn what Ray and its HTTP client raise into a line about address and token."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        mode = os.environ.get("RAY_AUTH_MODE")
        try:
            yield
        except (AuthenticationError, aiohttp.WSServerHandshakeError) as error:
            raise UsageError(
                f"RAY_AUTH_TOKEN: {self.address} refuses the token ({_first_line(error)}); "
                f"RAY_AUTH_MODE is {mode}; expected the cluster's token, which is renewed with "
                f"it: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=<its file>"
            ) from error
        except (
            aiohttp.ClientError,
            requests.RequestException,
            ConnectionError,
            RuntimeError,
            ValueError,
        ) as error:
            raise UsageError(
                f"RAY_ADDRESS: cannot {verb} {self.address} ({_first_line(error)}); expected the "
                f"http address of a cluster's dashboard, with the same RAY_AUTH_MODE ({mode}); "
                f"start one: ray start --head"
            ) from error


def require_small(folder: Path, excludes: Sequence[str]) -> None:
    """Refuse a working folder that Ray would not take.

    It is packed as Ray packs it, and forgotten again: only that tells its size.

    Raises:
        UsageError: It is too large, with what makes it so.
    """
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

    quiet = logging.getLogger(f"{__name__}.quiet")
    quiet.disabled = True  # it is Ray's own message about large files
    with tempfile.TemporaryDirectory(prefix="knet-package-") as scratch:
        package = Path(scratch) / "package.zip"
        create_package(
            str(folder), package, include_gitignore=True, excludes=list(excludes), logger=quiet
        )
        size = package.stat().st_size
        if size < GCS_STORAGE_MAX_SIZE:
            return
        parts: Counter[str] = Counter()
        with zipfile.ZipFile(package) as archive:
            for entry in archive.infolist():
                parts[entry.filename.partition("/")[0]] += entry.compress_size
    largest = ", ".join(
        f"{name} {part / 2**20:.1f}" for name, part in parts.most_common(_LARGEST_NAMED)
    )
    raise UsageError(
        f"{folder}: {size / 2**20:.1f} MiB would go along, Ray takes less than "
        f"{GCS_STORAGE_MAX_SIZE / 2**20:.0f} MiB (largest: {largest}); name in .rayignore what a "
        f"job has no use for"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
