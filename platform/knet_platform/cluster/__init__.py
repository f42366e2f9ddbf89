"""Ray clusters: connect to one, describe one, talk to one's jobs, and find what ails one."""

from knet_platform.cluster.connection import (
    HEAD,
    connected,
    prepare_environment,
    ray_address,
    release_abandoned,
    trial_slots,
    worker_environment,
)

__all__ = [
    "HEAD",
    "connected",
    "prepare_environment",
    "ray_address",
    "release_abandoned",
    "trial_slots",
    "worker_environment",
]
