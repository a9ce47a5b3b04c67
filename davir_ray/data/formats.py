"""One record → prompt and response text, cut into segments that are scored and segments that are not.

    plain text          alpaca, self_instruct, dolly, gsm8k, prompt_response, flan; with prepare.chat by the template
    the chat template   messages, sharegpt, lima, orca; prompt_completion where its columns hold messages
    two examples        preference, alpaca_preference, sharegpt_preference, swift_preference; see pairs.py

A format is a name in config/sources.py, one function here and one row of FORMATS. A record that cannot be rendered
raises RowError, which has one of the schema's reasons; one that the data's own marks leave out raises LeftOutError.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.data.chat import TODAY, ChatTemplate, render_conversation
from davir_ray.data.conversation import (
    Conversation,
    Message,
    is_filled,
    messages_of,
    scored_of,
    tools_of,
    turns_of,
    with_system,
)
from davir_ray.data.pairs import Pair, render_pair
from davir_ray.data.rendered import LeftOutError, Rendered, RowError, Segment, column
from davir_ray.errors import ConfigError
from davir_ray.schema import RejectReason
from davir_ray.text import shorten

# Stanford Alpaca, train.py, PROMPT_DICT (github.com/tatsu-lab/stanford_alpaca). The response follows without a space.
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

ALPACA_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# Our own: neither GSM8K nor the DavIR paper states a prompt.
GSM8K_PROMPT = "Question: {question}\nAnswer:\n"

PROMPT_COLUMNS = (
    "system", "system_prompt", "history", "context", "input", "documents", "tools", "functions", "chat_template_kwargs",
)  # fmt: skip
"""Columns that would change the prompt in the data that people have; a format that does not read one refuses it."""

MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
"""Columns of what is not text; a row that has one is a reject."""


class Kind(NamedTuple):
    """What a column holds."""

    words: str
    """The kind in the line that says which format was found; empty for text."""
    holds: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_answer(value: Any) -> bool:
    return _is_text(value) or _are(str)(value)


def _are(item: type, *names: str) -> Callable[[Any], bool]:
    """A test for a list that is not empty, of items of this type with these fields; also as JSON text."""

    def test(value: Any) -> bool:
        if isinstance(value, str):
            return bool(names) and value.lstrip().startswith("[{") and all(f'"{name}"' in value for name in names)
        return isinstance(value, list) and bool(value) and all(_has(one, item, names) for one in value)

    return test


def _has(value: Any, kind: type, names: Iterable[str]) -> bool:
    return isinstance(value, kind) and set(names) <= set(value if isinstance(value, dict) else ())


def _is_turn(value: Any) -> bool:
    return _has(value, dict, ["from", "value"]) or _has(value, dict, ["role", "content"])


def _is_any(value: Any) -> bool:
    return True


TEXT = Kind("", _is_text)
ANSWER = Kind("", _is_answer)
MESSAGES = Kind(" of role/content", _are(dict, "role"))
TURNS = Kind(" of from/value", _are(dict, "from", "value"))
STRINGS = Kind(" of strings", _are(str))
INSTANCES = Kind(" of input/output", _are(dict, "output"))
TURN = Kind(" of one turn", _is_turn)
TEXT_OR_MESSAGES = Kind("", lambda value: _is_text(value) or MESSAGES.holds(value))
ANY = Kind("", _is_any)


class Column(NamedTuple):
    """A column that a format reads."""

    kind: Kind = TEXT
    needed: bool = True
    others: tuple[str, ...] = ()
    """Names that the same column has in other data sets; the first that a record has is read."""
    only_in_chat: bool = False
    """Only the chat template has a place for it."""


_OPTIONAL = Column(needed=False)

_LABEL = {"label": Column(ANY, needed=False, others=("kto_tag",))}
"""KTO's mark: a row whose value is false is left out."""

_OF_TEMPLATE = {
    "system": Column(needed=False, others=("system_prompt",), only_in_chat=True),
    "tools": Column(ANY, needed=False, only_in_chat=True),
}

_WITH_HISTORY = {
    **_OF_TEMPLATE,
    "history": Column(ANY, needed=False, only_in_chat=True),
    "mask_history": Column(ANY, needed=False),
}

