"""The report of one run: manifests and tables in, one page and the same facts as JSON out.

    ReportInputs ─summary.summarise─► facts (report.json) ─page.render_page─► report.html
                      └─ a file for each section               ├─ charts.py draws the SVGs
                         of the facts                          └─ templates/, a file for each part of the page

Reads and writes no files and knows no cluster; the pipeline gathers the inputs and writes both results.
"""

from davir_ray.report.inputs import ReportInputs
from davir_ray.report.page import render_page
from davir_ray.report.summary import summarise

__all__ = ["ReportInputs", "render_page", "summarise"]
