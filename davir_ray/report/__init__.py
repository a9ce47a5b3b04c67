"""The report of a run: from manifests and tables to an HTML page and the same facts as JSON.

    ReportInputs ─facts.summarise─► facts (report.json) ─page.render_page─► report.html
                      │                                      ├─ charts.py draws the SVGs
                      ├─ distributions.py: of the scores     └─ templates/run*.html.j2, a file for each part of the page
                      ├─ stability.py: of the repeats
                      └─ prose.py: findings, fixed texts

alignment.py and comparison.py do both steps for their own pages, with the same charts and templates. Nothing here reads
or writes files or uses a cluster; the callers collect the inputs and write both results.
"""

from davir_ray.report.facts import ReportInputs, summarise
from davir_ray.report.page import render_page

__all__ = ["ReportInputs", "render_page", "summarise"]
