"""How many tokens of an example are scored, and whose text the others are."""

from collections import Counter
from typing import Any

from davir_ray.data.rendered import Rendered

SCORED, PROMPT, TEMPLATE = "scored", "prompt", "template"
"""Besides the roles of messages: tokens that are scored, the prompt of an example without roles, and what a chat
template writes itself, such as headers and the descriptions of tools."""


def tokens_by_role(tokenizer: Any, rendered: Rendered, num_tokens: int) -> Counter[str]:
    """Number of the first `num_tokens` tokens of an example by role; a token belongs where its text begins.

    An example is encoded as davir_ray.data.tokens does it. Where a tokenizer does not say where its tokens stand in the
    text (one in Python, or of mistral_common), all that is not scored is the prompt.
    """
    owners = _owners(rendered) if getattr(tokenizer, "is_fast", False) else []
    roles = [] if rendered.templated or tokenizer.bos_token_id is None else [PROMPT]
    begin = 0
    for text, scored in rendered.segments:
        if scored or not owners:
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=not rendered.templated)["input_ids"]
            roles += [SCORED if scored else PROMPT] * len(ids)
        else:
            encoding = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False
            )
            roles += [_owner(begin + start, owners) for start, _ in encoding["offset_mapping"]]
        begin += len(text)
    if not rendered.templated and tokenizer.eos_token_id is not None:
        roles.append(SCORED)
    return Counter(roles[:num_tokens])


def _owners(rendered: Rendered) -> list[tuple[int, int, str]]:
    """Where the content of each message that the text has begins and ends, and its role."""
    whole, at, owners = "".join(segment.text for segment in rendered.segments), 0, []
    for role, content in rendered.contents:
        text = content.strip()
        if text and (start := whole.find(text, at)) >= 0:
            at = start + len(text)
            owners.append((start, at, role))
    return owners


def _owner(position: int, owners: list[tuple[int, int, str]]) -> str:
    return next((role for start, end, role in owners if start <= position < end), TEMPLATE)
