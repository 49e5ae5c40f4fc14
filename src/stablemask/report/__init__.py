"""A report of trained models side by side.

``comparison.py`` measures, ``summary.py`` puts the numbers into words and a table, ``figures.py``
draws, ``html.py`` joins them in one page. Start with :func:`compare` and :func:`render`.
"""

from .comparison import Comparison, RunMeasurement, compare
from .html import render
from .summary import text_table

__all__ = ["Comparison", "RunMeasurement", "compare", "render", "text_table"]
