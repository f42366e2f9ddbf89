"""Data sets fetched from a folder and from a real S3 server: once, whole, again after faults."""

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig

from knet_core import (
    DataConfig,
    DataError,
    DiskFullError,
    SplitConfig,
    build_dataset,
    data_fingerprint,
    make_shapes,
)
from knet_platform import s3
from knet_platform.errors import StorageError, UsageError
from knet_platform.staging import Cache, fingerprint, num_train_images, staged
from knet_platform.staging.sources import Listed, _ETags, open_source
from knet_platform.staging.stage import _outline

ADE = DataConfig(
    format="ade20k",
    train=SplitConfig(images=("images/training",), annotations=("annotations/training",)),
    val=SplitConfig(images=("images/validation",), annotations=("annotations/validation",)),
)
PANOPTIC = DataConfig(
    format="coco_panoptic",
    train=SplitConfig(images=("train",), annotations=("annotations/panoptic_train.json",)),
    val=SplitConfig(images=("val/",), annotations=("annotations/panoptic_val.json",)),
)
STAGE = """
import sys
from knet_core import DataConfig
from knet_platform.staging import fingerprint, staged
data = DataConfig(root=sys.argv[1])
with staged(data, expected=fingerprint(data)):
    print("staged", flush=True)
    sys.stdin.read()
"""


class Far:
    """A place that sets are fetched from."""

    def __init__(self, address: str) -> None:
        self.address = address
        bucket, _, self._prefix = address.removeprefix("s3://").partition("/")
        self._bucket = boto3.resource("s3").Bucket(bucket) if "s3:" in address else None
        self._root = Path(address.removeprefix("file://"))

    def put(self, name: str, content: bytes, **options: str) -> None:
        if self._bucket:
            self._bucket.put_object(Key=f"{self._prefix}/{name}", Body=content, **options)
        else:
            (self._root / name).parent.mkdir(parents=True, exist_ok=True)
            (self._root / name).write_bytes(content)

    def put_all(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(path.relative_to(folder).as_posix(), path.read_bytes())

    def vanish(self) -> None:
        if self._bucket:
            self._bucket.objects.filter(Prefix=self._prefix).delete()
        else:
            shutil.rmtree(self._root)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    for name in ("KNET_CACHE", "KNET_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KNET_HOME", str(tmp_path / "home"))
    _outline.cache_clear()
    return tmp_path / "home"


@pytest.fixture(params=["folder", "s3"])
def far(request, tmp_path) -> Far:
    if request.param == "folder":
        return Far(f"file://{tmp_path}/shared")
    return request.getfixturevalue("in_s3")


@pytest.fixture
def in_s3(s3_uri, tmp_path) -> Far:
    return Far(f"{s3_uri}/{tmp_path.name}")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "shapes"
    make_shapes(folder, num_train=4, num_val=2, size=64)
    return folder


@pytest.fixture
def asked(before_s3, tmp_path):
    """Count what is asked of S3 in the test: names of objects, and "" for listings."""
    requests: Counter[str] = Counter()

    def note(line: str, count: int) -> None:
        method, path, _ = line.split()
        if method == "GET":
            requests[path.partition("?")[0].partition(f"/{tmp_path.name}/")[2]] += 1

    with before_s3(note):
        yield requests


def kept() -> list[str]:
    """Return the digests of the contents that the cache holds."""
    objects = Cache.in_use().folder / "objects"
    return sorted(f"{path.parent.name}{path.name}" for path in objects.glob("*/*"))


def files_of(address: str) -> Path:
    (cached, *_) = Cache.in_use().sets(address)
    return cached.files


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("config", "below"), [(DataConfig(), "."), (PANOPTIC, "."), (ADE, "semantic")]
)
def test_a_set_is_the_same_wherever_it_is_and_planning_leaves_its_images(
    far, shapes, config, below
):
    far.put_all(shapes / below)
    task = "semantic" if config.format == "ade20k" else "instance"
    here, there = replace(config, root=str(shapes / below)), replace(config, root=far.address)
    assert fingerprint(there) == fingerprint(here) == data_fingerprint(here)
    assert num_train_images(there) == 4
    names = contents(files_of(far.address))
    assert names
    assert all("annotations" in name or name == "classes.txt" for name in names)
    if config.format == "coco_panoptic":
        assert all(name.endswith(".json") for name in names)  # of maps names and sizes will do
    with pytest.raises(DataError, match="an address whose files are not here"):
        build_dataset(there, "val", seed=0, task=task)
    with staged(there, expected=fingerprint(there)):
        dataset = build_dataset(there, "val", seed=0, task=task)
        assert len(dataset) == 2
        assert dataset.load(1, epoch=0).image.equal(
            build_dataset(here, "val", seed=0, task=task).load(1, epoch=0).image
        )
        assert data_fingerprint(there) == data_fingerprint(here)
    assert contents(files_of(far.address)) == contents(shapes / below)
    with pytest.raises(DataError, match="an address whose files are not here"):
        data_fingerprint(there)


