"""What may be asked of the server: the rest is refused, in words that say what to do."""

import json
import time

import openai
import pytest

from .conftest import CONTEXT, complete, post, say, serving


def test_models(client, ours):
    begun = time.time()
    with serving(*ours, "/runs/our model") as named:
        for name, of in (("llama", client), ("/runs/our model", named)):
            (model,) = of.models.list()
            assert (model.id, model.object, model.owned_by) == (name, "model", "stablemask")
            assert of.models.retrieve(name) == model
            assert 0 < model.created < time.time()
        assert model.created >= int(begun)
        with pytest.raises(openai.NotFoundError, match="no model '/runs' here"):
            named.models.retrieve("/runs")
    with pytest.raises(
        openai.NotFoundError, match="no model 'gpt-4' here; this server has 'llama'"
    ):
        client.completions.create(model="gpt-4", prompt="a")


def test_a_prompt_that_is_too_long(client, our_client):
    words = "maximum context length is 256 tokens, the prompt has .* shorten the prompt"
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(model="llama", prompt="the dog " * 1000)
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(model="llama", messages=say("dog " * 1000), stream=True)
    with pytest.raises(openai.BadRequestError, match=r"64 tokens, .* and 64 more are asked for"):
        our_client.completions.create(model="ours", prompt="the", max_tokens=64, stream=True)
    complete(client, "the", max_tokens=CONTEXT - 1)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": ', "the body is not valid JSON: Expecting value"),
        (b"", "the body must be a JSON object"),
        (b"[1]", "the body must be a JSON object"),
        (b'{"prompt": "\xff"}', "error parsing the body"),
        (b"[" * 100_000, ""),
        (b"{}", "prompt must be given"),
        (b'{"prompt": 1}', "prompt: Input should be a valid string, got 1"),
        (b'{"prompt": ["a", "b"]}', "prompt: Input should be a valid string, got ['a', 'b']"),
        (b'{"prompt": "\\ud800"}', "prompt: "),
        (b'{"prompt": "a", "\\ud800": 1}', "\\ud800 is not supported"),
        (b'{"prompt": "a", "logprobs": 2}', "logprobs is not supported; what can be given is"),
        (b'{"prompt": "a", "tools": []}', "tools is not supported"),
        (b'{"prompt": "a", "n": 2}', "n: only 1 is supported, got 2"),
        (b'{"prompt": "a", "echo": true}', "echo: only False is supported, got True"),
        (b'{"prompt": "a", "presence_penalty": 0.5}', "presence_penalty: only 0 is supported"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens: Input should be greater than or equal"),
        (b'{"prompt": "a", "max_tokens": "9"}', "max_tokens: Input should be a valid integer"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens: Input should be a valid integer"),
        (b'{"prompt": "a", "temperature": -1}', "temperature: Input should be greater"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature: Input should be"),
        (b'{"prompt": "a", "top_p": 0}', "top_p: Input should be greater than 0, got 0"),
        (b'{"prompt": "a", "seed": 1e30}', "seed: Input should be"),
        (b'{"prompt": "a", "stop": ""}', "stop.0: String should have at least 1 character"),
        (
            b'{"prompt": "a", "stop": "' + b"a" * 100_000 + b'"}',
            "stop.0: String should have at most 1000 characters",
        ),
        (b'{"prompt": "a", "stop": [1]}', "stop.0: Input should be a valid string"),
        (b'{"prompt": "a", "stream": "yes"}', "stream: Input should be a valid boolean"),
        (b'{"prompt": "a", "model": 3}', "model: Input should be a valid string"),
    ],
)
def test_bad_requests(client, body, words):
    status, answer = post(client, body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages must be given"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "hi"}, "messages: Input should be a valid list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content must be given"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role: Input should be"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "no tools here"),
        (
            {"messages": say([{"type": "image_url"}])},
            "messages.0.content.0.type: Input should be 'text'",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 1}]},
            "messages.0.weight is not supported; what can be given is content, role",
        ),
        (
            {"messages": say([{"type": "text", "text": "a", "cache": 1}])},
            "messages.0.content.0.cache is not supported; what can be given is text, type",
        ),
        (
            {"messages": say("a"), "stream_options": {"all": True}},
            "stream_options.all is not supported; what can be given is include_usage",
        ),
        ({"messages": say(None)}, "messages.0.content must be given"),
        ({"messages": say(1)}, "messages.0.content: Input should be a valid list"),
        ({"messages": say("a"), "tools": [{}]}, "tools is not supported"),
        ({"messages": say("a"), "logprobs": True}, "logprobs: only False is supported"),
        ({"messages": say("a"), "generation_config": "{}"}, "generation_config is not supported"),
    ],
)
def test_bad_chats(client, body, words):
    status, answer = post(client, json.dumps(body).encode(), "chat/completions")
    assert status == 400
    assert words in answer["error"]["message"]


def test_neutral_values_and_nulls_are_taken(client):
    body = {
        "model": "llama",
        "prompt": ["the"],
        "max_tokens": 3,
        "n": 1,
        "echo": False,
        "best_of": 1,
    }
    body |= {"frequency_penalty": 0.0, "presence_penalty": 0, "stop": None, "suffix": None}
    status, answer = post(client, json.dumps(body | {"user": "me"}).encode())
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)


@pytest.mark.parametrize("route", ["../load_model", "../reset", "responses", "systemone"])
def test_no_request_loads_or_drops_a_model(client, route):
    assert post(client, b'{"model": "gpt2"}', route)[0] == 404


def test_a_page_cannot_post_without_being_asked(client):
    """A browser sends text/plain across origins without asking the server first."""
    assert post(client, b'{"prompt": "a"}', content_type="text/plain")[0] == 400
