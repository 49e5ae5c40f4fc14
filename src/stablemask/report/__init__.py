"""Reports as HTML pages, of trained models side by side and of the inside of a model.

A comparison of runs: ``comparison.py`` measures, ``summary.py`` puts the numbers into words and a table,
``figures.py`` draws, ``comparison_page.py`` joins. Start with :func:`comparison.compare`.

An inspection of one model or two on a text: ``inspection.py`` measures, ``inspection_figures.py`` draws,
``inspection_page.py`` joins. Start with :func:`inspection.inspect_model`.

Both share ``drawing.py`` (colours, lines, style) and ``page.py``, which fills the templates beside it.
"""
