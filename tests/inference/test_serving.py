"""The server on loopback, called with OpenAI's client, against Transformers' own `generate`."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM

import stablemask.hf
from stablemask.data import load_tokenizer, train_tokenizer
from stablemask.errors import InputError
from stablemask.inference.serving import bind, build_app
from stablemask.inference.serving.answers import AnswerStreamer

from ..cli.conftest import TEXT, save_model
from ..cli.conftest import learned_folder as learned_folder

CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["the quick", "brown fox jumps", " over", "lazy dog\n"]


@contextmanager
def serving(model, tokenizer, name):
    app = build_app(model, tokenizer, name=name)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    with bind("127.0.0.1", 0) as listener:
        url = "http://127.0.0.1:{1}/v1".format(*listener.getsockname())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
            yield client
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("ours"), max_position_embeddings=64)
    return stablemask.hf.load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="module")
def client(llama):
    with serving(*llama, "llama") as client:
        yield client


@pytest.fixture(scope="module")
def our_client(ours):
    with serving(*ours, "ours") as client:
        yield client


def expected(model, tokenizer, prompt, max_new_tokens, **settings):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    settings = {"do_sample": False} | settings
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=0, **settings)
    before, whole = (tokenizer.decode(t, skip_special_tokens=True) for t in (ids[0], output[0]))
    return whole[len(before) :]


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
    request = urllib.request.Request(
        f"{client.base_url}{route}", body, {"Content-Type": content_type}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# ---- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 7, 40])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions_are_those_of_generate(client, llama, prompt, max_tokens):
    text = expected(*llama, prompt, max_tokens)
    assert complete(client, prompt, max_tokens=max_tokens) == (text, "length")
    assert stream(client, prompt, max_tokens=max_tokens) == (text, "length")


def test_stablemask_is_what_runs(llama, client, monkeypatch):
    model, tokenizer = llama
    text = expected(model, tokenizer, PROMPTS[0], 40)
    settings = model.config.stablemask
    monkeypatch.setattr(model.config, "stablemask", None)
    softmax = expected(model, tokenizer, PROMPTS[0], 40)
    monkeypatch.setattr(model.config, "stablemask", settings)
    assert complete(client, PROMPTS[0], max_tokens=40)[0] == text != softmax


def test_our_own_model(our_client, ours):
    answer = our_client.completions.create(model="ours", prompt="the quick", max_tokens=30)
    assert answer.choices[0].text == expected(*ours, "the quick", 30)
    prompt_tokens = len(ours[1]("the quick").input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 30)
    with pytest.raises(openai.BadRequestError, match=r"no chat template.*use /v1/completions"):
        our_client.chat.completions.create(model="ours", messages=say("hi"))


def test_chat(client, llama):
    messages = [{"role": "system", "content": "dog"}, *say("the quick")]
    text = expected(*llama, "<system>dog\n<user>the quick\n<assistant>", 20)
    answer = client.chat.completions.create(model="llama", messages=messages, max_tokens=20)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    chunks = list(
        client.chat.completions.create(
            model="llama", messages=messages, max_completion_tokens=20, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage == answer.usage


def test_chat_content_in_parts(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "the quick"}]}]
    whole, in_parts = (
        client.chat.completions.create(model="llama", messages=messages, max_tokens=5)
        for messages in (say("the quick"), parts)
    )
    assert whole.choices[0].message.content == in_parts.choices[0].message.content


def test_answers_have_a_length_without_being_asked(client, our_client):
    answer = client.completions.create(model="llama", prompt="the")
    assert answer.usage.completion_tokens == 16
    answer = client.chat.completions.create(model="llama", messages=say("the"))
    assert answer.usage.total_tokens == CONTEXT
    long = "the quick brown fox " * 3
    answer = our_client.completions.create(model="ours", prompt=long)
    assert answer.usage.total_tokens <= 64


def test_an_empty_prompt_begins_a_document(client, llama):
    assert complete(client, "", max_tokens=9)[0] == expected(*llama, "<|endoftext|>", 9)


def test_the_end_token_ends_an_answer(client, llama, monkeypatch):
    model, tokenizer = llama
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 3:]
    last = next(i for i in range(4, 12) if new[i] not in new[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", int(new[last]))
    for max_tokens in (last + 1, 40):
        assert complete(client, PROMPTS[0], max_tokens=max_tokens)[1] == "stop"
        assert stream(client, PROMPTS[0], max_tokens=max_tokens)[1] == "stop"


def test_stop_texts(client, llama):
    whole = expected(*llama, PROMPTS[0], 40)
    for start, end in [(0, 1), (3, 4), (5, 9), (11, 19), (len(whole) - 2, len(whole))]:
        stop = whole[start:end]
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        result = (whole[: whole.index(stop)], "stop")
        for given in (stop, ["never", stop]):
            assert complete(client, PROMPTS[0], max_tokens=40, stop=given) == result
            assert stream(client, PROMPTS[0], max_tokens=40, stop=given) == result
    begun = whole[-1] + "never"
    assert complete(client, PROMPTS[0], max_tokens=40, stop=begun) == (whole, "length")
    assert stream(client, PROMPTS[0], max_tokens=40, stop=begun) == (whole, "length")


def test_sampling(client, llama):
    def sampled(settings, seed):
        torch.manual_seed(seed)
        return expected(*llama, PROMPTS[1], 20, do_sample=True, top_k=0, **settings)

    cases = [
        (settings, seed)
        for settings in ({"temperature": 1.3}, {"temperature": 0.7, "top_p": 0.8}, {"top_p": 0.9})
        for seed in (1, 2)
    ]
    # All of them first: the random state of this process is the server's too.
    texts = [sampled(*case) for case in cases]
    greedy = expected(*llama, PROMPTS[1], 20)
    assert len({*texts, greedy}) == 7
    for (settings, seed), text in zip(cases, texts):
        settings = {"max_tokens": 20, "seed": seed, **settings}
        assert complete(client, PROMPTS[1], **settings)[0] == text
        assert stream(client, PROMPTS[1], **settings)[0] == text
    for settings in ({"temperature": 0}, {"temperature": 1e-300}, {"top_p": 1e-9}):
        assert complete(client, PROMPTS[1], max_tokens=20, **settings)[0] == greedy
    free = {complete(client, PROMPTS[1], max_tokens=20, temperature=1)[0] for _ in range(3)}
    assert len(free) == 3


def test_requests_at_once_are_answered_as_one_by_one(client):
    jobs = [
        {"prompt": prompt, "max_tokens": 12, "seed": seed, "temperature": temperature}
        for prompt in PROMPTS
        for seed, temperature in ((1, 0), (2, 1))
    ]

    def ask(job):
        return complete(client, **job), stream(client, **job)

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, jobs)) == alone


def test_some_tokenizers_drop_a_leading_space():
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁dog": 1}, unk_token="▁the"))
    tokenizer.decoder = decoders.Metaspace()
    pieces = []

    class Loop:
        call_soon_threadsafe = staticmethod(lambda function, item: function(item))

    class Queue:
        put_nowait = pieces.append

    class Config:
        eos_token_id = (9,)
        max_new_tokens = 2
        request = {"stop": []}  # noqa: RUF012

    streamer = AnswerStreamer(tokenizer, Loop, Queue, None, [0], Config)
    for tokens in ([[0]], [1], [0]):
        streamer.put(torch.tensor(tokens))
    streamer.end()
    assert pieces == [" dog", " the", None]


# ---- clients that go --------------------------------------------------------------------------


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
    for stream in (False, True):
        # The second waits behind the first, and neither is ever answered.
        busy = client.chat.completions.create(model="llama", messages=say("the"), stream=True)
        with pytest.raises(openai.APITimeoutError):
            for _ in impatient.completions.create(
                model="llama", prompt="the", max_tokens=200, stream=stream
            ):
                pass
        busy.close()
        assert_free(client)


def test_hanging_up_on_a_whole_answer_frees_the_model(client, slow):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model="llama", messages=say("the"))
    assert_free(client)


# ---- what is refused --------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["llama"]
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
        (b'{"prompt": "a", "\\ud800": 1}', "valid string"),
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


# ---- the address and the model ------------------------------------------------------------------


def test_listens_on_loopback_alone(client):
    port = client.base_url.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


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
