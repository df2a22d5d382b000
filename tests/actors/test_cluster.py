import signal
import sys
from typing import Any

import pytest
import ray

from actors import cluster
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["checkpoint.source=demo", *overrides])


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    alive = [{"Alive": True, "Resources": found} for found in resources]
    dead = [{"Alive": False, "Resources": {"CPU": 999, "GPU": 999}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: alive + dead)


def fits(request: cluster.LaneRequest, node: dict[str, float]) -> bool:
    return all(amount <= node.get(kind, 0) for kind, amount in request.bundle.items())


@pytest.mark.parametrize("cpus", [1, 2, 64])
def test_without_a_gpu_there_is_one_lane_per_node_and_it_fits(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    nodes(monkeypatch, {"CPU": cpus}, {"CPU": cpus})
    request, num_lanes = cluster.plan_lanes(config())
    assert num_lanes == 2
    assert request.device == "cpu"
    assert fits(request, {"CPU": cpus})


def test_with_gpus_there_is_one_lane_per_gpu_and_all_of_them_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    host = {"CPU": 32, "GPU": 4}
    nodes(monkeypatch, {"CPU": 16}, host)
    request, num_lanes = cluster.plan_lanes(config())
    assert num_lanes == 4
    assert request.bundle["GPU"] == 1
    assert request.bundle["CPU"] * 4 <= host["CPU"]
    assert request.num_loaders > 1


def test_a_gpu_is_not_used_when_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 8, "GPU": 1})
    request, _ = cluster.plan_lanes(config("checkpoint.device=cpu"))
    assert "GPU" not in request.bundle


@pytest.mark.parametrize(
    ("overrides", "resources", "message"),
    [
        (["checkpoint.device=cuda"], {"CPU": 8}, "no GPU"),
        (["stages.load.cpus=4"], {"CPU": 2}, "more than 2"),
        (["checkpoint.device=cuda:1"], {"CPU": 8, "GPU": 2}, "use cuda or auto"),
        (["stages.load.actors=64"], {"CPU": 4}, r"needs \{'CPU': 64"),
        (["stages.encode.gpus=0", "stages.generate.gpus=0"], {"CPU": 8, "GPU": 1}, "give them shares"),
        (["stages.encode.precision=tf32"], {"CPU": 8}, "tf32, which only GPUs have"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], resources: dict[str, Any], message: str
) -> None:
    nodes(monkeypatch, resources)
    with pytest.raises(ConfigError, match=message):
        cluster.plan_lanes(config(*overrides))


def test_the_configs_numbers_win(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 8})
    request, num_lanes = cluster.plan_lanes(config("ray.lanes=3", "stages.load.actors=2", "stages.load.cpus=0.5"))
    assert num_lanes == 3
    assert request.bundle == {"CPU": 1.0}


def test_a_sigterm_that_meets_rays_own_handler_ends_the_command_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with cluster._signals_after():
            sys.exit(signal.SIGTERM)  # as Ray does, while it starts
        assert seen == [signal.SIGTERM]
        with pytest.raises(SystemExit, match="7"), cluster._signals_after():
            sys.exit(7)
    finally:
        signal.signal(signal.SIGTERM, before)
