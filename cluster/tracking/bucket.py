"""Copy a bucket's prefix to a folder or back, with boto3's own multipart transfers.

bucket.py download s3://BUCKET/PREFIX FOLDER
bucket.py upload FOLDER s3://BUCKET/PREFIX

Credentials by the usual chain; AWS_ENDPOINT_URL is honoured.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import boto3

TRANSFERS = 8


def main(verb: str, source: str, target: str) -> None:
    """Copy; the first transfer that fails ends it."""
    folder = Path(target if verb == "download" else source).absolute()
    address = source if verb == "download" else target
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    client = boto3.client("s3")

    def fetch(key: str) -> None:
        file = folder / key.removeprefix(prefix)
        if PurePosixPath("/", key).as_posix() != f"/{key}" or ".." in PurePosixPath(key).parts:
            sys.exit(f"s3://{bucket}/{key}: a name that no file can have; rename it")
        file.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, key, str(file))

    def send(file: Path) -> None:
        key = f"{prefix}{file.relative_to(folder).as_posix()}"
        client.upload_file(str(file), bucket, key)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        if verb == "download":
            folder.mkdir(parents=True, exist_ok=True)
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
            done = list(pool.map(fetch, keys))
        else:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            done = list(pool.map(send, files))
    print(f"{verb}: {len(done)} files")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("download", "upload"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
