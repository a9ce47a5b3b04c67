"""The chat templates that TRL ships, as models come with them: what is scored of a conversation in each.

The text must be what transformers writes; what is scored is told by words that stand in one message only, by the token
that ends each family's turns, and by the generation marks of the twins that TRL wrote for training.
"""

import pickle
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError, UndefinedError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from davir_ray.data.chat import ChatTemplate, render_conversation
from davir_ray.data.conversation import Conversation, messages_of
from davir_ray.data.rendered import Rendered, RowError
from davir_ray.data.tokens import Encoded, Encoder
from davir_ray.schema import RejectReason

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))

END_TOKENS = {
    "cohere": {"<|END_OF_TURN_TOKEN|>"},
    "deepseek": {"<｜end▁of▁sentence｜>"},
    "diffusion_gemma": {"<turn|>", "<|tool_response>", "<tool_call|>"},
    "gemma4": {"<turn|>", "<|tool_response>"},
    "gemma": {"<end_of_turn>"},
    "glm4moe": {"<|user|>", "<|observation|>"},
    "gptoss": {"<|return|>", "<|end|>", "<|call|>"},
    "idefics3": {"<end_of_utterance>"},
    "lfm2": {"<|im_end|>"},
    "llama3": {"<|eot_id|>"},
    "llava_next": {"</s>"},
    "muse_glimmer": {"<|eot|>"},
    "nemotron": {"<|im_end|>"},
    "phi3": {"<|end|>", "</s>"},
    "qwen": {"<|im_end|>"},
    "smolvlm": {"<end_of_utterance>"},
}
"""Tokens at which each family's models stop, by the beginning of the template's name."""

NAMED_TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
WANT_PARTS = ("idefics3", "smolvlm", "llava_next")
WANT_TEXT_ARGUMENTS = ("deepseekv3", "deepseek_r1_distill", "deepseek_r1_distill_training")

SPECIAL_TOKEN = re.compile(
    r"""<[|｜][^<>\s{}()'"+]+[|｜]>|<\|"\|>|<\|(?:turn|channel|tool_call|tool_response|tool)>"""
    r"""|<(?:turn|channel|tool_call|tool_response|tool)\|>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>"""
)
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the describedweather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The describedtown."}},
                "required": ["city"],
            },
        },
    }
]


def of_family(name: str, table: Any) -> Any:
    return next((table[key] if isinstance(table, dict) else True for key in table if name.startswith(key)), None)


