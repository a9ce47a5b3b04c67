"""One preference record → two examples that share a prompt: the chosen response and the rejected one.

    prompt, chosen, rejected     strings, unchanged; a prompt that both responses repeat is kept once
    chosen, rejected             strings: whole dialogues of Human and Assistant turns that share a prefix (HH's form)
    chosen, rejected             lists of messages, with the prompt's turns in both, in a column `prompt` (a string, or
                                 messages), or in both places; rendered by the chat template

The common beginning of the two is the prompt and is not scored; after it, every assistant turn is scored. Two
conversations must first differ in an assistant's turn: if they differ in a user's turn, they answer different questions
and have no common prompt. Two responses of which only one repeats the prompt have no common prompt either.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from davir_ray.data.chat import ChatTemplate, render_conversation
from davir_ray.data.conversation import Conversation, Message, messages_of, reply_of, scored_of, with_system
from davir_ray.data.rendered import Rendered, RowError, Segment, num_equal
from davir_ray.schema import RejectReason, Role
from davir_ray.text import shorten

ASSISTANT_MARK, HUMAN_MARK = "\n\nAssistant:", "\n\nHuman:"

_MARKS = re.compile(f"({HUMAN_MARK}|{ASSISTANT_MARK})")

_MIN_REPEATED_CHARACTERS = 8
"""A prompt with fewer characters, white space not counted, is never taken as repeated: a response may begin with the
same words ("The", "I am") by chance."""


RenderedPair = tuple[Rendered, Rendered]
"""The chosen response and the rejected one, each after the same prompt."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a record holds of a pair, in whatever form its format has."""

    prompt: Any
    """A string, or messages; None where both responses have it."""
    chosen: Any
    rejected: Any
    names: tuple[str, str, str]
    """Names of their columns, for errors."""
    system: str = ""
    """A system message that has a column of its own."""
    system_name: str = "system"
    tools: list[Any] | None = None
    """See Conversation."""
    as_chat: bool = False
    """Render strings by the chat template, too: the prompt as a user's turn, the responses as the assistant's."""


def render_pair(pair: Pair, chat: ChatTemplate | None) -> RenderedPair:
    """Both responses of one record after their common prompt.

    Raises RowError: wrong_type, no_common_prompt, empty_response, equal_responses, and for messages
    special_token_in_text and bad_conversation; LeftOutError where no turn is marked as scored.
    """
    chosen, rejected, names = pair.chosen, pair.rejected, pair.names[1:]
    if isinstance(chosen, str) and isinstance(rejected, str) and not pair.as_chat:
        rendered = _of_strings(pair)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        rendered = _of_messages(_as_turns(pair), chat)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        rendered = _of_messages(pair, chat)
    else:
        seen = f"{type(chosen).__name__} and {type(rejected).__name__}"
        detail = f"{names[0]!r} and {names[1]!r} hold {seen}; expected two strings, or lists"
        raise RowError(RejectReason.WRONG_TYPE, detail)
    responses = [one.response.strip() for one in rendered]
    for role, response in zip(Role, responses, strict=True):
        if not response:
            raise RowError(RejectReason.EMPTY_RESPONSE, f"the {role} response is empty or white space only")
    if responses[0] == responses[1]:
        raise RowError(RejectReason.EQUAL_RESPONSES, "the chosen and the rejected response are the same")
    if rendered[0].prompt != rendered[1].prompt:
        raise _no_common_prompt("the chat template renders their common messages differently")
    return rendered


def _no_common_prompt(detail: str) -> RowError:
    return RowError(RejectReason.NO_COMMON_PROMPT, detail)


def _of_strings(pair: Pair) -> RenderedPair:
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if prompt is not None and not isinstance(prompt, str):
        raise RowError(RejectReason.WRONG_TYPE, f"the prompt is of type {type(prompt).__name__}; expected a string")
    if prompt is None or _is_in_responses(prompt, chosen, rejected):
        end = _end_of_prompt(chosen, rejected)
        return _joined(chosen[:end], _turns(chosen[end:])), _joined(rejected[:end], _turns(rejected[end:]))
    prompt, chosen, rejected = _repeated_once(prompt, chosen, rejected, pair.names)
    return _joined(prompt, [Segment(chosen, True)]), _joined(prompt, [Segment(rejected, True)])


