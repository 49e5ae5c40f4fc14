"""Write a model as an ONNX file or a torch.export program, and check that it gives the model's logits."""

import torch

from stablemask import strict_json
from stablemask.cli.options import ExportOptions
from stablemask.errors import InputError, RunError
from stablemask.hf import load_model
from stablemask.inference.export import (
    export_onnx,
    export_pt2,
    largest_difference,
    load_onnx,
)


def run(options: ExportOptions) -> None:
    out, shape = options.out, _shape(options)
    if out.suffix not in (".onnx", ".pt2"):
        raise InputError(f"--out must end in .onnx or .pt2, got {str(out)!r}")
    if out.suffix == ".onnx" and options.dtype == "bfloat16":
        raise InputError("ONNX Runtime computes few operators in bfloat16; give another --dtype")
    if not out.parent.is_dir():
        raise InputError(f"--out: no folder at {str(out.parent)!r}")
    model = load_model(options.model, dtype=options.dtype)

    if out.suffix == ".onnx":
        export_onnx(model, out, cache=options.cache, shape=shape)
        graph = load_onnx(out)
    else:
        export_pt2(model, out, cache=options.cache, shape=shape)
        graph = torch.export.load(out).module()
    difference = largest_difference(model, graph, cache=options.cache, shape=shape)
    if not difference <= torch.finfo(model.dtype).eps ** 0.5:
        raise RunError(f"{out} is not the model: its outputs differ by a share of {difference:.1e}")
    print(f"{out}: outputs within {difference:.1e} of the model's, as a share of the largest")
    files = [file for file in (out, out.with_name(f"{out.name}.data")) if file.exists()]
    summary = {
        "model": options.model,
        "files": {str(file): file.stat().st_size for file in files},
        "cache": options.cache,
        "shape": shape,
        "dtype": options.dtype,
        "difference": difference,
    }
    print(strict_json.dumps(summary))


def _shape(options: ExportOptions) -> tuple[int, int] | None:
    batch_size, length = options.batch_size, options.length
    if batch_size is None and length is None:
        return None
    if batch_size is None or length is None or min(batch_size, length) < 1:
        raise InputError("--batch-size and --length fix the shape together, each at least 1")
    return batch_size, length
