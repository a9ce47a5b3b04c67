"""Text → tokens: the boundary, what is scored, special tokens, truncation."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from davir_ray.data.rendered import Rendered, RowError, Segment
from davir_ray.data.tokens import Encoded, Encoder
from davir_ray.schema import RejectReason

TEXTS = [
    "def f():\n    return 1",
    "Ünïcödé, 東京, العربية",
    "👩‍👩‍👧 🇩🇪 ✂️",
    "  spaces  \n\n\ttabs",
    "a\x00b\r\n",
    "</s>x<s>",
]


def plain(prompt: str, response: str) -> Rendered:
    segments = (Segment(prompt, False), Segment(response, True))
    return Rendered(prompt=prompt, response=response, segments=segments)


def encode(tokenizer: Any, prompt: str, response: str, max_tokens: int = 10_000) -> Encoded:
    (encoded,) = Encoder(tokenizer, max_tokens).encode([plain(prompt, response)])
    assert isinstance(encoded, Encoded), encoded
    return encoded


def scored_ids(encoded: Encoded) -> list[int]:
    pairs = zip(encoded.response_spans[::2], encoded.response_spans[1::2], strict=True)
    return [int(token) for start, end in pairs for token in encoded.input_ids[start:end]]


@pytest.mark.parametrize("prompt", ["", "Question: why?", *TEXTS])
@pytest.mark.parametrize("response", TEXTS)
def test_the_scored_tokens_are_the_response_and_the_end(
    tokenizer: PreTrainedTokenizerFast, prompt: str, response: str
) -> None:
    encoded = encode(tokenizer, prompt, response)
    assert encoded.input_ids.dtype == np.int32
    assert scored_ids(encoded)[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(scored_ids(encoded)[:-1]) == response
    assert tokenizer.decode(encoded.input_ids[1 : encoded.response_spans[0]]) == prompt
    assert encoded.response_spans[-1] == len(encoded.input_ids)
    assert not encoded.truncated


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_comes_back_and_the_boundary_does_not_move(
    tokenizer: PreTrainedTokenizerFast, prompt: str, response: str
) -> None:
    encoded = encode(tokenizer, prompt, response)
    assert tokenizer.decode(scored_ids(encoded)[:-1]) == response
    assert tokenizer.decode(encoded.input_ids[1 : encoded.response_spans[0]]) == prompt


@pytest.mark.parametrize("text", TEXTS)
def test_there_is_exactly_one_begin_and_one_end(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode(tokenizer, text, text).input_ids.tolist()
    assert [at for at, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]
    assert [at for at, token in enumerate(ids) if token == tokenizer.eos_token_id] == [len(ids) - 1]


def test_counts_add_up(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, "Question: why?", "because")
    assert encoded.num_prompt_tokens == 1 + len(tokenizer("Question: why?")["input_ids"])
    assert encoded.num_response_tokens == len(tokenizer("because")["input_ids"]) + 1
    assert encoded.num_prompt_tokens + encoded.num_response_tokens == len(encoded.input_ids)


def test_a_tokenizer_without_begin_and_end_adds_neither(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    encoded = encode(bare, "Question:", "because")
    assert tokenizer.decode(encoded.input_ids) == "Question:because"
    assert tokenizer.decode(scored_ids(encoded)) == "because"
    assert encode(bare, "", "because").response_spans[0] == 0


def with_begin_by_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which also writes a begin and an end of its own, as Llama's do."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {"id": "<s>", "ids": [tokenizer.bos_token_id], "tokens": ["<s>"]}
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, piece],
        "pair": [begin, piece],
        "special_tokens": {"<s>": special},
    }
    backend = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_a_tokenizer_that_writes_its_own_begin_still_gives_one(tokenizer: PreTrainedTokenizerFast) -> None:
    doubling = with_begin_by_template(tokenizer)
    assert doubling("x")["input_ids"][0] == tokenizer.bos_token_id
    ours = encode(doubling, "Question:", "because")
    assert ours.input_ids.tolist() == encode(tokenizer, "Question:", "because").input_ids.tolist()


# --- truncation ------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_limit_is_rejected_and_one_shorter_is_not(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt_tokens = encode(tokenizer, "Question: why?", "because of it").num_prompt_tokens
    (error,) = Encoder(tokenizer, prompt_tokens).encode([plain("Question: why?", "because of it")])
    assert isinstance(error, RowError)
    assert error.reason == RejectReason.PROMPT_TOO_LONG
    assert encode(tokenizer, "Question: why?", "because of it", prompt_tokens + 1).num_response_tokens == 1


def test_a_response_loses_its_tail_and_its_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(tokenizer, "Question:", "because of it, and more " * 5)
    for limit in range(whole.num_prompt_tokens + 1, len(whole.input_ids)):
        cut = encode(tokenizer, "Question:", "because of it, and more " * 5, limit)
        assert cut.truncated
        assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
        assert cut.response_spans == [whole.num_prompt_tokens, limit]
        assert tokenizer.eos_token_id not in cut.input_ids


def test_a_length_that_is_the_limit_is_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(tokenizer, "Question:", "because")
    exact = encode(tokenizer, "Question:", "because", max_tokens=len(whole.input_ids))
    assert not exact.truncated
    assert exact.input_ids.tolist() == whole.input_ids.tolist()


# --- templated -------------------------------------------------------------------------------------------------------

TURNS = (
    Segment("<s>user: hello\n", False),
    Segment("hi</s>", True),
    Segment("\nuser: and now?\n", False),
    Segment("good", True),
    Segment(" bye</s>", True),
)


def encode_turns(tokenizer: Any, max_tokens: int = 1000) -> Encoded | RowError:
    (encoded,) = Encoder(tokenizer, max_tokens).encode(
        [Rendered(prompt="", response="", segments=TURNS, templated=True)]
    )
    return encoded


def test_templated_segments_keep_their_special_tokens_and_get_no_more(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_turns(tokenizer)
    assert isinstance(encoded, Encoded)
    ids = encoded.input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids) == "".join(segment.text for segment in TURNS)


def test_every_turn_is_a_span_and_neighbours_are_one(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_turns(tokenizer)
    assert isinstance(encoded, Encoded)
    start, end, second_start, second_end = encoded.response_spans
    assert tokenizer.decode(encoded.input_ids[start:end]) == "hi</s>"
    assert tokenizer.decode(encoded.input_ids[second_start:second_end]) == "good bye</s>"
    assert second_end == len(encoded.input_ids)


def scored_positions(encoded: Encoded) -> set[int]:
    pairs = zip(encoded.response_spans[::2], encoded.response_spans[1::2], strict=True)
    return {at for start, end in pairs for at in range(start, end)}


def test_a_limit_clips_the_spans_of_a_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_turns(tokenizer)
    assert isinstance(whole, Encoded)
    scored = scored_positions(whole)
    for limit in range(1, len(whole.input_ids) + 1):
        cut = encode_turns(tokenizer, limit)
        kept = {at for at in scored if at < limit}
        if not kept:
            assert isinstance(cut, RowError)
            assert cut.reason == RejectReason.PROMPT_TOO_LONG
            continue
        assert isinstance(cut, Encoded)
        assert scored_positions(cut) == kept
        assert len(set(cut.response_spans)) == len(cut.response_spans)
        assert cut.truncated == (limit < len(whole.input_ids))
        assert cut.num_response_tokens == len(kept)


# --- special tokens that cannot be split -----------------------------------------------------------------------------


def without_splitting(tokenizer: PreTrainedTokenizerFast, unknown: str | None = None) -> Callable[..., Any]:
    class Unsplit:
        """Encodes special tokens wherever they are spelt, as some tokenizers do."""

        unk_token_id = None if unknown is None else tokenizer.convert_tokens_to_ids(unknown)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return tokenizer(texts, **{**options, "split_special_tokens": False})

    return Unsplit()


@pytest.mark.parametrize(("prompt", "response"), [("x </s> y", "z"), ("x", "y <pad>")])
def test_text_that_can_only_be_a_special_token_is_rejected(
    tokenizer: PreTrainedTokenizerFast, prompt: str, response: str
) -> None:
    encoder = Encoder(without_splitting(tokenizer), 100)
    error, fine = encoder.encode([plain(prompt, response), plain("x", "y")])
    assert isinstance(error, RowError)
    assert error.reason == RejectReason.SPECIAL_TOKEN_IN_TEXT
    assert isinstance(fine, Encoded)


def test_the_token_of_unknown_text_is_text_unless_it_has_another_role_too(tokenizer: PreTrainedTokenizerFast) -> None:
    spelt = [plain("x", "y <pad>"), plain("x", "y </s>"), plain("<s> x", "y")]
    for unknown, allowed in ((None, 0), ("<pad>", 1), ("</s>", 0), ("<s>", 0)):  # GPT-2 has one token for all roles
        encoded = Encoder(without_splitting(tokenizer, unknown), 100).encode(spelt)
        assert [isinstance(one, Encoded) for one in encoded] == [True] * allowed + [False] * (3 - allowed)


def test_a_batch_is_encoded_as_its_members_are(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = Encoder(tokenizer, 50).encode([plain(a, b) for a in TEXTS for b in TEXTS])
    singly = [Encoder(tokenizer, 50).encode([plain(a, b)])[0] for a in TEXTS for b in TEXTS]
    for ours, alone in zip(batch, singly, strict=True):
        assert isinstance(ours, Encoded)
        assert isinstance(alone, Encoded)
        assert ours.input_ids.tolist() == alone.input_ids.tolist()
        assert ours.response_spans == alone.response_spans
    mixed = Encoder(tokenizer, 50).encode(
        [plain("a", "b"), Rendered(prompt="", response="", segments=TURNS, templated=True), plain("</s>", "c")]
    )
    assert [one.input_ids.tolist() for one in mixed if isinstance(one, Encoded)] == [
        encode(tokenizer, "a", "b").input_ids.tolist(),
        tokenizer("".join(segment.text for segment in TURNS), add_special_tokens=False)["input_ids"],
        encode(tokenizer, "</s>", "c").input_ids.tolist(),
    ]
    assert Encoder(tokenizer, 50).encode([]) == []