def test_what_is_here_as_planned_needs_its_source_no_more(far, shapes):
    far.put_all(shapes)
    data = DataConfig(root=far.address)
    planned = fingerprint(data)
    with staged(data, expected=planned):
        pass
    far.vanish()
    with staged(data, expected=planned):
        assert len(build_dataset(data, "train", seed=0)) == 4
    with pytest.raises(DataError, match=r"no such folder|nothing there"), staged(data):
        pass


def test_of_a_new_version_only_what_changed_is_fetched_and_the_old_one_stays(in_s3, shapes, asked):
    in_s3.put_all(shapes)
    data = DataConfig(root=in_s3.address)
    planned = fingerprint(data)
    with staged(data, expected=planned):
        before = kept()
        annotations = (shapes / "annotations/instances_val.json").read_bytes()
        in_s3.put("annotations/instances_val.json", annotations + b" ")
        in_s3.put("more/again.json", annotations)
        asked.clear()
        with (
            pytest.raises(DataError, match="not what it was when the run was planned"),
            staged(data, expected="0" * 64),
        ):
            pass
        assert set(asked) == {"", "annotations/instances_val.json", "more/again.json"}
        # The content that moved is there once; the old set is read on as it was.
        assert len(kept()) == len(before) + 1
        assert data_fingerprint(data) == planned
    assert len(Cache.in_use().sets(in_s3.address)) == 2


def test_processes_that_start_together_fetch_once_and_share(in_s3, shapes, asked):
    in_s3.put_all(shapes)
    names = set(contents(shapes))
    command = [sys.executable, "-c", STAGE, in_s3.address]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    try:
        assert [process.stdout.readline() for process in processes] == [b"staged\n"] * 3
        (cached,) = Cache.in_use().sets()
        for process in processes:  # it stays until the last has ended
            assert not cached.evict()
            process.communicate()
    finally:
        for process in processes:
            process.kill()
    assert cached.evict()
    assert {name: asked[name] for name in names} == dict.fromkeys(names, 1)
    assert asked[""] <= 4  # each plans, and whoever fetches lists once more


def test_what_a_killed_process_fetched_is_not_fetched_again(
    in_s3, shapes, before_s3, home, tmp_path
):
    in_s3.put_all(shapes)
    processes: list[subprocess.Popen] = []
    asked: Counter[str] = Counter()

    def meddle(line: str, count: int) -> bytes | None:
        name = line.split()[1].partition("?")[0].partition(f"/{tmp_path.name}/")[2]
        asked[name] += bool(name)
        if len(asked) > len(contents(shapes)) // 2 and processes:
            processes.pop().send_signal(signal.SIGKILL)
        return None

    command = [sys.executable, "-c", STAGE, in_s3.address]
    with before_s3(meddle):
        victim = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        processes.append(victim)
        assert victim.wait(60) == -signal.SIGKILL
        (cached,) = Cache.in_use().sets()
        done = set(cached.index())
        assert done  # the annotations at least
        assert not cached.is_complete()
        asked.clear()
        data = DataConfig(root=in_s3.address)
        with staged(data, expected=fingerprint(data)):
            assert contents(files_of(in_s3.address)) == contents(shapes)
    assert set(asked) == {"", *contents(shapes)} - done
    assert sorted(path.name for path in files_of(in_s3.address).parent.iterdir()) == [
        *("address", "complete", "files", "index"),
    ]


