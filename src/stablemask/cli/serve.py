"""Serve a model over HTTP, with the API of OpenAI: chat, completions, streaming."""

from dataclasses import MISSING, dataclass

import transformers
from transformers.utils.import_utils import is_serve_available

from stablemask.cli.models import device_option, dtype_option, load
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.options import option
from stablemask.shell import pip_install
from stablemask.versions import OLDEST_SERVER, release

SUMMARY = "answer requests over HTTP, as OpenAI's API does"


@dataclass(kw_only=True)
class ServeOptions:
    model: str = option(MISSING, "folder or hub name of the model; requests call it by this name")
    host: str = option("127.0.0.1", "address to listen at; anyone who reaches it may ask")
    port: int = option(8000, "port to listen at; 0 takes a free one")
    max_model_len: int | None = option(
        None, "most tokens of a prompt and its answer together; by default the model's context"
    )
    dtype: str = dtype_option()
    device: str | None = device_option()


def run(options: ServeOptions) -> None:
    if not is_serve_available():
        raise InputError(f"serve needs a web server: {pip_install('serve')}")
    here = transformers.__version__
    if release(here) < release(OLDEST_SERVER):
        raise InputError(
            f"serve needs Transformers {OLDEST_SERVER} or newer, this is {here}: {pip_install('serve')}"
        )
    from stablemask.inference.serving import bind, serve

    with bind(options.host, options.port) as listener:
        model = load(options.model, options.dtype, options.device)
        serve(
            model,
            load_tokenizer(options.model),
            name=options.model,
            listener=listener,
            max_model_len=options.max_model_len,
        )
