"""Whole training loops: tokens per second and peak memory of ours and of what a user would take instead.

    workload.py   what all train, and the clock
    rows.py       who is timed
    trainers.py   ours, as ``stablemask pretrain`` builds it; Transformers' Llama on the plain Trainer
    lit.py        litgpt's model in its own loop (optional)
    plain.py      a decoder and a loop in plain PyTorch, after nanoGPT
    check.py      every row's loss and gradients against a reference in float64, before it is timed
    measure.py    built, checked, timed in turn; memory

What is the same: the architecture (RMSNorm, SwiGLU, RoPE, no biases), the sizes, the weights it starts
from, the batch, the precision (float32, or bfloat16 under autocast over float32 weights), AdamW,
clipping at 1, a cosine of the learning rate; random tokens in memory; with torch.compile all or none.

What is not, for it is what the loops are: what each does about a step. Ours runs all that a pretraining
run has (logs, the watch for bad steps, token counts), the Trainer, litgpt's Fabric and the plain loop
what they have; each has its own optimizer settings (litgpt: not fused on the CPU) and forms of the
layers. Evaluating and saving are left out of all.

Loops go in turn, a second or so at a time, in an order that rotates. A loop goes on from its weights and
optimizer. Its clock starts with its first batch at hand and stops at the end of its last step, so
starting up is not counted, and the data of all other steps is.
"""

from .measure import measure_training as measure_training
from .rows import ROWS as ROWS
from .workload import BATCH_SIZES as BATCH_SIZES
from .workload import Workload as Workload
