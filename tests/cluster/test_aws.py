"""cluster/aws.yaml: Ray's own schema and checks, and its own provider against a mock of EC2 that starts the nodes."""

import copy
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
from deployment import CLUSTER, ROOT, documents
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig

(FILE,) = documents(CLUSTER / "aws.yaml")
PROFILES = ("davir-ray-head", "davir-ray-worker")


def prepared() -> Any:
    config = prepare_config(copy.deepcopy(FILE))
    validate_config(config)
    return config


def test_ray_accepts_it_and_adds_no_setup_of_its_own() -> None:
    config = prepared()
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert config["initialization_commands"] == []
    assert config["available_node_types"]["head"]["max_workers"] == 0
    assert config["available_node_types"]["gpu"]["max_workers"] == config["max_workers"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("max_worker", 3),
        ("idle_timeout_minutes", "10"),
        ("docker.imag", "x"),
        ("auth.ssh_usr", "x"),
        ("available_node_types.gpu.min_worker", 1),
    ],
)
def test_rays_schema_refuses_a_mistake(place: str, value: Any) -> None:
    config = prepared()
    *outer, last = place.split(".")
    inside = config
    for step in outer:
        inside = inside[step]
    inside[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_more_workers_at_least_than_at_most_are_refused() -> None:
    config = prepared()
    config["available_node_types"]["gpu"]["min_workers"] = config["max_workers"] + 1
    with pytest.raises(ValueError, match="max_workers"):
        validate_config(config)


def test_the_token_is_mounted_where_ray_looks_for_it() -> None:
    assert FILE["file_mounts"] == {"/home/ray/.ray": "~/.ray"}
    assert "useradd --create-home --uid 1000 --shell /bin/bash ray" in (CLUSTER / "Dockerfile").read_text()


def test_the_commands_start_a_head_without_work() -> None:
    (head,) = [command for command in FILE["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert FILE["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_what_is_not_copied_lies_in_no_image_either() -> None:
    assert set(FILE["rsync_exclude"]) <= set((ROOT / ".rayignore").read_text().replace("/", "").split())


@pytest.mark.slow
def test_rays_provider_starts_the_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mock")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key pair there
    with mock_aws():
        for name in PROFILES:
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(prepared()))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node_type in config["available_node_types"].items():
            provider.create_node(node_type["node_config"], {TAG_RAY_NODE_KIND: name}, 1)
        found = boto3.client("ec2", config["provider"]["region"]).describe_instances()["Reservations"]
        nodes = {tag["Value"]: node for entry in found for node in entry["Instances"] for tag in node["Tags"]
                 if tag["Key"] == TAG_RAY_NODE_KIND}  # fmt: skip
        named = {tag["Value"] for node in nodes.values() for tag in node["Tags"] if tag["Key"] == TAG_RAY_CLUSTER_NAME}
    assert named == {"davir-ray"}
    assert nodes.keys() == {"head", "gpu"}
    assert nodes["gpu"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in nodes["head"]
    assert [nodes[name]["IamInstanceProfile"]["Arn"].rpartition("/")[2] for name in ("head", "gpu")] == list(PROFILES)
    gpu = config["available_node_types"]["gpu"]
    wanted = parse_as(RunConfig, ["--config", str(CLUSTER / "run.yaml")])
    assert gpu["resources"]["GPU"] * gpu["min_workers"] == wanted.finetune.num_workers
    assert gpu["resources"]["CPU"] > gpu["resources"]["GPU"] * wanted.score.num_cpus
