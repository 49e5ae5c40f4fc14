"""Measurements of speed and memory: correctness first, interleaved in one run, medians.

    cases.py        what is timed: shapes, dtypes, tensors; masks.py the masks
    rows.py         who is timed: stock SDPA, ours, the definition; peers.py what others wrote
    correctness.py  every row against the definition in float64, before it is timed
    timing.py       functions timed in turn; measure.py one cell of a table; plan.py which cells
    memory.py       peak memory, in a fresh process
    training/       whole training loops, ours and others'; generation.py a model that generates
    streaming.py    loss by position from bounded caches, the study of docs/results/streaming.md
    backends.py     the measurements that backend="auto" chooses by
    tables.py, figure.py, environment.py    what a run leaves

Start at ``plan.py``. Results kept with the project are in ``benchmarks/results``.
"""
