"""What the page says in fixed words: meanings of reasons and statuses, what the score is, its known limits."""

from davir_ray.schema import RejectReason, Status

REASON_MEANING: dict[str, str] = {
    RejectReason.BROKEN_JSON: "the line or array element is not JSON",
    RejectReason.INVALID_TEXT: "not UTF-8, or holds a lone surrogate",
    RejectReason.NOT_AN_OBJECT: "JSON, but not an object with named fields",
    RejectReason.MISSING_COLUMN: "a column of the format is absent or null",
    RejectReason.WRONG_TYPE: "a column holds something else than the format's type",
    RejectReason.EMPTY_RESPONSE: "nothing to score: empty or white space only",
    RejectReason.PROMPT_TOO_LONG: "the prompt alone fills the token limit",
    RejectReason.SPECIAL_TOKEN_IN_TEXT: "the text spells a special token that cannot be encoded as text",
    RejectReason.NO_COMMON_PROMPT: "the two responses of the pair do not follow the same prompt",
    RejectReason.EQUAL_RESPONSES: "the pair's chosen response is its rejected one",
    RejectReason.BAD_CONVERSATION: "the chat template refuses the messages, or no assistant turn is found",
    RejectReason.EMPTY_FILE: "a file of no bytes",
    RejectReason.UNREADABLE_FILE: "reading stopped at this row; what follows in the file is lost",
}
STATUS_MEANING: dict[str, str] = {
    Status.OK: "scored",
    Status.NO_PREDICTOR: "the first scored token has nothing before it",
    Status.ZERO_BASE_NLL: "the base loss is 0, so the ratio is not defined",
    Status.NON_FINITE_NLL: "a model returned NaN or infinity",
    Status.OUT_OF_MEMORY: "did not fit the device even alone",
}
SCORE_EXPLAINED = [
    "The reference is the base model fine-tuned on the whole candidate set; each example’s score is "
    "DavIR = (L_base − L_ref) / L_base, the share of the base’s loss on the response (in nats, given the prompt) "
    "that the fine-tune removed.",
    "0 means that the fine-tune changed nothing, 1 that the reference predicts the response perfectly (it has "
    "memorised it), and a negative score that the reference predicts it worse than the base did.",
]
OUTSIDE_REFERENCE = (
    "This run did not train its reference; whether that model has seen these examples is not known here, and the "
    "score means the above only as far as it has."
)
LIMITS = [
    "The reference has seen what it scores. It can memorise duplicates and label noise, whose score then rises "
    "towards 1, so a high score alone does not show that an example is good.",
    "A small base loss makes the ratio noisy: answers of one or two tokens, or answers that the base already knew, "
    "can get extreme scores in either direction.",
    "Nothing in the score keeps the selection diverse. Before you rely on it, train on a random selection of the same "
    "size, and on a random one with the same lengths, and compare.",
    "Dividing by the base loss reduces the dependence on response length; it does not remove it.",
    "The end-of-sequence token is scored as part of the response, for both models; a truncated response has none. "
    "Whether the paper scores it is not stated; we do.",
]
ARM_MEANING = {
    "selection": "what the run selected; where it has a mixture, that",
    "random": "as many rows, drawn by hash, others for each seed",
    "random_matched": "drawn rows with the same histogram of response lengths and as many response tokens",
    "lowest": "as many rows, from the other end of the ranking",
    "rho": "as many rows, the highest by RHO summed over the response (base minus reference loss, not divided)",
    "full": "every prepared example",
}
READING_MEANING = {
    "epochs": "every arm for the recipe’s number of epochs, so that a smaller set takes fewer steps",
    "steps": "every arm for as many optimiser steps as the full set takes, so that a smaller set is repeated",
}
COMPARISON_LIMITS = [
    "It shows what these rows do for this base, with this recipe, on this held-out data. A small base is not a large "
    "one: what a small model learns first, a large one may know already.",
    "A loss is not a judgement: a lower loss on held-out answers says that such answers became likelier, not that a "
    "person would prefer what the model writes.",
    "Few seeds leave the spread between models uncertain. Intervals and p-values count it by Student’s t with one "
    "degree of freedom less than seeds, so with two or three seeds only large differences are shown; that none is "
    "shown does not mean that there is none.",
    "The selection is one set of rows. Against arms that are drawn, the question is whether it does better than one "
    "more draw would; its own rows would be others with another reference or pool.",
    "p (these models) counts the held-out examples alone: it says whether these very models differ, not whether "
    "models trained anew would.",
    "Held-out rows that are in the run’s training pool, word for word, are left out. Paraphrases and near copies are "
    "not found.",
]


def explanation(reference_trained_here: bool) -> list[str]:
    """What the score says of this run."""
    return SCORE_EXPLAINED if reference_trained_here else [*SCORE_EXPLAINED, OUTSIDE_REFERENCE]
