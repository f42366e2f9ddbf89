"""S3 and what speaks its protocol: one client, one line about whatever goes wrong.

Credentials come by boto3's usual chain (environment, profile, instance or pod role) and are named
nowhere else; `AWS_ENDPOINT_URL` leads to MinIO and the like. Every upload carries a checksum that
the server compares, every download one that boto3 does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
)

from knet_platform.errors import StorageError

_ATTEMPTS = 6
"""Of each request, with pauses that double and are drawn at random: about 15 s in all."""
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct its name",
    "InvalidAccessKeyId": "check the credentials in use with `aws sts get-caller-identity`",
    "SignatureDoesNotMatch": "check the credentials in use with `aws sts get-caller-identity`",
    "ExpiredToken": "renew the credentials, then run again",
    "AccessDenied": "allow these credentials s3:ListBucket, s3:GetObject, s3:PutObject and "
    "s3:DeleteObject there",
    "403": "allow these credentials s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject "
    "there",
    "PreconditionFailed": "it was replaced meanwhile: run again",
}
_MISSING = frozenset({"NoSuchKey", "404"})


def open_client(connections: int = 10) -> Any:
    """Return a client of its own, which threads may share.

    Args:
        connections: Most requests at a time; others wait.
    """
    config = Config(
        max_pool_connections=connections,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        tcp_keepalive=True,
    )
    with explained("s3", "open"):
        return boto3.session.Session().client("s3", config=config)


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key of s3://bucket/key; the key neither begins nor ends with a slash.

    Raises:
        StorageError: The bucket has no name.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: no bucket named; expected s3://bucket/prefix")
    return bucket, key.strip("/")


def is_missing(error: ClientError) -> bool:
    """Return whether S3 answered that there is no such object."""
    return error.response["Error"]["Code"] in _MISSING


@contextmanager
def explained(uri: str, verb: str) -> Iterator[None]:
    """Turn what boto3 raises about `uri` into a `StorageError`: what failed, why, what to do."""
    try:
        yield
    except (BotoCoreError, Boto3Error, ClientError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"{uri}: cannot {verb} ({reason}); {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if isinstance(error, NoCredentialsError):
        return "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret, or give the machine a role"
    if isinstance(error, EndpointConnectionError):
        return "check AWS_ENDPOINT_URL, AWS_REGION and the network"
    # An upload in parts reports a refusal as an error of its own, caused by the one that tells.
    cause = error if isinstance(error, ClientError) else error.__context__
    code = cause.response["Error"]["Code"] if isinstance(cause, ClientError) else ""
    return _ADVICE.get(
        code, "check the bucket, the credentials and AWS_ENDPOINT_URL, then run again"
    )
