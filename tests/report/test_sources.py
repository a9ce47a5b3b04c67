"""How the data were understood, as the report tells it."""

from typing import Any

import run_facts

from davir_ray.report import render_page, summarise


def facts_of(config: dict[str, Any] | None = None, **sources: dict[str, Any]) -> dict[str, Any]:
    inputs = run_facts.report_inputs()
    prepared = run_facts.manifest(inputs.manifests["prepare"]["counts"], by_source=sources)
    prepared["fingerprint"] = {"encoding": {"max_tokens": 512, "chat_template": "ab" * 32}}
    fields = {"manifests": inputs.manifests | {"prepare": prepared}, "config": inputs.config | (config or {})}
    return summarise(run_facts.report_inputs(**fields))


def texts(facts: dict[str, Any], look: bool) -> list[str]:
    return [finding["text"] for finding in facts["findings"] if finding["look"] is look]


def test_sources_with_many_truncated_rows_are_found() -> None:
    facts = facts_of(
        chats=run_facts.source(prepared=200, truncated=50),
        few=run_facts.source(prepared=1000, truncated=2),
        whole=run_facts.source(),
    )
    finding = "{} % of the rows of source {} are truncated at 512 tokens; their scores are of the part that was kept."
    assert finding.format(25, "chats") in texts(facts, look=True)
    assert finding.format(0.2, "few") in texts(facts, look=False)
    assert not any("whole" in finding["text"] for finding in facts["findings"])


def test_whose_template_rendered_a_source_is_told() -> None:
    def rendering(chat: str, **config: Any) -> str:
        (source,) = facts_of(config, s=run_facts.source(chat=chat))["sources"]
        return str(source["rendering"])

    assert rendering("never") == "plain text"
    assert rendering("always") == "the chat template of tiny-base (sha256 abababababab…)"
    assert rendering("always", chat_template="t.jinja").startswith("the chat template in t.jinja (")
    assert rendering("where_messages").endswith("), where the columns hold messages; else plain text")


def test_the_page_shows_columns_roles_and_examples_with_their_scored_text_marked() -> None:
    page = render_page(facts_of(s=run_facts.source(role_tokens={"user": 30, "scored": 60, "template": 10})))
    assert 'href="#sources"' in page
    assert '<span class="code">date</span> (40)' in page
    assert "Say yes.<mark>Yes.</mark>" in page
    assert "user 30.0 %, the template’s own text 10.0 %" in page
    assert "scored 60.0 %" in page


def test_what_was_left_out_because_of_each_evaluation_set_is_shown() -> None:
    inputs = run_facts.report_inputs()
    prepared = inputs.manifests["prepare"]
    sets = {"s3://evals/mmlu.jsonl": run_facts.evaluation_set(rows=1204), "b": run_facts.evaluation_set(rows=0)}
    details = prepared["details"] | {"evaluation_sets": sets}
    facts = summarise(
        run_facts.report_inputs(manifests=inputs.manifests | {"prepare": prepared | {"details": details}})
    )
    assert facts["evaluation_sets"] == [{"name": name, **counts} for name, counts in sets.items()]
    page = render_page(facts)
    cells = "".join(f"<td>{count}</td>" for count in ("1,204", "90", "5", "2", "700", "30"))
    assert f"s3://evals/mmlu.jsonl</th>{cells}" in page
    assert "Evaluation sets" not in render_page(summarise(inputs))


def test_a_run_of_an_earlier_version_has_no_such_section() -> None:
    facts = facts_of()
    assert facts["sources"] == []
    assert 'id="sources"' not in render_page(facts)
