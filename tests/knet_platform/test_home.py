import pytest

from knet_platform.errors import UsageError
from knet_platform.home import knet_home, storage_uri, tracking_uri


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in ("KNET_HOME", "KNET_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_state_is_kept_below_the_working_folder_by_default(tmp_path):
    assert knet_home() == tmp_path / ".knet"
    assert storage_uri() == f"{tmp_path}/.knet/storage"
    assert tracking_uri() == f"sqlite:///{tmp_path}/.knet/mlflow.db"
    assert not (tmp_path / ".knet").exists()


def test_the_environment_moves_each_of_them(monkeypatch, tmp_path):
    monkeypatch.setenv("KNET_HOME", "state")
    monkeypatch.setenv("KNET_STORAGE", "s3://bucket/knet/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert knet_home() == tmp_path / "state"
    assert storage_uri() == "s3://bucket/knet"
    assert tracking_uri() == "http://tracking:5000"


def test_a_ray_job_without_a_home_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "working_dir_files" / "_ray_pkg_0123abcd"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(UsageError, match="KNET_HOME: not set inside a Ray job"):
        storage_uri()
    monkeypatch.setenv("KNET_HOME", str(tmp_path))
    assert storage_uri() == f"{tmp_path}/storage"