_OF_CONVERSATION = {**_OF_TEMPLATE, "mask_history": Column(ANY, needed=False), **_LABEL}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record, as the functions of the formats read it."""

    fields: Mapping[str, Any]
    """The record by column name, without the columns that are to be ignored."""
    source: Source
    chat: ChatTemplate | None
    options: PrepareConfig
    take: Callable[[Conversation], Rendered] | None = None
    """What takes a conversation instead of the chat template."""

    @property
    def spec(self) -> "FormatSpec":
        """The row of FORMATS."""
        return spec_of(self.source)

    def name(self, own: str) -> str:
        """The name in the data of a column that the format calls `own`."""
        names = _names(self.source, own)
        return next((name for name in names if is_filled(self.fields.get(name))), names[0])

    def value(self, own: str) -> Any:
        """The value of a column; RowError missing_column where it is absent or null."""
        return column(self.fields, self.name(own))

    def get(self, own: str) -> Any:
        """The value of a column that may be absent; None where it is."""
        return self.fields.get(self.name(own))

    def text(self, own: str) -> str:
        """The text of a column; RowError missing_column or wrong_type."""
        return _text(self.fields, self.name(own))

    def optional(self, own: str) -> str:
        """The text of a column that may be absent or null; empty where it is."""
        return "" if self.get(own) is None else self.text(own)

    def answer(self, own: str) -> str:
        """The text of a response; of a list of answers, the first."""
        answers = self.value(own)
        return str(answers[0]) if _are(str)(answers) else self.text(own)

    def text_or_messages(self, own: str) -> Any:
        """The value of a column that holds a string or messages, which may be stored as JSON text."""
        value = self.get(own)
        return messages_of(value, self.name(own)) if isinstance(value, str) and MESSAGES.holds(value) else value

    def tools(self) -> list[Any] | None:
        """The tools that the assistant may call."""
        return tools_of(self.get("tools"), self.name("tools"))

    @property
    def is_chat(self) -> bool:
        """Whether this record is rendered by the chat template."""
        return self.options.chat or self.spec.chat == "always" or self.holds_messages

    @property
    def holds_messages(self) -> bool:
        """Whether the record of a format that takes strings or messages holds messages."""
        needed = (own for own, found in self.spec.columns.items() if found.needed)
        return self.spec.chat == "where_messages" and any(MESSAGES.holds(self.get(own)) for own in needed)

    def check_nothing_is_lost(self) -> None:
        """Raise RowError if the record has what the format does not read and a model would have to see."""
        for name in MEDIA_COLUMNS:
            if is_filled(self.fields.get(name)):
                raise RowError(RejectReason.NOT_TEXT, f"the row has {name}; only text can be scored")
        if unread := self.unread():
            raise RowError(RejectReason.UNREAD_COLUMN, unread_column(unread, self.source))

    def unread(self) -> str | None:
        """The first column that would change the prompt and is not read; None if there is none."""
        columns, renamed = self.spec.columns, self.source.renamed
        own_names = [name for own, name in renamed.items() if own in columns and columns[own].only_in_chat]
        filled = [name for name in (*PROMPT_COLUMNS, *own_names) if is_filled(self.fields.get(name))]
        if not filled:
            return None
        read = {self.name(own) for own, found in columns.items() if self.is_chat or not found.only_in_chat}
        return next((name for name in filled if name not in read), None)


Render = Callable[[Row], tuple[Rendered, ...]]


def _alpaca(row: Row) -> tuple[Rendered]:
    return _instructed(row, row.text("instruction"), row.optional("input"), row.answer("output"))


def _dolly(row: Row) -> tuple[Rendered]:
    return _instructed(row, row.text("instruction"), row.optional("context"), row.answer("response"))


def _self_instruct(row: Row) -> tuple[Rendered]:
    instances = row.value("instances")
    if not (isinstance(instances, list) and len(instances) == 1 and isinstance(instances[0], dict)):
        detail = f"column {row.name('instances')!r} has not one instance of input and output: {shorten(str(instances))}"
        raise RowError(RejectReason.WRONG_TYPE, detail)
    (instance,) = instances
    context = "" if instance.get("input") is None else _text(instance, "input")
    return _instructed(row, row.text("instruction"), context, _text(instance, "output"))


def _instructed(row: Row, instruction: str, context: str, response: str) -> tuple[Rendered]:
    """Stanford Alpaca's prompt and the response; in chat, a user's turn with the input below the instruction."""
    return _answered(row, _alpaca_prompt(instruction, context), response, _user_turn(instruction, context))


def _gsm8k(row: Row) -> tuple[Rendered]:
    question = row.text("question")
    return _answered(row, GSM8K_PROMPT.format(question=question), row.answer("answer"), question)


def _prompt_response(row: Row) -> tuple[Rendered]:
    return _answered(row, row.text("prompt"), row.answer("response"), row.text("prompt"))


def _flan(row: Row) -> tuple[Rendered]:
    return _answered(row, row.text("inputs"), row.answer("targets"), row.text("inputs"))


def _orca(row: Row) -> tuple[Rendered]:
    return _answered(row, "", row.answer("response"), row.text("question"))


def _messages(row: Row) -> tuple[Rendered]:
    return _conversed(row, messages_of(row.value("messages"), row.name("messages")), row.name("messages"))


def _sharegpt(row: Row) -> tuple[Rendered]:
    name = row.name("conversations")
    return _conversed(row, turns_of(row.value("conversations"), name), name)


def _lima(row: Row) -> tuple[Rendered]:
    name, texts = row.name("conversations"), row.value("conversations")
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise RowError(RejectReason.WRONG_TYPE, f"column {name!r} is not a list of strings: {shorten(str(texts))}")
    roles = ("user", "assistant")
    return _conversed(row, [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)], name)


def _prompt_completion(row: Row) -> tuple[Rendered]:
    if not row.holds_messages:
        return _answered(row, row.text("prompt"), row.answer("completion"), row.text("prompt"))
    name = row.name("completion")
    given = messages_of(row.value("prompt"), row.name("prompt"))
    return _conversed(row, [*given, *messages_of(row.value("completion"), name)], name, len(given))


def _preference(row: Row) -> tuple[Rendered, ...]:
    for own in ("chosen", "rejected"):
        row.value(own)  # raises where it is absent
    prompt, chosen, rejected = (row.text_or_messages(own) for own in ("prompt", "chosen", "rejected"))
    return _pair(row, "prompt", prompt, chosen, rejected)


def _alpaca_preference(row: Row) -> tuple[Rendered, ...]:
    instruction, context = row.text("instruction"), row.optional("input")
    prompt = _user_turn(instruction, context) if row.is_chat else _alpaca_prompt(instruction, context)
    return _pair(row, "instruction", prompt, row.text("chosen"), row.text("rejected"))


def _sharegpt_preference(row: Row) -> tuple[Rendered, ...]:
    name, value = row.name("conversations"), row.value("conversations")
    prompt = turns_of(value, name) if TURNS.holds(value) else messages_of(value, name)
    chosen, rejected = (_one_turn(row.value(own), row.name(own)) for own in ("chosen", "rejected"))
    return _pair(row, "conversations", prompt, chosen, rejected)


def _one_turn(value: Any, name: str) -> list[Message]:
    return turns_of([value], name) if _has(value, dict, ["from"]) else messages_of([value], name)


def _swift_preference(row: Row) -> tuple[Rendered, ...]:
    name = row.name("messages")
    messages = messages_of(row.value("messages"), name)
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError(RejectReason.BAD_CONVERSATION, f"the last message of {name!r} is not the assistant's")
    rejected = {"role": "assistant", "content": row.text("rejected_response")}
    return _pair(row, "messages", messages[:-1], messages[-1:], [rejected], names=("messages", "rejected_response"))


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """Everything that the code knows about a format."""

    render: Render
    """Function from a record to the text of its example, or of the two examples of a pair."""
    columns: dict[str, Column]
    """Columns that are read, by the format's own names."""
    chat: Literal["always", "where_messages", "on_request"] = "on_request"
    """When the chat template is used: always, for records that hold messages, or with prepare.chat only."""
    is_pairs: bool = False
    """Whether a record becomes two examples."""
    also: tuple[str, ...] = ()
    """What else the text depends on, besides the record and the chat template."""