def test_half_a_line_of_the_index_costs_the_file_alone(far, shapes):
    far.put_all(shapes)
    data = DataConfig(root=far.address)
    with staged(data):
        pass
    index = files_of(far.address).parent / "index"
    index.write_bytes(index.read_bytes()[:-10])
    (cached,) = Cache.in_use().sets()
    assert len(cached.index()) == len(contents(shapes)) - 1
    with staged(data):
        assert len(cached.index()) == len(contents(shapes))
    assert contents(cached.files) == contents(shapes)


def test_a_damaged_file_is_fetched_again(far, shapes):
    far.put_all(shapes)
    data = DataConfig(root=far.address)
    planned = fingerprint(data)
    with staged(data, expected=planned):
        pass
    image = next(files_of(far.address).glob("train/*"))
    stat, sound = image.stat(), image.read_bytes()
    image.chmod(0o644)
    image.write_bytes(sound[:-1] + b"x")
    with staged(data, expected=planned):
        assert image.read_bytes() == sound
    # A disk that rots changes neither size nor time: `knet data check` compares the content.
    stat = image.stat()
    image.chmod(0o644)
    image.write_bytes(sound[:-1] + b"x")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with staged(data, expected=planned):
        assert image.read_bytes() != sound
    with staged(data, verify=True):
        assert image.read_bytes() == sound
    image.unlink()
    with staged(data, expected=planned):
        assert image.read_bytes() == sound


def reply(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + body
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda content: reply(content[:-9]), "bytes arrived, expected"),
        (lambda content: reply(content[:-9], length=len(content)), "cannot read"),
        (lambda content: reply(content[:-1] + b"x"), "not that of its ETag"),
    ],
)
def test_an_object_that_does_not_arrive_whole_is_never_used(in_s3, shapes, before_s3, fault, said):
    in_s3.put_all(shapes)
    name = min(name for name in contents(shapes) if name.startswith("train/"))
    content, told = (shapes / name).read_bytes(), []

    def meddle(line: str, count: int) -> bytes | None:
        if line.split()[1].partition("?")[0].endswith(f"/{name}") and len(told) < often:
            told.append(line)
            return fault(content)
        return None

    data, often = DataConfig(root=in_s3.address), 100
    with before_s3(meddle), pytest.raises(StorageError, match=said) as caught, staged(data):
        pass
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    (cached,) = Cache.in_use().sets()
    assert not (cached.files / name).exists()
    told, often = [], 2  # what passes is sat out
    with before_s3(meddle), staged(data):
        assert contents(cached.files) == contents(shapes)
    assert len(told) == 2


@pytest.fixture
def ranges(monkeypatch) -> list[str | None]:
    """Collect the range that every request for `a/big` names."""
    asked: list[str | None] = []
    client = s3.open_client

    def note(request: Any, **_: Any) -> None:
        if request.url.endswith("/a/big"):
            given = request.headers.get("Range")
            asked.append(given.decode() if isinstance(given, bytes) else given)

    def watched(connections: int) -> Any:
        made = client(connections)
        made.meta.events.register("before-send.s3.GetObject", note)
        return made

    monkeypatch.setattr(s3, "open_client", watched)
    return asked


