"""KubeRay's custom resources, and what Kubernetes itself must know beside them.

They need KubeRay 1.6, the first with `authOptions.secretName`.
"""

import shlex
from importlib import metadata
from typing import Any

from knet_platform.cluster.description import HOME, SECRETS
from knet_platform.cluster.machines import Cluster, Group

_RETRIES = 3
"""Times that a RayJob starts a new cluster when its own is lost; each continues the sweep."""
_TTL_SECONDS = 600
"""A finished job's cluster goes after so long: time to read a log."""
_GRACE_SECONDS = 120
"""As long as clouds give a spot machine; checkpoints are put in it."""
_DAEMONS = {"cpu": 1, "memory": 0.85}
"""CPUs left to the node's own services, and the share of its memory that pods may have."""
_METRICS_PORT = 8080
"""Of the metric agent in every pod."""
_SPOT_LABEL = {
    "aws": ("karpenter.sh/capacity-type", "spot"),
    "gcp": ("cloud.google.com/gke-spot", "true"),
}


def cluster_resource(cluster: Cluster) -> dict[str, Any]:
    """Return a RayCluster that stays, for `knet submit`."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(cluster, cluster.description.name),
        "spec": _cluster_spec(cluster),
    }


def job_resource(cluster: Cluster) -> dict[str, Any]:
    """Return a RayJob: a cluster of its own on which the sweep starts or continues."""
    description = cluster.description
    job = _metadata(cluster, f"{description.name}-sweep")
    spec: dict[str, Any] = {
        "entrypoint": _entrypoint(cluster),
        "backoffLimit": _RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _TTL_SECONDS,
    }
    if description.max_usd is not None:
        spec["activeDeadlineSeconds"] = int(description.max_usd / cluster.usd_per_hour * 3600)
    if description.queue is not None:
        job["labels"]["kueue.x-k8s.io/queue-name"] = description.queue
        # Without it Kueue refuses clusters that grow and shrink.
        job["annotations"] = {"kueue.x-k8s.io/elastic-job": "true"}
        spec["suspend"] = True
    spec["submissionMode"] = "K8sJobMode"
    spec["submitterConfig"] = {"backoffLimit": 0}
    small = {"cpu": "500m", "memory": "1Gi"}
    submitter = _container(cluster, "ray-job-submitter", description.head_image, small)
    spec["submitterPodTemplate"] = _pod(cluster, submitter, spec={"restartPolicy": "Never"})
    spec["rayClusterSpec"] = _cluster_spec(cluster)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": job, "spec": spec}


def access_resources(cluster: Cluster) -> list[dict[str, Any]]:
    """Return the namespace, the accounts of head and workers, and who may reach them."""
    name = cluster.description.name
    accounts = [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": _metadata(cluster, f"{name}-{role}"),
            "automountServiceAccountToken": role == "head",  # its autoscaler asks for pods
        }
        for role in ("head", "worker")
    ]
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(cluster, f"{name}-closed"),
        "spec": {
            "podSelector": {"matchLabels": _labels(cluster)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": _labels(cluster)}}]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]},
            ],
        },
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    return [namespace, *accounts, policy]


def monitoring_resources(cluster: Cluster) -> list[dict[str, Any]]:
    """Return what the Prometheus operator scrapes, and the door through which it may."""
    name = cluster.description.name
    ours = {"matchLabels": _labels(cluster)}
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata(cluster, name),
        "spec": {"selector": ours, "podMetricsEndpoints": [{"port": "metrics"}]},
    }
    prometheus = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }
    port = {"protocol": "TCP", "port": _METRICS_PORT}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(cluster, f"{name}-scraped"),
        "spec": {
            "podSelector": ours,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [prometheus], "ports": [port]}],
        },
    }
    return [monitor, policy]


def _entrypoint(cluster: Cluster) -> str:
    """Return the command, which starts and continues alike."""
    description = cluster.description
    words = ["knet", "run", str(description.sweep), "--yes", "--instance", cluster.machine.name]
    words += ["--spot"] if description.spot else []
    if description.max_usd is not None:
        words += ["--max-usd", f"{description.max_usd:g}"]
    return shlex.join(words)


def _cluster_spec(cluster: Cluster) -> dict[str, Any]:
    description = cluster.description
    spec: dict[str, Any] = {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token", "secretName": f"{description.name}-token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 60 * description.idle_minutes,
            "resources": _fixed({"cpu": "500m", "memory": "1Gi"}),
        },
    }
    if description.redis is not None:
        password = {"secretKeyRef": {"name": f"{description.name}-redis", "key": "password"}}
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": description.redis,
            "redisPassword": {"valueFrom": password},
        }
    spec["headGroupSpec"] = {
        # Nothing trains on the head. Its dashboard is reached through the service, which the
        # network policy closes to other pods.
        "rayStartParams": {
            "num-cpus": "0",
            "num-gpus": "0",
            "dashboard-host": "0.0.0.0",
            "metrics-export-port": str(_METRICS_PORT),
        },
        "template": _pod(
            cluster,
            _container(
                cluster,
                "ray-head",
                description.head_image,
                {
                    "cpu": str(cluster.head.cpus - _DAEMONS["cpu"]),
                    "memory": _memory(cluster.head.memory_gb),
                },
                ports={
                    "gcs-server": 6379,
                    "dashboard": 8265,
                    "client": 10001,
                    "metrics": _METRICS_PORT,
                },
            ),
            spec={
                "serviceAccountName": f"{description.name}-head",
                "affinity": _not_on_spot(cluster),
            },
        ),
    }
    spec["workerGroupSpecs"] = [_workers(cluster, group) for group in cluster.groups]
    return spec


def _workers(cluster: Cluster, group: Group) -> dict[str, Any]:
    description, machine = cluster.description, cluster.machine
    where: dict[str, Any] = {
        "nodeSelector": {"node.kubernetes.io/instance-type": machine.name},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    if group.spot:
        label, value = _SPOT_LABEL[machine.cloud]
        where["nodeSelector"][label] = value
        taint = {"key": label, "operator": "Equal", "value": value, "effect": "NoSchedule"}
        where["tolerations"].append(taint)
    else:
        where["affinity"] = _not_on_spot(cluster)
    resources = {
        "cpu": str(machine.cpus - _DAEMONS["cpu"]),
        "memory": _memory(machine.memory_gb),
        "nvidia.com/gpu": machine.gpus,
    }
    return {
        "groupName": group.name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": description.max_workers,
        "idleTimeoutSeconds": 60 * description.idle_minutes,
        "rayStartParams": {"metrics-export-port": str(_METRICS_PORT)},
        "template": _pod(
            cluster,
            _container(
                cluster,
                "ray-worker",
                description.worker_image,
                resources,
                ports={"metrics": _METRICS_PORT},
            ),
            spec={
                "serviceAccountName": f"{description.name}-worker",
                "terminationGracePeriodSeconds": _GRACE_SECONDS,
                **where,
            },
            # Workers of data loaders hand images over in shared memory.
            shared_memory=_memory(machine.memory_gb / 4),
        ),
    }


def _not_on_spot(cluster: Cluster) -> dict[str, Any]:
    label, value = _SPOT_LABEL[cluster.machine.cloud]
    rule = {"key": label, "operator": "NotIn", "values": [value]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _container(
    cluster: Cluster,
    name: str,
    image: str,
    resources: dict[str, Any],
    ports: dict[str, int] | None = None,
) -> dict[str, Any]:
    settings = cluster.environment()
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "env": [{"name": key, "value": value} for key, value in settings.items()],
        "resources": _fixed(resources),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        # Emptied with the pod; on the machine's own disks where the nodes' are set up so.
        "volumeMounts": [{"name": "home", "mountPath": HOME}],
    }
    if ports:
        container["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
    return container


def _pod(
    cluster: Cluster,
    container: dict[str, Any],
    *,
    spec: dict[str, Any],
    shared_memory: str | None = None,
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "home", "emptyDir": {}}]
    if shared_memory is not None:
        volumes.append(
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}
        )
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    if cluster.machine.cloud == "gcp":
        secret = {"secretName": f"{cluster.description.name}-s3", "defaultMode": 0o440}
        volumes.append({"name": "s3", "secret": secret})
        container["volumeMounts"].append({"name": "s3", "mountPath": SECRETS, "readOnly": True})
    return {
        "metadata": {"labels": _labels(cluster)},
        "spec": {
            **spec,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }


def _metadata(cluster: Cluster, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": cluster.description.name,
        "labels": dict(_labels(cluster)),
    }


def _labels(cluster: Cluster) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": cluster.description.name}


def _fixed(resources: dict[str, Any]) -> dict[str, Any]:
    """Return limits that are what is asked for, so that no pod lives on what others leave."""
    return {"limits": dict(resources), "requests": dict(resources)}


def _memory(machine_gb: float) -> str:
    return f"{int(machine_gb * _DAEMONS['memory'])}Gi"
