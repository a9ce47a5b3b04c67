"""Every column that a stage writes, with its Arrow type, unit and meaning; every reject reason and every status.

The stages exchange Parquet files with these schemas (`EXAMPLES`, `REJECTS`, `SCORES`, `RANKED`, `SELECTED`,
`IFD`, `ANCHORED`, `GENERATIONS`, `MATCHES`), so this file is the contract between stages, and with readers of the
output.
"""

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class RejectReason(StrEnum):
    """Why a row of the input did not become an example; the column `detail` of rejects/ says more."""

    BROKEN_JSON = "broken_json"  # the line or array element is not JSON
    INVALID_TEXT = "invalid_text"  # not UTF-8, or with a lone surrogate
    BROKEN_ROW = "broken_row"  # a row of CSV or TSV that is broken, or has more or fewer fields than the header
    NOT_AN_OBJECT = "not_an_object"  # JSON, but not an object with named fields
    MISSING_COLUMN = "missing_column"  # a column of the format is absent or null
    WRONG_TYPE = "wrong_type"  # a column has another type than the format's
    EMPTY_RESPONSE = "empty_response"  # nothing to score: empty or white space only
    PROMPT_TOO_LONG = "prompt_too_long"  # the prompt alone fills the token limit
    SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"  # the text contains a special token that cannot be encoded as text
    NO_COMMON_PROMPT = "no_common_prompt"  # a pair whose responses do not follow the same prompt
    EQUAL_RESPONSES = "equal_responses"  # a pair whose two responses are the same: none is preferred
    UNREAD_COLUMN = "unread_column"  # a column that changes the prompt, and that the format has no place for
    NOT_TEXT = "not_text"  # the row has images, audio or video
    BAD_CONVERSATION = "bad_conversation"  # the chat template rejects the messages, or no assistant turn is found
    IN_EVALUATION_SET = "in_evaluation_set"  # shares words in a row with an evaluation set (decontaminate); not bad
    EMPTY_FILE = "empty_file"  # a file of no bytes; source_row is 0
    UNREADABLE_FILE = "unreadable_file"  # reading stopped at source_row; what follows in the file is lost


class Role(StrEnum):
    """Which response of a pair an example has."""

    CHOSEN = "chosen"
    REJECTED = "rejected"


class Status(StrEnum):
    """Whether an example has a score or a generated text; where it is not OK, `davir` or `output` is null."""

    OK = "ok"
    NO_PREDICTOR = "no_predictor"  # the first token has nothing before it (empty prompt, model without BOS)
    ZERO_BASE_NLL = "zero_base_nll"  # base_nll is 0: the ratio is not defined
    ZERO_ALONE_NLL = "zero_alone_nll"  # alone_nll is 0: IFD is not defined
    NON_FINITE_NLL = "non_finite_nll"  # a model returned NaN or infinity
    OUT_OF_MEMORY = "out_of_memory"  # the example alone did not fit the device


@dataclass(frozen=True)
class Column:
    """One column of the output."""

    name: str
    type: pa.DataType
    meaning: str


