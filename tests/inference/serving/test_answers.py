"""What the server answers OpenAI's client, against Transformers' own `generate`."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from stablemask.inference.serving.answers import AnswerStreamer

from .conftest import CONTEXT, complete, say, stream

PROMPTS = ["the quick", "brown fox jumps", " over", "lazy dog\n"]


def expected(model, tokenizer, prompt, max_new_tokens, **settings):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    settings = {"do_sample": False} | settings
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=0, **settings)
    before, whole = (tokenizer.decode(t, skip_special_tokens=True) for t in (ids[0], output[0]))
    return whole[len(before) :]


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


def test_a_reply_goes_back_as_the_client_dumps_it(client):
    """With a null for everything that it might hold."""
    messages = say("the quick")
    reply = client.chat.completions.create(model="llama", messages=messages, max_tokens=5)
    message = reply.choices[0].message
    assert None in message.model_dump().values()
    again = [
        client.chat.completions.create(
            model="llama", messages=[*messages, said, *say("fox")], max_tokens=5
        ).choices[0].message.content
        for said in (message.model_dump(), {"role": "assistant", "content": message.content})
    ]  # fmt: skip
    assert again[0] == again[1]


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
