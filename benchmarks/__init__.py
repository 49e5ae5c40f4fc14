"""Measurements of speed and memory: correctness first, interleaved in one run, medians.

    python -m benchmarks attention | training | generation | streaming | serving | gpu

    commands.py     what the first three do, and leave in a file
    cases.py        what is timed: shapes, dtypes, tensors; masks.py the masks
    rows.py         who is timed: stock SDPA, ours, the definition; peers.py what others wrote
    correctness.py  every row against the definition in float64, before it is timed
    timing.py       functions timed in turn; measure.py one cell of a table; plan.py which cells
    memory.py       peak memory, in a fresh process
    training/       whole training loops, ours and others'; generation.py a model that generates
    streaming.py    loss by position from bounded caches, the study of docs/results/streaming.md
    serving/        servers of a model under load, side by side
    gpu.py          what a card is asked, part by part: gpu_contract.py, gpu_parts.py, gpu_page.py
    tables.py, figure.py, environment.py    what a run leaves; speed_figure.py the README's figure

Start at ``plan.py``. ``results/`` holds the measurements kept with the project. All of it is run from a clone and
is no part of the installed package, whose ``stablemask bench`` says in a minute how this machine does.
"""