def read(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One id a byte, and one for each special token that the template names."""
    text = read(name)
    bos, eos = of_family(name, NAMED_TOKENS) or ("<s>", "</s>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    tokens.decoder = decoders.ByteLevel()
    special = sorted({*SPECIAL_TOKEN.findall(text), bos, eos})
    tokens.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=bos, eos_token=eos, chat_template=text)


TOKENIZERS = {name: tokenizer_of(name) for name in NAMES}
CHATS = {name: ChatTemplate.from_tokenizer(tokenizer, None) for name, tokenizer in TOKENIZERS.items()}
MARKED = {name for name in NAMES if re.search(r"\{%-? *generation", read(name))}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(city: str) -> dict[str, Any]:
    return {"id": "call56789", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call56789", "name": "weather", "content": content}


TALKS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("queryone"), assistant("replyone")],
    "two turns": [user("queryone"), assistant("replyone"), user("querytwo"), assistant("replytwo\n\nsaymore")],
    "three turns": [user("a"), assistant("replya"), user("a"), assistant("replya"), user("a"), assistant("replya b")],
    "white space": [user("queryone "), assistant(" replyone\n"), user("\nquerytwo"), assistant("\n\nreplytwo  ")],
    "system": [
        {"role": "system", "content": "obeying"},
        user("queryone"),
        assistant("replyone"),
        user("querytwo"),
        assistant("b"),
    ],
    "a user last": [user("queryone"), assistant("replyone"), user("querytwo")],
    "call": [
        user("queryone"),
        assistant(None, tool_calls=[call("paramone")]),
        result("outcomeone"),
        assistant("replytwo"),
    ],
    "call last": [user("queryone"), assistant(None, tool_calls=[call("paramone")])],
    "two calls": [
        user("queryone"),
        assistant(None, tool_calls=[call("paramone"), call("paramtwo")]),
        result("outcomeone"),
        result("outcometwo"),
        assistant("replytwo"),
        user("querytwo"),
        assistant("replythree"),
    ],
    "call after text": [
        user("queryone"),
        assistant("replyone", tool_calls=[call("paramone")]),
        result("outcomeone"),
        assistant("replytwo"),
    ],
    "call after reasoning": [
        user("queryone"),
        assistant(None, reasoning_content="musingone", tool_calls=[call("paramone")]),
        result("outcomeone"),
        assistant("replytwo", reasoning_content="musingtwo"),
    ],
    "reasoning_content": [
        user("queryone"),
        assistant("replyone", reasoning_content="musingone"),
        user("querytwo"),
        assistant("replytwo", reasoning_content="musingtwo\nmusingmore"),
    ],
    "thinking": [
        user("queryone"),
        assistant("replyone", thinking="musingone"),
        user("querytwo"),
        assistant("replytwo", thinking="musingtwo"),
    ],
    "think tags": [
        user("queryone"),
        assistant("<think>\nmusingone\n</think>\n\nreplyone"),
        user("querytwo"),
        assistant("<think>musingtwo</think>replytwo"),
    ],
}


def written(name: str, talk: list[dict[str, Any]], **options: Any) -> str | None:
    """What transformers writes for a conversation; None where the template refuses it."""
    messages = [as_the_template_wants(name, message) for message in talk]
    tokenizer = TOKENIZERS[name]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TypeError, ValueError, UndefinedError, TemplateError):
        return None
    for format in ("%Y-%m-%d", "%d %b %Y"):
        text = text.replace(datetime.now().strftime(format), datetime(2024, 7, 26).strftime(format))
    return text


def as_the_template_wants(name: str, message: dict[str, Any]) -> dict[str, Any]:
    content, calls = message["content"], message.get("tool_calls")
    if content is None and name.startswith("deepseek"):
        content = ""
    if of_family(name, WANT_PARTS):
        content = [{"type": "text", "text": content}] if content else []
    if calls and name in WANT_TEXT_ARGUMENTS:
        texts = [f'{{"city": "{one["function"]["arguments"]["city"]}"}}' for one in calls]
        calls = [
            {**one, "function": {**one["function"], "arguments": text}} for one, text in zip(calls, texts, strict=True)
        ]
    return {**message, "content": content, **({"tool_calls": calls} if calls else {})}


def conversation(talk: list[dict[str, Any]], **more: Any) -> Conversation:
    return Conversation(messages=messages_of(talk, "messages"), column="messages", **more)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def words(talk: list[dict[str, Any]], kind: str) -> set[str]:
    return set(re.findall(rf"\b(?:{kind})\w+", " ".join(strings(talk))))


def needed(talk: list[dict[str, Any]]) -> set[str]:
    """What must be in the text: all that the assistant says or calls, and the reasoning of the last turn."""
    last = talk[-1:] if talk[-1]["role"] == "assistant" else []
    return words(talk, "reply") | words(talk, "param") | words(last, "musing")


def in_order(text: str, talk: list[dict[str, Any]]) -> bool:
    """Whether a message's words stand before those of the next one; some templates write a text after its calls."""
    places = [[text.index(word) for word in words([message], "reply|outcome") if word in text] for message in talk]
    last = [max(found) for found in places if found]
    return all(max(last[:index], default=0) <= min(found) for index, found in enumerate(filter(None, places)))


def mask(rendered: Rendered) -> list[bool]:
    return [segment.scored for segment in rendered.segments for _ in segment.text]


def whole(rendered: Rendered) -> str:
    return "".join(segment.text for segment in rendered.segments)


def runs(text: str, scored: list[bool]) -> list[str]:
    """The scored pieces of a text."""
    runs = groupby(zip(text, scored, strict=True), key=lambda pair: pair[1])
    return ["".join(letter for letter, _ in run) for is_scored, run in runs if is_scored]


def positions(word: str, text: str) -> Iterator[range]:
    return (range(*match.span()) for match in re.finditer(rf"\b{re.escape(word)}\b", text))


def check(name: str, talk: list[dict[str, Any]], tools: list[Any] | None = None) -> Rendered | None:
    """Check one conversation in one template; None where it is refused, as it must be."""
    options = {"tools": tools} if tools else {}
    text = written(name, talk, **options)
    missing = needed(talk) if text is None else {word for word in needed(talk) if word not in text}
    has_no_place = text is not None and any(tool["function"]["name"] not in text for tool in tools or ())
    if missing or has_no_place or not in_order(text or "", talk):
        with pytest.raises(RowError) as caught:
            render_conversation(conversation(talk, tools=tools), CHATS[name])
        assert caught.value.reason in (RejectReason.BAD_CONVERSATION, *[RejectReason.UNREAD_COLUMN] * has_no_place)
        return None
    assert text is not None
    rendered = render_conversation(conversation(talk, tools=tools), CHATS[name])
    found, scored = whole(rendered), mask(rendered)
    if name == "glm4moe" and not text.startswith(found):
        assert found in (text + "<|user|>", text + "<|observation|>")
    else:
        assert text.startswith(found)
    scored += [False] * (len(text) - len(scored))
    for kind in ("reply", "param", "musing"):
        for word in words(talk, kind):
            assert all(scored[at] for place in positions(word, text) for at in place), word
    for kind in ("query", "obeying", "outcome", "described"):
        for word in words([*talk, {"content": TOOLS}], kind):
            assert not any(scored[at] for place in positions(word, text) for at in place), word
    pieces = runs(found, scored[: len(found)])
    ends = of_family(name, END_TOKENS)
    assert all(any(piece.rstrip().endswith(end) for end in ends) for piece in pieces), pieces
    if name not in MARKED:
        assert len(pieces) == sum(message["role"] == "assistant" for message in talk)
        assert not any(EMPTY_THOUGHT.match(piece.lstrip()) for piece in pieces)
        prompt = written(name, talk[:-1], add_generation_prompt=True, **options)
        if prompt and text.startswith(prompt) and talk[-1]["role"] == "assistant":
            assert not any(scored[len(prompt) - 1 : len(prompt)])
    return rendered


def check_ids(name: str, rendered: Rendered) -> None:
    tokenizer = TOKENIZERS[name]
    (encoded,) = Encoder(tokenizer, max_tokens=100_000).encode([rendered])
    assert isinstance(encoded, Encoded)
    assert tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False) == whole(rendered)
    spans = encoded.response_spans
    spelt = [tokenizer.decode(encoded.input_ids[a:b]) for a, b in zip(spans[::2], spans[1::2], strict=True)]
    assert spelt == runs(whole(rendered), mask(rendered))
    assert list(encoded.input_ids).count(tokenizer.bos_token_id) == whole(rendered).count(tokenizer.bos_token) <= 1


