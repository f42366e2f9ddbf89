"""Secrets planted where they were seen to leak, and code that only looks like them."""

import pytest

from knet_platform.redaction import clean_command, clean_patch, clean_text

AWS = "AKIA" + "IOSFODNN7EXAMPLE"
GITHUB = "ghp_" + "a1B2" * 9
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://knet:pa55@db/mlflow", "postgresql://***@db/mlflow"),
        ("https://tok@example.org/x", "https://***@example.org/x"),
        ("api_key=abcdef", "api_key=***"),
        ("tracking.password=abcdef", "tracking.password=***"),
        ("client-secret: abcdef", "client-secret: ***"),
        ('{"token": "abc def"}', '{"token": "***"}'),
        ("Authorization: Bearer abcdefgh1234", "Authorization: Bearer ***"),
        (f"use {AWS} here", "use *** here"),
        (f"use {GITHUB} here", "use *** here"),
        (f"use {JWT} here", "use *** here"),
    ],
)
def test_secrets_are_masked(text: str, clean: str) -> None:
    assert clean_text(text, environment={}) == clean


@pytest.mark.parametrize(
    "text",
    [
        "model.num_kernels=100",
        "data.root=/data/coco",
        "s3://bucket/prefix",
        "https://example.org/a@b",
        "knet run sweeps/stages.yaml --seeds 3",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert clean_text(text, environment={}) == text


def test_values_of_secret_variables_are_masked_wherever_they_stand() -> None:
    environment = {
        "WANDB_API_KEY": "0123456789",
        "AWS_SECRET_ACCESS_KEY": "a/b+c=d",
        "SHORT_TOKEN": "test",
        "HOME": "/home/me",
    }
    text = "x 0123456789 y 'a/b+c=d' test /home/me 01234567890"
    expected = "x *** y '***' test /home/me 01234567890"
    assert clean_text(text, environment=environment) == expected


@pytest.mark.parametrize(
    "line",
    [
        "token = next(tokens)",
        "def f(token: str) -> None:",
        "self.token = self._token",
        'token = ""',
    ],
)
def test_python_that_handles_secrets_stays_code(line: str) -> None:
    assert clean_text(line, is_python=True, environment={}) == line


def test_python_with_a_literal_secret_does_not() -> None:
    line = "connect(password=\"hunter2\", token: str = 'abc')"
    expected = "connect(password=\"***\", token: str = '***')"
    assert clean_text(line, is_python=True, environment={}) == expected


def test_a_command_is_printed_as_typed() -> None:
    words = ["knet", "run", "a b.yaml", "--api-key", "s3cret", "token=abc", "data.root=/d"]
    assert clean_command(words) == "knet run 'a b.yaml' --api-key '***' 'token=***' data.root=/d"


def test_the_next_line_of_a_diff_is_no_value() -> None:
    patch = "diff --git a/a.yaml b/a.yaml\n+token:\n+  name: x\n"
    assert clean_patch(patch) == (patch, ())


def test_a_private_key_in_a_diff_is_masked_line_by_line() -> None:
    patch = (
        "diff --git a/old.py b/old.py\n+x = 1\n"
        "diff --git a/key.pem b/key.pem\n@@ -0,0 +1,4 @@\n"
        "+-----BEGIN RSA PRIVATE KEY-----\n+MIIEow\n+IBAAKC\n+-----END RSA PRIVATE KEY-----\n"
    )
    clean, found = clean_patch(patch)
    assert found == ("key.pem",)
    assert "MIIE" not in clean
    assert clean.count("\n") == patch.count("\n")
    assert "+***\n+***\n+-----END" in clean
