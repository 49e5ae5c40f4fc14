"""Reports as HTML pages, of trained models side by side and of the inside of a model.

A comparison of runs: ``comparison.py`` measures, ``summary.py`` puts the numbers into words and a table,
``figures.py`` draws, ``html.py`` joins them. Start with :func:`comparison.compare`.

An inspection of one model or two on a text: ``inspection.py`` measures, ``inspection_figures.py`` draws,
``inspection_page.py`` joins. Start with :func:`inspection.inspect_model`.

Both share ``drawing.py`` (colours, style) and ``page.py`` (the shell of a page).
"""
