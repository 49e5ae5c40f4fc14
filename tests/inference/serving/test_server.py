"""The server itself: its address, its model, and clients that go before they are answered."""

import socket
import time

import openai
import pytest

import stablemask.hf
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.inference.serving import bind, build_app

from ...cli.conftest import learned_folder as learned_folder
from .conftest import CONTEXT, complete, post, say, stream


@pytest.fixture
def slow(llama):
    """An answer of the whole context takes 10 s at least."""
    hook = llama[0].register_forward_pre_hook(lambda *_: time.sleep(10 / CONTEXT))
    yield
    hook.remove()


def assert_free(client):
    start = time.perf_counter()
    complete(client, "the", max_tokens=1)
    assert time.perf_counter() - start < 4


def test_hanging_up_in_a_stream_frees_the_model(client, slow):
    answer = client.chat.completions.create(model="llama", messages=say("the"), stream=True)
    for _ in zip(range(3), answer):
        pass
    answer.close()
    assert_free(client)


def test_hanging_up_while_waiting_frees_the_model(client, slow):
    impatient = client.with_options(timeout=0.5)
    for streamed in (False, True):
        # The second waits behind the first, and neither is ever answered.
        busy = client.chat.completions.create(model="llama", messages=say("the"), stream=True)
        with pytest.raises(openai.APITimeoutError):
            for _ in impatient.completions.create(
                model="llama", prompt="the", max_tokens=200, stream=streamed
            ):
                pass
        busy.close()
        assert_free(client)


def test_hanging_up_on_a_whole_answer_frees_the_model(client, slow):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model="llama", messages=say("the"))
    assert_free(client)


def test_a_failing_model_is_said_and_survived(client, llama, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError('out of "memory"\nand more')

    with monkeypatch.context() as patch:
        patch.setattr(llama[0], "generate", fail)
        with pytest.raises(openai.InternalServerError, match='could not answer: out of "memory"'):
            complete(client, "the")
        with pytest.raises(openai.APIError, match='could not answer: out of "memory"'):
            stream(client, "the")
    assert complete(client, "the", max_tokens=2)[1] == "length"


def test_listens_on_loopback_alone(client):
    port = client.base_url.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def chunks(size):
    """A body whose length nobody has told."""
    for _ in range(size // 1000):
        yield b" " * 1000


@pytest.mark.parametrize("body", [lambda size: b" " * size, chunks], ids=["whole", "in chunks"])
def test_a_body_that_is_too_long(client, monkeypatch, body):
    monkeypatch.setattr("stablemask.inference.serving.http.MAX_BODY", 10_000)
    status, answer = post(client, body(30_000))
    assert (status, answer["error"]["message"]) == (413, "the body must have at most 10000 bytes")
    assert post(client, body(10_000))[0] == 400  # it is taken, and is no JSON
    assert complete(client, "the", max_tokens=2)[1] == "length"


def test_addresses_that_cannot_be_had():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1 port {port}: Address already in use"):
            bind("127.0.0.1", port)
    for host in ("no.such.host.invalid", "192.0.2.1"):
        with pytest.raises(InputError, match=f"cannot listen at {host} port 0: "):
            bind(host, 0)
    for port in (-1, 65_536):
        with pytest.raises(InputError, match=f"port must be from 0 to 65535, got {port}"):
            bind("127.0.0.1", port)


def test_lengths_that_cannot_be_had(learned_folder, llama):
    model, tokenizer = stablemask.hf.load_model(learned_folder), load_tokenizer(learned_folder)
    build_app(model, tokenizer, name="learned", max_model_len=32)
    with pytest.raises(InputError, match="33 positions"):
        build_app(model, tokenizer, name="learned", max_model_len=33)
    with pytest.raises(InputError, match="max_model_len must be at least 2"):
        build_app(*llama, name="llama", max_model_len=1)
