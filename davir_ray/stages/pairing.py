"""Do base, reference and settings belong together? Known before any weight is loaded."""

from transformers import PreTrainedTokenizerBase

from davir_ray.config.sources import Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.errors import ConfigError, ModelError
from davir_ray.models.checkpoint import Checkpoint, check_same_encoding
from davir_ray.models.size import num_ids
from davir_ray.run.manifest import differences
from davir_ray.stages.prepare import Preparation, scoring_spec


def check_base(preparation: Preparation, sources: list[Source]) -> None:
    """ModelError if the base is an adapter, lacks the chat template it needs or has tokens without an embedding;
    ConfigError if it is too short.
    """
    base, max_tokens = preparation.base, preparation.config.max_tokens
    if base.is_adapter:
        raise ModelError(f"{base.uri} is an adapter; give the model it was trained on as the base")
    longest = getattr(base.config().get_text_config(), "max_position_embeddings", None)
    if longest and max_tokens > longest:
        raise ConfigError(f"prepare.max_tokens is {max_tokens}, but {base.uri} has {longest} positions")
    tokenizer = base.tokenizer()
    _check_ids(base, {base.uri: tokenizer})
    if any(source.format == "messages" for source in sources):
        ChatTemplate.from_tokenizer(tokenizer, preparation.chat_template)


def check_reference(reference: Checkpoint, preparation: Preparation, sources: list[Source]) -> None:
    """ModelError unless the reference belongs to the base and was trained on text encoded alike."""
    base = preparation.base
    if reference.is_adapter:  # it reads with the base's embeddings
        reference.check_adapter(base)
    else:
        ours, theirs = base.tokenizer(), reference.tokenizer()
        check_same_encoding(ours, theirs, (base.uri, reference.uri))
        _check_ids(reference, {base.uri: ours, reference.uri: theirs})
    spec = reference.spec()
    if spec is not None and (changed := differences(spec, scoring_spec(preparation, sources))):
        raise ModelError(
            f"{reference.uri} was fine-tuned on text encoded otherwise ({'; '.join(changed)}); use the same settings"
        )


def _check_ids(model: Checkpoint, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """ModelError unless the model has a row for each token of these tokenizers, which stand by their checkpoint."""
    limit = num_ids(model)
    for uri, tokenizer in tokenizers.items():
        roles = tokenizer.special_tokens_map
        # A processor of images or sound writes these, no text does; gemma-3-1b has one and no row for it.
        placeholders = {str(roles.get(f"{kind}_token")) for kind in ("image", "audio", "video")}
        beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= limit and token not in placeholders}
        if beyond:
            first = min(beyond)
            more = f" and {len(beyond) - 1} more beyond them" if len(beyond) > 1 else ""
            raise ModelError(
                f"the tokenizer of {uri} has the token {beyond[first]!r} with the id {first}{more}, but {model.uri} "
                f"has {limit} embedding rows; resize it (model.resize_token_embeddings({max(beyond) + 1})) and save it "
                "once it is trained with them, or remove these tokens from the tokenizer"
            )