def test_a_large_file_goes_on_where_it_broke_off(in_s3, before_s3, ranges):
    content = os.urandom(4_000_000)
    in_s3.put("a/big", content)
    in_s3.put("a/small", b"small")

    def cut(line: str, count: int) -> bytes | None:
        if "/a/big" not in line:
            return None
        if len(ranges) == 1:
            return reply(content[:3_000_000], length=len(content))
        head = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 3000000-3999999/4000000\r\n"
        return f"{head}Content-Length: 1000000\r\nConnection: close\r\n\r\n".encode()

    data = DataConfig(root=in_s3.address)
    with before_s3(cut), pytest.raises(StorageError, match="a/big: cannot read"), staged(data):
        pass
    (cached,) = Cache.in_use().sets()
    assert set(cached.index()) == {"a/small"}
    (begun,) = (cached.files.parent / "unfinished").iterdir()
    assert begun.read_bytes() == content[:3_000_000]
    with staged(data):
        assert contents(cached.files) == {"a/big": content, "a/small": b"small"}
    assert ranges == [None, *["bytes=3000000-"] * 4]
    assert not begun.parent.exists()


def leave_unfinished(address: str, name: str) -> Path:
    """Leave what a killed process does, with a file that a power cut spoilt; return its folder."""
    cached = Cache.in_use().set(address, open_source(address).list())
    with cached.used(address), cached.scratch() as unfinished:
        (unfinished / hashlib.sha256(name.encode()).hexdigest()).write_bytes(b"x" * 1000)
        (unfinished / "link").write_bytes(b"an object")
        (unfinished / "link").chmod(0o444)
    assert len(list(unfinished.iterdir())) == 2
    return unfinished


@pytest.mark.parametrize("encryption", [{}, {"ServerSideEncryption": "aws:kms"}])
def test_what_had_arrived_is_dropped_where_it_may_be_damaged(in_s3, ranges, encryption):
    content, data = os.urandom(2**20), DataConfig(root=in_s3.address)
    in_s3.put("a/big", content, **encryption)
    unfinished = leave_unfinished(in_s3.address, "a/big")
    with staged(data):
        assert contents(files_of(in_s3.address)) == {"a/big": content}
    assert ranges == ["bytes=1000-", None]
    assert not unfinished.exists()


def test_files_of_a_shared_folder_begin_again(tmp_path):
    far = Far(f"file://{tmp_path}/shared")
    far.put("a/big", os.urandom(5000))
    unfinished = leave_unfinished(far.address, "a/big")
    with staged(DataConfig(root=far.address)):
        assert contents(files_of(far.address)) == contents(tmp_path / "shared")
    assert not unfinished.exists()


def test_objects_that_were_uploaded_in_parts_are_verified_too(in_s3, tmp_path):
    content = os.urandom(12 * 2**20)
    (tmp_path / "big").write_bytes(content)
    parts = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    name, _, prefix = in_s3.address.removeprefix("s3://").partition("/")
    boto3.client("s3").upload_file(str(tmp_path / "big"), name, f"{prefix}/a/big", Config=parts)
    source = open_source(in_s3.address)
    (listed,) = source.list()
    assert listed.version.endswith("-3")
    found = _ETags(5 * 2**20)
    for start in range(0, len(content), 2**20):
        found.update(content[start : start + 2**20])
    assert found.etag() == listed.version
    with (tmp_path / "copy").open("x+b") as target:
        source.fetch(listed, target)
    assert (tmp_path / "copy").read_bytes() == content
    in_s3.put("a/big", b"replaced")
    with (
        (tmp_path / "other").open("x+b") as target,
        pytest.raises(StorageError, match="replaced meanwhile: run again"),
    ):
        source.fetch(listed, target)


def test_what_was_used_least_lately_makes_room_and_nothing_in_use(tmp_path, monkeypatch):
    def make(name: str, *files: str) -> DataConfig:
        place = Far(f"file://{tmp_path}/{name}")
        for file in files:
            place.put(f"a/{file}", file.encode() * 300_000)
        return DataConfig(root=place.address)

    one, two, three = make("one", "1", "s"), make("two", "2", "s"), make("three", "3", "4")
    monkeypatch.setenv("KNET_CACHE_GB", "0.0013")
    cache = Cache.in_use()
    with staged(one), staged(two):
        assert cache.used() == 900_000  # what both have is there once
        refused = pytest.raises(DiskFullError, match=r"0\.0006 GB are to be fetched.*KNET_CACHE")
        with refused, staged(three):
            pass
    with staged(one), staged(three):
        assert {state.address for state in cache.states()} == {one.root, three.root}
        assert cache.used() == 1_200_000
        assert len(contents(files_of(one.root))) == 2
    with staged(two):
        assert {state.address for state in cache.states()} == {two.root, three.root}
    assert not (cache.folder / "deleted").exists()


