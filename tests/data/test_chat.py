"""Conversations: which tokens are scored, how they are cut and padded, and what is refused."""

import datetime
import decimal
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stablemask.data import train_tokenizer
from stablemask.data.chat import IGNORED, is_chat, pad_conversations, prepare_chat
from stablemask.data.conversations import messages_of
from stablemask.data.records import read_records
from stablemask.errors import InputError
from stablemask.hf import apply_stablemask

from ..test_reading import DEEP

# The same format twice: without and with markers around what the assistant says.
PLAIN = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|endoftext|>\n"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|endoftext|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Like templates that drop the reasoning of earlier answers.
REWRITING = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if loop.last %}(last){% endif %}{{ message['content'] }}\n{% endfor %}"
)
TALKS = [
    [("system", "Be brief."), ("user", "Count to two."), ("assistant", "One, two.")],
    [
        ("user", "Ça va ? 你好"),
        ("assistant", "Très bien 🙂"),
        ("user", "and?"),
        ("assistant", "你好."),
    ],
    [("user", "no " * 300), ("assistant", "yes")],
]


def messages(talk):
    return [{"role": role, "content": content} for role, content in talk]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    text = " ".join(content for talk in TALKS for _, content in talk) + " assistant user system"
    tokenizer = train_tokenizer([text], 300)
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "chats.jsonl", [{"messages": messages(talk)} for talk in TALKS])


def conversations(corpus):
    return [corpus.train[i] for i in range(len(corpus.train))] + [
        corpus.validation[i] for i in range(len(corpus.validation))
    ]


def by_text(corpus, tokenizer):
    """Of each conversation, by its whole text: the text of its labels."""
    decode = tokenizer.decode
    return {
        decode(e["input_ids"]): decode(e["labels"][e["labels"] != IGNORED])
        for e in conversations(corpus)
    }


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_the_assistant_says_is_scored_and_nothing_else(template, tokenizer, source):
    tokenizer.chat_template = template
    found = by_text(prepare_chat(source, tokenizer, context=2048), tokenizer)
    expected = {
        "".join(f"<|{role}|>\n{content}<|endoftext|>\n" for role, content in talk): "".join(
            f"{content}<|endoftext|>\n" for role, content in talk if role == "assistant"
        )
        for talk in TALKS
    }
    assert found == expected
    tokenizer.chat_template = PLAIN


def test_long_conversations_are_cut_and_counted(tokenizer, source):
    whole = prepare_chat(source, tokenizer, context=2048)
    assert (whole.cut, whole.left_out) == (0, 0)
    lengths = sorted(len(example["input_ids"]) for example in conversations(whole))
    cut = prepare_chat(source, tokenizer, context=lengths[1])
    assert (cut.cut, cut.left_out) == (1, 1)  # the last one's answer stands behind the cut
    assert sorted(len(e["input_ids"]) for e in conversations(cut)) == lengths[:2]
    with pytest.raises(InputError, match="3 have no assistant token within 5 tokens"):
        prepare_chat(source, tokenizer, context=5)


