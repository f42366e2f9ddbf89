"""`knet doctor --cluster`: asks every node, lets them talk to each other, and judges."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from knet_platform.checks import LITTLE_DISK, Check, disk_status
from knet_platform.cluster.connection import connected
from knet_platform.cluster.node_probe import REDUCE_SECONDS, NodeProbe, NodeReport
from knet_platform.files import open_files

_ANSWER_SECONDS = 120.0
"""For an actor to start and answer: it loads torch, and a GPU may be taken by a trial."""
_SKEW_SECONDS = 1.0
"""Above which points of curves and ends of leases are in a wrong order."""


def cluster_checks(storage: str, home: Path) -> Iterator[Check]:
    """Yield what is wrong with the nodes of the cluster in use; leaves nothing behind.

    Raises:
        UsageError: The cluster cannot be reached.
        StorageError: The store cannot be written from here.
    """
    marker = f"doctor/{uuid4().hex}"
    files = open_files(storage)
    with connected():
        files.write(marker, b"")
        try:
            reports, silent = _ask(storage, marker, str(home))
        finally:
            files.delete(marker)
        yield from judge(reports, silent, storage)
        yield _reduce()


def judge(reports: Sequence[NodeReport], silent: Sequence[str], storage: str) -> Iterator[Check]:
    """Yield one check per thing that all nodes must have.

    Args:
        reports: Of the nodes that answered, the asking process' own first.
        silent: Names of those that did not.
        storage: Address of the store.
    """
    if silent:
        yield Check(
            name="nodes",
            status="fail",
            found=f"no answer in {_ANSWER_SECONDS:g} s from {', '.join(silent)}",
            mend="look at their logs: ray logs cluster; end them, the autoscaler starts others",
        )
    else:
        yield Check(name="nodes", status="ok", found=f"{len(reports)} answer")
    if not reports:
        return
    yield _versions(reports)
    yield _gpus(reports)
    yield _storage(reports, storage)
    yield _clocks(reports)
    yield _caches(reports)


def _versions(reports: Sequence[NodeReport]) -> Check:
    usual = {
        package: Counter(report.versions[package] for report in reports).most_common(1)[0][0]
        for package in reports[0].versions
    }
    wrong = [
        f"{report.host}: {package} {version or 'missing'}"
        for report in reports
        for package, version in report.versions.items()
        if version != usual[package] or not version
    ]
    shown = ", ".join(f"{package} {version}" for package, version in usual.items())
    if not wrong:
        return Check(name="versions", status="ok", found=f"{shown} everywhere")
    mend = "start all nodes from one image, by its tag: knet cluster render, then ray up"
    found = f"most have {shown}; not {'; '.join(wrong)}"
    return Check(name="versions", status="fail", found=found, mend=mend)


def _gpus(reports: Sequence[NodeReport]) -> Check:
    wrong = [
        f"{report.host}: {report.gpus_promised} promised, {report.gpus_seen} seen"
        for report in reports
        if report.gpus_seen < report.gpus_promised
    ]
    if wrong:
        mend = "run nvidia-smi there; the driver must be as new as torch.version.cuda wants"
        return Check(name="GPUs", status="fail", found="; ".join(wrong), mend=mend)
    total = sum(report.gpus_promised for report in reports)
    return Check(name="GPUs", status="ok", found=f"{total} on {len(reports)} nodes")


def _storage(reports: Sequence[NodeReport], storage: str) -> Check:
    wrong = [f"{r.host}: {r.storage_problem}" for r in reports if r.storage_problem]
    if not wrong:
        return Check(name="store", status="ok", found=f"{storage}: written from every node")
    mend = (
        "give the nodes' role the rights of cluster/aws/access.yaml"
        if "://" in storage
        else "set KNET_STORAGE to a bucket, or to a folder that all nodes share"
    )
    return Check(name="store", status="fail", found="; ".join(wrong), mend=mend)


def _clocks(reports: Sequence[NodeReport]) -> Check:
    worst = max(reports, key=lambda report: abs(report.skew_seconds))
    found = f"at most {abs(worst.skew_seconds):.2f} s apart"
    if abs(worst.skew_seconds) <= _SKEW_SECONDS:
        return Check(name="clocks", status="ok", found=found)
    mend = "run chrony or systemd-timesyncd there"
    return Check(name="clocks", status="fail", found=f"{found} ({worst.host})", mend=mend)


def _caches(reports: Sequence[NodeReport]) -> Check:
    least = min(reports, key=lambda report: report.cache_free_gib)
    found = f"at least {least.cache_free_gib:.0f} GiB free ({least.host})"
    status = disk_status(least.cache_free_gib)
    mend = f"mount a disk with {LITTLE_DISK:g} GiB and more at KNET_HOME/cache there"
    return Check(name="caches", status=status, found=found, mend="" if status == "ok" else mend)


def _ask(storage: str, marker: str, home: str) -> tuple[list[NodeReport], list[str]]:
    """Return what nodes say, and the names of those that say nothing."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    here = ray.get_runtime_context().get_node_id()
    nodes.sort(key=lambda node: node["NodeID"] != here)
    probes = [_probe_on(node) for node in nodes]
    answers = [probe.answer.remote(storage, marker, home) for probe in probes]
    done, _ = ray.wait(answers, num_returns=len(answers), timeout=_ANSWER_SECONDS)
    reports, silent = [], []
    for node, probe, answer in zip(nodes, probes, answers, strict=True):
        name = node["NodeManagerHostname"]
        if answer not in done:
            silent.append(name)
            continue
        try:
            said = ray.get(answer)
            before = time.time()
            theirs = ray.get(probe.now.remote())
            skew = theirs - (before + time.time()) / 2
        except ray.exceptions.RayError as error:
            silent.append(f"{name} ({type(error).__name__})")
            continue
        promised = int(node["Resources"].get("GPU", 0))
        reports.append(NodeReport(**asdict(said), gpus_promised=promised, skew_seconds=skew))
    for probe in probes:
        ray.kill(probe)
    return reports, silent


def _reduce() -> Check:
    """Let the nodes add numbers up; a cluster of one node does it in two processes."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    with_gpu = [node for node in nodes if node["Resources"].get("GPU", 0)]
    backend, chosen = ("nccl", with_gpu) if with_gpu else ("gloo", nodes)
    if len(chosen) == 1 and backend == "gloo":
        chosen = chosen * 2
    probes = [_probe_on(node, gpus=1 if backend == "nccl" else 0) for node in chosen]
    name = f"all-reduce ({backend})"
    try:
        address = ray.get(probes[0].free_address.remote(), timeout=_ANSWER_SECONDS)
        world = len(probes)
        sums = [p.reduce.remote(address, rank, world, backend) for rank, p in enumerate(probes)]
        seconds = max(ray.get(sums, timeout=_ANSWER_SECONDS + REDUCE_SECONDS))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        mend = (
            "let nodes reach each other on all ports (cluster/aws/access.yaml does); run it while "
            "no trial has the GPUs; NCCL_DEBUG=INFO says more"
        )
        return Check(name=name, status="fail", found=reason[-1], mend=mend)
    finally:
        for probe in probes:
            ray.kill(probe)
    found = (
        f"{world} ranks on {len(set(map(_id, chosen)))} nodes, 16 MiB in {1e3 * seconds:.0f} ms"
    )
    return Check(name=name, status="ok", found=found)


def _id(node: dict[str, Any]) -> str:
    return str(node["NodeID"])


def _probe_on(node: dict[str, Any], gpus: int = 0) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(_id(node), soft=False)
    actor = ray.remote(NodeProbe)
    return actor.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=there).remote()
