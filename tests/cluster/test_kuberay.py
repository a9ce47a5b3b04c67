"""The KubeRay files: valid to the custom resources' own schemas, and such that a run fits what they ask for."""

import copy
import gzip
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from deployment import CLUSTER, bounds, documents
from jsonschema import Draft202012Validator
from ray._private import ray_constants
from ray.scripts.scripts import start

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.engine.ray_train import check_workers
from davir_ray.engine.resources import Pool, plan_pool

KUBERAY = CLUSTER / "kuberay"
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
}
"""The schemas leave it to Kubernetes."""


def strict(schema: Any) -> Any:
    """The same schema, in which a field that it does not name is an error: Kubernetes drops such a field silently."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if fields and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


@pytest.fixture(scope="module")
def validators() -> dict[str, Draft202012Validator]:
    """By kind, of version v1."""
    found = {}
    for path in (Path(__file__).parent / "kuberay").glob("*.yaml.gz"):
        definition = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]
        (version,) = [version for version in definition["versions"] if version["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = METADATA
        schema["properties"]["kind"] = {"const": definition["names"]["kind"]}
        schema["properties"]["apiVersion"] = {"const": f"{definition['group']}/v1"}
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        found[definition["names"]["kind"]] = Draft202012Validator(strict(schema))
    return found


def load(kind: str) -> Any:
    (found,) = documents(KUBERAY / f"{kind.lower()}.yaml")
    return found


def spec_of(kind: str) -> Any:
    return load("RayJob")["spec"]["rayClusterSpec"] if kind == "RayJob" else load("RayCluster")["spec"]


KINDS = ["RayJob", "RayCluster"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_accepts_it(kind: str, validators: dict[str, Draft202012Validator]) -> None:
    errors = [f"{error.json_path}: {error.message[:200]}" for error in validators[kind].iter_errors(load(kind))]
    assert errors == []


MISTAKES: list[tuple[str, Any]] = [
    ("spec.backofLimit", 2),
    ("spec.rayClusterSpec.enableInTreeAutoscalin", True),
    ("spec.rayClusterSpec.rayVersion", 2.6),
    ("spec.rayClusterSpec.authOptions.mode", "password"),
    ("spec.rayClusterSpec.headGroupSpec.template.spec.serviceAcountName", "x"),
    ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.0.valueFrom.secretKeyRef.name", None),
    ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limit", {}),
    ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.cpu", "seven"),
    ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.tolerations.0.operater", "Exists"),
    ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "1"),
    ("metadata.lables", {}),
    ("apiVersion", "ray.io/v1alpha2"),
]


@pytest.mark.parametrize(("place", "value"), MISTAKES, ids=[place for place, _ in MISTAKES])
def test_the_schema_refuses_a_mistake(place: str, value: Any, validators: dict[str, Draft202012Validator]) -> None:
    changed = copy.deepcopy(load("RayJob"))
    *outer, last = place.split(".")
    inside = changed
    for step in outer:
        inside = inside[int(step)] if step.isdigit() else inside[step]
    inside[last] = value
    assert not validators["RayJob"].is_valid(changed)


def test_a_missing_field_is_refused(validators: dict[str, Draft202012Validator]) -> None:
    changed = load("RayCluster")
    del changed["spec"]["workerGroupSpecs"][0]["groupName"]
    assert not validators["RayCluster"].is_valid(changed)


def test_both_describe_the_same_cluster_but_for_the_number_of_workers() -> None:
    job, cluster = spec_of("RayJob"), spec_of("RayCluster")
    for spec in (job, cluster):
        (group,) = spec["workerGroupSpecs"]
        assert 1 <= group.pop("minReplicas") <= group.pop("replicas") <= group.pop("maxReplicas")
    assert job == cluster


SPEC = spec_of("RayJob")
HEAD = SPEC["headGroupSpec"]
GPU = SPEC["workerGroupSpecs"][0]
GROUPS = {"head": HEAD, "gpu": GPU}


def container(group: Any) -> Any:
    (found,) = group["template"]["spec"]["containers"]
    return found


def num_bytes(quantity: str) -> int:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity)
    assert found, quantity
    return int(found[1]) * units[found[2]]


def test_its_ray_is_the_projects_and_the_installed_one() -> None:
    assert SPEC["rayVersion"] in bounds("ray")
    assert SPEC["rayVersion"] == ray.__version__


def test_the_cluster_asks_for_a_token() -> None:
    assert SPEC["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_ray_start_takes_the_options(group: Any) -> None:
    known = {name for option in start.params for name in option.opts}
    assert {f"--{name}" for name in group["rayStartParams"]} <= known
    assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_memory_of_the_object_store_fits(group: Any) -> None:
    pod, inner = group["template"]["spec"], container(group)
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in inner["volumeMounts"]}
    assert mounted["/dev/shm"]["medium"] == "Memory"
    assert "/tmp/ray" in mounted
    home = {variable["name"]: variable.get("value") for variable in inner["env"]}["HF_HOME"]
    assert home in mounted
    store = int(group["rayStartParams"]["object-store-memory"])
    shared, memory = num_bytes(mounted["/dev/shm"]["sizeLimit"]), num_bytes(inner["resources"]["limits"]["memory"])
    assert store < shared < memory / 2
    assert inner["resources"]["limits"] == inner["resources"]["requests"]


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_pod_ends_in_its_own_time(group: Any) -> None:
    assert SPEC["autoscalerOptions"]["version"] == "v2"
    assert group["template"]["spec"]["restartPolicy"] == "Never", "the autoscaler's version 2 asks for it"
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S + 20


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_pod_is_the_images_user_without_rights(group: Any) -> None:
    context = group["template"]["spec"]["securityContext"]
    assert context["runAsNonRoot"] is True
    assert f"--uid {context['runAsUser']} " in (CLUSTER / "Dockerfile").read_text()


def test_the_head_does_no_work_and_is_no_spot_node() -> None:
    assert (HEAD["rayStartParams"]["num-cpus"], HEAD["rayStartParams"]["num-gpus"]) == ("0", "0")
    affinity = HEAD["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {rule["operator"] for rule in term["matchExpressions"]} == {"NotIn"}
    wanted = GPU["template"]["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    spot = {rule["key"] for choice in wanted for rule in choice["preference"]["matchExpressions"]}
    tolerated = {rule["key"] for rule in GPU["template"]["spec"]["tolerations"]}
    assert "tolerations" not in HEAD["template"]["spec"]
    assert {rule["key"] for rule in term["matchExpressions"]} == spot | tolerated - {"nvidia.com/gpu"}


def test_the_driver_runs_on_the_head_and_a_retry_goes_on() -> None:
    job = load("RayJob")["spec"]
    assert not [name for name in job if name.startswith("entrypoint") and name != "entrypoint"]
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] >= 1
    assert job["activeDeadlineSeconds"] > 0


def test_accounts_are_made() -> None:
    made = {account["metadata"]["name"] for account in documents(KUBERAY / "service-accounts.yaml")}
    assert made == {group["template"]["spec"]["serviceAccountName"] for group in GROUPS.values()}
    assert len(made) == 2, "the head's may change the cluster"


def test_head_and_workers_reach_the_same_places() -> None:
    assert container(HEAD)["env"] == container(GPU)["env"]


def test_the_run_fits_the_workers_that_are_there_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_as(RunConfig, ["--config", str(CLUSTER / "run.yaml")])
    limits, nodes = container(GPU)["resources"]["limits"], GPU["minReplicas"]
    gpus = nodes * limits["nvidia.com/gpu"]
    of_a_node = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": of_a_node}] * nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {name: nodes * size for name, size in of_a_node.items()})
    assert plan_pool(config.score) == Pool(gpus, GPU["maxReplicas"] * limits["nvidia.com/gpu"], gpus)
    assert config.finetune.num_workers == gpus
    assert config.finetune.use_gpu
    check_workers(config.finetune)
