"""Text that a model writes itself: kinds, turns, the prefix, and going on after a kill."""

import copy
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stablemask.data.chat_form import chat_form
from stablemask.errors import InputError
from stablemask.inference.author import CODE, Author, Sampler
from stablemask.training.self_written import SHARES, write_texts

from .conftest import TEMPLATE

LENGTH = 48
SETTINGS = {"prefix": 1, "texts": 20, "length": LENGTH, "seed": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def model(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[0] *= 7  # so that turns end soon
    model.generation_config.update(top_k=1, repetition_penalty=9.0, max_length=5)
    return model


@pytest.fixture(scope="module")
def tokenizer(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(
        ["<|pad|>", "<|beyond|>"], special_tokens=True
    )  # which the model has no rows for
    return tokenizer


@pytest.fixture(scope="module")
def written(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "texts"
    return folder, write_texts(model, tokenizer, folder, **SETTINGS)


def of_kind(written, kind):
    return written.tokens[np.array(written.kinds) == kind]


def test_kinds_and_lengths(written, model, tokenizer):
    texts = written[1]
    assert texts.kinds == ["prose"] * 9 + ["code"] * 6 + ["chats"] * 5
    assert texts.tokens.shape == (20, LENGTH)
    assert texts.tokens.dtype == np.int32
    prose, code = of_kind(texts, "prose"), of_kind(texts, "code")
    assert len(np.unique(prose[:, 0])) > 4
    assert not np.isin(np.concatenate([prose, code]), tokenizer.all_special_ids).any()
    assert texts.tokens.max() < model.config.vocab_size
    for row in code:
        assert tokenizer.decode(row).startswith(tuple(text[:20].rstrip() for text in CODE))
    # Of the model's own settings none counts: neither its penalty of repeated tokens nor its top_k.
    assert all(len(set(row)) < LENGTH for row in texts.tokens.tolist())
    assert len({tuple(row) for row in code[:, 6:].tolist()}) == len(code)


def test_prose_begins_as_the_model_begins_a_text(model, tokenizer, tmp_path):
    """After a prefix that opens no chats: three of four texts begin with a token that the model chose."""
    certain, prefix = 40, 7
    changed = copy.deepcopy(model)
    with torch.no_grad():
        hidden = changed.model(torch.tensor([[prefix]])).last_hidden_state[0, -1]
        changed.lm_head.weight[certain] = 20 * hidden
    settings = SETTINGS | {"texts": 16, "kinds": {"prose": 1}, "length": 2}
    texts = write_texts(changed, tokenizer, tmp_path / "a", **settings | {"prefix": prefix})
    assert (texts.tokens[:, 0] == certain).reshape(4, 4).tolist() == [[False, True, True, True]] * 4
    opening = chat_form(tokenizer).opening[0]
    with torch.no_grad():
        hidden = changed.model(torch.tensor([[opening]])).last_hidden_state[0, -1]
        changed.lm_head.weight[certain] = 20 * hidden
    texts = write_texts(changed, tokenizer, tmp_path / "b", **settings | {"prefix": opening})
    assert (texts.tokens[:, 0] == certain).sum() < 3


def test_it_is_written_in_a_random_state_of_its_own(written, model, tokenizer, tmp_path):
    state, kept = torch.get_rng_state(), model.generation_config
    torch.manual_seed(99)
    after = torch.rand(1)
    torch.manual_seed(99)
    again = write_texts(model, tokenizer, tmp_path, **SETTINGS)
    assert torch.rand(1) == after
    torch.set_rng_state(state)
    assert np.array_equal(again.tokens, written[1].tokens)
    other = write_texts(model, tokenizer, tmp_path / "other", **SETTINGS | {"seed": 4})
    assert not np.array_equal(other.tokens, written[1].tokens)
    assert model.generation_config is kept
    assert kept.top_k == 1


def test_going_on_after_a_kill(written, model, tokenizer, tmp_path, monkeypatch):
    write, calls = Author.write, []

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(self, *arguments)

    monkeypatch.setattr(Author, "write", killed)
    folder = tmp_path / "texts"
    with pytest.raises(KeyboardInterrupt):
        write_texts(model, tokenizer, folder, **SETTINGS)
    assert len(list(folder.glob("*.npy"))) == 3
    first = sorted(folder.glob("*.npy"))[0]
    first.write_bytes(first.read_bytes()[:-7])  # the machine lost its power
    texts = write_texts(model, tokenizer, folder, **SETTINGS)
    assert np.array_equal(texts.tokens, written[1].tokens)
    assert len(calls) == 4 + (7 - 2)
    write_texts(model, tokenizer, folder, **SETTINGS)
    assert len(calls) == 9  # what is there is read
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".json"}


def test_turns_alternate_as_the_template_writes_them(written, tokenizer):
    turns = 0
    for row in of_kind(written[1], "chats").tolist():
        text = tokenizer.decode(row)
        parts = text.removeprefix("<|user|>\n").split("<|endoftext|>\n<|")
        said = [parts[0], *(part.partition("|>\n")[2] for part in parts[1:])]
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": content}
            for number, content in enumerate(said)
        ]
        assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(text)
        assert all(said[:-1])  # nobody says nothing
        turns += len(said) - 1
    assert turns > 5


def test_turns_are_token_for_token_those_of_the_template(tokenizer):
    """Two chats at once by a stand-in for a model, which says what stands here and ends its turns."""
    chats = [["the model", "reads its own row", "a"], ["mask", "sink", "token writes"]]
    form = chat_form(tokenizer)
    end = form.turns[0][0]
    wanted = []
    for chat in chats:
        words = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in chat]
        wanted.append([token for turn in words for token in turn])
    forbidden = torch.tensor(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler([[], []], form.turns, forbidden, 0.9, generator, lambda rows: None)
    ids = torch.tensor([form.opening] * 2)
    for _ in range(60):
        scores = torch.zeros(2, len(tokenizer))
        for row, tokens in enumerate(wanted):
            scores[row, tokens[:1]] = 1e4
        chosen = sampler(ids, scores).argmax(-1)
        ids = torch.cat([ids, chosen[:, None]], 1)
        for row, own in enumerate(sampler.spoken):
            if own and wanted[row]:
                assert wanted[row].pop(0) == chosen[row]
    for row, chat in zip(ids.tolist(), chats, strict=True):
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user"), chat, strict=True)
        ]
        expected = tokenizer.apply_chat_template(messages)["input_ids"]
        assert row[: len(expected)] == expected


def test_samples_follow_the_probabilities():
    rows = 40_000
    scores = torch.tensor([0.3, 1.1, -0.4, 2.0]).log_softmax(-1).expand(rows, 4)
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler([[]] * rows, None, torch.tensor([3]), 0.7, generator, lambda rows: None)
    chosen = sampler(torch.zeros(rows, 1, dtype=torch.long), scores.clone()).argmax(-1)
    shares = torch.bincount(chosen, minlength=4) / rows
    expected = (torch.tensor([0.3, 1.1, -0.4, -torch.inf]) / 0.7).softmax(-1)
    assert (shares - expected).abs().max() < 4 * (0.25 / rows) ** 0.5  # standard deviations


def test_what_begins_with_the_prefix_says_so(model, tokenizer, tmp_path):
    opening = chat_form(tokenizer).opening[0]
    settings = SETTINGS | {"prefix": opening, "texts": 8}
    texts = write_texts(model, tokenizer, tmp_path / "own", **settings)
    assert texts.begins_with_prefix.tolist() == [kind == "chats" for kind in texts.kinds]
    none = write_texts(model, tokenizer, tmp_path / "none", **settings | {"prefix": None})
    assert not none.begins_with_prefix.any()
    # The prefix is read by the model before the first token, and once.
    assert np.array_equal(of_kind(none, "chats"), of_kind(texts, "chats"))
    assert not np.array_equal(of_kind(none, "prose"), of_kind(texts, "prose"))


def test_without_a_template_there_are_no_chats(model, tokenizer, tmp_path, capsys):
    tokenizer.chat_template = None
    try:
        texts = write_texts(model, tokenizer, tmp_path / "a", **SETTINGS)
        assert texts.kinds == ["prose"] * 13 + ["code"] * 7
        assert not capsys.readouterr().err
        tokenizer.chat_template = "{{ raise_exception('a system message is wanted') }}"
        texts = write_texts(model, tokenizer, tmp_path / "b", **SETTINGS)
        assert set(texts.kinds) == {"prose", "code"}
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "no chats: the chat template fails: a system message" in said
        with pytest.raises(InputError, match="no chats can be written"):
            write_texts(model, tokenizer, tmp_path / "c", **SETTINGS, kinds={"chats": 1})
    finally:
        tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"texts": 0}, "texts must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"length": 4, "kinds": {"chats": 1}}, "of 4 tokens before the first word"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0"),
        ({"prefix": -1}, "token id -1 is outside"),
        ({"prefix": 10_000}, "token id 10000 is outside"),
        ({"kinds": {"poems": 1}}, "kinds must be of prose, code, chats, got poems"),
        ({"kinds": {"prose": 0}}, "one above 0"),
        ({"kinds": {"prose": -1, "code": 2}}, "must be 0 or more"),
    ],
)
def test_bad_arguments(wrong, message, model, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        write_texts(model, tokenizer, tmp_path / "texts", **SETTINGS | wrong)
    assert not (tmp_path / "texts").exists()


def test_a_folder_of_other_settings_is_refused(written, model, tokenizer, tmp_path):
    folder = tmp_path / "texts"
    shutil.copytree(written[0], folder)
    with pytest.raises(InputError, match=r"texts of another seed \(3, now 5\); remove it"):
        write_texts(model, tokenizer, folder, **SETTINGS | {"seed": 5})
    with pytest.raises(InputError, match="texts of another kinds"):
        write_texts(model, tokenizer, folder, **SETTINGS, kinds=SHARES | {"code": 0})
    weight = model.model.layers[1].input_layernorm.weight
    with torch.no_grad():
        weight[3] += 1
        try:
            with pytest.raises(InputError, match="texts of another model"):
                write_texts(model, tokenizer, folder, **SETTINGS)
        finally:
            weight[3] -= 1
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        write_texts(model, tokenizer, tmp_path / "file", **SETTINGS)