def test_all_of_trls_templates_are_seen() -> None:
    assert len(NAMES) >= 72 and len(MARKED) >= 34


@pytest.mark.parametrize("name", NAMES)
def test_what_is_scored_is_what_the_assistant_says(name: str) -> None:
    rendered = {kind: check(name, talk, TOOLS if "call" in kind else None) for kind, talk in TALKS.items()}
    assert all(rendered[kind] for kind in ("one turn", "two turns", "three turns", "white space", "a user last"))
    for kind, one in rendered.items():
        if one is not None:
            check_ids(name, one)
            again = pickle.loads(pickle.dumps(CHATS[name]))
            assert render_conversation(conversation(TALKS[kind], tools=TOOLS if "call" in kind else None), again) == one


def test_what_the_families_can_do_is_not_refused() -> None:
    """The other test follows transformers; this one says for which templates there is something to follow."""
    calls = {"deepseekv3", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "muse_glimmer", "nemotron_3_nano"}
    calls |= {"qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "qwen3_vl", "lfm2_v2"}
    reasoning = {"gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "muse_glimmer", "nemotron_3_super", "qwen3", "qwen3_6"}
    reasoning |= {"nemotron_3_ultra", "nemotron_3_5_lightning", "qwen3_5_think", "qwen3_5_nothink", "qwen3_8"}
    for name in calls:
        assert check(name, TALKS["call"], TOOLS) and check(name, TALKS["call last"], TOOLS), name
    for name in reasoning:
        assert check(name, TALKS["reasoning_content"]) and check(name, TALKS["thinking"]), name
    for name in set(NAMES) - {"deepseekv3", "deepseekv3_training", "deepseek_r1_distill"}:
        assert check(name, TALKS["think tags"]), name


NOISE = st.lists(st.sampled_from([*" \n\t.,{}\"'\\é中<>/|", "</p>", "<b>", "```"]), max_size=6).map("".join)


@st.composite
def talks(draw: st.DrawFn) -> list[dict[str, Any]]:
    talk = [{"role": "system", "content": draw(NOISE) + " obeying"}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        said = f"{draw(NOISE)} reply{turn} {draw(NOISE)}"
        thought = f"{draw(NOISE)} musing{turn} {draw(NOISE)}"
        way = draw(st.sampled_from(["", "", "tags", "reasoning_content", "thinking"]))
        talk.append(user(f"{draw(NOISE)} query{turn} {draw(NOISE)}"))
        more = {way: thought} if way not in ("", "tags") else {}
        talk.append(assistant(f"<think>{thought}</think>{said}" if way == "tags" else said, **more))
    return talk


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(talk=talks())
def test_any_conversation_is_read_back_or_refused(name: str, talk: list[dict[str, Any]]) -> None:
    if any(token in str(message.values()) for message in talk for token in TOKENIZERS[name].all_special_tokens):
        return
    if rendered := check(name, talk):
        check_ids(name, rendered)


STRIP_SOME = ("glm4moe", "nemotron")
"""Families that strip the contents of some roles only, as qwen3 does."""

ODD_CONTENTS = [
    "x", " x\n", "\nx", "x" * 500, "assistant", "user", "final", "model", "Zqv1q", "", " ", "\n", "</p> <b>",
    "I think so", "<think>", "<think></think>x", "x</think>", "<tool_response>x</tool_response>", "/no_think",
    "26 Jul 2024", "None",
]  # fmt: skip


def segments_or_error(name: str, talk: list[dict[str, Any]], **more: Any) -> Any:
    try:
        return CHATS[name].segments(conversation(talk, **more))
    except RowError as error:
        return error.reason, error.detail


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_places_turns_as_a_second_rendering_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = zip(ODD_CONTENTS, [*ODD_CONTENTS[3:], *ODD_CONTENTS[:3]], strict=True)
    odd = [[user(one), assistant(other), user("querytwo "), assistant(one)] for one, other in pairs]
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [(talk, {}) for talk in [*TALKS.values(), *odd]]
    cases += [(talk, {"given": 2}) for talk in odd] + [(talk, {"scored": (False, False, False, True)}) for talk in odd]
    with_frames = [segments_or_error(name, talk, **more) for talk, more in cases]
    monkeypatch.setattr(ChatTemplate, "_frame", lambda self, roles: None)
    assert with_frames == [segments_or_error(name, talk, **more) for talk, more in cases]


def test_after_the_first_conversation_of_its_roles_one_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = TALKS["two turns"]
    before = {name: CHATS[name].segments(conversation(talk)) for name in NAMES}
    monkeypatch.setattr("davir_ray.data.chat.MarkedConversation", None)
    monkeypatch.setattr("davir_ray.data.chat.read_frame", None)
    for name in NAMES:
        longer = [{**message, "content": message["content"] + " longer"} for message in talk]
        segments = CHATS[name].segments(conversation(longer))
        assert [part.text.replace(" longer", "") for part in segments] == [part.text for part in before[name]], name
        if not name.startswith(STRIP_SOME) and name not in ("qwen3", "qwen3_training"):
            assert CHATS[name].segments(conversation(TALKS["white space"])), name


def test_a_template_keeps_a_limited_number_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davir_ray.data.chat._MAX_FRAMES", 2)
    chat = ChatTemplate(read("qwen2_5"), special_tokens=("<|im_start|>", "<|im_end|>"))
    for _ in range(2):
        for count in range(1, 6):
            segments = chat.segments(conversation(TALKS["one turn"] * count))
            assert sum(part.scored for part in segments) == count
            assert len(chat._frames) <= 2


AS_IT_IS = "{{ m.content }}"


@pytest.mark.parametrize(
    ("written", "contents", "told"),
    [
        (
            "{{ m.content if loop.last or m.role == 'user' }}",
            ["yes", "yes", "b", "c"],
            "turn 1 is not in the scored text",
        ),
        (
            "{{ m.content[:9] if m.role == 'assistant' else m.content }}",
            ["a", "more than nine"],
            "rewrites the assistant",
        ),
        (AS_IT_IS + AS_IT_IS, ["a", "b"], "writes 'b' of message 1 twice"),
        ("{{ m.content if m.content != 'no' }}", ["a", "no"], "rewrites the assistant"),
        ("{{ 'A' if m.content == 'no' else 'B' }}" + AS_IT_IS, ["a", "no"], "rewrites the assistant"),
        (AS_IT_IS + "{{ '!' if loop.last and m.content == 'no' }}", ["a", "no"], "rewrites the assistant"),
        (
            "{% if m.content == ' ' %} {% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}",
            ["a", "b", "c", " "],
            r"turn 2 is not in the scored text unchanged \(' ' is missing\)",
        ),
    ],
)
def test_a_turn_that_is_not_written_as_it_is_gets_no_place(written: str, contents: list[str], told: str) -> None:
    template = "{% for m in messages %}<s>{{ m.role }}:" + written + "{{ '<e>' if not loop.last }}{% endfor %}"
    template += "{% if add_generation_prompt %}<e><s>assistant:{% endif %}"
    talk = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    with pytest.raises(RowError, match=told):
        ChatTemplate(template, special_tokens=("<s>", "<e>")).segments(conversation(talk))


def transformers_runs(name: str, talk: list[dict[str, Any]], tools: list[Any] | None) -> list[str]:
    """What transformers takes for the assistant's, by the template's generation marks."""
    messages = [as_the_template_wants(name, message) for message in talk]
    tokenizer = TOKENIZERS[name]
    options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(messages, tools=tools, **options)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    groups = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in group]) for is_scored, group in groups if is_scored]


