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
        (b'{"prompt": ', "the body is not valid JSON: EOF while parsing a value"),
        (b"", "the body must be a JSON object"),
        (b"[1]", "the body must be a JSON object"),
        (b'{"prompt": "\xff"}', "the body is not valid JSON"),
        (b"[" * 100_000, "the body is not valid JSON"),
        (b"{}", "prompt must be given"),
        (b'{"prompt": 1.5}', "prompt: it must be text, a list of token ids, or a list of either"),
        (b'{"prompt": [[1], [-1]]}', "prompt: it must be text, a list of token ids"),
        (b'{"prompt": [[1.0]]}', "prompt: it must be text, a list of token ids"),
        (b'{"prompt": [999]}', "token id 999 is outside the model's vocabulary of 280"),
        (
            b'{"prompt": [9999999999999999999]}',
            "token id 9999999999999999999 is outside the model's",
        ),
        (b'{"prompt": []}', "prompt must be given"),
        (b'{"prompt": "\\ud800"}', "the body is not valid JSON"),
        (b'{"prompt": "a", "\\ud800": 1}', "the body is not valid JSON"),
        (b'{"prompt": "a", "\\n\\u00e9": 1}', "\\n\\xe9 is not supported"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs: Input should be less than or equal to 20"),
        (
            b'{"prompt": "a", "suffix": "b"}',
            "suffix is not supported; what can be given is best_of",
        ),
        (b'{"prompt": "a", "logit_bias": {"5": 1}}', "logit_bias is not supported"),
        (b'{"prompt": "a", "n": 0}', "n: Input should be greater than or equal to 1, got 0"),
        (b'{"prompt": "a", "best_of": 2}', "best_of: Input should be 1, got 2"),
        (
            b'{"prompt": "a", "presence_penalty": 0.5}',
            "presence_penalty: Input should be 0, got 0.5",
        ),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens: Input should be greater than or equal"),
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
        ({"messages": []}, "messages must be given"),
        ({"messages": "hi"}, "messages: Input should be a valid list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content must be given"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role: Input should be"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "no tools here"),
        (
            {"messages": say([{"type": "image_url"}])},
            "messages.0.content: a part must be {'type': 'text', 'text': ...}",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 1}]},
            "messages.0.weight is not supported",
        ),
        (
            {"messages": say([{"type": "text", "text": "a", "cache": 1}])},
            "messages.0.content: a part must be {'type': 'text', 'text': ...}",
        ),
        (
            {"messages": say("a"), "stream_options": {"all": True}},
            "stream_options.all is not supported",
        ),
        ({"messages": say(None)}, "messages.0.content must be given"),
        ({"messages": say(1)}, "messages.0.content: Input should be a valid string"),
        ({"messages": say("a"), "tools": [{}]}, "tools is not supported"),
        ({"messages": say("a"), "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"messages": say("a"), "max_tokens": 0}, "max_tokens"),
        ({"messages": say("a"), "generation_config": "{}"}, "generation_config is not supported"),
    ],
)
def test_bad_chats(client, body, words):
    status, answer = post(client, json.dumps(body).encode(), "chat/completions")
    assert status == 400
    assert words in answer["error"]["message"]


# What clients send of themselves, with nothing asked for but a model, a prompt and a length.
CLIENTS = {
    "langchain OpenAI": {
        "prompt": ["the"], "temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0,
        "n": 1, "logit_bias": {}, "seed": None, "logprobs": None, "stop": None,
    },
    "langchain ChatOpenAI": {
        "messages": [{"role": "user", "content": "the", "name": "me"}], "n": 1, "temperature": 0.7,
        "max_completion_tokens": 3, "stream": False, "stream_options": None, "stop": None,
    },
    "litellm": {"messages": say("the"), "temperature": 1, "user": "me", "metadata": {}, "tools": None},
    "litellm text": {"prompt": "the", "echo": False, "suffix": None, "best_of": 1, "extra_body": {}},
    "lm-eval": {"prompt": [[5, 6]], "temperature": 0, "stop": ["\n\n", "<|endoftext|>"], "seed": 1234},
    "lm-eval chat": {
        "messages": [{"role": "user", "content": "the", "type": "text"}], "temperature": 0,
        "stop": ["\n\n"], "seed": 1234,
    },
    "openai": {
        "messages": say([{"type": "text", "text": "the"}]), "response_format": {"type": "text"},
        "store": False, "service_tier": "auto", "tools": [], "logit_bias": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CLIENTS)
def test_what_clients_send_of_themselves(client, name):
    body = {"model": "llama", "max_tokens": 3, **CLIENTS[name]}
    if "max_completion_tokens" in body:
        del body["max_tokens"]
    status, answer = post(client, body, "completions" if "prompt" in body else "chat/completions")
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("route", ["../load_model", "../reset", "responses", "systemone"])
def test_no_request_loads_or_drops_a_model(client, route):
    assert post(client, b'{"model": "gpt2"}', route)[0] == 404


def test_a_page_cannot_post_without_being_asked(client):
    """A browser sends text/plain across origins without asking the server first."""
    assert post(client, b'{"prompt": "a"}', content_type="text/plain")[0] == 400