_ALPACA_PROMPTS = (ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT)
_TODAY = (TODAY.isoformat(),)

FORMATS: dict[Format, FormatSpec] = {
    "alpaca": FormatSpec(
        render=_alpaca,
        columns={"instruction": Column(), "input": _OPTIONAL, "output": Column(ANSWER), **_WITH_HISTORY, **_LABEL},
        also=_ALPACA_PROMPTS,
    ),
    "self_instruct": FormatSpec(
        render=_self_instruct,
        columns={"instruction": Column(), "instances": Column(INSTANCES)},
        also=_ALPACA_PROMPTS,
    ),
    "dolly": FormatSpec(
        render=_dolly,
        columns={"instruction": Column(), "context": _OPTIONAL, "response": Column(ANSWER)},
        also=_ALPACA_PROMPTS,
    ),
    "gsm8k": FormatSpec(render=_gsm8k, columns={"question": Column(), "answer": Column(ANSWER)}, also=(GSM8K_PROMPT,)),
    "prompt_response": FormatSpec(
        render=_prompt_response,
        columns={"prompt": Column(others=("query",)), "response": Column(ANSWER), **_WITH_HISTORY},
    ),
    "flan": FormatSpec(render=_flan, columns={"inputs": Column(), "targets": Column(ANSWER)}),
    "orca": FormatSpec(
        render=_orca,
        columns={"question": Column(), "response": Column(ANSWER), **_WITH_HISTORY},
        chat="always",
        also=_TODAY,
    ),
    "messages": FormatSpec(
        render=_messages,
        columns={
            "messages": Column(MESSAGES, others=("conversations", "conversation")),
            **_OF_CONVERSATION,
        },
        chat="always",
        also=_TODAY,
    ),
    "sharegpt": FormatSpec(
        render=_sharegpt,
        columns={"conversations": Column(TURNS, others=("conversation", "messages")), **_OF_CONVERSATION},
        chat="always",
        also=_TODAY,
    ),
    "lima": FormatSpec(
        render=_lima, columns={"conversations": Column(STRINGS), **_OF_CONVERSATION}, chat="always", also=_TODAY
    ),
    "prompt_completion": FormatSpec(
        render=_prompt_completion,
        columns={"prompt": Column(TEXT_OR_MESSAGES), "completion": Column(TEXT_OR_MESSAGES), **_OF_CONVERSATION},
        chat="where_messages",
        also=_TODAY,
    ),
    "preference": FormatSpec(
        render=_preference,
        columns={
            "prompt": Column(TEXT_OR_MESSAGES, needed=False),
            "chosen": Column(TEXT_OR_MESSAGES),
            "rejected": Column(TEXT_OR_MESSAGES),
            **_OF_TEMPLATE,
        },
        chat="where_messages",
        is_pairs=True,
        also=_TODAY,
    ),
    "alpaca_preference": FormatSpec(
        render=_alpaca_preference,
        columns={
            "instruction": Column(),
            "input": _OPTIONAL,
            "chosen": Column(),
            "rejected": Column(),
            **_OF_TEMPLATE,
        },
        is_pairs=True,
        also=_ALPACA_PROMPTS,
    ),
    "sharegpt_preference": FormatSpec(
        render=_sharegpt_preference,
        columns={
            "conversations": Column(Kind(" of turns", lambda value: TURNS.holds(value) or MESSAGES.holds(value))),
            "chosen": Column(TURN),
            "rejected": Column(TURN),
            **_OF_TEMPLATE,
        },
        chat="always",
        is_pairs=True,
        also=_TODAY,
    ),
    "swift_preference": FormatSpec(
        render=_swift_preference,
        columns={"messages": Column(MESSAGES), "rejected_response": Column(), **_OF_TEMPLATE},
        chat="always",
        is_pairs=True,
        also=_TODAY,
    ),
}


