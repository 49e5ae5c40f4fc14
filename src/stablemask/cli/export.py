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
from stablemask.writing import whole_file


def run(options: ExportOptions) -> None:
    out, shape = options.out, _shape(options)
    if out.suffix not in (".onnx", ".pt2"):
        raise InputError(f"--out must end in .onnx or .pt2, got {str(out)!r}")
    if out.suffix == ".onnx" and options.dtype == "bfloat16":
        raise InputError("ONNX Runtime computes few operators in bfloat16; give another --dtype")
    if not out.parent.is_dir():
        raise InputError(f"--out: no folder at {str(out.parent)!r}")
    model = load_model(options.model, dtype=options.dtype)

    # What stands at --out gives way to a file that has been checked.
    with whole_file(out) as partial:
        if out.suffix == ".onnx":
            export_onnx(model, partial, cache=options.cache, shape=shape)
            graph = load_onnx(partial)
        else:
            export_pt2(model, partial, cache=options.cache, shape=shape)
            graph = torch.export.load(partial).module()
        difference = largest_difference(model, graph, cache=options.cache, shape=shape)
        if not difference <= torch.finfo(model.dtype).eps ** 0.5:
            raise RunError(
                f"{out} is not the model: its outputs differ by a share of {difference:.1e}"
            )
        written = sorted(partial.parent.iterdir())
        files = {str(out.with_name(file.name)): file.stat().st_size for file in written}
    print(f"{out}: outputs within {difference:.1e} of the model's, as a share of the largest")
    summary = {
        "model": options.model,
        "files": files,
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
