"""What a cloud says about the machine, from a real HTTP server in its place."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from knet_platform import notices
from knet_platform.notices import Notices, aws_takes_it, gcp_takes_it


@pytest.fixture
def pages(monkeypatch):
    """Answers by path; what is missing is answered with 404."""
    pages = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write((content or "").encode())

        do_PUT = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}/")
    monkeypatch.setenv("GCE_METADATA_HOST", address)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    yield pages
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_spot_instance_that_is_to_go_is_known(pages):
    pages["/latest/api/token"] = "token"
    assert not aws_takes_it()
    pages["/latest/meta-data/spot/instance-action"] = '{"action": "terminate"}'
    assert aws_takes_it()


def test_a_preempted_machine_of_google_is_known(pages):
    pages["/computeMetadata/v1/instance/preempted"] = "FALSE"
    assert not gcp_takes_it()
    pages["/computeMetadata/v1/instance/preempted"] = "TRUE"
    assert gcp_takes_it()


@pytest.mark.parametrize("cloud", [aws_takes_it, gcp_takes_it])
def test_elsewhere_nobody_answers(pages, cloud):
    with pytest.raises(OSError, match="404"):
        cloud()


def test_a_notice_is_taken_once(monkeypatch):
    monkeypatch.setattr(notices.ray.train, "get_preemption_info", lambda: None)
    asked = threading.Event()
    answers = iter([False, False, True])

    def cloud():
        answer = next(answers)
        if answer:
            asked.set()
        return answer

    with Notices([cloud], poll_seconds=0.001) as watched:
        assert asked.wait(10)
        watched._thread.join(10)
        assert watched.take()
        assert not watched.take()


def test_what_ray_says_is_taken_once_for_each_notice(monkeypatch):
    said = [None, "drain 1", "drain 1", "drain 2"]
    monkeypatch.setattr(notices.ray.train, "get_preemption_info", lambda: said.pop(0))
    with Notices([]) as watched:
        assert [watched.take() for _ in range(4)] == [False, True, False, True]