def test_a_full_disk_leaves_what_has_arrived(far, shapes, monkeypatch):
    far.put_all(shapes)
    link, calls = os.link, []

    def full(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        link(*paths)

    data = DataConfig(root=far.address)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(DiskFullError, match="no space left"), staged(data):
            pass
    (cached,) = Cache.in_use().sets()
    assert 0 < len(cached.index()) < len(contents(shapes))
    assert not cached.is_complete()
    with staged(data):
        assert contents(cached.files) == contents(shapes)


@pytest.mark.parametrize("key", ["../../evil", "a/../../../evil", "/evil", "a//b", "a/./b"])
def test_a_key_that_leads_out_of_the_set_is_refused(in_s3, home, tmp_path, key):
    in_s3.put("a/fine", b"fine")
    in_s3.put(key, b"evil")
    with (
        pytest.raises(DataError, match=f"'{re.escape(key)}' is no name of a file below"),
        staged(DataConfig(root=in_s3.address)),
    ):
        pass
    assert not list(home.rglob("*evil*"))
    assert not (home / "cache" / "sets").exists()


def test_a_key_below_that_of_a_file_and_marks_of_folders(in_s3):
    in_s3.put("a/", b"")
    in_s3.put("a/b", b"file")
    assert open_source(in_s3.address).list() == [
        Listed("a/b", 4, "8c7dd922ad47494fc02c388e12c00eac")
    ]
    in_s3.put("a/b/c", b"file")
    with pytest.raises(DataError, match="'a/b' is both a file and a folder"):
        open_source(in_s3.address).list()


def test_links_out_of_a_shared_folder_are_refused(tmp_path):
    far = Far(f"file://{tmp_path}/shared")
    far.put("a/b", b"file")
    (tmp_path / "shared" / "within").symlink_to("a/b")
    assert [file.name for file in open_source(far.address).list()] == ["a/b", "within"]
    for target in ("/etc/passwd", "a", "nothing"):
        (tmp_path / "shared" / "link").symlink_to(target)
        with pytest.raises(DataError, match="shared/link: neither a file nor a folder of the set"):
            open_source(far.address).list()
        (tmp_path / "shared" / "link").unlink()


def test_what_cannot_be_fetched_is_one_line_with_the_mend(s3_uri, before_s3, monkeypatch):
    def said(address: str) -> str:
        with pytest.raises((DataError, StorageError)) as caught, staged(DataConfig(root=address)):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert re.search(
        "nobody-made-it/x: cannot list .*create the bucket", said("s3://nobody-made-it/x")
    )
    assert "s3://: no bucket named" in said("s3://")
    assert "nothing there; expected the data set" in said(f"{s3_uri}/no-such-prefix")
    assert "no such folder" in said("file:///no/such/folder")
    assert "expected a folder, s3://bucket/prefix or file:///" in said("gs://bucket/coco")
    denied = b"<Error><Code>InvalidAccessKeyId</Code><Message>no</Message></Error>"
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(denied)}\r\nConnection: close\r\n\r\n"
    with before_s3(lambda line, count: head.encode() + denied):
        assert "check the credentials in use" in said(s3_uri)
    for size in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("KNET_CACHE_GB", size)
        with pytest.raises(UsageError, match=f"KNET_CACHE_GB: got '{size}', expected a size in"):
            Cache.in_use()


def test_how_far_a_set_is_fetched_is_told(far, shapes, monkeypatch, capsys):
    monkeypatch.setattr("knet_platform.staging.stage.TELL_SECONDS", 0.0)
    far.put_all(shapes)
    with staged(DataConfig(root=far.address)):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(contents(shapes)) + 1
    assert lines[-1] == f"data: {far.address}: 0.00 of 0.00 GB fetched"
