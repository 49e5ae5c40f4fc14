"""What the server answers OpenAI's client, against Transformers' own `generate`."""

import copy
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from transformers import GenerationConfig

from stablemask.inference.generate import CallbackStreamer
from stablemask.inference.serving import answers
from stablemask.inference.serving.answers import _Answer
from stablemask.inference.serving.protocol import CompletionRequest

from .conftest import CONTEXT, complete, post, say, serving, stream

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
    asked = {"model": "llama", "messages": messages, "max_completion_tokens": 20, "stream": True}
    *chunks, last = client.chat.completions.create(**asked, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage) == ([], answer.usage)
    assert all(chunk.usage is None for chunk in [*chunks, *client.chat.completions.create(**asked)])


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


def test_a_model_without_an_end_token_answers_to_the_length(llama, monkeypatch):
    model, tokenizer = llama[0], copy.deepcopy(llama[1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    tokenizer.eos_token = None
    with serving(model, tokenizer, "llama") as client:
        answer = (expected(model, tokenizer, PROMPTS[0], 5), "length")
        assert complete(client, PROMPTS[0], max_tokens=5) == answer


def test_a_checkpoint_that_asks_for_beams_or_texts_to_stop_at(client, llama, monkeypatch):
    text = complete(client, PROMPTS[0], max_tokens=40)[0]
    asked = llama[0].generation_config
    monkeypatch.setattr(asked, "num_beams", 3)
    monkeypatch.setattr(asked, "num_return_sequences", 2)
    assert complete(client, PROMPTS[0], max_tokens=40) == (text, "length")
    stop = re.search(r"[!-~]", text[1:])[0]
    monkeypatch.setattr(asked, "stop_strings", [stop])
    shorter, reason = complete(client, PROMPTS[0], max_tokens=40)
    assert reason == "stop"
    assert text.startswith(shorter)
    assert stop in shorter


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


def log_probs(model, ids):
    """Of each token but the first, by the definition."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def test_several_choices_of_several_prompts(client, llama):
    """A choice has the seed of its place, and prompts may come as the ids of their tokens."""
    settings = {"max_tokens": 12, "temperature": 1.0}
    texts = [
        complete(client, prompt, seed=seed, **settings)[0]
        for prompt in PROMPTS[:2]
        for seed in (5, 6)
    ]
    assert len(set(texts)) == 4
    ids = [llama[1](prompt).input_ids for prompt in PROMPTS[:2]]
    for prompts in (PROMPTS[:2], ids, [ids[0], PROMPTS[1]]):
        asked = {"model": "llama", "prompt": prompts, "n": 2, "seed": 5, **settings}
        answer = client.completions.create(**asked)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == len(ids[0] + ids[1])
        assert answer.usage.completion_tokens == 4 * 12
        streamed = [""] * 4
        for chunk in client.completions.create(**asked, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts
    assert complete(client, ids[0], seed=5, **settings)[0] == texts[0]
    chat = client.chat.completions.create(
        model="llama", messages=say("the"), n=2, seed=1, **settings
    )
    assert chat.choices[0].message.content != chat.choices[1].message.content


def test_logprobs_are_those_of_the_model_before_temperature(client, llama):
    model, tokenizer = llama
    ids = tokenizer(PROMPTS[0]).input_ids
    torch.manual_seed(3)
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=9, do_sample=True, temperature=1.5, top_k=0, pad_token_id=0
        )[0].tolist()  # fmt: skip
    truth, answer = log_probs(model, whole)[-9:], whole[len(ids) :]
    own = truth.gather(1, torch.tensor(answer)[:, None])[:, 0]
    asked = {"model": "llama", "max_tokens": 9, "temperature": 1.5, "seed": 3}

    def as_text(token_id):
        text = tokenizer.decode([token_id])  # where it is whole characters
        return text if "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token_id)

    told = client.completions.create(**asked, prompt=ids, logprobs=3).choices[0].logprobs
    assert told.tokens == [as_text(i) for i in answer]
    assert torch.tensor(told.token_logprobs).double().allclose(own, atol=1e-5)
    for row, token, logprob, top in zip(truth, told.tokens, told.token_logprobs, told.top_logprobs):
        assert {*map(as_text, row.topk(3).indices.tolist()), token} == set(top)
        assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-5)
        assert top[token] == logprob
    chunks = list(client.completions.create(**asked, prompt=ids, logprobs=3, stream=True))
    assert [o for c in chunks for o in c.choices[0].logprobs.text_offset] == told.text_offset
    assert [t for c in chunks for t in c.choices[0].logprobs.tokens] == told.tokens
    assert [t for c in chunks for t in c.choices[0].logprobs.token_logprobs] == told.token_logprobs

    asked |= {"messages": say("the"), "logprobs": True, "temperature": 0}
    chat = client.chat.completions.create(**asked, top_logprobs=2).choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in chat] == [2] * 9
    assert [token.top_logprobs[0].token for token in chat] == [token.token for token in chat]
    said = client.chat.completions.create(**asked | {"temperature": 1.5}).choices[0]
    spelled = b"".join(bytes(token.bytes) for token in said.logprobs.content)
    told = spelled.decode(errors="replace").removesuffix(tokenizer.eos_token)
    assert told == said.message.content
    assert not spelled.isascii()
    ids = tokenizer("<user>the\n<assistant>").input_ids
    assert chat[0].logprob == pytest.approx(log_probs(model, [*ids, 0])[-1].max().item(), abs=1e-5)
    assert client.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("prompt", [PROMPTS[0], [PROMPTS[0], "dog"]], ids=["one", "several"])
def test_an_echo_has_the_logprobs_of_the_prompt(client, llama, prompt):
    """As lm-eval asks for them; and where nothing is to be generated."""
    model, tokenizer = llama
    prompts = prompt if isinstance(prompt, list) else [prompt]
    asked = {"model": "llama", "prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True}
    for max_tokens in (0, 1):
        answer = client.completions.create(**asked, max_tokens=max_tokens, seed=1234)
        for text, choice in zip(prompts, answer.choices, strict=True):
            ids = tokenizer(text).input_ids
            truth = log_probs(model, ids)
            own = truth.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            told = choice.logprobs.token_logprobs
            assert told[0] is None
            assert torch.tensor(told[1 : len(ids)]).double().allclose(own, atol=1e-5)
            assert len(told) == len(ids) + max_tokens
            greedy = [
                max(top.values()) == t for top, t in zip(choice.logprobs.top_logprobs[1:], told[1:])
            ]
            assert greedy[: len(own)] == (truth.max(-1).values == own).tolist()
            assert choice.text == text + expected(model, tokenizer, text, 1)[: 99 * max_tokens]


def test_lm_eval_scores_through_the_server(client, llama):
    """Its own requests and its own reading of the answers."""
    api = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    model, tokenizer = llama
    contexts, ends = [tokenizer(p).input_ids for p in PROMPTS[:2]], [[7, 8], [9]]
    payload = api._create_payload(
        type("Api", (), {"model": "llama"}), [c + e for c, e in zip(contexts, ends)], seed=1234
    )
    status, answer = post(client, payload)
    assert status == 200
    scores = api.parse_logprobs(answer, ctxlens=[len(ids) for ids in contexts])
    for (score, greedy), context, end in zip(scores, contexts, ends, strict=True):
        rows = log_probs(model, context + end)[-len(end) :]
        assert score == pytest.approx(sum(row[i].item() for row, i in zip(rows, end)), abs=1e-4)
        assert greedy == (rows.argmax(-1).tolist() == end)


def spaced_tokenizer(*more):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("▁the", "▁dog", *more))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="▁the"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_token_is_told_with_its_space_and_bytes():
    """As Llama's tokenizer has them, whose `decode` drops a space at the beginning of a text."""
    request = CompletionRequest(prompt="", logprobs=2)
    pieces = []
    answer = _Answer(
        spaced_tokenizer("the", "<0xE2>", "\ufffd"),
        request,
        GenerationConfig(),
        pieces.append,
        bool,
    )
    answer.tell_prompt([0, 2, 3, 4], torch.tensor([2.0, 0, 3, 1, 1]).expand(3, 5))
    answer.finish()
    tokens = pieces[0].tokens
    assert [token["token"] for token in tokens] == [" the", "the", "<0xE2>", "\ufffd"]
    assert [token["bytes"] for token in tokens[:3]] == [[*b" the"], [*b"the"], [0xE2]]
    assert {token["token"] for token in tokens[1]["top_logprobs"]} == {" the", "the"}


def test_an_offset_counts_characters_and_not_the_names_of_bytes():
    tokens = [
        {"token": token, "bytes": spelled, "logprob": -1.0, "top_logprobs": []}
        for token, spelled in [
            (" a", [*b" a"]), ("<0xE2>", [0xE2]), ("<0x82>", [0x82]), ("<0xAC>", [0xAC]),
            ("né", [*"né".encode()]), ("[unk]", None), ("b", [*b"b"]),
        ]
    ]  # fmt: skip
    text = " a\u20acné[unk]b"
    offsets = CompletionRequest(prompt="", logprobs=0).told(tokens, 4)["text_offset"]
    assert [offsets[place] - 4 for place in (0, 1, 4, 5, 6)] == [
        0, 2, text.index("n"), text.index("["), text.index("b"),
    ]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_not_a_number_is_null(client, monkeypatch, streamed):
    monkeypatch.setattr(answers, "_log_probs", lambda logits: torch.full_like(logits, torch.nan))
    body = {"prompt": "the", "max_tokens": 1, "logprobs": 1, "stream": streamed}
    request = urllib.request.Request(
        f"{client.base_url}completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["content-type"].startswith(
            "text/event-stream" if streamed else "application/json"
        )
        events = response.read().decode().removesuffix("data: [DONE]\n\n")
    for event in events.removesuffix("\n\n").split("\n\n"):
        reply = json.loads(event.removeprefix("data: "), parse_constant=pytest.fail)
        (choice,) = reply["choices"]
        assert set(choice["logprobs"]["token_logprobs"]) <= {None}
    assert "null" in events


def test_some_tokenizers_drop_a_leading_space():
    tokenizer = spaced_tokenizer()
    pieces = []
    streamer = CallbackStreamer(tokenizer, pieces.append)
    for tokens in ([0], [1], [0]):
        streamer.put(torch.tensor(tokens))
    streamer.end()
    assert "".join(pieces) == " dog the"


def test_a_tokenizer_that_would_take_spaces_back_loses_no_characters():
    tokenizer = spaced_tokenizer("▁'")
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode([0, 2, 1]) == "the'dog"
    pieces = []
    streamer = CallbackStreamer(tokenizer, pieces.append)
    for token in (0, 2, 1):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == [" '", " dog"]