_ID = [
    Column("example_id", pa.int64(), "first 63 bits of SHA-256 of (source name, relative path, record index)"),
    Column("content_hash", pa.int64(), "first 63 bits of SHA-256 of (prompt, response); equal for exact duplicates"),
    Column("source", pa.string(), "name of the source in the configuration"),
]
_ORIGIN = [
    Column("source_file", pa.string(), "path relative to the source's root"),
    Column("source_row", pa.int64(), "0-based record index in the file; the line index for JSONL, blank lines counted"),
]
_TEXT = [
    Column("prompt", pa.string(), "rendered prompt: everything the response is conditioned on"),
    Column("response", pa.string(), "the text whose likelihood is scored; assistant turns joined by blank lines"),
    Column("record", pa.string(), "the source row as JSON; null with --keep_record false"),
]
_COUNTS = [
    Column("num_prompt_tokens", pa.int32(), "tokens of input_ids that are not scored"),
    Column("num_response_tokens", pa.int32(), "scored tokens, the end-of-sequence token included"),
    Column("truncated", pa.bool_(), "the response's tail was cut at the token limit (then no end token is scored)"),
]
_STATUS = Column("status", pa.string(), "ok, or why there is no score, or no text (see Status)")
_LOSSES = [
    Column("base_nll", pa.float64(), "nats, summed over the scored tokens, under the base"),
    Column("reference_nll", pa.float64(), "nats, summed over the scored tokens, under the reference"),
    Column("davir", pa.float64(), "(base_nll - reference_nll) / base_nll; null unless status is ok"),
    Column("rho_sum", pa.float64(), "base_nll - reference_nll, nats"),
    Column("rho_mean", pa.float64(), "(base_nll - reference_nll) / num_response_tokens, nats per token"),
    _STATUS,
]
_TOKEN_LOSSES = [
    Column("base_token_nll", pa.list_(pa.float32()), "nats for each scored token, in order; null where not kept"),
    Column("reference_token_nll", pa.list_(pa.float32()), "nats for each scored token, in order; null where not kept"),
]
_TOKENS = [
    Column("input_ids", pa.list_(pa.int32()), "prompt and response tokens, joined; at most prepare.max_tokens"),
    Column("response_spans", pa.list_(pa.int32()), "(start, end) pairs into input_ids, end exclusive; what is scored"),
]
PAIR_COLUMNS = [
    Column("pair_id", pa.int64(), "first 63 bits of SHA-256 of (source name, relative path, record index)"),
    Column(
        "prompt_hash",
        pa.int64(),
        "first 63 bits of SHA-256 of the prompt; pairs with the same prompt are held out together",
    ),
    Column("role", pa.string(), "chosen or rejected; the two rows of a pair are adjacent, in this order"),
]
FOLD_COLUMNS = [
    Column("fold", pa.int8(), "the row's fold, from 0 (prepare.folds); -1: none, every reference scores it"),
    Column("fold_key", pa.int64(), "first 63 bits of SHA-256 of the value of prepare.fold_by; null where it has none"),
]
_MARGINS = [
    *PAIR_COLUMNS[:2],
    _ID[2],
    Column("held_out", pa.bool_(), "the pair was not trained on (align.heldout_fraction)"),
    Column("num_chosen_tokens", pa.int32(), "scored tokens of the chosen response"),
    Column("num_rejected_tokens", pa.int32(), "scored tokens of the rejected response"),
    Column("frozen_chosen", pa.float64(), "log-probability of the chosen response under the frozen policy, nats"),
    Column("frozen_rejected", pa.float64(), "log-probability of the rejected response under the frozen policy, nats"),
    Column("policy_chosen", pa.float64(), "log-probability of the chosen response under the trained policy, nats"),
    Column("policy_rejected", pa.float64(), "log-probability of the rejected response under the trained policy, nats"),
    Column("chosen_reward", pa.float64(), "implicit reward of the chosen response by the loss function of the run"),
    Column("rejected_reward", pa.float64(), "implicit reward of the rejected response by the loss function of the run"),
    Column("margin", pa.float64(), "chosen_reward - rejected_reward; null unless status is ok"),
    Column("loss", pa.float64(), "loss of the pair, by the loss function of the run"),
]
_RANK = [Column("rank", pa.int64(), "1 = best by the chosen order, ties by ascending example_id")]
_REJECT = [
    Column("reason", pa.string(), "why the row was rejected (see RejectReason)"),
    Column("detail", pa.string(), "details that help to correct the data"),
]

_GENERATED = [
    Column("output", pa.string(), "the text that the model generated; null unless status is ok"),
    Column("num_new_tokens", pa.int32(), "tokens generated, the end-of-sequence token included"),
    Column("finished", pa.bool_(), "ended by an end-of-sequence token, not by the limit of new tokens"),
]
_MATCHED = [
    Column(
        "expected",
        pa.string(),
        "the number that the response gives as its answer; null if none, or with several turns",
    ),
    Column(
        "strict_answer", pa.string(), "the number that the output marks as its answer (#### or boxed); null if none"
    ),
    Column(
        "flexible_answer",
        pa.string(),
        "the marked number, else the number that is stated, else the last one; null if none",
    ),
    Column("strict", pa.bool_(), "strict_answer equals expected; null without expected or output"),
    Column("flexible", pa.bool_(), "flexible_answer equals expected; null without expected or output"),
]

