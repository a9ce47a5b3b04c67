"""Do base, reference and settings belong together? Known before any weight is loaded."""

from davir_ray.config import Source
from davir_ray.data.render import ChatTemplate
from davir_ray.errors import ConfigError, ModelError
from davir_ray.manifest import differences
from davir_ray.models.checkpoint import Checkpoint, check_same_encoding
from davir_ray.stages.prepare import Preparation, scoring_spec


def check_base(preparation: Preparation, sources: list[Source]) -> None:
    """ModelError if the base is an adapter or lacks the chat template it needs; ConfigError if it is too short."""
    base, max_tokens = preparation.base, preparation.config.max_tokens
    if base.is_adapter:
        raise ModelError(f"{base.uri} is an adapter; give the model it was trained on as the base")
    longest = getattr(base.config().get_text_config(), "max_position_embeddings", None)
    if longest and max_tokens > longest:
        raise ConfigError(f"prepare.max_tokens is {max_tokens}, but {base.uri} has {longest} positions")
    if any(source.format == "messages" for source in sources):
        ChatTemplate.from_tokenizer(base.tokenizer(), preparation.chat_template)


def check_reference(reference: Checkpoint, preparation: Preparation, sources: list[Source]) -> None:
    """ModelError unless the reference belongs to the base and was trained on text encoded alike."""
    base = preparation.base
    if reference.is_adapter:  # it reads with the base's embeddings
        reference.check_adapter(base)
    else:
        check_same_encoding(base.tokenizer(), reference.tokenizer(), (base.uri, reference.uri))
    spec = reference.spec()
    if spec is not None and (changed := differences(spec, scoring_spec(preparation, sources))):
        raise ModelError(
            f"{reference.uri} was fine-tuned on text encoded otherwise ({'; '.join(changed)}); use the same settings"
        )