def _as_turns(pair: Pair) -> Pair:
    """A pair of strings as messages of the assistant's; RowError for whole dialogues, which have no messages."""
    if not isinstance(pair.prompt, str) or _is_in_responses(pair.prompt, pair.chosen, pair.rejected):
        detail = "the responses are whole dialogues in one string, which have no turns for the chat template"
        raise RowError(RejectReason.BAD_CONVERSATION, f"{detail}; leave out --prepare.chat")
    prompt, *answers = _repeated_once(pair.prompt, pair.chosen, pair.rejected, pair.names)
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def _is_in_responses(prompt: Any, chosen: str, rejected: str) -> bool:
    """Whether the two are whole dialogues: there is no prompt beside them, or they begin with it."""
    return not prompt or not prompt.strip() or _are_dialogues_of(prompt, chosen, rejected)


def _are_dialogues_of(prompt: str, *responses: str) -> bool:
    """Whether the two are whole dialogues that begin with the prompt, although it also has a column of its own."""
    end = len(prompt.strip()) + len(ASSISTANT_MARK)
    return all(_repeats(text, prompt) and ASSISTANT_MARK in text.lstrip()[:end] for text in responses)


def _repeats(response: str, prompt: str) -> bool:
    """Whether a response begins with the prompt, apart from white space around it."""
    return response.lstrip().startswith(prompt.strip())


def _repeated_once(prompt: str, chosen: str, rejected: str, names: tuple[str, str, str]) -> tuple[str, str, str]:
    """The prompt and what follows it in both responses, which may repeat it."""
    if len("".join(prompt.split())) < _MIN_REPEATED_CHARACTERS:
        return prompt, chosen, rejected
    by_chosen, by_rejected = _repeats(chosen, prompt), _repeats(rejected, prompt)
    if by_chosen != by_rejected:
        one, other = names[1:] if by_chosen else reversed(names[1:])
        raise _no_common_prompt(
            f"{one!r} begins with the text of {names[0]!r} and {other!r} does not; repeat the prompt in "
            "both or in neither"
        )
    if not by_chosen:
        return prompt, chosen, rejected
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        prompt, chosen, rejected = prompt.strip(), chosen.lstrip(), rejected.lstrip()
    return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)


def _end_of_prompt(chosen: str, rejected: str) -> int:
    """Number of characters before the assistant's turn in which two dialogues first differ.

    Raises RowError: equal_responses, no_common_prompt.
    """
    one, other = _MARKS.split(chosen), _MARKS.split(rejected)  # text, mark, text, …, mark, text
    shared = num_equal(one, other)
    if shared == len(one) == len(other):
        raise RowError(RejectReason.EQUAL_RESPONSES, "the chosen and the rejected dialogue are the same")
    if one[:shared][-1:] != [ASSISTANT_MARK] or _differ_in_space([one, other], shared):
        same = num_equal(chosen, rejected)
        then = [shorten(text[same:], 30) for text in (chosen, rejected)]
        raise _no_common_prompt(
            f"there is no prompt apart from the responses, and the two dialogues share only their first {same} "
            f"characters, followed by {then[0]!r} and {then[1]!r}; the first turn that differs must be an "
            f"{ASSISTANT_MARK!r} turn in both, and differ by more than white space"
        )
    return len("".join(one[:shared]))


def _differ_in_space(texts: Sequence[Sequence[str]], at: int) -> bool:
    """Whether the texts at this index differ only in white space, while more text follows that really differs."""
    return len({text[at].strip() for text in texts}) == 1 and any(len(text) > at + 1 for text in texts)


def _joined(prompt: str, rest: Iterable[Segment]) -> Rendered:
    segments = (Segment(prompt, False), *rest)
    response = "\n\n".join(segment.text for segment in segments if segment.scored)
    return Rendered(prompt=prompt, response=response, segments=segments)


