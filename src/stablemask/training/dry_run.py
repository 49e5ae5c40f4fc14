"""``--dry-run``: what a run would take, worked out without data and without allocating the model."""

import torch

from ..models.cost import count_parameters, flops_per_token, training_memory
from ..models.devices import peak_flops
from .pretrain_options import PretrainOptions
from .run import given, tokens_per_step

UTILIZATION = 0.4  # the share of its FLOP/s that a device reaches, where much goes right


def describe_cost(options: PretrainOptions) -> str:
    """The size of a run, a line for each figure.

    FLOPs are those of :func:`~stablemask.models.cost.flops_per_token`, memory that of
    :func:`~stablemask.models.cost.training_memory`, both estimates of what is said there.

    Raises:
        InputError: an option is out of its range.
    """
    options = options.resolved()
    config = options.model_config()
    context = given(options.context)
    step, flops = tokens_per_step(options), flops_per_token(config, context)
    lines = [
        (
            "preset",
            f"{options.preset}, {options.attention} attention, {options.position} positions",
        ),
        ("parameters", f"{count_parameters(config):,}"),
        ("tokens a step", f"{step:,}: {_batches(options)}"),
        ("FLOPs per token", f"{flops.training:.3e} to train, {flops.forward:.3e} forward"),
    ]
    memory = training_memory(
        config,
        options.batch_size,
        context,
        getattr(torch, options.dtype),
        options.gradient_checkpointing,
        chunked_loss=True,
        devices=options.placing()[0],
        fsdp=options.fsdp,
        context_parallel=options.context_parallel,
    )
    total = memory.pop("total")
    lines.append(("memory, estimate", f"{_gib(total)} on each device in {options.dtype}"))
    lines += [(f"  {part}", _gib(size)) for part, size in memory.items()]
    if options.steps is not None:
        tokens = options.steps * step
        lines += [
            ("tokens", f"{tokens:,} in {options.steps:,} steps"),
            ("FLOPs", f"{flops.training * tokens:.3e} in all"),
            ("time, estimate", _time(options, flops.training * tokens)),
        ]
    return "\n".join(f"{name:<16}  {value}" for name, value in lines)


def _batches(options: PretrainOptions) -> str:
    devices, sharing = options.placing()
    where = "one device" if devices == 1 else f"each of {devices} devices"
    if sharing > 1:
        where = f"each {sharing} of {devices} devices"
    return (
        f"{options.accumulation} x {options.batch_size} blocks of {options.context} on {where}"
        + ", FSDP2" * options.fsdp
    )


def _time(options: PretrainOptions, flops: float) -> str:
    devices, _ = options.placing()
    where = "one device" if devices == 1 else f"{devices} devices"
    peak = options.peak_flops
    if peak is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        where, peak = f"{devices} x {name}", peak_flops(name, getattr(torch, options.dtype))
    if peak is None:
        return (
            f"needs the FLOP/s of a device in {options.dtype}, not known here: --peak-flops 989e12 is "
            "an H100"
        )
    return (
        f"{_duration(flops / (devices * peak * UTILIZATION))} on {where} at "
        f"{100 * UTILIZATION:g} % of {peak / 1e12:,.4g} TFLOP/s each"
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