_IFD = [
    Column("alone_nll", pa.float64(), "nats, summed over the scored tokens, under the base, without the prompt"),
    Column("ifd", pa.float64(), "base_nll / alone_nll, the ratio of mean losses; null unless status is ok"),
    Column(
        "ifd_perplexity", pa.float64(), "exp((base_nll - alone_nll) / num_response_tokens), the ratio of perplexities"
    ),
]

_SCORES = [*_ID, *_COUNTS, *_LOSSES, *_TOKEN_LOSSES]
COLUMNS = {
    "examples": [*_ID, *_ORIGIN, *_TEXT, *_TOKENS, *_COUNTS],
    "margins": [*_MARGINS, _LOSSES[-1]],
    "rejects": [_ID[2], *_ORIGIN, *_REJECT],
    "scores": _SCORES,
    "extra/ifd": [_ID[0], _COUNTS[1], *_IFD, _STATUS],
    "extra/davir_aligned": [
        _ID[0],
        Column(
            "davir_aligned",
            pa.float64(),
            "davir on one scale: its place in the fold (share of scored rows below, and half the row), or linked",
        ),
    ],
    "extra/anchor": [
        _ID[0],
        _COUNTS[1],
        Column("scored_by", pa.int8(), "the fold whose reference scored the row of the anchor"),
        *_LOSSES[:3],
        _STATUS,
    ],
    "extra/repeats": [
        _ID[0],
        Column("davir_repeated", pa.float64(), "mean of the row's places in all runs that have scored it"),
        Column("place_sd", pa.float64(), "standard deviation of the row's places; null with fewer than two"),
        Column("num_repeats", pa.int16(), "number of runs that have scored the row, this one included"),
        Column("places", pa.list_(pa.float64()), "the row's place in this run and in each of rank.repeats"),
    ],
    "ranked": [*_RANK, *_SCORES],
    "selected": [*_RANK, *_SCORES, *_TEXT, *_ORIGIN],
    "generations": [_ID[0], _ID[2], *_GENERATED, _STATUS],
    "matches": [_ID[0], _ID[2], *_MATCHED, _STATUS],
}


def _schema(folder: str) -> pa.Schema:
    return pa.schema([pa.field(column.name, column.type) for column in COLUMNS[folder]])


EXAMPLES = _schema("examples")
PAIRS = pa.schema([*EXAMPLES, *(pa.field(column.name, column.type) for column in PAIR_COLUMNS)])
"""The schema of examples/ for preference data; example_id also depends on the role."""
_FOLD, _FOLD_KEY = (pa.field(column.name, column.type) for column in FOLD_COLUMNS)
FOLDED_EXAMPLES = EXAMPLES.append(_FOLD)
"""The schema of examples/ with folds; with prepare.fold_by, `fold_key` follows."""
KEYED_EXAMPLES = EXAMPLES.append(_FOLD_KEY)
"""The schema of shards that are to be dealt by prepare.fold_by."""
MARGINS = _schema("margins")
REJECTS = _schema("rejects")
SCORES = _schema("scores")
IFD = _schema("extra/ifd")
ALIGNED = _schema("extra/davir_aligned")
ANCHORED = _schema("extra/anchor")
REPEATS = _schema("extra/repeats")
EXTRA = {"ifd": IFD, "davir_aligned": ALIGNED, "repeats": REPEATS}
"""The schemas of scores that rows can be ranked by, by the name of their folder in extra/."""
RANKED = _schema("ranked")
SELECTED = _schema("selected")
GENERATIONS = _schema("generations")
MATCHES = _schema("matches")
