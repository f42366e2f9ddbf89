"""Faults on demand in the processes of a test's Ray cluster, which have this folder in PYTHONPATH.

Nothing of the product knows of it: every Python process imports a module of this name when it
starts. A test writes `$KNET_TEST_FAULTS/<trial hash>/<fault>`:

    kill_worker, kill_driver, hang   number of the step at which it happens, once, on one worker
    nan                              number of the step from which images are NaN
    train_limit, eval_limit          images of a pass beyond which the device has no memory
    pause                            seconds before each step; node and step are left in `place`
    hold                             number of the step before which all wait while this is there
    watch                            seconds between looks for drained nodes, which tests else omit
    deaf                             number of the step whose report the driver does not hear
"""

import functools
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps one function of one module as soon as that is imported."""

    def __init__(self, module, name, wrap):
        self.module, self.name, self.wrap = module, name, wrap

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            setattr(module, self.name, self.wrap(getattr(module, self.name)))

        spec.loader.exec_module = exec_module
        return spec


def _faults(trial_hash):
    return Path(os.environ["KNET_TEST_FAULTS"], trial_hash)


def _faulty_driver(run_trial):
    @functools.wraps(run_trial)
    def run(config, *args, **options):
        faults = _faults(config["trial_hash"])
        if faults.is_dir():
            (faults / "driver.pid").write_text(str(os.getpid()))
        if (watch := faults / "watch").exists():
            os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"
            os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = watch.read_text()
        import ray.tune

        report = ray.tune.report
        ray.tune.report = _hard_of_hearing(report, faults / "deaf")
        try:
            run_trial(config, *args, **options)
        finally:
            ray.tune.report = report

    return run


def _hard_of_hearing(report, deaf):
    def run(metrics):
        if not deaf.exists() or metrics.get("step") != int(deaf.read_text()):
            report(metrics)

    return run


def _faulty_worker(train_worker):
    @functools.wraps(train_worker)
    def run(config):
        faults = _faults(config["trial_hash"])
        if faults.is_dir():
            _install(faults, Path(config["store_uri"], "trials", config["trial_hash"]))
        return train_worker(config)

    return run


def _install(faults, folder):
    import ray
    import torch

    from knet_core.models.knet import KNet
    from knet_core.trainer import Trainer

    do_step, forward = Trainer.step, KNet.forward

    def is_due(name, step):
        """Tell one worker, once."""
        fault = faults / name
        if not fault.exists() or step != int(fault.read_text()):
            return False
        try:
            fault.unlink()
        except FileNotFoundError:
            return False
        return True

    def await_upload(step):
        """Let the checkpoint of a step arrive first: tests say where the trial goes on."""
        while not (folder / f"checkpoint_{step}" / "manifest.json").exists():
            time.sleep(0.01)  # it appears by a rename, of which nobody is told

    def step(self, number, batches):
        if (pause := faults / "pause").exists():
            node = ray.get_runtime_context().get_node_id()
            (faults / "place").write_text(f"{node} {number}")
            time.sleep(float(pause.read_text()))
        while (hold := faults / "hold").exists() and number >= int(hold.read_text()):
            time.sleep(0.05)  # the test takes the file away, and tells nobody
        if is_due("kill_worker", number):
            await_upload(number - 1)
            os.kill(os.getpid(), signal.SIGKILL)
        if is_due("kill_driver", number):
            await_upload(number - 1)
            record = folder / "checkpoint_manager_snapshot.json"
            record.write_bytes(b'{"checkpoint_')  # it died while Ray Train wrote it
            os.kill(int((faults / "driver.pid").read_text()), signal.SIGKILL)
            time.sleep(3600)  # Ray ends it with its driver; no further checkpoint until then
        if is_due("hang", number):
            time.sleep(3600)
        if (nan := faults / "nan").exists() and number >= int(nan.read_text()):
            batches[0].images[0] = float("nan")
        return do_step(self, number, batches)

    def run(self, images):
        limit = faults / ("train_limit" if self.training else "eval_limit")
        if limit.exists() and len(images) > int(limit.read_text()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, images)

    Trainer.step, KNet.forward = step, run


if "KNET_TEST_FAULTS" in os.environ:
    sys.meta_path.insert(0, _Finder("knet_platform.worker", "train_worker", _faulty_worker))
    sys.meta_path.insert(0, _Finder("knet_platform.driver", "run_trial", _faulty_driver))
