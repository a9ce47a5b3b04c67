"""Checkpoints: which are refused, and what identifies one."""

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from davir_ray.errors import ModelError, StorageError
from davir_ray.models.checkpoint import SPEC_FILE, Checkpoint
from davir_ray.models.kernel.attention import PACKED_ATTENTION
from davir_ray.run.files import file_digest
from davir_ray.run.location import TEMPORARY, Location


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_for_packs_in_evaluation_mode(folder: Path) -> None:
    checkpoint = Checkpoint.find(str(folder))
    model = checkpoint.model(torch.float32, torch.device("cpu"))
    assert not model.training
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert model.dtype == torch.float32
    assert checkpoint.tokenizer().eos_token == "</s>"
    assert checkpoint.config().hidden_size == 64


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_a_folder_of_pickled_weights_is_refused(folder: Path, pickled: str) -> None:
    (folder / "model.safetensors").rename(folder / pickled)
    with pytest.raises(ModelError, match="safetensors"):
        Checkpoint.find(str(folder))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        Checkpoint.find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/nowhere-at-all", "a/b/c"])
def test_what_looks_like_a_path_is_never_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        Checkpoint.find(name)


def test_a_checkpoint_without_some_weights_is_refused_instead_of_filled_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {f"module.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu"))


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.txt"
    file.write_text("no model")
    with pytest.raises(ModelError, match="is not a folder"):
        Checkpoint.find(str(file))


def test_a_folder_without_a_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint.find(str(folder))


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-model"}'])
def test_a_configuration_that_means_nothing_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Checkpoint.find(str(folder)).config()


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\x08" + bytes(7) + b"{}"])
def test_damaged_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu"))


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu"))


def test_a_local_folder_that_this_node_lacks_is_named(folder: Path) -> None:
    checkpoint = Checkpoint.find(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="put it there on every node"):
        checkpoint.model(torch.float32, torch.device("cpu"))


def test_weights_and_an_adapter_in_one_folder_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="keep one of them"):
        Checkpoint.find(str(folder))


# --- object storage --------------------------------------------------------------------------------------------------