def render(
    fields: Mapping[str, Any], source: Source, chat: ChatTemplate | None, options: PrepareConfig | None = None
) -> tuple[Rendered, ...]:
    """The text of one record in its source's format: one example, or the chosen and the rejected one of a pair.

    Raises RowError: missing_column (absent or null), wrong_type, empty_response (empty or white space only),
    unread_column, not_text; with a chat template special_token_in_text and bad_conversation; for a pair also
    no_common_prompt and equal_responses. Raises LeftOutError where the data's own marks leave the record out.
    """
    row = row_of(fields, source, chat, options)
    row.check_nothing_is_lost()
    if is_marked_bad(row):
        raise LeftOutError
    return row.spec.render(row)


def conversation_of(fields: Mapping[str, Any], source: Source) -> Conversation:
    """A record of one example as a conversation, whatever its format: plain text is a question and its answer.

    Raises RowError as `render` does.
    """
    taken: list[Conversation] = []

    def take(conversation: Conversation) -> Rendered:
        taken.append(conversation)
        return Rendered(prompt="", response="", segments=())

    row = row_of(fields, source, options=PrepareConfig(chat=True, score_turns="all"))
    row.spec.render(replace(row, take=take))
    return taken[0]


def is_marked_bad(row: Row) -> bool:
    """Whether KTO's mark says that the answer is a bad one; a label that is neither true nor false is no mark."""
    label = row.get("label") if "label" in row.spec.columns else None
    return label is False or (isinstance(label, str) and label.strip().lower() == "false")


