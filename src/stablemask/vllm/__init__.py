"""vLLM serves StableMask: its entry point ``vllm.general_plugins`` calls :func:`register` in each process.

``guard.py`` refuses what would run something else, ``mass.py`` has log M by position for each layer, and a
platform has its attention: ``cpu.py``, and ``cuda.py`` with ``kernels.py``. ``model.py`` is our own decoder.

vLLM only logs a plug-in that fails to import, and would then run a model with ``config.stablemask`` as plain
softmax. So nothing is imported here, and what may fail is in the call, whose error stops vLLM.
"""


def register() -> None:
    """Have vLLM run the pseudo mass of each model whose configuration asks for one."""
    from . import guard

    guard.install()
    guard.register_models()
    guard.register_backends()