class Store(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory with etags, as an object store has them; counts what it is asked for."""

    protocol = "counted"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("counted://", "memory://")))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self.asked["ls"] += 1
        return [self._marked(info) for info in super().ls(path, detail=True, **kwargs)]

    def info(self, path: str, **kwargs: Any) -> Any:
        self.asked["info"] += 1
        return self._marked(super().info(path, **kwargs))

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self.asked[Path(rpath).name] += 1
        Path(lpath).write_bytes(self.cat_file(rpath))

    def _marked(self, info: dict[str, Any]) -> dict[str, Any]:
        if info["type"] != "file":
            return info
        return info | {"ETag": hashlib.md5(self.cat_file(info["name"])).hexdigest()}


@pytest.fixture
def store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with the checkpoint, and the other files that a trainer leaves with it, in counted://models/tiny."""
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("counted", Store, clobber=True)
    store = Store()
    for file in folder.iterdir():
        store.pipe_file(f"/models/tiny/{file.name}", file.read_bytes())
    for name in ("optimizer.pt", "pytorch_model.bin", "consolidated.safetensors", "checkpoint-5/model.safetensors"):
        store.pipe_file(f"/models/tiny/{name}", b"never read")
    Store.asked.clear()
    yield store
    Store.store.clear()


URI = "counted://models/tiny"


def copied(tmp_path: Path) -> Path:
    (found,) = [path for path in (tmp_path / "cache" / "checkpoints").iterdir() if path.is_dir()]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_in_object_storage_is_listed_once_and_copied_once(store: Store, folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.find(URI)
    assert store.asked["ls"] == 2  # before, and after what was copied
    assert "model.safetensors" not in contents(copied(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: checkpoint._folder(weights=True), range(4)))
    assert contents(copied(tmp_path)) == contents(folder)
    assert {store.asked[name] for name in contents(folder)} == {1}
    asked = dict(store.asked)
    checkpoint.model(torch.float32, torch.device("cpu"))
    checkpoint.tokenizer(), checkpoint.spec(), checkpoint.weights_digest()
    assert store.asked == asked
    assert Checkpoint.find(URI) == checkpoint


def test_the_digest_of_a_folder_in_object_storage_is_that_of_its_etags(store: Store) -> None:
    digest = Checkpoint.find(URI).weights_digest()
    place = Location.of(URI)
    assert digest.keys() == {"config.json", "model.safetensors", "consolidated.safetensors"}
    assert digest == {name: file_digest(place / name) for name in digest}


def test_a_damaged_copy_is_made_good(store: Store, folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.find(URI)
    file = checkpoint._folder(weights=True) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (file.parent / f"{TEMPORARY}of-a-copy-that-was-killed").write_bytes(b"half")
    checkpoint.model(torch.float32, torch.device("cpu"))
    assert contents(copied(tmp_path)) == contents(folder)
    assert (store.asked["model.safetensors"], store.asked["config.json"]) == (2, 1)


def test_a_file_that_changes_between_driver_and_worker_is_refused(store: Store, tmp_path: Path) -> None:
    checkpoint = Checkpoint.find(URI)
    content = bytearray(store.cat_file("/models/tiny/model.safetensors"))
    content[-1] ^= 1
    store.pipe_file("/models/tiny/model.safetensors", bytes(content))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"model\.safetensors was changed while the run used it"):
            checkpoint.model(torch.float32, torch.device("cpu"))
    other = Checkpoint.find(URI)
    assert other.weights_digest() != checkpoint.weights_digest()
    other.model(torch.float32, torch.device("cpu"))


def test_a_full_disk_is_reported_with_the_name_of_the_cache(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.find(URI)

    def fill(_self: Store, _path: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "get_file", fill)
    with pytest.raises(ModelError, match=r"cannot be kept in .*cache/checkpoints.* no space is left"):
        checkpoint.model(torch.float32, torch.device("cpu"))
    assert not [name for name in contents(copied(tmp_path)) if name.startswith(TEMPORARY)]


def test_a_store_that_fails_in_a_worker_is_no_mistake_of_the_users(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.find(URI)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "slow down")

    monkeypatch.setattr(Store, "get_file", fail)
    with pytest.raises(StorageError, match="throttled"):
        checkpoint.model(torch.float32, torch.device("cpu"))


def test_without_etags_files_of_a_store_are_distinguished_by_content(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/models-{tmp_path.name}/{file.name}", file.read_bytes())
    uri = f"memory://models-{tmp_path.name}"
    checkpoint = Checkpoint.find(uri)
    checkpoint.model(torch.float32, torch.device("cpu"))
    assert checkpoint.weights_digest() == Checkpoint.find(str(folder)).weights_digest()
    memory.rm(f"/models-{tmp_path.name}/config.json")
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint.find(uri)


# --- links, pointers and what is missing -----------------------------------------------------------------------------


def links_to(folder: Path, target: Path) -> Path:
    """A folder of links to the files of another, as the hub's cache has them."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    return target


def test_a_folder_of_links_is_the_model_that_it_points_to(folder: Path, tmp_path: Path) -> None:
    linked = Checkpoint.find(str(links_to(folder, tmp_path / "linked")))
    digest = linked.weights_digest()
    assert digest == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    for uri in (folder, tmp_path / "link", f"file://{tmp_path / 'linked'}"):
        assert Checkpoint.find(str(uri)).weights_digest() == digest
    loaded, plain = linked.model(torch.float32, torch.device("cpu")), load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in plain.items())


def test_other_weights_behind_a_link_change_the_digest_whatever_their_size_and_time(
    folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(reference_folder, tmp_path / "other")
    for file in (folder / "model.safetensors", other / "model.safetensors"):
        os.utime(file, ns=(0, 0))
    assert os.stat(folder / "model.safetensors").st_size == os.stat(other / "model.safetensors").st_size
    checkpoint = Checkpoint.find(str(links_to(folder, tmp_path / "linked")))
    before = checkpoint.weights_digest()
    (tmp_path / "linked" / "model.safetensors").unlink()
    (tmp_path / "linked" / "model.safetensors").symlink_to(other / "model.safetensors")
    assert checkpoint.weights_digest() == Checkpoint.find(str(other)).weights_digest() != before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "additional_chat_templates"])
def test_a_link_to_nothing_in_a_checkpoint_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    linked = links_to(folder, tmp_path / "linked")
    (linked / name).unlink(missing_ok=True)
    (linked / name).symlink_to("../../blobs/gone")
    with pytest.raises(ModelError, match=rf"linked/{name} is a link to \.\./\.\./blobs/gone, which does not exist"):
        Checkpoint.find(str(linked))
    (linked / name).unlink()
    (linked / "pytorch_model.bin").symlink_to("../../blobs/gone")  # never read
    if name == "additional_chat_templates":
        Checkpoint.find(str(linked))


def test_a_checkpoint_that_is_a_link_to_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "link"), "./link", "link"):
        with pytest.raises(ModelError, match="link is a link to nowhere, which does not exist"):
            Checkpoint.find(name)


def test_the_digest_of_a_folder_that_lost_weights_is_an_error(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(shards, max_shard_size="200KB")
    adapter = tmp_path / "adapter"
    get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(r=2)).save_pretrained(adapter)
    for place, lost in ((folder, "model.safetensors"), (shards, "*-00002-*"), (adapter, "adapter_model.safetensors")):
        checkpoint = Checkpoint.find(str(place))
        assert checkpoint.weights_digest()
        (file,) = place.glob(lost)
        file.unlink()
        for look in (checkpoint.weights_digest, lambda place=place: Checkpoint.find(str(place))):
            with pytest.raises(ModelError, match=rf"has no .*{file.name if place != folder else 'safetensors'}"):
                look()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4951240\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    for place in (folder, links_to(folder, tmp_path / "linked")):
        with pytest.raises(ModelError, match=rf"{place}: {name} is a Git LFS pointer; run git lfs pull"):
            Checkpoint.find(str(place))


def test_a_pointer_of_git_lfs_is_named_in_an_adapter_and_in_a_store(folder: Path, store: Store, tmp_path: Path) -> None:
    store.pipe_file("/models/tiny/model.safetensors", POINTER)
    with pytest.raises(ModelError, match=r"counted://models/tiny: model\.safetensors is a Git LFS pointer"):
        Checkpoint.find(URI)
    get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        Checkpoint.find(str(tmp_path / "adapter"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("keep", [None, '{"tokenizer_class": "GPT2Tokenizer"}'])
def test_a_folder_without_a_tokenizer_is_named_and_none_is_made_up(folder: Path, family: str, keep: str | None) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    if keep:
        (folder / "tokenizer_config.json").write_text(keep)
    if family == "gpt2":
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"{folder} has no tokenizer .*; copy the tokenizer files of the model"):
        Checkpoint.find(str(folder)).tokenizer()


def test_a_tokenizer_of_bytes_needs_no_vocabulary(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    assert Checkpoint.find(str(folder)).tokenizer()("é", add_special_tokens=False)["input_ids"] == [0xC3 + 3, 0xA9 + 3]


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_weights_digest_changes_with_one_byte_of_the_weights(folder: Path) -> None:
    checkpoint = Checkpoint.find(str(folder))
    before = checkpoint.weights_digest()
    assert before.keys() == {"model.safetensors", "config.json"}
    assert checkpoint.weights_digest() == before
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = checkpoint.weights_digest()
    assert after["model.safetensors"] != before["model.safetensors"]
    assert after["config.json"] == before["config.json"]


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py"])
def test_the_weights_digest_changes_with_the_configuration_and_with_the_code_that_comes_with_it(
    folder: Path, name: str
) -> None:
    (folder / "modeling_own.py").write_text("SCALE = 1\n")
    checkpoint = Checkpoint.find(str(folder), trust_remote_code=True)
    before = checkpoint.weights_digest()
    (folder / name).write_text((folder / name).read_text() + "\n")
    after = checkpoint.weights_digest()
    assert {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)} == {name}


def test_the_weights_digest_does_not_depend_on_the_place(folder: Path, base_folder: Path) -> None:
    assert Checkpoint.find(str(folder)).weights_digest() == Checkpoint.find(str(base_folder)).weights_digest()


def test_models_of_different_seeds_have_different_digests(base_folder: Path, reference_folder: Path) -> None:
    digests = [Checkpoint.find(str(f)).weights_digest()["model.safetensors"] for f in (base_folder, reference_folder)]
    assert digests[0] != digests[1]


def test_the_scoring_spec_travels_with_a_reference(folder: Path) -> None:
    checkpoint = Checkpoint.find(str(folder))
    assert checkpoint.spec() is None
    (folder / SPEC_FILE).write_text('{"max_tokens": 512}')
    assert checkpoint.spec() == {"max_tokens": 512}