@pytest.mark.parametrize("name", sorted(MARKED))
def test_generation_marks_are_used_as_transformers_uses_them(name: str) -> None:
    for kind, talk in TALKS.items():
        tools = TOOLS if "call" in kind else None
        if rendered := check(name, talk, tools):
            ours, theirs = runs(whole(rendered), mask(rendered)), transformers_runs(name, talk, tools)
            assert ours == theirs, kind


@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}_training" in NAMES])
def test_a_template_without_marks_scores_what_its_twin_for_training_marks(name: str) -> None:
    """Apart from what the reader is given: the generation prompt, an empty think block, and the line's end."""
    num_same = 0
    for kind, talk in TALKS.items():
        tools = TOOLS if "call" in kind else None
        rendered = check(name, talk, tools)
        options = {"tools": tools} if tools else {}
        text = written(name, talk, **options)
        if rendered is None or text != written(f"{name}_training", talk, **options):
            continue
        num_same += 1
        ours, theirs = runs(whole(rendered), mask(rendered)), transformers_runs(f"{name}_training", talk, tools)
        for one, other in zip(ours, theirs, strict=True):
            before, found, after = other.partition(one.removesuffix("<|tool_response>"))
            assert found and not after.strip(), (kind, one, other)
            assert EMPTY_THOUGHT.sub("", before).strip() in (
                "",
                "<think>",
                "<|start|>assistant",
                "<｜Assistant｜>",
                "<｜tool▁outputs▁end｜>",
            ), (
                kind,
                other,
            )
    assert num_same or name == "glm4moe"


