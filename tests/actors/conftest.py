"""One local Ray for the whole suite: starting one takes seconds."""

import os
import warnings
from collections.abc import Iterator

import pytest

# `ray.init` would put "token" here, for good, and every Ray that another test begins in this process would ask for one.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A private Ray of two CPUs; never joins one that happens to run here."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ray's own, at start
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300 * 2**20
        )
    yield
    ray.shutdown()
