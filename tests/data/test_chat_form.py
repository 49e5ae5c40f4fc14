"""What chat templates put around what is said: those of well-known families, and what cannot be used."""

import pytest

from stablemask.data import train_tokenizer
from stablemask.data.chat_form import chat_form
from stablemask.errors import InputError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
)
# The families' own, as far as plain turns go.
TEMPLATES = {
    "qwen": CHATML,
    "smollm2": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
        "{% endif %}" + CHATML
    ),
    "llama": (
        "{{ '<|bos|>' }}{% for message in messages %}{{ '<|head|>' + message['role'] + '<|/head|>\n\n' "
        "+ message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    ),
    "gemma": (
        "{{ '<|bos|>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
        "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    ),
    "mistral": (
        "{{ '<|bos|>' }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|head|> ' + message['content'] + '<|/head|>' }}{% else %}"
        "{{ ' ' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    ),
}  # fmt: skip
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(
        ["user assistant system model You help. its own words\n\n" * 3], 290
    )
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_form_is_what_the_template_writes_around_the_words(family, tokenizer):
    form = chat_form(with_template(tokenizer, TEMPLATES[family]))
    said = ["its own words", "You help", "words"]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), said, strict=True)
    ]
    expected = tokenizer.apply_chat_template(messages)["input_ids"]
    before = " " if family == "mistral" else ""
    words = [tokenizer.encode(before + text, add_special_tokens=False) for text in said]
    built = form.opening + words[0] + form.turns[0] + words[1] + form.turns[1] + words[2]
    assert built == expected[: len(built)]
    # The last message ends as that of any user.
    assert expected[len(built) :] == form.turns[0][: len(expected) - len(built)]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "template fails: Cannot use chat template"),
        ("{{ raise_exception('give a system message') }}", "fails: give a system message"),
        ("{{ messages[0]['content'] }}", "does not write down what is said"),
        ("{{ messages }}", "no token of its own ends a turn"),
        (
            "{% for message in messages %}{{ '<|im_start|>' + message['content'] }}"
            "{% if loop.first %}{{ '<|bos|>' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}",
            "differently as a chat goes on",
        ),
    ],
)
def test_a_template_that_cannot_be_written_by(template, reason, tokenizer):
    with pytest.raises(InputError, match=reason):
        chat_form(with_template(tokenizer, template))
