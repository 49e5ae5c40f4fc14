"""Reports as HTML pages, of trained models side by side and of the inside of a model.

A comparison of runs: ``comparison.py`` measures, ``summary.py`` puts the numbers into words and a table,
``figures.py`` draws, ``html.py`` joins them. Start with :func:`compare` and :func:`render`.

An inspection of one model or two on a text: ``inspection.py`` measures, ``inspection_figures.py`` draws,
``inspection_page.py`` joins. Start with :func:`inspect_model` and :func:`render_inspection`.

Both share ``drawing.py`` (colours, style) and ``page.py`` (the shell of a page).
"""

from .comparison import Comparison, RunMeasurement, compare
from .html import render
from .inspection import Inspection, inspect_model
from .inspection_page import render_inspection
from .summary import text_table

__all__ = [
    "Comparison",
    "Inspection",
    "RunMeasurement",
    "compare",
    "inspect_model",
    "render",
    "render_inspection",
    "text_table",
]
