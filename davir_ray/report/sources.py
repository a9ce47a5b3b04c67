"""How the data of a run were understood, source by source: what prepare recorded, for the pages of reports."""

from collections.abc import Mapping
from typing import Any

ROLE_NAMES = {"assistant": "assistant, not scored", "template": "the template’s own text"}
"""Names of the roles of tokens that do not explain themselves."""


_COUNTS = (
    "read", "prepared", "left_out", "near_duplicates", "rejected", "turns_left_out", "truncated", "num_prompt_tokens",
    "num_response_tokens",
)  # fmt: skip


def source_facts(prepared: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of each source, in the order of the sources; none from a run of an earlier version.

    `prepared` is the manifest of prepare, `config` the run's settings. A count that is not recorded is None. Tokens by
    role are those of a sample.
    """
    sources = (prepared.get("details") or {}).get("by_source") or {}
    encoding = (prepared.get("fingerprint") or {}).get("encoding") or {}
    return [
        {
            "name": name,
            "format": source.get("format"),
            "rendering": _rendering(source.get("chat"), config, encoding.get("chat_template")),
            "max_tokens": encoding.get("max_tokens"),
            **{count: source.get(count) for count in _COUNTS},
            "columns_used": _columns(source.get("columns_used") or {}),
            "columns_not_used": _columns(source.get("columns_not_used") or {}),
            "sampled": source.get("sampled"),
            "roles": _roles(source.get("role_tokens") or {}),
            "shown": source.get("shown") or [],
        }
        for name, source in sources.items()
    ]


def evaluation_facts(prepared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts of each evaluation set that no example may come from, by prepare's manifest; none without these sets.

    `rows` are those of the data that were left out because of it; the others are of davir_ray.data.evaluation.
    """
    sets = (prepared.get("details") or {}).get("evaluation_sets") or {}
    counts = ("records", "too_short", "only_common", "ngrams", "common", "rows")
    return [{"name": name, **{count: found.get(count) for count in counts}} for name, found in sets.items()]


def _rendering(chat: str | None, config: Mapping[str, Any], digest: str | None) -> str | None:
    """What made text of a source's records; `chat` says when the chat template does."""
    if chat in (None, "never"):
        return "plain text" if chat else None
    file, base = config.get("chat_template"), config.get("base") or "the base"
    template = f"the chat template in {file}" if file else f"the chat template of {base}"
    template = f"{template} (sha256 {digest[:12]}…)" if digest else template
    return template if chat == "always" else f"{template}, where the columns hold messages; else plain text"


def _columns(rows: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"name": name, "rows": count} for name, count in sorted(rows.items(), key=lambda item: (-item[1], item[0]))]


def _roles(tokens: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tokens by role, most first, with their share."""
    total = sum(tokens.values())
    return [
        {"role": role, "name": ROLE_NAMES.get(role, role), "tokens": count, "share": count / total}
        for role, count in sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
        if count
    ]
