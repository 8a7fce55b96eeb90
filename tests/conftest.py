import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see launch/process/environment.py
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # real runs are of more ranks than a machine may have GPUs
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers of xdist inherit it, so that all tests share one
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-")
    os.environ["HF_DATASETS_CACHE"] = f"{os.environ['HF_HOME']}/datasets"
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

from tests.support.hub import reserve_endpoint

reserve_endpoint()  # before huggingface_hub is imported: no test reaches the network

import pytest

from tests.support.ranks import pool


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="{}rank".format)
def ranks(request):
    """The shared pool of 1, 2, 3 and 4 gloo ranks in turn."""
    return pool(request.param)


def pytest_collection_modifyitems(items):
    """Begin with the tests that start runs where there are several workers: these keep one of them busy longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith("tests/runs/"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Share files out among the workers of `pytest -n 2`; those that start runs to one of them.

    Two runs of several ranks at once would be too many for two cores. (xdist 3.8 has groups of tests for this, which
    pytest 9 ignores: xdist writes them into a name that pytest no longer reads.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class FilesAndRuns(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "runs" if file.startswith("tests/runs/") else file

    return FilesAndRuns(config, log)
