"""Whether this worker's machine is about to be taken away: Ray says so, or the cloud does.

Ray knows of nodes that are drained, which its own shutdown on SIGTERM does, and what the cloud's
autoscaler tells it. Of spot machines only the machine itself is told: by a page that the cloud
serves to it (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
https://cloud.google.com/compute/docs/instances/create-use-preemptible#detecting_if_an_instance_was_preempted).
"""

import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import TracebackType

import ray.train

_POLL_SECONDS = 5.0
"""As often as AWS advises."""
_TIMEOUT_SECONDS = 2.0


class Notices:
    """Watches the cloud's page from a thread of its own while its block runs.

    Args:
        clouds: Ask one cloud each whether the machine goes; they raise `OSError` elsewhere.
        poll_seconds: Between questions.
    """

    def __init__(
        self,
        clouds: Sequence[Callable[[], bool]] | None = None,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._clouds = (aws_takes_it, gcp_takes_it) if clouds is None else clouds
        self._poll_seconds = poll_seconds
        self._noticed = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)
        self._known: ray.train.PreemptionInfo | None = None

    def take(self) -> bool:
        """Return whether there is a new notice; all workers of a trial call it together."""
        info = ray.train.get_preemption_info()
        told, self._known = info is not None and info != self._known, info
        if self._noticed.is_set():
            self._noticed.clear()
            return True
        return told

    def __enter__(self) -> "Notices":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        """Ask until the first notice; a cloud that does not answer is not this machine's."""
        clouds = [cloud for cloud in self._clouds if _answer(cloud) is not None]
        while clouds and not self._over.is_set():
            if any(_answer(cloud) for cloud in clouds):
                self._noticed.set()
                return
            self._over.wait(self._poll_seconds)


def aws_takes_it() -> bool:
    """Return whether EC2 is about to stop or end this spot instance."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise ConnectionError("EC2's metadata are switched off")
    default = "http://169.254.169.254"
    service = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", default).rstrip("/")
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _fetch(f"{service}/latest/api/token", lifetime, method="PUT")
    page = f"{service}/latest/meta-data/spot/instance-action"
    try:
        _fetch(page, {"X-aws-ec2-metadata-token": token.decode()})
    except urllib.error.HTTPError as error:
        if error.code == http.client.NOT_FOUND:  # there is nothing to say yet
            return False
        raise
    return True


def gcp_takes_it() -> bool:
    """Return whether Compute Engine has preempted this machine."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    page = f"http://{host}/computeMetadata/v1/instance/preempted"
    return _fetch(page, {"Metadata-Flavor": "Google"}) == b"TRUE"


def _answer(cloud: Callable[[], bool]) -> bool | None:
    try:
        return cloud()
    except OSError:
        return None


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> bytes:
    request = urllib.request.Request(url, headers=headers, method=method)
    # The page is the machine's own: a proxy would be asked about another's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
        content: bytes = answer.read()
    return content