def test_padding_on_the_right_changes_no_token(tokenizer, source):
    """The padded batch gives each conversation the logits it has alone, under StableMask too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.3,
    )  # fmt: skip
    model = apply_stablemask(LlamaForCausalLM(config).double().eval(), gamma=0.02)
    examples = conversations(prepare_chat(source, tokenizer, context=2048))
    batch = pad_conversations(examples)
    assert batch["attention_mask"].sum(1).tolist() == [len(e["input_ids"]) for e in examples]
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    nats, count = 0.0, 0
    for row, (padded, example) in enumerate(zip(logits, examples, strict=True)):
        length = len(example["input_ids"])
        alone = model(example["input_ids"][None]).logits[0]
        torch.testing.assert_close(padded[:length], alone)
        assert (batch["labels"][row, length:] == IGNORED).all()
        for scores, label in zip(alone.log_softmax(-1), example["labels"][1:], strict=False):
            if label != IGNORED:
                nats, count = nats - scores[label].item(), count + 1
    assert model(**batch).loss.item() == pytest.approx(nats / count)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder", "hub"])
def test_every_kind_of_source_gives_the_same(kind, tokenizer, source, tmp_path):
    records = [{"messages": messages(talk)} for talk in TALKS]
    path = tmp_path / "other" / f"chats.{kind}"
    path.parent.mkdir()
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(Path(source).read_bytes()))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif kind == "hub":
        import datasets

        path = tmp_path / "set"
        datasets.Dataset.from_list(records).save_to_disk(path)
    else:
        path = path.with_suffix(".jsonl")
        write(path, records)
    other = {"folder": str(path.parent), "hub": f"hub:{path}"}.get(kind, str(path))
    assert is_chat(other)
    expected = prepare_chat(source, tokenizer, context=2048)
    corpus = prepare_chat(other, tokenizer, context=2048)
    assert corpus.key == expected.key
    assert by_text(corpus, tokenizer) == by_text(expected, tokenizer)


def test_a_validation_split_is_kept(tokenizer, tmp_path):
    import datasets

    rows = [{"messages": messages(talk)} for talk in TALKS]
    splits = {"train": rows[:1], "validation": rows[1:]}
    made = {name: datasets.Dataset.from_list(part) for name, part in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
    corpus = prepare_chat(f"hub:{tmp_path / 'set'}", tokenizer, context=999)
    assert (len(corpus.train), len(corpus.validation)) == (1, 2)


def test_who_is_held_out_depends_on_the_conversation_alone(tokenizer, tmp_path):
    pairs = [{"prompt": f"say {n}", "completion": str(n)} for n in range(200)]
    corpus = prepare_chat(write(tmp_path / "a.jsonl", pairs), tokenizer, context=99)
    turned = prepare_chat(write(tmp_path / "b.jsonl", pairs[::-1]), tokenizer, context=99)
    held_out = {tokenizer.decode(e["input_ids"]) for e in corpus.validation}
    assert held_out == {tokenizer.decode(e["input_ids"]) for e in turned.validation}
    assert 2 <= len(held_out) <= 20
    assert corpus.key != turned.key


QUESTION = [("user", "Count:\nto two."), ("assistant", "One, two.")]
WITH_SYSTEM = [("system", "Be brief."), *QUESTION]
PARTS = [{"type": "text", "text": "Count:\n"}, {"type": "text", "text": "to two."}]


@pytest.mark.parametrize(
    ("record", "talk"),
    [
        ({"prompt": "Count:\nto two.", "completion": "One, two.", "input": None}, QUESTION),
        ({"instruction": "Count:", "input": "to two.", "output": "One, two."}, QUESTION),
        ({"instruction": "Count:\nto two.", "input": "", "output": "One, two."}, QUESTION),
        (
            {"instruction": "Count:\nto two.", "output": "One, two.", "system": "Be brief."},
            WITH_SYSTEM,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Count:\nto two.", "weight": 0},
                    {"from": "gpt", "value": "One, two.", "weight": 1.0},
                ]
            },
            WITH_SYSTEM,
        ),
        ({"conversations": messages(QUESTION)}, QUESTION),
        ({"messages": messages(QUESTION), "instruction": "x", "output": "y"}, QUESTION),
        ({"messages": messages(QUESTION), "system": "Be brief.", "tools": []}, WITH_SYSTEM),
        ({"messages": messages(WITH_SYSTEM), "system": "Be long."}, WITH_SYSTEM),
        ({"conversations": messages(WITH_SYSTEM), "system": "Be long."}, WITH_SYSTEM),
        ({"messages": [messages(QUESTION)[0], messages(QUESTION)[1] | {"weight": 1}]}, QUESTION),
        (
            {"messages": [{"role": "user", "content": PARTS}, messages(QUESTION)[1]]},
            QUESTION,
        ),
    ],
)
def test_forms_of_conversations(record, talk, tmp_path):
    assert messages_of(record, "here") == messages(talk)
    assert is_chat(write(tmp_path / "a.jsonl", [record]))


def test_values_of_parquet_become_text(tokenizer, tmp_path):
    """Those that JSON does not know; a template may write them."""
    day = datetime.datetime(2024, 2, 29, 12, 30)
    talk = [
        {"role": "user", "content": b"Cost?", "at": day, "day": day.date(), "id": b"\xc3\xa9"},
        {"role": "assistant", "content": b"Much.", "at": None, "cost": decimal.Decimal("1.50")},
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": talk}] * 2), path)
    assert is_chat(str(path))
    (first, _) = (messages_of(record.fields, record.where) for record in read_records(str(path)))
    assert first == [
        {
            "role": "user", "content": "Cost?", "at": "2024-02-29T12:30:00", "day": "2024-02-29",
            "id": "é",
        },
        {"role": "assistant", "content": "Much.", "cost": "1.50"},
    ]  # fmt: skip
    corpus = prepare_chat(str(path), tokenizer, context=99)
    assert set(by_text(corpus, tokenizer).values()) == {"Much.<|endoftext|>\n"}


def test_text_beside_conversations_is_told(tokenizer, source, tmp_path):
    (tmp_path / "README.md").write_text("what these are")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/dataset_info.json").write_text('{"features": {}}')
    assert is_chat(str(tmp_path))
    with pytest.warns(match=r"of 3 files in .*, 1 are read; not read: 1 \.md, 1 \.json"):
        prepare_chat(str(tmp_path), tokenizer, context=2048)


@pytest.mark.parametrize(
    "conversation",
    [
        {"messages": messages(TALKS[0])},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"conversations": []},
    ],
)
def test_text_and_a_conversation_in_a_record(conversation, tmp_path):
    source = write(tmp_path / "both.jsonl", [{"text": "a"} | conversation])
    with pytest.warns(match="line 1: .*both 'text' .* read as text; --text-column messages reads"):
        assert not is_chat(source)
    assert is_chat(source, text_column="messages")


@pytest.mark.parametrize(
    "record", [{"question": "a", "answer": "b"}, {"body": "a"}, {"prompt": "a"}]
)
def test_a_record_that_is_neither_is_told_what_would_be_one(record, tmp_path):
    columns = ", ".join(sorted(record))
    wanted = f"{columns}; for conversations name them 'messages', or 'prompt' and 'completion'$"
    with pytest.raises(InputError, match=f"line 1: no column 'text'; the columns are: {wanted}"):
        is_chat(write(tmp_path / "a.jsonl", [record]))


def test_text_alone_is_no_conversation(tmp_path):
    (tmp_path / "prose.txt").write_text("prose")
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    for source in ("builtin", "", "/no/file.jsonl", str(tmp_path / "none"), text):
        assert not is_chat(source)
    assert not is_chat(str(tmp_path / "prose.txt"))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


DEEP_LIST = "where a list stands that is nested deep"
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"messages": []}, "line 2: messages must be a list of at least one"),
        ({"messages": "hello"}, "line 2: messages must be a list"),
        (
            {"messages": [{"role": "narrator", "content": "a"}, ANSWER]},
            "role must be .* 'narrator'",
        ),
        ({"messages": ["hello"]}, "role must be"),
        ({"messages": [USER, {"role": "assistant"}]}, "content of the assistant's message"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "must be text"),
        ({"messages": [USER]}, "no assistant answers"),
        ({"messages": [ANSWER]}, "no assistant answers"),
        ({"prompt": "a", "completion": ""}, "a conversation is wanted"),
        ({"prompt": "a"}, "a conversation is wanted"),
        ({"other": 1}, "a conversation is wanted: 'messages', or 'prompt'.*; it has other$"),
        ({"instruction": "a", "output": ""}, "a conversation is wanted"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' is not read"),
        ({"instruction": "a", "input": ["c"], "output": "b"}, "'input' must be text, got list"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "'tools' is not read"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "'weight' must be 1, got 0"),
        (
            {"conversations": [USER, {"from": "gpt", "value": "b", "weight": 0}]},
            "'weight' must be 1, got 0",
        ),
        ({"conversations": "hello"}, "line 2: conversations must be a list"),
        ({"conversations": []}, "line 2: messages must be a list of at least one"),
        (
            {"conversations": [{"from": "bing", "value": "a"}]},
            "'from' must be one of human, gpt, system, got 'bing'; give others as 'messages'",
        ),
        ({"conversations": [{"from": "human"}]}, "content of the user's message must be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "the user's message must be text or parts of type 'text', got a part of type 'image_url'",
        ),
        ({"messages": [USER, {"role": "assistant", "content": ["b"]}]}, "type 'text', got str"),
        ({"messages": [USER, ANSWER | {"more": DEEP_LIST}]}, "nested too deep"),
        ({"messages": [USER, {"role": ["assistant"]}]}, "role must be"),
        ({"conversations": [{"from": ["human"]}]}, "'from' must be"),
        ([1, 2], "line 2: a JSON object is wanted"),
    ],
)
def test_a_bad_record_is_named(record, match, tokenizer, tmp_path):
    source = write(tmp_path / "bad.jsonl", [{"messages": [USER, ANSWER]}, record])
    Path(source).write_text(Path(source).read_text().replace(f'"{DEEP_LIST}"', DEEP))
    with pytest.raises(InputError, match=match) as info:
        prepare_chat(source, tokenizer, context=99)
    assert "line 2" in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"\xff", "bytes that are no UTF-8 text"),
        ({1, 2}, "a message holds set, which is no text"),
        ({(1, 2): 3}, "keys must be str"),
        (nested(100_000), "nested too deep"),
    ],
)
def test_values_that_are_no_text_are_named(value, problem):
    with pytest.raises(InputError, match=f"row 7: .*{problem}"):
        messages_of({"messages": [USER, ANSWER | {"more": value}]}, "row 7")


def test_damaged_files_and_templates_are_named(tokenizer, source, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    for name in ("bad.jsonl", "bad.parquet", "bad.jsonl.gz"):
        with pytest.raises(InputError, match=name):
            prepare_chat(str(tmp_path / name), tokenizer, context=99)
    for template, match in (
        (None, "has no chat template"),
        (REWRITING, "line 1: the chat template rewrites earlier messages"),
        ("{{ raise_exception('only users here') }}", "line 1: the chat template fails: only users"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=match):
            prepare_chat(source, tokenizer, context=99)
    tokenizer.chat_template = PLAIN
    one = write(tmp_path / "one.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(InputError, match="both sides need one"):
        prepare_chat(one, tokenizer, context=99)
