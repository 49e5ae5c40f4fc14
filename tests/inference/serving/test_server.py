"""The server itself: its address, its model, and clients that go before they are answered."""

import logging
import socket
import time
import urllib.error
import urllib.request
from urllib.parse import urljoin

import openai
import pytest

import stablemask.hf
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.inference.serving import bind, build_app

from ...cli.conftest import learned_folder as learned_folder
from .conftest import CONTEXT, complete, post, say, serving, stream


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


def test_hanging_up_in_the_midst_of_a_body_is_no_failure(client, caplog):
    caplog.set_level(logging.INFO, "stablemask.serve")
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
        connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
    wait_for_lines(caplog, 1)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert " POST /v1/completions 499 " in caplog.messages[0]


def wait_for_lines(caplog, count):
    end = time.perf_counter() + 10
    while len(caplog.messages) < count and time.perf_counter() < end:
        time.sleep(0.05)


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
    monkeypatch.setattr("stablemask.inference.serving.server.MAX_BODY", 10_000)
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


def get(client, route, method="GET", **headers):
    """Status and headers."""
    url = urljoin(str(client.base_url), route)
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_health(client):
    assert get(client, "../health")[0] == 200
    assert get(client, "../metrics")[0] == 404


def test_a_key(ours):
    with serving(*ours, "ours", api_key="s\u00e9same") as client:
        assert get(client, "../health")[0] == 200
        for given in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "s\u00e9same"}):
            assert get(client, "models", **given)[0] == 401
        status, answer = post(client, {"prompt": "the"})
        assert (status, answer["error"]["message"]) == (401, "the API key is missing or wrong")
        key = "Bearer s\u00e9same".encode().decode("latin-1")  # as http.client writes it
        assert get(client, "models", Authorization=key)[0] == 200
    with serving(*ours, "ours", api_key="sesame") as client:
        client = client.with_options(api_key="sesame")
        assert client.completions.create(model="ours", prompt="the", max_tokens=1).choices


def test_pages_of_other_origins(client, ours):
    page = "https://chat.example"
    preflight = {"Access-Control-Request-Method": "POST"}
    allowed = "Access-Control-Allow-Origin"
    assert allowed not in get(client, "models", Origin=page)[1]
    assert get(client, "completions", "OPTIONS", Origin=page, **preflight)[0] == 400
    with serving(*ours, "ours", cors_origins=[page], api_key="k") as open_client:
        status, headers = get(open_client, "completions", "OPTIONS", Origin=page, **preflight)
        assert (status, headers[allowed]) == (200, page)
        other = get(open_client, "completions", "OPTIONS", Origin="https://b.example", **preflight)
        assert other[0] == 400
        status, headers = get(open_client, "models", Origin=page, Authorization="Bearer k")
        assert (status, headers[allowed]) == (200, page)


def test_a_line_for_each_request(client, slow, caplog):
    caplog.set_level(logging.INFO, "stablemask.serve")
    complete(client, [5, 6, 7], max_tokens=2)
    list(client.completions.create(model="llama", prompt=[5], max_tokens=3, stream=True))
    post(client, b"{}")
    get(client, "a%0Ab")
    with pytest.raises(openai.APITimeoutError):
        complete(client.with_options(timeout=0.3), "the", max_tokens=200)
    wait_for_lines(caplog, 5)
    lines = [line.split() for line in caplog.messages]
    assert [line[1:4] for line in lines[:3]] == [
        ["POST", "/v1/completions", status] for status in ("200", "200", "400")
    ]
    assert [line[5:] for line in lines[:2]] == [["prompt=3", "answer=2"], ["prompt=1", "answer=3"]]
    assert lines[3][1:4] == ["GET", "/v1/a%0Ab", "404"]
    assert lines[4][3] == "499"  # its client has gone
    assert all(float(line[4].removesuffix("s")) < 30 for line in lines)
