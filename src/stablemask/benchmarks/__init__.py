"""Measurements of speed and memory: correctness first, interleaved in one run, medians.

``attention.py`` times the attention against its peers, ``memory.py`` finds its peak memory in a fresh
process, ``training.py`` times whole training steps. Results kept with the project are in
``benchmarks/results``.
"""
