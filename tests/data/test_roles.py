"""Tokens by role, counted with a tokenizer of which every character is a token."""

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.formats import render
from davir_ray.data.roles import tokens_by_role
from davir_ray.data.tokens import Encoded, Encoder

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def characters() -> PreTrainedTokenizerFast:
    known = {chr(code): code - 32 for code in range(32, 127)}
    made = Tokenizer(models.WordLevel(known | {"<s>": 95, "</s>": 96}, unk_token="~"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="~", chat_template=CHAT
    )


def counted(tokenizer: Any, fields: dict[str, Any], source: Source, max_tokens: int = 1000) -> dict[str, int]:
    """The counts of one record, after the check that they add up to what the encoder makes of it."""
    (rendered,) = render(fields, source, ChatTemplate.from_tokenizer(tokenizer, None), PrepareConfig())
    (encoded,) = Encoder(tokenizer, max_tokens).encode([rendered])
    assert isinstance(encoded, Encoded)
    found = tokens_by_role(tokenizer, rendered, len(encoded.input_ids))
    assert found.total() == len(encoded.input_ids)
    assert found["scored"] == encoded.num_response_tokens
    return {role: count for role, count in found.items() if count}


def test_a_conversation_is_divided_among_its_roles(characters: PreTrainedTokenizerFast) -> None:
    said = [
        ("system", "Be kind."),
        ("user", "user?"),
        ("assistant", "Old answer"),
        ("user", "And?"),
        ("assistant", "New!"),
    ]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    messages[2]["weight"] = 0
    source = Source(name="s", path="a.jsonl", format="messages")
    headers = sum(len(f"[{role}];") for role, _ in said)
    expected = {
        "system": len("Be kind."), "user": len("user?And?"), "assistant": len("Old answer"),
        "scored": len("New!;"), "template": headers - 1,
    }  # fmt: skip
    assert counted(characters, {"messages": messages}, source) == expected
    cut = counted(characters, {"messages": messages}, source, max_tokens=sum(expected.values()) - 3)
    assert cut == expected | {"scored": 2}


def test_plain_text_has_a_prompt_with_its_bos_and_a_response_with_its_end(
    characters: PreTrainedTokenizerFast,
) -> None:
    source = Source(name="s", path="a.jsonl", format="prompt_response")
    found = counted(characters, {"prompt": "Why? ", "response": "So."}, source)
    assert found == {"prompt": 1 + len("Why? "), "scored": len("So.") + 1}


def test_a_tokenizer_that_does_not_tell_places_leaves_the_rest_to_the_prompt(
    characters: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    found = counted(characters, {"messages": messages}, Source(name="s", path="a.jsonl", format="messages"))
    assert found == {"prompt": len("[user]Why?;[assistant]"), "scored": len("So.;")}
