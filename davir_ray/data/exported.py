"""One scored row → a row that a trainer reads: its text in the trainer's form, with its rank, score and losses.

    completion    prompt, completion             the text that was scored
    alpaca        instruction, input, output     as in the source
    messages      messages, perhaps tools        role and content, with whatever else a message of the source has
    sharegpt      conversations, perhaps tools   from and value; tool calls are of function_call, results of observation
    alternating   conversations, tools           the same, user and assistant in turn, as LLaMA-Factory wants them

A conversation is read from the record by its format. A row that cannot be put into the form raises RowError.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from davir_ray.config.export import Trainer
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.conversation import Message
from davir_ray.data.formats import conversation_of, row_of, uses_chat
from davir_ray.data.rendered import RowError
from davir_ray.schema import RejectReason

Form = Literal["completion", "alpaca", "messages", "alternating", "sharegpt"]

SCORE_COLUMNS = (
    "rank", "davir", "rho_sum", "rho_mean", "base_nll", "reference_nll", "num_prompt_tokens", "num_response_tokens",
    "source", "example_id",
)  # fmt: skip
"""Columns of selected/ that every exported row has, after its text."""

_SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}

_OF_RESULTS = {"tool": {"tool_call_id", "name"}}
"""Fields that say which call a result belongs to, which in ShareGPT's form the order says."""

_AS_IS: dict[str, Any] = {"ensure_ascii": False}


def form_of(trainer: Trainer, sources: Sequence[Source], options: PrepareConfig) -> Form | None:
    """The form that a trainer takes the rows of these sources in; None: the columns of selected/."""
    is_plain = not any(uses_chat(source, options) for source in sources)
    if trainer == "parquet":
        return None
    if trainer == "trl" and is_plain:  # a trainer of completions takes plain text as it was scored
        return "completion"
    if trainer in ("axolotl", "llamafactory") and is_plain and {source.format for source in sources} == {"alpaca"}:
        return "alpaca"
    if trainer == "llamafactory":
        return "alternating"
    return "sharegpt" if trainer == "sharegpt" else "messages"


def needs_record(form: Form | None) -> bool:
    """Whether rows can be put into the form only with their records."""
    return form not in (None, "completion")


def exported_text(form: Form, prompt: str, response: str, record: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The text of a row in a form."""
    if form == "completion":
        return {"prompt": prompt, "completion": response}
    if form == "alpaca":
        row = row_of(record, source)
        return {
            "instruction": row.text("instruction"), "input": row.optional("input"), "output": row.answer("output"),
        }  # fmt: skip
    conversation = conversation_of(record, source)
    messages, tools = conversation.messages, conversation.tools
    if form == "messages":
        return {"messages": messages} if tools is None else {"messages": messages, "tools": tools}
    turns = {"conversations": [_sharegpt_turn(index, message) for index, message in enumerate(messages)]}
    if form == "alternating":
        _check_alternating(messages)
    elif tools is None:
        return turns
    return turns | {"tools": json.dumps([tool.get("function", tool) for tool in tools], **_AS_IS) if tools else ""}


def _sharegpt_turn(index: int, message: Message) -> dict[str, str]:
    role, calls = message["role"], message.get("tool_calls")
    if role not in _SHAREGPT_ROLES:
        raise _no_place(f"message {index} is of the role {role!r}; sharegpt has {', '.join(_SHAREGPT_ROLES)}")
    if more := sorted(message.keys() - {"role", "content", "tool_calls"} - _OF_RESULTS.get(role, set())):
        raise _no_place(f"message {index} has {', '.join(more)}, which this form has no place for")
    if not calls:
        return {"from": _SHAREGPT_ROLES[role], "value": message["content"]}
    if message["content"]:
        raise _no_place(f"message {index} has text beside its tool calls, which this form has no place for")
    functions = [_function(call) for call in calls]
    return {"from": "function_call", "value": json.dumps(functions if len(functions) > 1 else functions[0], **_AS_IS)}


def _function(call: Any) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    return {"name": function["name"], "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def _check_alternating(messages: list[Message]) -> None:
    """RowError unless LLaMA-Factory keeps the row; it skips others with a line in its log."""
    roles = [message["role"] for message in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    speakers = ["assistant" if role == "assistant" else "user" for role in roles]
    if speakers != ["user", "assistant"] * (len(speakers) // 2) or not speakers:
        raise _no_place(f"the turns are {', '.join(roles)}; LLaMA-Factory takes user (or tool) and assistant in turn")


def _no_place(detail: str) -> RowError:
    return RowError(RejectReason.BAD_CONVERSATION, detail)
