"""Servers on loopback, and OpenAI's client to each."""

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from urllib.parse import urljoin

import openai
import pytest
import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM

import stablemask.hf
from stablemask.data import load_tokenizer, train_tokenizer
from stablemask.inference.serving import bind, build_app

from ...cli.conftest import TEXT, save_model

CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@contextmanager
def serving(model, tokenizer, name, **settings):
    app = build_app(model, tokenizer, name=name, **settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    with bind("127.0.0.1", 0) as listener:
        url = "http://127.0.0.1:{1}/v1".format(*listener.getsockname())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="package")
def llama(tmp_path_factory):
    """A Llama with StableMask and a chat template, saved and loaded as a user's would be."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 280)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.3, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config.stablemask = {"gamma": 0.01}
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return stablemask.hf.load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="package")
def ours(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("ours"), max_position_embeddings=64)
    return stablemask.hf.load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="package")
def client(llama):
    with serving(*llama, "llama") as client:
        yield client


@pytest.fixture(scope="package")
def our_client(ours):
    with serving(*ours, "ours") as client:
        yield client


def complete(client, prompt, **settings):
    choice = client.completions.create(model="llama", prompt=prompt, **settings).choices[0]
    return choice.text, choice.finish_reason


def stream(client, prompt, **settings):
    chunks = list(client.completions.create(model="llama", prompt=prompt, stream=True, **settings))
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    return "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason


def say(text):
    return [{"role": "user", "content": text}]


def post(client, body, route="completions", content_type="application/json"):
    """What the client would not send: the status and the JSON of the answer."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(
        urljoin(str(client.base_url), route), body, {"Content-Type": content_type}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