def row_of(
    fields: Mapping[str, Any], source: Source, chat: ChatTemplate | None = None, options: PrepareConfig | None = None
) -> Row:
    """A record as the formats read it, without the columns that are to be ignored."""
    if source.ignore_columns:
        fields = {name: value for name, value in fields.items() if name not in source.ignore_columns}
    return Row(fields=fields, source=source, chat=chat, options=options or PrepareConfig())


def spec_of(source: Source) -> FormatSpec:
    """The row of FORMATS of a source, whose format must have been found."""
    assert source.format != "auto", "the format of the source has not been found yet"
    return FORMATS[source.format]


def columns(source: Source) -> dict[str, bool]:
    """Columns of the data that a source's format may read, and whether every row must have them."""
    found: dict[str, bool] = {}
    for own, one in spec_of(source).columns.items():
        first, *others = _names(source, own)
        found |= {first: one.needed, **dict.fromkeys(others, False)}
    return found


def _names(source: Source, own: str) -> tuple[str, ...]:
    """The names that a column of the format may have in the data: one, where the source names it."""
    if own in source.renamed:
        return (source.renamed[own],)
    return own, *spec_of(source).columns[own].others


def names_read(source: Source) -> list[str]:
    """Every column of the data that decides what a record becomes, those that are refused or rejected included."""
    return list(dict.fromkeys([*columns(source), *PROMPT_COLUMNS, *MEDIA_COLUMNS]))


def uses_chat(source: Source, options: PrepareConfig) -> bool:
    """Whether a source's text may depend on the chat template."""
    return options.chat or spec_of(source).chat != "on_request"


def needs_chat(source: Source, options: PrepareConfig) -> bool:
    """Whether a source's records cannot be rendered without a chat template."""
    return options.chat or spec_of(source).chat == "always"


def are_pairs(sources: Iterable[Source]) -> bool:
    """Whether each record of the sources becomes two examples, one after the other."""
    return any(spec_of(source).is_pairs for source in sources)


def check_columns(source: Source) -> None:
    """Raise ConfigError if the source names a column that its format does not read."""
    known = list(spec_of(source).columns)
    for own, name in source.renamed.items():
        if own not in known:
            option = f"{own}_column" if f"{own}_column" in source.renamed_by_option else f"{own} in columns"
            raise ConfigError(
                f"{option} of source {source.name!r} is {name!r}, but the format {source.format} does not read it "
                f"(it reads {', '.join(known)}); leave it out, or choose another format"
            )


def check_chat_template(chat_template: str | None, sources: Iterable[Source], options: PrepareConfig) -> None:
    """Raise ConfigError if a chat template is given but none of the sources uses one."""
    if chat_template is not None and not any(uses_chat(source, options) for source in sources):
        raise ConfigError(
            "chat_template is given, but only conversations are rendered with one, such as the format messages, and "
            "other data with --prepare.chat true; leave it out, or choose one of these"
        )


def unread_column(name: str, source: Source) -> str:
    """What is wrong with a column that would change the prompt and is not read, and what to change."""
    own = next((own for own in spec_of(source).columns if name in _names(source, own)), None)
    chat = "render the data by the chat template, which has a place for it (--prepare.chat true), or " if own else ""
    return (
        f"column {name!r} would change the prompt, and the format {source.format} does not read it; {chat}leave it out "
        f"on purpose with --ignore_columns '[{name}]'"
    )


def rendering(source: Source) -> list[Any]:
    """What the text of a source's examples depends on, besides its records and a chat template; for fingerprints."""
    spec = spec_of(source)
    own_options = [own for own in spec.columns if hasattr(source, f"{own}_column")]
    renamed = {own: name for own, name in source.renamed.items() if own not in own_options}
    return [
        *(_names(source, own)[0] for own in own_options),
        *spec.also,
        *([{"columns": renamed}] if renamed else []),
        *([{"ignored": sorted(source.ignore_columns)}] if source.ignore_columns else []),
    ]


