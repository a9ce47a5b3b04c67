"""Checkpoints: find, load and identify a causal language model and its tokenizer.

Only safetensors are loaded: a pickled checkpoint can run code. A path is a local folder, a folder in object storage
(s3://…) or a hub name (org/model, or org/model@ a branch, tag or commit). A remote checkpoint is pinned when the driver
finds it, and copied to each node once; from then on it is loaded from the node's disk without a request.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from davir_ray.errors import ModelError
from davir_ray.models.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    attach_adapter,
    check_kind,
    check_shapes,
    read_settings,
)
from davir_ray.models.download import RemoteFile, fetch_from_store, forget_from_store, host, store_files
from davir_ray.models.hub import fetch_from_hub, repository_files, resolve
from davir_ray.models.kernel.packing import PACKED_ATTENTION
from davir_ray.run.access import PROBE_S, in_time
from davir_ray.run.files import file_digest
from davir_ray.run.location import LFS_POINTER, LFS_POINTER_BYTES, Location
from davir_ray.run.storage_errors import user_errors
from davir_ray.text import BYTE_ORDER_MARK, one_line

if TYPE_CHECKING:  # both take seconds to import, and a checkpoint can be found and identified without them
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEC_FILE = "scoring_spec.json"
"""Saved with a reference: how its examples were rendered and tokenised, so that scoring cannot silently differ."""

_WEIGHTS = ".safetensors"
CONFIGS = ("config.json", ADAPTER_CONFIG)
"""A folder with neither of these is not a checkpoint."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
"""Folder of a checkpoint with further chat templates."""

_DESCRIPTIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
"""Endings of the small files: configuration, tokenizer, index of the weights. Pickles, GGUF, ONNX and the formats of
other libraries (consolidated.*) are never downloaded."""

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint by name. Each process that loads it locates the files itself, so it can be sent to other nodes."""

    uri: str
    """A local folder as an absolute path, a folder in object storage, or a hub name without its revision."""
    revision: str | None = None
    """The commit of a hub name, so that every worker loads the same files."""
    trust_remote_code: bool = False
    is_adapter: bool = False
    """A folder with a peft adapter and no weights of its own."""
    files: tuple[RemoteFile, ...] = ()
    """What the hub or the object storage had when the checkpoint was found; empty for a local folder."""

    @classmethod
    def find(cls, uri: str, trust_remote_code: bool = False) -> Checkpoint:
        """The checkpoint of a local folder, s3://… or hub name; no weights are downloaded.

        ModelError if it is none of these, or lacks what is needed to load it.
        """
        is_hub, uri = uri.startswith("hf://"), uri.removeprefix("hf://").removeprefix("file://")
        path = Path(uri).expanduser()
        name, _, revision = uri.partition("@")
        commit: str | None = None
        files: tuple[RemoteFile, ...] = ()
        if "://" in uri:
            with user_errors(uri, ModelError):
                files = store_files(Location.of(uri))
            names = {file.name for file in files}
        elif os.path.lexists(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            if path.is_symlink() and not path.exists():
                raise ModelError(
                    f"{path} is a link to {path.readlink()}, which does not exist; correct the path or the link"
                )
            uri, names = str(path.resolve()), _names_in(path.resolve())
        else:
            if path.parent != Path() and path.parent.is_dir() and not (is_hub or revision):
                _look_up_first(path)
            uri, commit = name, resolve(name, revision or None)
            files = repository_files(name, commit)
            names = {file.name for file in files}
        is_adapter = _is_adapter(uri, names)
        found = cls(uri=uri, revision=commit, trust_remote_code=trust_remote_code, is_adapter=is_adapter, files=files)
        found._check_files()
        return found

    def _check_files(self) -> None:
        """Raise ModelError, now rather than in every worker, if weights are missing or a file is a Git LFS pointer."""
        folder = self._folder()
        if not self.is_hub_name:  # the hub has no pointers: it lists the files themselves
            sizes = {file.name: file.bytes for file in self.files}
            sizes = sizes or {name: (folder / name).stat().st_size for name in _names_in(folder) if _is_read(name)}
            for name in (name for name, size in sizes.items() if size < LFS_POINTER_BYTES and _is_read(name)):
                here = folder / name
                with user_errors(self.uri, ModelError):
                    content = Location.of(here if here.exists() else f"{self.uri}/{name}").read_bytes()
                if LFS_POINTER.match(content):
                    raise ModelError(f"{self.uri}: {name} is a Git LFS pointer; run git lfs pull where it was cloned")
        self._weight_names(folder)

    def config(self) -> Any:
        """The model's configuration, without its weights."""
        return self._load("AutoConfig")

    def tokenizer(self, known_class: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer. ModelError if there is none, or it cannot be loaded.

        `known_class` is the class that another process found it to have (see `class_name`): to find it, transformers
        imports torch.
        """
        from transformers import PreTrainedTokenizerBase

        from davir_ray.models.tokenizer import class_named

        names = {file.name for file in self.files} or _names_in(self._folder())
        has_vocabulary = any(
            name.startswith(("tokenizer.", "vocab", "tekken.")) or name.endswith((".model", ".tiktoken"))
            for name in names
        )
        absent = (
            f"{self.uri} has no tokenizer (tokenizer.json, or the vocabulary that it is made from); copy the "
            "tokenizer files of the model that it was trained from into it"
        )
        try:
            tokenizer = self._load(class_named(known_class) or "AutoTokenizer")
        except ModelError as error:
            if has_vocabulary:
                raise
            raise ModelError(absent) from error
        # Without its files transformers (5.23) may make up an empty vocabulary, which encodes text as no tokens.
        # Byte-level tokenizers such as ByT5's need no files.
        needed = set(getattr(tokenizer, "vocab_files_names", {}).values())
        if needed and needed.isdisjoint(names) and not has_vocabulary:
            raise ModelError(absent)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(f"{self.uri} has no tokenizer that transformers can load")
        # transformers keeps the byte-order mark of a template file, with which every conversation would then begin.
        templates = tokenizer.chat_template
        if isinstance(templates, str):
            tokenizer.chat_template = templates.removeprefix(BYTE_ORDER_MARK)
        elif templates is not None:
            tokenizer.chat_template = {name: text.removeprefix(BYTE_ORDER_MARK) for name, text in templates.items()}
        return tokenizer

    def model(
        self, dtype: torch.dtype, device: torch.device, attention: str | None = PACKED_ATTENTION
    ) -> PreTrainedModel:
        """The causal language model in evaluation mode, with packed attention unless another is named (None: its own).

        ModelError if the files lack any of its weights.
        """
        from transformers.utils import is_accelerate_available

        from davir_ray.models.kernel.attention import register_packed_attention

        register_packed_attention()
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        if is_accelerate_available():
            # Straight to the device: by way of the host, its memory would have to hold the model, too.
            options["device_map"] = {"": device}
        try:
            model, info = self._load("AutoModelForCausalLM", attn_implementation=attention, **options)
        except ModelError as error:
            if not (isinstance(error.__cause__, KeyError) and PACKED_ATTENTION in str(error.__cause__)):
                raise
            # Families with their own table of attentions (Falcon, GPT-J) look the name up when they are built.
            model, info = self._load("AutoModelForCausalLM", attn_implementation="eager", **options)
        if absent := sorted(info["missing_keys"]):
            # transformers would fill them with random numbers, different ones in every process.
            raise ModelError(
                f"{self.uri} lacks {len(absent)} weights of the model, such as {absent[0]}; it cannot be used"
            )
        # Adapters name their base by this, so it must not be the folder of this node's cache.
        model.name_or_path = self.uri
        return model.to(device).eval()

    def skeleton(self, attention: str | None = None) -> PreTrainedModel:
        """The model on the meta device: its modules and shapes, with its own attention unless another is named.

        ModelError if it cannot be built.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from davir_ray.models.kernel.attention import register_packed_attention

        config = self.config()
        if attention == PACKED_ATTENTION:
            register_packed_attention()
        try:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=self.trust_remote_code, attn_implementation=attention
                )
        except (ValueError, KeyError, RuntimeError, ImportError) as error:
            if isinstance(error, KeyError) and PACKED_ATTENTION in str(error):  # a table of its own, see `model`
                return self.skeleton("eager")
            raise ModelError(f"{self.uri} is not a causal language model: {one_line(error)}") from error
        return model

    def check_adapter(self, base: Checkpoint) -> None:
        """Raise ModelError unless this adapter can be scored on that base, as far as is known before its download."""
        check_kind(read_settings(self._folder()), self.uri)
        if not self.files:
            shapes = {name: value.shape for name, value in base.skeleton().state_dict().items()}
            check_shapes(Path(self.uri), shapes, base.uri)

    def modules_to_save(self) -> list[str]:
        """Modules that this adapter replaces as a whole, such as a trained head; empty for a full model."""
        return sorted(read_settings(self._folder()).get("modules_to_save") or []) if self.is_adapter else []

    def attach_to(self, base: PreTrainedModel) -> None:
        """Load this adapter into its base, switched on. ModelError if it does not fit."""
        with quiet():
            attach_adapter(base, str(self._folder(weights=True)))

    def as_peft(self, base: PreTrainedModel) -> PreTrainedModel:
        """The base with this adapter, loaded by peft itself, to check `attach_to`: the two share no code."""
        from peft import PeftModel  # imported late: scoring full references does not need peft

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by an old name
            return PeftModel.from_pretrained(base, self._folder(weights=True)).eval().get_base_model()

    def weights_digest(self) -> dict[str, str]:
        """What identifies the model: the commit of a hub name, else digests of configuration, weights and code.

        ModelError if a weights file is missing, as different models would then have the same digests.
        """
        if self.is_hub_name:
            return {"commit": str(self.revision)}
        if self.files:
            return {file.name: file.digest for file in self.files if _is_content(file.name)}
        folder = Path(self.uri)
        names = {*filter(_is_content, _names_in(folder)), *self._weight_names(folder)}
        return {name: file_digest(Location.of(folder / name)) for name in sorted(names)}

    def content(self) -> dict[str, str]:
        """What identifies the whole checkpoint: the model, and the files that its tokenizer and templates are made of.

        More than `weights_digest`, and known without loading anything; ModelError if a weights file is missing.
        """
        if self.is_hub_name:
            return self.weights_digest()
        if self.files:
            return {file.name: file.digest for file in self.files if _is_read(file.name)}
        folder = Path(self.uri)
        names = [name for name in _names_in(folder) if _is_read(name)]
        names += [str(path.relative_to(folder)) for path in (folder / _TEMPLATES).glob("*")]
        return self.weights_digest() | {name: file_digest(Location.of(folder / name)) for name in sorted(names)}

    def spec(self) -> dict[str, Any] | None:
        """The scoring spec that came with a reference, if it has one."""
        file = self._folder() / SPEC_FILE
        return json.loads(file.read_bytes()) if file.exists() else None

    def forget(self) -> None:
        """Delete this node's copy of a checkpoint in object storage; does nothing for any other checkpoint."""
        if "://" in self.uri:
            forget_from_store(self.files)

    @property
    def is_hub_name(self) -> bool:
        """Whether it is on the hub, rather than in a folder."""
        return "://" not in self.uri and not Path(self.uri).is_absolute()

    def _load(self, loader: str | type[Any], **kwargs: Any) -> Any:
        """What transformers loads by a class, or by one of its own that is named, so that it is imported only here."""
        import transformers

        folder = str(self._folder(weights=loader == "AutoModelForCausalLM"))
        try:
            with quiet():
                if not isinstance(loader, str):
                    return loader.from_pretrained(folder, **kwargs)
                auto_class = getattr(transformers, loader)
                return auto_class.from_pretrained(folder, trust_remote_code=self.trust_remote_code, **kwargs)
        except _LOAD_ERRORS as error:
            reason = one_line(error)
            if not self.trust_remote_code and "trust_remote_code" in reason:
                raise ModelError(
                    f"{self.uri} needs Python code that comes with it; read it, then add --trust_remote_code "
                    "(in Python: trust_remote_code=True)"
                ) from error
            raise ModelError(f"{self.uri} cannot be loaded as a causal language model: {reason[:400]}") from error

    def _folder(self, *, weights: bool = False) -> Path:
        """The folder on this node's disk. Missing files are downloaded first, the weights only if they are wanted."""
        if not self.files:
            folder = Path(self.uri)
            if not folder.is_dir():
                raise ModelError(
                    f"{folder} is not a folder on {host()}; put it there on every node, or give s3://… or a hub name"
                )
            return folder
        folder = self._fetch([file for file in self.files if _is_description(file.name, self.trust_remote_code)])
        if not weights:
            return folder
        wanted = self._weight_names(folder)
        return self._fetch([file for file in self.files if file.name in wanted])

    def _fetch(self, wanted: list[RemoteFile]) -> Path:
        with quiet():
            if self.revision:
                return fetch_from_hub(self.uri, self.revision, wanted)
            return fetch_from_store(Location.of(self.uri), self.files, wanted)

    def _weight_names(self, folder: Path) -> list[str]:
        """The files that transformers would read the weights from; a repository may hold them in other formats, too.

        ModelError if one of them is missing.
        """
        listed = {file.name for file in self.files}

        def is_there(name: str) -> bool:
            return name in listed if listed else (folder / name).is_file()

        names = [ADAPTER_WEIGHTS if self.is_adapter else _SINGLE]
        if not is_there(names[0]) and is_there(_INDEX):
            try:
                names = sorted(set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{self.uri} has an index of weights, {_INDEX}, that cannot be read") from error
        if absent := [name for name in names if not is_there(name)]:
            raise ModelError(
                f"{self.uri} has no {absent[0]}, which its weights are read from; save it with safetensors"
            )
        return names


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' progress bars for the block: each of many actors would draw its own."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _names_in(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder; name a checkpoint folder, an s3:// folder or a hub name such as org/model"
        )
    names = {path.name for path in folder.iterdir()}
    for name in sorted(names):
        # A name without a suffix may be a folder.
        if (_is_read(name) or not Path(name).suffix) and not (folder / name).exists():
            raise ModelError(
                f"{folder / name} is a link to {os.readlink(folder / name)}, which does not exist or cannot be read; "
                "restore it, or download or copy the model again"
            )
    return names


