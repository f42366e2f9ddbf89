"""`knet cluster`: the files and the token of a cluster, before anything is started."""

import argparse
import dataclasses
import json
from pathlib import Path

from knet_platform.cluster.description import PROVIDERS, Description

EXAMPLES = """\
examples:
  knet cluster token knet
  knet cluster render --provider aws --gpu a10g --max-workers 8 --spot \\
      --storage s3://bucket/knet --image registry.example/knet:0.1.0 \\
      --ami ami-0123456789abcdef0 --allow-ssh 203.0.113.7/32
  knet cluster render --provider gcp --gpu l4 --max-workers 8 --spot \\
      --storage s3://bucket/knet --image registry.example/knet:0.1.0 \\
      --project my-project --zone us-central1-a
  knet cluster render --provider kuberay --gpu a10g --max-workers 8 --spot \\
      --storage s3://bucket/knet --image registry.example/knet:0.1.0 --sweep sweeps/stages.yaml

Nothing is started and nobody is asked. How to go on from there: cluster/README.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    token = actions.add_parser("token", help="make the cluster's token, readable by you alone")
    token.add_argument("name", metavar="NAME", help="the cluster's name")
    token.add_argument("--renew", action="store_true", help="replace the token that is there")
    render = actions.add_parser("render", help="write the files that start a cluster")
    render.add_argument("--provider", required=True, help=f"one of {', '.join(PROVIDERS)}")
    render.add_argument("--gpu", required=True, help="L4, A10G, A100 or H100")
    render.add_argument("--max-workers", required=True, type=int, help="GPU machines at once")
    render.add_argument("--storage", required=True, help="where results go, s3://bucket/prefix")
    render.add_argument(
        "--image", required=True, help="registry/name:tag; -cpu and -cuda are put behind it"
    )
    render.add_argument("--name", default="knet", help="of the cluster (default: knet)")
    render.add_argument(
        "--spot", action="store_true", help="spot machines, others where there are none"
    )
    render.add_argument("--gpus-per-machine", type=int, help="default: the fewest to be had")
    render.add_argument("--region", help="default: the first that has the machine")
    render.add_argument(
        "--idle-minutes", type=int, default=10, help="until a machine goes (default: 10)"
    )
    render.add_argument("--tracking-uri", help="MLflow's server (default: a file on the head)")
    render.add_argument(
        "--quota", type=int, help="what your account is granted; more is refused here and now"
    )
    render.add_argument("--ami", help="AWS: image with NVIDIA's driver and docker")
    render.add_argument("--allow-ssh", help="AWS: who may use SSH, such as 203.0.113.7/32")
    render.add_argument("--project", help="Google Cloud: the project's id")
    render.add_argument("--zone", help="Google Cloud: such as us-central1-a")
    render.add_argument("--sweep", help="KubeRay: what the RayJob runs")
    render.add_argument("--max-usd", type=float, help="KubeRay: budget of one run of the RayJob")
    render.add_argument("--queue", help="KubeRay: Kueue's queue")
    render.add_argument("--redis", help="KubeRay: host:port that keeps the head's state")
    render.add_argument("--machines", type=Path, help="a table of machines of your own")
    render.add_argument("--prices", type=Path, help="a price list of your own")
    render.add_argument("--out", type=Path, help="folder (default: cluster/PROVIDER)")
    for action in (token, render):
        action.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    return _token(args) if args.action == "token" else _render(args)


def _token(args: argparse.Namespace) -> int:
    from knet_platform.cluster.tokens import make_token

    path = make_token(args.name, renew=args.renew)
    if args.json:
        print(json.dumps({"token_path": str(path)}, indent=2))
    else:
        print(f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path}")
    return 0


def _render(args: argparse.Namespace) -> int:
    from knet_platform.cluster.machines import plan_cluster, read_machines
    from knet_platform.cluster.render import render, write_files
    from knet_platform.prices import read_prices

    names = [field.name for field in dataclasses.fields(Description)]
    description = Description(**{name: getattr(args, name) for name in names})
    cluster = plan_cluster(description, read_machines(args.machines, read_prices(args.prices)))
    paths = write_files(render(cluster), args.out or Path("cluster") / description.provider)
    machine, (quota, needed, unit) = cluster.machine, cluster.quota_needed
    if args.json:
        outcome = {
            "files": list(map(str, paths)),
            "machine": machine.name,
            "region": cluster.region,
            "usd_per_hour_at_rest": cluster.head.usd_per_hour,
            "usd_per_hour_at_most": cluster.usd_per_hour,
            "quota": {"name": quota, "needed": needed, "unit": unit},
        }
        print(json.dumps(outcome, indent=2))
        return 0
    for path in paths:
        print(f"wrote {path}")
    print(
        f"up to {description.max_workers} x {machine.name} ({machine.gpus:g} x {machine.gpu}) in "
        f"{cluster.region}: {cluster.head.usd_per_hour:g} USD an hour at rest, at most "
        f"{cluster.usd_per_hour:.2f} (list prices of {machine.price.date})"
    )
    print(f"needs a quota of {needed} {unit} ({quota}); --quota N checks it against yours")
    return 0
