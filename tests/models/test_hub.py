"""Models of the hub: one commit, no file that is not read, each file once a node, and nobody asked afterwards."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ModelError, StorageError
from davir_ray.models import hub as hub_module
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import SPEC_FILE, Checkpoint
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.size import ModelSize
from davir_ray.models.training.model import save_reference

CPU = torch.device("cpu")
NEVER_READ = {
    "README.md": b"a card",
    ".gitattributes": b"",
    "pytorch_model.bin": b"pickled",
    "pytorch_model-00001-of-00002.bin": b"pickled",
    "training_args.bin": b"pickled",
    "consolidated.safetensors": b"Mistral's own",
    "consolidated.00.pth": b"Meta's own",
    "model.fp16.safetensors": b"another type",
    "model-Q4_K_M.gguf": b"llama.cpp's",
    "flax_model.msgpack": b"",
    "tf_model.h5": b"",
    "modeling_tiny.py": b"code",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"",
    "onnx/model.onnx": b"",
    "onnx/config.json": b"{}",
    "checkpoint-500/model.safetensors": b"",
}
"""Files in the repositories of Llama, Mistral, Gemma and Qwen that transformers does not read."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(checkpoint: Checkpoint | Path) -> dict[str, torch.Tensor]:
    if isinstance(checkpoint, Path):
        return dict(AutoModelForCausalLM.from_pretrained(checkpoint).state_dict())
    return dict(checkpoint.model(torch.float32, CPU).state_dict())


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def sharded(folder: Path, target: Path) -> dict[str, bytes]:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="200KB")
    return files_of(folder) | files_of(target)


# --- what is downloaded ----------------------------------------------------------------------------------------------


def test_only_what_is_read_is_downloaded_and_weights_only_for_a_model(hub: HubServer, base_folder: Path) -> None:
    commit = hub.publish("org/tiny", files_of(base_folder) | NEVER_READ)
    checkpoint = Checkpoint.find("org/tiny")
    assert (checkpoint.uri, checkpoint.revision, checkpoint.is_adapter) == ("org/tiny", commit, False)
    assert checkpoint.config().hidden_size == 64
    assert checkpoint.tokenizer().eos_token == "</s>"
    assert ModelSize.of(checkpoint) == ModelSize.of(Checkpoint.find(str(base_folder)))
    described = {f"org/tiny/{name}" for name in files_of(base_folder)} - {"org/tiny/model.safetensors"}
    assert hub.fetched() == dict.fromkeys(described, 1)
    assert_same(weights_of(checkpoint), weights_of(base_folder))
    assert hub.fetched() == dict.fromkeys(described | {"org/tiny/model.safetensors"}, 1)


def test_a_sharded_model_is_read_by_its_index(hub: HubServer, base_folder: Path, tmp_path: Path) -> None:
    files = sharded(base_folder, tmp_path / "shards")
    del files["model.safetensors"]
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 1
    hub.publish("org/sharded", files | NEVER_READ | {"model-00001-of-00009.safetensors": b"of another export"})
    assert_same(weights_of(Checkpoint.find("org/sharded")), weights_of(base_folder))
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == {f"org/sharded/{s}" for s in shards}


def test_of_two_formats_one_is_downloaded(hub: HubServer, base_folder: Path, tmp_path: Path) -> None:
    hub.publish("org/both", sharded(base_folder, tmp_path / "shards"))
    Checkpoint.find("org/both").model(torch.float32, CPU)
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == ["org/both/model.safetensors"]


@pytest.mark.parametrize("index", ["absent shard", "{", "[]"])
def test_an_index_that_leads_nowhere_is_refused_before_any_weights(
    hub: HubServer, base_folder: Path, tmp_path: Path, index: str
) -> None:
    files = sharded(base_folder, tmp_path / "shards")
    del files["model.safetensors"]
    if index == "absent shard":
        del files[max(name for name in files if name.endswith(".safetensors"))]
    else:
        files["model.safetensors.index.json"] = index.encode()
    hub.publish("org/torn", files)
    with pytest.raises(ModelError, match="safetensors"):
        Checkpoint.find("org/torn")
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


@pytest.mark.parametrize("left", [{}, {"consolidated.safetensors": b"", "adapter_model.bin": b""}])
def test_pickled_weights_are_refused_by_the_list_alone(
    hub: HubServer, base_folder: Path, left: dict[str, bytes]
) -> None:
    files = {**files_of(base_folder), "pytorch_model.bin": b"pickled", **left}
    del files["model.safetensors"]
    hub.publish("org/pickled", files)
    with pytest.raises(ModelError, match="safetensors"):
        Checkpoint.find("org/pickled")
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".safetensors"))]