def _look_up_first(path: Path) -> None:
    """Ask the hub, for a few seconds at most, for a name that may be a mistyped folder.

    If the hub does not have it, ModelError names both possibilities.
    """
    name = path.as_posix()
    try:
        in_time(partial(resolve, name, None))
    except (ModelError, TimeoutError) as error:
        siblings = sorted(one.name for one in path.parent.iterdir() if one.is_dir())
        there = f"has {', '.join(siblings[:10])}" if siblings else "has no folders"
        raise ModelError(
            f"{path.absolute()} is not a folder ({path.parent} {there}), and as a hub name: "
            f"{f'no answer in {PROBE_S:g} seconds' if isinstance(error, TimeoutError) else error}"
        ) from error


def _is_adapter(uri: str, names: set[str]) -> bool:
    """Whether files of these names are an adapter, rather than a whole model. ModelError if they are neither."""
    if ADAPTER_CONFIG in names and names.isdisjoint({_SINGLE, _INDEX}):
        if ADAPTER_WEIGHTS not in names:
            raise ModelError(f"{uri} has no {ADAPTER_WEIGHTS}; pickled weights are refused, save it with safetensors")
        return True
    if ADAPTER_CONFIG in names:  # transformers would load the adapter on the base that it names, and ignore the weights
        raise ModelError(f"{uri} has both the weights of a model and {ADAPTER_CONFIG}; keep one of them in a folder")
    if "config.json" not in names:
        inside = " (in the hub's cache: snapshots/REVISION)" if "snapshots" in names else ""
        raise ModelError(f"{uri} has no config.json, so it is not a checkpoint; name the folder that holds it{inside}")
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise ModelError(f"{uri} has no *{_WEIGHTS} file; pickled weights are refused, save it with safetensors")
    return False


def _is_content(name: str) -> bool:
    return name.endswith((_WEIGHTS, ".py")) or name in CONFIGS


def _is_read(name: str) -> bool:
    return _is_content(name) or _is_description(name, trust_remote_code=True)


def _is_description(name: str, trust_remote_code: bool) -> bool:
    """Whether a file is one of the small ones that describe a model; chat templates and code may be in subfolders."""
    if name.endswith(".py"):
        return trust_remote_code
    in_place = "/" not in name or name.startswith(f"{_TEMPLATES}/")
    return in_place and name.endswith(_DESCRIPTIONS)