def render_prompt(
    fields: Mapping[str, Any], source: Source, chat: ChatTemplate | None, options: PrepareConfig | None = None
) -> tuple[Rendered]:
    """Only the prompt of a record with `instruction`, possibly `input`, and no response; nothing is scored.

    In the format alpaca it is Stanford Alpaca's prompt; in the format messages it is a user's turn with the input
    below the instruction, followed by what the chat template writes before a reply. Raises RowError.
    """
    is_templated = spec_of(source).chat == "always"
    instruction, context = _text(fields, "instruction"), "" if fields.get("input") is None else _text(fields, "input")
    if is_templated:
        assert chat is not None, "the format messages needs a chat template"
        turn = _user_turn(instruction, context)
        if token := chat.find_special_token(turn):
            raise RowError(RejectReason.SPECIAL_TOKEN_IN_TEXT, f"the instruction contains {token!r}")
        prompt = chat.prompt([{"role": "user", "content": turn}])
    else:
        prompt = _alpaca_prompt(instruction, context)
    return (Rendered(prompt=prompt, response="", segments=(Segment(prompt, False),), templated=is_templated),)


def _answered(row: Row, prompt: str, response: str, question: str) -> tuple[Rendered]:
    """The prompt and the response, unchanged; in chat, the history, the question as a user's turn, and the response."""
    if not response.strip():
        raise RowError(RejectReason.EMPTY_RESPONSE, "the response is empty or white space only")
    if not row.is_chat:
        segments = (Segment(prompt, False), Segment(response, True))
        return (Rendered(prompt=prompt, response=response, segments=segments),)
    messages = [*_history(row), {"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return _conversed(row, messages, next(iter(row.spec.columns)))


def _history(row: Row) -> list[Message]:
    """The earlier turns of a record: a list of pairs of a user's text and the assistant's."""
    if "history" not in row.spec.columns or not is_filled(row.get("history")):
        return []
    messages = []
    history = row.value("history")
    for said in history if isinstance(history, list) else [history]:
        if not (isinstance(said, list | tuple) and len(said) == 2 and all(isinstance(text, str) for text in said)):
            detail = f"column {row.name('history')!r} is not a list of [prompt, response]: {shorten(str(said))}"
            raise RowError(RejectReason.WRONG_TYPE, detail)
        messages += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    return messages


def _conversed(row: Row, messages: list[Message], name: str, given: int = 0) -> tuple[Rendered]:
    """A conversation rendered by the chat template, with the record's system message and tools."""
    take = row.take or (partial(render_conversation, chat=row.chat) if row.chat else None)
    if take is None:
        detail = f"{name!r} is a conversation, but the base has no chat template; give one with --chat_template FILE"
        raise RowError(RejectReason.BAD_CONVERSATION, detail)
    whole, tools, mask_history = messages, None, False
    if "system" in row.spec.columns:
        whole, tools = with_system(messages, row.optional("system"), row.name("system")), row.tools()
    if "mask_history" in row.spec.columns:
        mask_history = row.get("mask_history") is True
    given = given and given + len(whole) - len(messages)
    scored = scored_of(whole, given, row.options.score_turns, mask_history)
    conversation = Conversation(messages=whole, column=name, tools=tools, given=given, scored=scored)
    return (replace(take(conversation), num_turns_left_out=conversation.num_left_out),)


def _pair(
    row: Row, prompt_name: str, prompt: Any, chosen: Any, rejected: Any, names: tuple[str, str] = ("chosen", "rejected")
) -> tuple[Rendered, ...]:
    pair = Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        names=(row.name(prompt_name), row.name(names[0]), row.name(names[1])),
        system=row.optional("system"),
        system_name=row.name("system"),
        tools=row.tools(),
        as_chat=row.is_chat,
    )
    return render_pair(pair, row.chat)


def _user_turn(instruction: str, context: str) -> str:
    return "\n\n".join(text for text in (instruction, context) if text)


def _alpaca_prompt(instruction: str, context: str) -> str:
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT_WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = column(fields, name)
    if not isinstance(value, str):
        detail = f"column {name!r} has a value of type {type(value).__name__}; expected a string"
        raise RowError(RejectReason.WRONG_TYPE, detail)
    return value