def test_only_the_chosen_messages_are_scored() -> None:
    talk = TALKS["three turns"]
    for name in NAMES:
        chosen = conversation(talk, scored=(False, True, False, False, False, True))
        every = runs(whole(r := render_conversation(conversation(talk), CHATS[name])), mask(r))
        some = runs(whole(r := render_conversation(chosen, CHATS[name])), mask(r))
        assert len(every) == 3 and some == [every[0], every[2]], name
        given_two = render_conversation(conversation(talk, given=4), CHATS[name])
        assert len(runs(whole(given_two), mask(given_two))) == 1, name
        assert runs(whole(given_two), mask(given_two))[0] in every[2], name


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(RowError, match="none of the assistant's messages is to be scored"):
        render_conversation(conversation(TALKS["one turn"], scored=(True, False)), CHATS["qwen3"])


def test_tools_that_spell_a_special_token_are_refused() -> None:
    with pytest.raises(RowError, match=r"the tools of 'messages' contain '<\|im_end\|>'") as caught:
        render_conversation(conversation(TALKS["call"], tools=[{"name": "a<|im_end|>"}]), CHATS["qwen3"])
    assert caught.value.reason is RejectReason.SPECIAL_TOKEN_IN_TEXT


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "deepseekv3", "glm4moe", "gemma4_v5", "gptoss"])
def test_arguments_as_json_text_are_written_as_objects_are(name: str) -> None:
    as_text = [
        user("queryone"),
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "call56789",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "paramone"}'},
                }
            ],
        },
        *TALKS["call"][2:],
    ]
    expected = render_conversation(conversation(TALKS["call"], tools=TOOLS), CHATS[name])
    rendered = render_conversation(conversation(as_text, tools=TOOLS), CHATS[name])
    assert rendered.segments == expected.segments


