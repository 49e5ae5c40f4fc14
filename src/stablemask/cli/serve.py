"""Serve a model over HTTP, with the API of OpenAI: chat, completions, streaming."""

import transformers
from transformers.utils.import_utils import is_serve_available

from stablemask.cli.models import load
from stablemask.cli.options import ServeOptions
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.shell import pip_install
from stablemask.versions import OLDEST_SERVER, release


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
        model = load(options)
        serve(
            model,
            load_tokenizer(options.model),
            name=options.model,
            listener=listener,
            max_model_len=options.max_model_len,
        )
