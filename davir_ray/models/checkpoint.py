"""Checkpoints: find, load, save and identify a causal language model and its tokenizer.

Only safetensors are loaded: a pickled checkpoint can run code. A path is a local folder, a folder in object storage
(s3://…) or a hub name (org/model, or org/model@ a branch, tag or commit). What lies elsewhere is pinned where it is
found, in the driver, and comes to each node once; then it is loaded from the node's disk, and nobody is asked.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from davir_ray.config.training import FinetuneConfig
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
from davir_ray.models.kernel.attention import PACKED_ATTENTION
from davir_ray.run.access import PROBE_S, in_time
from davir_ray.run.files import digest, file_digest
from davir_ray.run.location import LFS_POINTER, LFS_POINTER_BYTES, Location
from davir_ray.run.storage_errors import user_errors
from davir_ray.text import BYTE_ORDER_MARK

SPEC_FILE = "scoring_spec.json"
"""Travels with a reference: how its examples were rendered and tokenised, so that scoring cannot differ silently."""

_WEIGHTS = ".safetensors"
CONFIGS = ("config.json", ADAPTER_CONFIG)
"""A folder without one of these is no checkpoint."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DESCRIPTIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
"""Endings of what is small: configuration, tokenizer, index of the weights. Pickles, GGUF, ONNX and the formats of
other libraries (consolidated.*) are never downloaded."""

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by name; each process that loads it finds the files for itself, so it can travel between nodes."""

    uri: str
    """A local folder as an absolute path, a folder in object storage, or a hub name without its revision."""
    revision: str | None = None
    """The commit of a hub name, so that every worker loads the same."""
    trust_remote_code: bool = False
    is_adapter: bool = False
    """A folder with a peft adapter and no weights of its own."""
    files: tuple[RemoteFile, ...] = ()
    """What the hub or the object storage had when the checkpoint was found; empty for a local folder."""

    @classmethod
    def find(cls, uri: str, trust_remote_code: bool = False) -> "Checkpoint":
        """The checkpoint of a local folder, s3://… or hub name; no weights are downloaded.

        ModelError if it is none of these, or lacks what is needed to load it.
        """
        is_hub, uri = uri.startswith("hf://"), uri.removeprefix("hf://").removeprefix("file://")
        if "://" in uri:
            with user_errors(uri, ModelError):
                files = store_files(Location.of(uri))
            return cls._checked(uri, {file.name for file in files}, trust_remote_code, files=files)
        path = Path(uri).expanduser()
        name, _, revision = uri.partition("@")
        if os.path.lexists(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            if path.is_symlink() and not path.exists():
                raise ModelError(f"{path} is a link to {path.readlink()}, which is not there; correct path or link")
            folder = path.resolve()
            return cls._checked(str(folder), _names_in(folder), trust_remote_code)
        if path.parent != Path() and path.parent.is_dir() and not (is_hub or revision):
            _look_up_first(path)
        commit = resolve(name, revision or None)
        files = repository_files(name, commit)
        return cls._checked(name, {file.name for file in files}, trust_remote_code, commit, files)

    @classmethod
    def _checked(
        cls,
        uri: str,
        names: set[str],
        trust_remote_code: bool,
        commit: str | None = None,
        files: tuple[RemoteFile, ...] = (),
    ) -> "Checkpoint":
        """The checkpoint of a place that holds files of these names. ModelError if one is missing or is no weights."""
        _check_names(uri, names)
        found = cls(uri, commit, trust_remote_code, _is_adapter(names), files)
        found._check_files()
        return found

    def _check_files(self) -> None:
        """ModelError now rather than in every worker where weights are missing, or Git LFS left pointers to files."""
        folder = self._folder()
        if not self.is_hub_name:  # the hub tells the sizes of the files themselves
            sizes = {file.name: file.bytes for file in self.files if _is_read(file.name)}
            sizes = sizes or {name: (folder / name).stat().st_size for name in _names_in(folder) if _is_read(name)}
            for name in (name for name, num_bytes in sizes.items() if num_bytes < LFS_POINTER_BYTES):
                here = folder / name
                with user_errors(self.uri, ModelError):
                    content = Location.of(here if here.exists() else f"{self.uri}/{name}").read_bytes()
                if LFS_POINTER.match(content):
                    raise ModelError(f"{self.uri}: {name} is a Git LFS pointer; run git lfs pull where it was cloned")
        self._weight_names(folder)

    def config(self) -> Any:
        """The model's configuration, without its weights."""
        return self._load(AutoConfig)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. ModelError if there is none, or it cannot be loaded."""
        names = {file.name for file in self.files} or _names_in(self._folder())
        has_vocabulary = any(_is_vocabulary(name) for name in names)
        absent = (
            f"{self.uri} has no tokenizer (tokenizer.json, or the vocabulary that it is made from); copy the "
            "tokenizer's files of the model that it was trained from into it"
        )
        try:
            tokenizer = self._load(AutoTokenizer)
        except ModelError as error:
            if has_vocabulary:
                raise
            raise ModelError(absent) from error
        # Without its files transformers (5.23) may make up an empty vocabulary, in which text has no tokens.
        # Tokenizers of bytes need none.
        needed = set(getattr(tokenizer, "vocab_files_names", {}).values())
        if needed and needed.isdisjoint(names) and not has_vocabulary:
            raise ModelError(absent)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(f"{self.uri} has no tokenizer that transformers can load")
        # Of a template's file transformers keeps the byte-order mark, and would begin every conversation with it.
        templates = tokenizer.chat_template
        if isinstance(templates, str):
            tokenizer.chat_template = templates.removeprefix(BYTE_ORDER_MARK)
        elif templates is not None:
            tokenizer.chat_template = {name: text.removeprefix(BYTE_ORDER_MARK) for name, text in templates.items()}
        return tokenizer

    def model(
        self, dtype: torch.dtype, device: torch.device, attention: str | None = PACKED_ATTENTION
    ) -> PreTrainedModel:
        """The causal language model in evaluation mode, for packs unless another attention is named (None: its own).

        ModelError if the files lack any of its weights.
        """
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        try:
            model, info = self._load(AutoModelForCausalLM, attn_implementation=attention, **options)
        except ModelError as error:
            if not (isinstance(error.__cause__, KeyError) and PACKED_ATTENTION in str(error.__cause__)):
                raise
            # Families with a table of attentions of their own (Falcon, GPT-J) look the name up when they are built.
            model, info = self._load(AutoModelForCausalLM, attn_implementation="eager", **options)
        if absent := sorted(info["missing_keys"]):
            # transformers would fill them with random numbers, others in every process.
            raise ModelError(
                f"{self.uri} lacks {len(absent)} weights of the model, such as {absent[0]}; it cannot be used"
            )
        # Not the folder that this node keeps it in: adapters name their base by it.
        model.name_or_path = self.uri
        return model.to(device).eval()

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: its modules and shapes. ModelError if it cannot be built."""
        config = self.config()
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        except (ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"{self.uri} is no causal language model: {' '.join(str(error).split())}") from error
        assert isinstance(model, PreTrainedModel)
        return model

    def check_adapter(self, base: "Checkpoint") -> None:
        """ModelError unless this adapter can be scored on that base, as far as can be known without its download."""
        check_kind(read_settings(self._folder()), self.uri)
        if not self.files:
            shapes = {name: value.shape for name, value in base.skeleton().state_dict().items()}
            check_shapes(Path(self.uri), shapes, base.uri)

    def modules_to_save(self) -> list[str]:
        """What this adapter replaces as a whole, such as a trained head; nothing if it is no adapter."""
        return sorted(read_settings(self._folder()).get("modules_to_save") or []) if self.is_adapter else []

    def attach_to(self, base: PreTrainedModel) -> None:
        """Load this adapter into its base, switched on. ModelError if it does not fit."""
        with quiet():
            attach_adapter(base, str(self._folder(weights=True)))

    def as_peft(self, base: PreTrainedModel) -> PreTrainedModel:
        """The base with this adapter on it, by peft's own loading, to check `attach_to` against: they share no code."""
        from peft import PeftModel  # late: scoring full references does without peft

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by an old name
            return PeftModel.from_pretrained(base, self._folder(weights=True)).eval().get_base_model()

    def weights_digest(self) -> dict[str, str]:
        """What changes when the model does: configuration, weights and code of a folder, the commit of a hub name.

        ModelError where a file of the weights is missing: the digest would be that of other models, too.
        """
        if self.is_hub_name:
            return {"commit": str(self.revision)}
        if self.files:
            return {file.name: file.digest for file in self.files if _is_content(file.name)}
        folder = Path(self.uri)
        names = {*filter(_is_content, _names_in(folder)), *self._weight_names(folder)}
        return {name: file_digest(Location.of(folder / name)) for name in sorted(names)}

    def spec(self) -> dict[str, Any] | None:
        """The scoring spec that came with a reference, if it has one."""
        file = self._folder() / SPEC_FILE
        return json.loads(file.read_bytes()) if file.exists() else None

    def forget(self) -> None:
        """Delete this node's copy of a checkpoint in object storage; of any other nothing."""
        if "://" in self.uri:
            forget_from_store(self.files)

    @property
    def is_hub_name(self) -> bool:
        """Whether the hub has it, rather than a folder."""
        return "://" not in self.uri and not Path(self.uri).is_absolute()

    def _load(self, auto_class: Any, **kwargs: Any) -> Any:
        folder = str(self._folder(weights=auto_class is AutoModelForCausalLM))
        try:
            with quiet():
                return auto_class.from_pretrained(folder, trust_remote_code=self.trust_remote_code, **kwargs)
        except _LOAD_ERRORS as error:
            reason = " ".join(str(error).split())
            if not self.trust_remote_code and "trust_remote_code" in reason:
                raise ModelError(
                    f"{self.uri} needs Python code that comes with it; read it, then add --trust_remote_code "
                    "(in Python: trust_remote_code=True)"
                ) from error
            raise ModelError(f"{self.uri} cannot be loaded as a causal language model: {reason[:400]}") from error

    def _folder(self, *, weights: bool = False) -> Path:
        """Where this node has it on disk; what it still lacks comes first: the weights only where they are wanted."""
        if not self.files:
            folder = Path(self.uri)
            if not folder.is_dir():
                raise ModelError(
                    f"{folder} is no folder on {host()}; put it there on every node, or give s3://… or a hub name"
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
        """The files that transformers would read the weights from: of several formats in a repository, one.

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
    """Without a progress bar for each load or save: many actors would write many."""
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
            f"{folder} is no folder; name a checkpoint folder, an s3:// folder or a hub name such as org/model"
        )
    names = {path.name for path in folder.iterdir()}
    for name in sorted(names):
        if (_is_read(name) or not Path(name).suffix) and not (folder / name).exists():  # without one it may be a folder
            raise ModelError(
                f"{folder / name} is a link to {os.readlink(folder / name)}, which is not there or may not be read; "
                "restore that, or download or copy the model again"
            )
    return names


def _look_up_first(path: Path) -> None:
    """Ask the hub, a few seconds at most, for a name in a folder that is here; ModelError that tells of both if it
    does not have it.
    """
    name = path.as_posix()
    try:
        in_time(partial(resolve, name, None))
    except (ModelError, TimeoutError) as error:
        siblings = sorted(one.name for one in path.parent.iterdir() if one.is_dir())
        there = f"has {', '.join(siblings[:10])}" if siblings else "has no folder"
        raise ModelError(
            f"{path.absolute()} is no folder ({path.parent} {there}), and as the name of a model of the hub: "
            f"{f'no answer in {PROBE_S:g} seconds' if isinstance(error, TimeoutError) else error}"
        ) from error


def _check_names(uri: str, names: set[str]) -> None:
    if _is_adapter(names):
        if ADAPTER_WEIGHTS not in names:
            raise ModelError(f"{uri} has no {ADAPTER_WEIGHTS}; pickled weights are refused, save it with safetensors")
        return
    if ADAPTER_CONFIG in names:  # transformers would load the adapter, on the model that it names, and not the weights
        raise ModelError(f"{uri} has both the weights of a model and {ADAPTER_CONFIG}; keep one of them in a folder")
    if "config.json" not in names:
        inside = " (in the hub's cache: snapshots/REVISION)" if "snapshots" in names else ""
        raise ModelError(f"{uri} has no config.json, so it is no checkpoint; name the folder that holds it{inside}")
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise ModelError(f"{uri} has no *{_WEIGHTS} file; pickled weights are refused, save it with safetensors")


def _is_adapter(names: set[str]) -> bool:
    return ADAPTER_CONFIG in names and not names & {_SINGLE, _INDEX}


def _is_content(name: str) -> bool:
    return name.endswith((_WEIGHTS, ".py")) or name in CONFIGS


def _is_read(name: str) -> bool:
    return _is_content(name) or _is_description(name, trust_remote_code=True)


def _is_vocabulary(name: str) -> bool:
    return name.startswith(("tokenizer.", "vocab", "tekken.")) or name.endswith((".model", ".tiktoken"))


def _is_description(name: str, trust_remote_code: bool) -> bool:
    """Whether a file says what the model is: small, and beside its weights (templates and code have folders)."""
    if name.endswith(".py"):
        return trust_remote_code
    beside = "/" not in name or name.startswith("additional_chat_templates/")
    return beside and name.endswith(_DESCRIPTIONS)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes when text would be encoded differently: vocabulary, merges, normalisation, special tokens."""
    added = sorted((i, str(token), token.special) for i, token in tokenizer.added_tokens_decoder.items())
    return digest([_encoding(tokenizer), added, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])


def check_same_encoding(
    base: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, names: tuple[str, str]
) -> None:
    """Raise ModelError unless both encode text alike; added special tokens and chat templates may differ."""
    if _encoding(base) != _encoding(reference) or _added_words(base) != _added_words(reference):
        raise ModelError(
            f"{names[0]} and {names[1]} do not encode alike (vocabulary, merges or normalisation differ), so their "
            "losses are not of the same tokens; give a reference that was fine-tuned from this base"
        )
    for token in ("bos_token", "eos_token"):
        ours, theirs = getattr(base, token), getattr(reference, token)
        if ours != theirs:
            raise ModelError(f"{names[0]} has {token} {ours!r} and {names[1]} has {theirs!r}; they must be the same")


def _added_words(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """Added tokens that plain text can spell; special ones it cannot."""
    return sorted((i, str(token)) for i, token in tokenizer.added_tokens_decoder.items() if not token.special)


def _encoding(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of how text becomes ids, without added tokens and chat templates."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest(sorted(tokenizer.get_vocab().items()))
    parts = json.loads(backend.to_str())
    return digest([parts.get(name) for name in ("model", "normalizer", "pre_tokenizer")])


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that a precision setting means on this device; auto: bfloat16 on a GPU that has it, else float32."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[precision]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def uses_autocast(precision: str, device: torch.device) -> bool:
    """Whether a fine-tune's precision setting means bfloat16 arithmetic, whatever the weights' type, on this device."""
    return resolve_dtype(precision, device) is torch.bfloat16


def weights_precision(config: FinetuneConfig) -> Literal["auto", "float32", "bfloat16"]:
    """Type of the base's weights in a fine-tune: float32 where they are trained; under an adapter as precision says."""
    return "float32" if config.lora_rank is None else config.precision


def local_device() -> torch.device:
    """The GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The model of the GPU, or the vector instructions that torch uses on the CPU: another may round differently."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(torch.backends.cpu.get_cpu_capability())
