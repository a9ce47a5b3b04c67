"""Four actors and one node: each file of a model comes from the hub once, and then none of them asks it anything."""

from pathlib import Path

import pytest
import ray
from hub_server import HubServer

from davir_ray.models.checkpoint import Checkpoint

NUM_ACTORS = 4


@pytest.mark.slow
def test_four_actors_make_one_download_and_work_on_without_the_hub(
    hub: HubServer, base_folder: Path, reference_folder: Path, ray_session: None, tmp_path: Path
) -> None:
    class Worker:
        def ready(self) -> None:
            import davir_ray.models.checkpoint  # noqa: F401

        def weights(self, checkpoint: Checkpoint) -> dict[str, float]:
            import torch

            model = checkpoint.model(torch.float64, torch.device("cpu"))
            checkpoint.tokenizer()
            return {name: float(value.sum()) for name, value in model.named_parameters()}

    expected = Worker().weights(Checkpoint.find(str(base_folder)))
    hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    described = hub.fetched()
    hub.requests.clear()

    # The node's cache is another than the driver's, and this hub reaches the actors as any does, by HF_ENDPOINT.
    node = {"env_vars": hub.environment(tmp_path / "node")}
    actor = ray.remote(num_cpus=0.5, runtime_env=node)(Worker)
    actors = [actor.remote() for _ in range(NUM_ACTORS)]
    ray.get([one.ready.remote() for one in actors])
    hub.publish("org/tiny", reference_folder)  # the branch moves
    assert ray.get([one.weights.remote(checkpoint) for one in actors]) == [expected] * NUM_ACTORS
    assert hub.fetched() == described | {"org/tiny/model.safetensors": 1}
    assert set(hub.fetched().values()) == {1}

    asked = hub.requests.total()
    assert ray.get([one.weights.remote(checkpoint) for one in actors]) == [expected] * NUM_ACTORS
    assert hub.requests.total() == asked
    hub.close()
    assert ray.get([one.weights.remote(checkpoint) for one in actors]) == [expected] * NUM_ACTORS