def test_the_response_of_a_call_is_the_call() -> None:
    rendered = render_conversation(conversation(TALKS["call"], tools=TOOLS), CHATS["qwen3"])
    assert rendered.response == '{"name": "weather", "arguments": {"city": "paramone"}}\n\nreplytwo'


@pytest.mark.parametrize("name", NAMES)
def test_the_token_that_ends_a_turn_is_the_familys(name: str) -> None:
    assert CHATS[name].turn_end() in of_family(name, END_TOKENS)


@pytest.mark.parametrize(
    ("template", "reason", "told"),
    [
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", RejectReason.UNREAD_COLUMN, "'weather'"),
        ("{{ tools }}{% for m in messages[1:] %}{{ m.content }}<eos>{% endfor %}", None, "message 0 of 'm'.*'system'"),
        ("{{ tools }}{% for m in messages %}{{ m.content | upper }}<eos>{% endfor %}", None, "message 0 of 'm'"),
    ],
)
def test_a_template_that_leaves_out_what_is_answered_is_refused(
    template: str, reason: RejectReason | None, told: str
) -> None:
    talk = [{"role": role, "content": f"a word of {role}"} for role in ("system", "user", "assistant")]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with pytest.raises(RowError, match=told) as caught:
        ChatTemplate(template, {"eos_token": "<eos>"}).segments(Conversation(messages=talk, column="m", tools=tools))
    assert caught.value.reason is (reason or RejectReason.BAD_CONVERSATION)
