"""What is installed here, whether decoding with a cache is right in it, which attention backends work,
each checked by running it, and in which order "auto" tries them."""

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stablemask import __version__, strict_json
from stablemask.attention import sink_attention
from stablemask.backends import BACKENDS, native
from stablemask.backends.choice import order
from stablemask.backends.native import tuning
from stablemask.cli.options import EnvOptions
from stablemask.private import PRIVATE, missing
from stablemask.versions import installed, newer_than_tested

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "matplotlib",
    "tensorboard",
    "wandb",
)

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class BackendCheck:
    """Whether a backend ran on a device, and its error there or the reason why it cannot run."""

    backend: str
    device: str
    works: bool
    detail: str


@dataclass(frozen=True)
class DecodingCheck:
    """Whether a tiny decoder writes the same tokens with its cache as without; None: not checked."""

    works: bool | None
    detail: str


def run(options: EnvOptions) -> None:
    report = describe_environment()
    print(strict_json.dumps(report) if options.json else _as_table(report))


def describe_environment() -> dict[str, Any]:
    """Versions, machine, devices, each backend checked and the order of "auto", ready for JSON."""
    devices = available_devices()
    library = native.load()  # which another process may have compiled
    return {
        "versions": {
            "stablemask": __version__,
            "python": platform.python_version(),
            **{name: installed(name) for name in PACKAGES},
            "torch": torch.__version__,  # which tells its kind of build, its package's may not
        },
        "newer_than_tested": newer_than_tested(),
        "decoding": asdict(check_decoding()),
        "changed_internals": missing(PRIVATE),
        "platform": platform.platform(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "library": library and library.name,
            "rules": tuning.read(native.rules_path()),
        },
        "devices": devices,
        "backends": [
            asdict(check_backend(name, device)) for name in BACKENDS for device in devices
        ],
        "auto": {
            device: {"sequence": order(device, False), "one row": order(device, True)}
            for device in devices
        },
    }


def available_devices() -> dict[str, str]:
    """The kinds of device PyTorch can use here, each with a description."""
    devices = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices["cuda"] = ", ".join(
            f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def check_decoding() -> DecodingCheck:
    """Write greedily with a tiny decoder, with its cache and without: the tokens must be equal.

    So a version of Transformers that hands the cache over in another way is noticed, whatever it is.
    """
    try:
        from stablemask.models import StableMaskConfig, StableMaskForCausalLM
    except ModuleNotFoundError as error:
        return DecodingCheck(None, f"not checked: needs the package {error.name!r}")
    config = StableMaskConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = StableMaskForCausalLM(config).double().eval()
    prompt = torch.tensor([[7, 3, 55, 20, 41]])
    try:
        cached, uncached = (
            model.generate(prompt, max_new_tokens=16, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
    except Exception as reason:  # whatever stops it is the answer
        return DecodingCheck(False, " ".join(str(reason).split()))
    if torch.equal(cached, uncached):
        return DecodingCheck(True, "a tiny decoder's cached and uncached tokens are equal")
    return DecodingCheck(False, "a tiny decoder's cached tokens are NOT those without a cache")


def check_backend(name: str, device: str) -> BackendCheck:
    """Run a small forward and backward pass and compare them with the dense float64 reference.

    A backend may be twice as far from it as the reference itself is in the same precision.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    exact = _forward_backward("reference", "cpu", dtype, torch.float64)
    allowed = 2 * _distance(_forward_backward("reference", device, dtype, dtype), exact)
    try:
        error = _distance(_forward_backward(name, device, dtype, dtype), exact)
    except Exception as reason:  # whatever stops it is the answer
        return BackendCheck(name, device, False, " ".join(str(reason).split()))
    works = error <= allowed
    relation = "within" if works else "BEYOND"
    precision = str(dtype).removeprefix("torch.")
    detail = f"{precision}, error {error:.0e}, {relation} the allowed {allowed:.0e}"
    return BackendCheck(name, device, works, detail)


def _forward_backward(
    backend: str, device: str, rounded_to: torch.dtype, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU, of inputs that are the same for every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 63, 32), (1, 2, 63, 32), (1, 2, 63, 32), (1, 4, 63)]
    inputs = [
        torch.randn(shape, generator=generator).to(rounded_to).to(device, dtype).requires_grad_()
        for shape in shapes
    ]
    query, key, value, sink_logits = inputs
    out = sink_attention(query, key, value, sink_logits, backend=backend)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    return [tensor.detach().cpu().double() for tensor in (out, *gradients)]


def _distance(tensors: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error, relative to the largest value of its tensor."""
    pairs = zip(tensors, exact, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _as_table(report: dict[str, Any]) -> str:
    cpu = report["cpu"]
    rows = [(name, version or "not installed") for name, version in report["versions"].items()]
    rows += [
        ("platform", report["platform"]),
        ("cpu", f"{cpu['capability']}, {cpu['cores']} cores, {cpu['threads']} threads"),
        ("native", cpu["library"] or "not compiled; `stablemask build` does it"),
    ]
    if cpu["rules"] is not None:
        rows += [(f"... {dtype}", rule) for dtype, rule in tuning.in_words(cpu["rules"]).items()]
    elif cpu["library"]:
        rows += [("not timed", "the stock kernel serves sequences, until `stablemask build` times")]
    rows += [(f"device {name}", text) for name, text in report["devices"].items()]
    lines = [f"{name:<14} {text}" for name, text in rows]
    if report["newer_than_tested"]:
        lines.insert(0, f"{report['newer_than_tested']}\n")
    decoding = report["decoding"]
    verdict = {True: "works: ", False: "WRONG: ", None: ""}[decoding["works"]]
    lines.append(f"{'decoding':<14} {verdict}{decoding['detail']}")
    lines += [f"CHANGED, and used here: {line}" for line in report["changed_internals"]]
    lines += ["", "backends, each run forward and backward here:"]
    for check in report["backends"]:
        verdict = "works" if check["works"] else "no"
        lines.append(f"{check['backend']:<11} {check['device']:<5} {verdict:<6} {check['detail']}")
    lines += ["", "backend='auto' takes the first of these that can serve the call:"]
    for device, orders in report["auto"].items():
        for calls in orders if orders["one row"] != orders["sequence"] else ("sequence",):
            kind = "" if calls == "sequence" else f" ({calls})"
            lines.append(f"{device:<11} {', '.join(orders[calls])}{kind}")
    return "\n".join(lines)
