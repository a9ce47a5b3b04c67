"""Text → tokens: input_ids, scored spans, truncation.

Each segment is encoded on its own and the ids are joined, so the boundary between prompt and response cannot move.
Plain formats get exactly one BOS in front, where the model has one, and an EOS at the end, which is scored. A chat
template writes its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from davir_ray.data.rendered import Rendered, RowError, Segment
from davir_ray.schema import RejectReason


@dataclass(frozen=True)
class Encoded:
    """One tokenised example."""

    input_ids: npt.NDArray[np.int32]
    response_spans: list[int]
    """(start, end) pairs into input_ids, end exclusive."""
    truncated: bool

    @property
    def num_response_tokens(self) -> int:
        """Number of scored tokens, the EOS included."""
        return sum(self.response_spans[1::2]) - sum(self.response_spans[::2])

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens that are not scored."""
        return len(self.input_ids) - self.num_response_tokens


class Encoder:
    """Encodes rendered examples with one tokenizer under one token limit."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._special_ids = set(tokenizer.all_special_ids) - unknown

    def encode(self, examples: Sequence[Rendered]) -> list[Encoded | RowError]:
        """Encode examples; a RowError takes the place of one that must be rejected.

        In text of a chat template, special tokens are encoded as such. In other text, what looks like a special token
        is encoded as plain text, and rejected where the tokenizer cannot do that. An example without a scored segment
        is a prompt: it is never truncated, and nothing follows it.
        """
        ids = {
            templated: iter(
                self._ids(
                    [part.text for one in examples if one.templated is templated for part in one.segments],
                    split_special_tokens=not templated,
                )
            )
            for templated in (False, True)
        }
        return [
            self._join([(next(ids[one.templated]), part.scored) for part in one.segments], one.templated)
            for one in examples
        ]

    def _ids(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        encoding = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        return list(encoding["input_ids"])

    def _join(self, parts: list[tuple[list[int], bool]], templated: bool) -> Encoded | RowError:
        is_prompt = not any(scored for _, scored in parts)
        if not templated:
            if error := self._special_token(parts):
                return error
            parts = [(self._bos, False), *parts, ([] if is_prompt else self._eos, True)]
        input_ids = np.array(list(chain.from_iterable(ids for ids, _ in parts)), dtype=np.int32)
        spans = _spans(parts)
        truncated = len(input_ids) > self._max_tokens
        if truncated:
            input_ids, spans = input_ids[: self._max_tokens], _clip(spans, self._max_tokens)
        if truncated if is_prompt else not spans:
            num_tokens = sum(len(ids) for ids, _ in parts)
            detail = f"{num_tokens} tokens in all, none of the response within the limit of {self._max_tokens}"
            return RowError(RejectReason.PROMPT_TOO_LONG, detail)
        return Encoded(input_ids, spans, truncated)

    def _special_token(self, parts: list[tuple[list[int], bool]]) -> RowError | None:
        for ids, _ in parts:
            if found := self._special_ids.intersection(ids):
                token = self.tokenizer.convert_ids_to_tokens(min(found))
                detail = f"the text contains the special token {token!r}, which this tokenizer cannot encode as text"
                return RowError(RejectReason.SPECIAL_TOKEN_IN_TEXT, detail)
        return None


def _spans(parts: list[tuple[list[int], bool]]) -> list[int]:
    """(start, end) of each run of scored parts; adjacent parts (a response and its EOS) are one span."""
    spans: list[int] = []
    position = 0
    for ids, scored in parts:
        end = position + len(ids)
        if scored and ids:
            if spans and spans[-1] == position:
                spans[-1] = end
            else:
                spans += [position, end]
        position = end
    return spans


def _clip(spans: list[int], limit: int) -> list[int]:
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return [edge for start, end in pairs if start < limit for edge in (start, min(end, limit))]


def decoded_segments(tokenizer: Any, input_ids: npt.NDArray[np.int32], spans: Sequence[int]) -> list[Segment]:
    """The tokens of an example as text, cut where the scored spans begin and end: what a model reads."""
    edges = [0, *spans, len(input_ids)]
    pieces = [Segment(tokenizer.decode(input_ids[a:b]), bool(at % 2)) for at, (a, b) in enumerate(pairwise(edges))]
    return [piece for piece in pieces if piece.text]