def test_code_comes_only_where_it_is_trusted(hub: HubServer, base_folder: Path) -> None:
    hub.publish("org/code", files_of(base_folder) | {"modeling_tiny.py": b"1", "layers/rope.py": b"2"})
    Checkpoint.find("org/code")
    assert not any(name.endswith(".py") for name in hub.fetched())
    Checkpoint.find("org/code", trust_remote_code=True)
    assert {"org/code/modeling_tiny.py", "org/code/layers/rope.py"} <= hub.fetched().keys()


def test_an_adapter_of_the_hub_is_attached_to_a_base_of_the_hub(
    hub: HubServer, base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), LoraConfig(task_type="CAUSAL_LM", r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.peft_config["default"].base_model_name_or_path = "org/tiny"
    with hub_module.hub_offline():
        adapted.save_pretrained(tmp_path / "adapter")
    hub.publish("org/tiny", base_folder)
    # Some trainers leave the base's configuration with the adapter.
    hub.publish(
        "org/lora", files_of(tmp_path / "adapter") | {"config.json": (base_folder / "config.json").read_bytes()}
    )
    adapter = Checkpoint.find("org/lora")
    assert adapter.is_adapter
    assert hub.fetched()["org/lora/adapter_model.safetensors"] == 0
    model = Checkpoint.find("org/tiny").model(torch.float32, CPU)
    adapter.attach_to(model)
    ids = torch.arange(3, 20)[None]
    edges = torch.tensor([0, 17], dtype=torch.int32)
    places = {"sequence_edges": edges, "sequence_edges_on_cpu": edges, "longest_sequence": 17}
    expected = adapted.eval()(ids).logits
    torch.testing.assert_close(model(ids, **places).logits, expected, rtol=1e-4, atol=1e-5)
    assert "was trained on" not in caplog.text  # the base is known by its name, not by its folder in the cache


def test_weights_and_an_adapter_in_one_place_are_refused(hub: HubServer, base_folder: Path) -> None:
    hub.publish("org/mixed", files_of(base_folder) | {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    with pytest.raises(ModelError, match="keep one of them"):
        Checkpoint.find("org/mixed")


def test_the_scoring_spec_of_a_reference_is_read(hub: HubServer, base_folder: Path) -> None:
    hub.publish("org/plain", base_folder)
    hub.publish("org/tuned", files_of(base_folder) | {SPEC_FILE: b'{"max_tokens": 512}'})
    assert Checkpoint.find("org/plain").spec() is None
    assert Checkpoint.find("org/tuned").spec() == {"max_tokens": 512}


# --- which commit ----------------------------------------------------------------------------------------------------


def test_a_branch_that_moves_changes_nothing_for_who_found_it_before(
    hub: HubServer, base_folder: Path, reference_folder: Path
) -> None:
    first = hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    second = hub.publish("org/tiny", reference_folder)
    assert_same(weights_of(pickle.loads(pickle.dumps(checkpoint))), weights_of(base_folder))
    assert Checkpoint.find("org/tiny") == checkpoint  # of one process, the same to the end
    assert checkpoint.weights_digest() == {"commit": first}
    hub_module.resolve.cache_clear()
    assert Checkpoint.find("org/tiny").weights_digest() == {"commit": second}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, base_folder: Path, reference_folder: Path) -> None:
    old = hub.publish("org/tiny", base_folder, branch="v1")
    new = hub.publish("org/tiny", reference_folder)
    named = {"org/tiny": new, "org/tiny@v1": old, f"org/tiny@{old}": old, "hf://org/tiny@v1": old}
    assert {name: Checkpoint.find(name).revision for name in named} == named
    pull_request = hub.publish("org/tiny", base_folder, branch="refs/pr/3")
    assert Checkpoint.find("org/tiny@refs/pr/3").revision == pull_request


# --- once, and then nobody is asked ----------------------------------------------------------------------------------


def test_a_complete_snapshot_is_loaded_without_the_hub(hub: HubServer, base_folder: Path) -> None:
    commit = hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    weights = weights_of(checkpoint)
    asked = hub.requests.total()
    travelled = pickle.loads(pickle.dumps(checkpoint))
    travelled.config(), travelled.tokenizer(), travelled.spec(), ModelSize.of(travelled)
    assert_same(weights_of(travelled), weights)
    assert hub.requests.total() == asked
    hub.close()
    assert_same(weights_of(travelled), weights)
    hub_module.resolve.cache_clear()
    assert Checkpoint.find(f"org/tiny@{commit}") == checkpoint
    assert Checkpoint.find("org/tiny") == checkpoint  # the branch as this node saw it last


def test_a_new_adapter_is_saved_without_the_hub_and_names_its_base(
    hub: HubServer, base_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    model = checkpoint.model(torch.float32, CPU)
    add_adapter(model, FinetuneConfig(lora_rank=2), 2)
    hub.requests.clear()
    save_reference(Likelihood(model), checkpoint.tokenizer(), tmp_path)
    assert hub.requests.total() == 0
    assert not [str(one.message) for one in recwarn if "config file" in str(one.message)]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"


def test_of_many_at_once_one_downloads(hub: HubServer, base_folder: Path) -> None:
    hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    shutil.rmtree(constants.HF_HUB_CACHE)  # another node
    with ThreadPoolExecutor(6) as pool:
        folders = set(pool.map(lambda _: checkpoint._folder(weights=True), range(6)))
    assert len(folders) == 1
    count = hub.fetched()
    assert count.pop("org/tiny/model.safetensors") == 1
    assert set(count.values()) == {2}  # once for each node


CHILD = """
import sys
from davir_ray.models.hub import fetch_from_hub, repository_files, resolve
commit = resolve("org/tiny", None)
print("resolved", flush=True)
print(fetch_from_hub("org/tiny", commit, list(repository_files("org/tiny", commit))))
"""


def child(server: HubServer, home: Path) -> subprocess.Popen[str]:
    """A process of its own that downloads; HF_ENDPOINT reaches it as it would reach any."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], env=os.environ | server.environment(home), stdout=subprocess.PIPE, text=True
    )


def test_two_processes_at_once_make_one_download(hub: HubServer, base_folder: Path, tmp_path: Path) -> None:
    hub.publish("org/tiny", base_folder)
    processes = [child(hub, tmp_path / "home") for _ in range(2)]
    folders = {process.communicate(timeout=400)[0].split()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert {path.name: path.read_bytes() for path in Path(folders.pop()).iterdir()} == files_of(base_folder)
    assert hub.fetched() == {f"org/tiny/{name}": 1 for name in files_of(base_folder)}


def test_a_download_that_was_killed_goes_on_where_it_was(hub: HubServer, base_folder: Path, tmp_path: Path) -> None:
    hub.publish("org/tiny", base_folder)
    hub.stall_at = "model.safetensors"
    killed = child(hub, tmp_path / "home")
    assert hub.stalls.wait(400)
    others = {name: 1 for name in hub.fetched() if not name.endswith(".safetensors")}
    assert others
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    complete = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    hub.stall_at = None
    again = child(hub, tmp_path / "home")
    folder = Path(again.communicate(timeout=400)[0].split()[-1])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files_of(base_folder)
    fetched = hub.fetched()
    assert fetched["org/tiny/model.safetensors"] == 2
    assert {fetched[f"org/tiny/{name}"] for name in complete} == {1}


def test_a_file_that_was_cut_off_comes_again_and_no_other(hub: HubServer, base_folder: Path) -> None:
    hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    file = checkpoint._folder(weights=True) / "model.safetensors"
    file.resolve().write_bytes(file.read_bytes()[:-100])
    assert_same(weights_of(checkpoint), weights_of(base_folder))
    assert {name: count for name, count in hub.fetched().items() if count > 1} == {"org/tiny/model.safetensors": 2}


# --- what is refused -------------------------------------------------------------------------------------------------


def gate(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.gated.add("org/tiny")


def hide(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.private.add("org/tiny")


def give_a_wrong_token(_: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def take_away(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.close()


def go_offline(_: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def nothing(_: HubServer, __: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("uri", "change", "message"),
    [
        ("org/tiny", gate, "gated; ask for access at http://127.0.0.1.*/org/tiny and set HF_TOKEN"),
        ("org/tiny", hide, "shows no such model without a token; .*if it is private, set HF_TOKEN"),
        ("org/nobody", nothing, "is not a folder here, and the hub shows no such model"),
        ("org/tiny", give_a_wrong_token, "does not accept the token .401.; set HF_TOKEN"),
        ("org/tiny@v9", nothing, "no revision 'v9'; give a branch, a tag"),
        ("org/tiny", take_away, "gives no answer .ConnectError.*; check the network and HF_ENDPOINT"),
        ("org/tiny", go_offline, "HF_HUB_OFFLINE is set and the cache .* has no complete copy of the default branch"),
        ("org/tiny@" + "0" * 40, go_offline, "HF_HUB_OFFLINE is set"),
        ("no such name", nothing, "neither a folder here nor a hub name such as org/model"),
        ("org/ti..ny", nothing, "not a hub name"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_told_in_one_line(
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    base_folder: Path,
    uri: str,
    change: Callable[[HubServer, pytest.MonkeyPatch], None],
    message: str,
) -> None:
    hub.publish("org/tiny", base_folder)
    change(hub, monkeypatch)
    with pytest.raises(ModelError, match=message) as error:
        Checkpoint.find(uri)
    assert "\n" not in str(error.value)
    assert "hf_wrong" not in str(error.value)


def test_a_private_model_comes_with_the_token(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> None:
    hub.publish("org/tiny", base_folder)
    hub.private.add("org/tiny")
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    assert_same(weights_of(Checkpoint.find("org/tiny")), weights_of(base_folder))


def test_a_worker_that_cannot_reach_the_hub_ends_the_run_so_that_it_can_go_on(
    hub: HubServer, base_folder: Path
) -> None:
    hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    hub.close()
    with pytest.raises(StorageError, match=r"gives no answer.*The same command continues"):
        checkpoint.model(torch.float32, CPU)


def test_an_incomplete_copy_offline_is_told_and_a_complete_one_works(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> None:
    hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module.resolve.cache_clear()
    assert Checkpoint.find("org/tiny") == checkpoint
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE is set and the cache"):
        checkpoint.model(torch.float32, CPU)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    checkpoint.model(torch.float32, CPU)
    asked = hub.requests.total()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module.resolve.cache_clear()
    assert_same(weights_of(Checkpoint.find("org/tiny")), weights_of(base_folder))
    assert hub.requests.total() == asked


def test_a_cache_without_the_list_is_used_offline(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> None:
    """As older versions of huggingface_hub left it."""
    hub.publish("org/tiny", base_folder)
    Checkpoint.find("org/tiny").model(torch.float32, CPU)
    shutil.move(constants.HF_HUB_CACHE, f"{constants.HF_HUB_CACHE}-older")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{constants.HF_HUB_CACHE}-older")
    (trees,) = Path(constants.HF_HUB_CACHE).rglob("trees")
    shutil.rmtree(trees)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module.resolve.cache_clear()
    assert_same(weights_of(Checkpoint.find("org/tiny")), weights_of(base_folder))


def test_a_snapshot_of_the_cache_is_a_folder_of_links(hub: HubServer, base_folder: Path) -> None:
    hub.publish("org/tiny", base_folder)
    found = Checkpoint.find("org/tiny")
    found.model(torch.float32, CPU)
    snapshot = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "snapshots" / str(found.revision)
    assert (snapshot / "model.safetensors").is_symlink()
    local = Checkpoint.find(str(snapshot))
    assert local.weights_digest() == Checkpoint.find(str(base_folder)).weights_digest()
    assert_same(weights_of(local), weights_of(base_folder))
    with pytest.raises(ModelError, match=r"no config\.json.*in the hub's cache: snapshots/REVISION"):
        Checkpoint.find(str(snapshot.parents[1]))
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is a link to \.\./\.\./blobs/.*, which does not exist"):
        Checkpoint.find(str(snapshot))
    assert_same(weights_of(Checkpoint.find("org/tiny")), weights_of(base_folder))  # downloaded again


def test_a_mistyped_folder_is_named_as_one_and_soon(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, base_folder: Path, tmp_path: Path
) -> None:
    hub.publish("org/tiny", base_folder)
    (tmp_path / "org" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    told = rf"^{tmp_path}/org/mien is not a folder .org has mine., .*shows no such model"
    with pytest.raises(ModelError, match=told):
        Checkpoint.find("org/mien")
    assert Checkpoint.find("org/tiny").is_hub_name  # the hub's, whatever else is in a folder of that name
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("davir_ray.run.access.PROBE_S", 0.5)
        with pytest.raises(ModelError, match=r"org/other is not a folder .org has mine., .*no answer in"):
            Checkpoint.find("org/other")


def test_a_full_disk_is_told_before_the_download(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> None:
    hub.publish("org/tiny", base_folder)
    checkpoint = Checkpoint.find("org/tiny")

    def usage(_: Any) -> SimpleNamespace:
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(ModelError, match=r"needs .* GB in .* free some space, or name another disk"):
        checkpoint.model(torch.float32, CPU)
    assert hub.fetched()["org/tiny/model.safetensors"] == 0


@pytest.mark.parametrize(("status", "message"), [(503, "gives no answer|the hub failed"), (429, "throttled")])
def test_a_hub_that_fails_is_named(hub: HubServer, base_folder: Path, status: int, message: str) -> None:
    hub.publish("org/tiny", base_folder)
    hub.failing = status
    with pytest.raises(ModelError, match=message):
        Checkpoint.find("org/tiny")
