import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see launch/preload.py

import pytest
from ranks import pool


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="{}rank".format)
def ranks(request):
    """The shared pool of 1, 2, 3 and 4 gloo ranks in turn."""
    return pool(request.param)