def _turns(text: str) -> Iterator[Segment]:
    """The segments after a dialogue's prompt, up to its last assistant turn: the assistant's, and the text between."""
    first, *rest = _MARKS.split(text)
    yield Segment(first, True)
    between = ""
    for mark, said in zip(rest[::2], rest[1::2], strict=True):
        between += mark
        if mark == ASSISTANT_MARK:
            yield from (Segment(between, False), Segment(said, True))
            between = ""
        else:
            between += said


def _of_messages(pair: Pair, chat: ChatTemplate | None) -> RenderedPair:
    if chat is None:
        detail = "the responses are messages, but the base has no chat template; give one with --chat_template FILE"
        raise RowError(RejectReason.BAD_CONVERSATION, detail)
    _, *names = pair.names
    one, other = messages_of(pair.chosen, names[0]), messages_of(pair.rejected, names[1])
    given = _given(pair.prompt, one[: num_equal(one, other)], pair.names[0])
    one, other = _whole(given, one, names[0]), _whole(given, other, names[1])
    one, other = (with_system(messages, pair.system, pair.system_name) for messages in (one, other))
    shared = _num_shared(one, other)
    return _rendered(pair, one, names[0], shared, chat), _rendered(pair, other, names[1], shared, chat)


def _rendered(pair: Pair, messages: list[Message], name: str, shared: int, chat: ChatTemplate) -> Rendered:
    scored = scored_of(messages, shared, "marked")
    conversation = Conversation(messages=messages, column=name, tools=pair.tools, given=shared, scored=scored)
    return replace(render_conversation(conversation, chat), num_turns_left_out=conversation.num_left_out)


def _given(prompt: Any, shared: Sequence[Message], name: str) -> list[Message]:
    """The messages of the prompt's column; none if it is blank, or repeats a user's message that both share."""
    if isinstance(prompt, list):
        return messages_of(prompt, name)
    if not isinstance(prompt, str | None):
        detail = f"column {name!r} has a value of type {type(prompt).__name__}; expected a string or messages"
        raise RowError(RejectReason.WRONG_TYPE, detail)
    text = (prompt or "").strip()
    is_repeated = any(message["role"] == "user" and message["content"].strip() == text for message in shared)
    return [] if not text or is_repeated else [{"role": "user", "content": prompt}]


def _whole(given: list[Message], messages: list[Message], name: str) -> list[Message]:
    """The conversation from the given messages on; the column `name` may repeat all of them, or the last ones."""
    for start in range(len(given)):
        end = given[start:]
        # A lone assistant's message may be there twice without being a repetition.
        is_repetition = not start or any(message["role"] != "assistant" for message in end)
        if is_repetition and messages[: len(end)] == end:
            return [*given[:start], *messages]
    if given and messages and messages[0]["role"] != "assistant":
        first, last = (shorten(message["content"], 30) for message in (messages[0], given[-1]))
        raise _no_common_prompt(
            f"{name!r} begins with a message of the role {messages[0]['role']!r}, {first!r}, which does not repeat the "
            f"prompt; the last message of the prompt is {last!r}"
        )
    return [*given, *messages]


def _num_shared(one: list[Message], other: list[Message]) -> int:
    """Number of messages that are the prompt: equal in both, up to the assistant's message in which they first differ.

    Raises RowError: equal_responses, no_common_prompt.
    """
    shared = num_equal(one, other)
    if shared == len(one) == len(other):
        raise RowError(RejectReason.EQUAL_RESPONSES, "the chosen and the rejected conversation are the same")
    seen = [messages[shared]["role"] if len(messages) > shared else "the end" for messages in (one, other)]
    contents = [[reply_of(message) for message in messages] for messages in (one, other)]
    if seen != ["assistant", "assistant"] or _differ_in_space(contents, shared):
        raise _no_common_prompt(
            f"the two conversations share their first {shared} messages, followed by {seen[0]} and {seen[1]}; the "
            "first message that differs must be the assistant's in both, and differ by more than white space"
        )
    if all(message["role"] == "assistant" for message in one[:shared]):
        raise _no_common_prompt(
            f"there is no prompt: both conversations begin with {shared} messages, all of them the assistant's, and "
            "then differ in an assistant's message"
        )
    return shared
