"""Tasks by the lm-evaluation-harness, offline: its log-likelihoods and texts against the model's own."""

import json
import sys

import huggingface_hub
import pytest
import torch
from transformers import LlamaForCausalLM

from stablemask.data import train_tokenizer
from stablemask.errors import InputError
from stablemask.evaluation.tasks import evaluate_tasks, results_table
from stablemask.hf import apply_stablemask

from ..models.tiny import tiny_model

lm_eval = pytest.importorskip("lm_eval")

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20
# Contexts of unlike lengths, so that a batch of them is padded.
EXAMPLES = [
    {"question": "the quick", "choices": ["brown fox", "lazy dog jumps over", "over"], "answer": 1},
    {"question": "fox jumps over the", "choices": ["dog", "lazy dog", "quick"], "answer": 1},
    {"question": "dog", "choices": ["the quick brown", "fox fox", "jumps"], "answer": 2},
    {"question": "the lazy dog jumps over", "choices": ["the", "fox", "dog dog dog"], "answer": 0},
    {"question": "over the quick brown", "choices": ["fox jumps", "dog", "the lazy"], "answer": 0},
]
CHOICE = """
task: fox_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITING = """
task: fox_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 9, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "examples.jsonl"
    data.write_text("\n".join(map(json.dumps, EXAMPLES)))
    places = {"data": data, "cache": tmp_path / "cache"}
    (tmp_path / "choice.yaml").write_text(CHOICE.format(**places))
    (tmp_path / "writing.yaml").write_text(WRITING.format(**places))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 280)


def ours(tokenizer):
    torch.manual_seed(0)
    return tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64)


def llama(tokenizer):
    config = ours(tokenizer).config
    torch.manual_seed(1)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    llama_config = LlamaForCausalLM.config_class(**{name: getattr(config, name) for name in names})
    llama_config.eos_token_id = llama_config.bos_token_id = tokenizer.eos_token_id
    return apply_stablemask(LlamaForCausalLM(llama_config).eval(), gamma=[0.3, 0.1, 0.03, 0.01])


@pytest.fixture
def answers(monkeypatch):
    """What the harness asks a model and what it answers, by the kind of request."""
    from lm_eval.models.huggingface import HFLM

    recorded = {}

    def record(kind):
        answer = getattr(HFLM, kind)

        def watch(self, requests, *args, **kwargs):
            results = answer(self, requests, *args, **kwargs)
            recorded[kind] = [(r.args, result) for r, result in zip(requests, results, strict=True)]
            return results

        monkeypatch.setattr(HFLM, kind, watch)

    record("loglikelihood")
    record("generate_until")
    return recorded


def log_likelihood(model, tokenizer, context, continuation):
    """Of a text by itself: the sum over its tokens, in float64."""
    ids = tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    model.float()
    first = len(tokenizer(context)["input_ids"])
    return sum(logits[i - 1, ids[i]].item() for i in range(first, len(ids)))


@pytest.mark.parametrize("make", [ours, llama])
def test_log_likelihoods_are_those_of_each_text_alone(folder, tokenizer, answers, make):
    model = make(tokenizer)
    expected = {
        (example["question"], " " + choice): log_likelihood(
            model, tokenizer, example["question"], " " + choice
        )
        for example in EXAMPLES
        for choice in example["choices"]
    }
    sums = [[expected[e["question"], " " + c] for c in e["choices"]] for e in EXAMPLES]
    means = [
        [value / len(choice) for value, choice in zip(row, e["choices"], strict=True)]
        for row, e in zip(sums, EXAMPLES, strict=True)
    ]
    correct = [[row.index(max(row)) == e["answer"] for row, e in zip(rows, EXAMPLES, strict=True)]
               for rows in (sums, means)]  # fmt: skip
    for batch_size in (1, 4):
        results = evaluate_tasks(
            model, tokenizer, ["fox_choice"], include_path=folder, batch_size=batch_size
        )
        got = {args: value for args, (value, _) in answers["loglikelihood"]}
        assert got.keys() == expected.keys()
        for key in expected:
            assert got[key] == pytest.approx(expected[key], abs=1e-4)
        scores = results["results"]["fox_choice"]
        assert [scores["acc,none"], scores["acc_norm,none"]] == [sum(c) / 5 for c in correct]


@pytest.mark.parametrize("make", [ours, llama])
def test_texts_of_a_padded_batch_are_those_of_each_alone(folder, tokenizer, answers, make):
    model = make(tokenizer)
    expected = {}
    for example in EXAMPLES:
        ids = torch.tensor([tokenizer(example["question"])["input_ids"]])
        row = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
        text = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        expected[example["question"]] = text.partition("\n")[0]
    assert len(set(expected.values())) > 1
    for batch_size in (1, 4):
        evaluate_tasks(
            model, tokenizer, ["fox_writing"], include_path=folder, batch_size=batch_size
        )
        assert {args[0]: text for args, text in answers["generate_until"]} == expected


def test_limit_examples_and_the_table(folder, tokenizer, answers):
    results = evaluate_tasks(
        ours(tokenizer), tokenizer, ["fox_*"], include_path=folder, limit=2, num_fewshot=1
    )
    assert [len(answers[kind]) for kind in ("loglikelihood", "generate_until")] == [6, 2]
    assert results["n-shot"] == {"fox_choice": 1, "fox_writing": 1}
    prompt = answers["generate_until"][0][0][0]
    assert prompt.endswith("\n\nthe quick")
    assert prompt.removesuffix("\n\nthe quick") in [
        f"{example['question']} {example['choices'][0]}" for example in EXAMPLES
    ]
    table = results_table(results)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][:5] == ["Tasks", "Version", "Filter", "n-shot", "Metric"]
    assert [row[0] for row in rows[2:]] == ["fox_choice", "", "fox_writing"]
    acc = results["results"]["fox_choice"]["acc,none"]
    assert float(rows[2][6]) == pytest.approx(acc, abs=1e-4)


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Without the harness's own tasks, which take seconds to find."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path=None, include_defaults=True: manager(
            include_path=include_path, include_defaults=False
        ),
    )


@pytest.mark.usefixtures("own_tasks_only")
def test_tasks_that_cannot_be_run(folder, tokenizer, monkeypatch):
    model = ours(tokenizer)

    def refused(*names, include_path=folder, **settings):
        with pytest.raises(InputError) as error:
            evaluate_tasks(model, tokenizer, names, include_path=include_path, **settings)
        return str(error.value)

    assert refused("fox_choise") == "no task 'fox_choise'; did you mean fox_choice?"
    assert "no task 'zzz'; `lm-eval ls tasks` lists all" in refused("zzz", include_path=None)
    assert "must be a folder of YAML files" in refused("fox_choice", include_path=folder / "no")
    assert refused("fox_choice", limit=0) == "limit must be at least 1, got 0"
    assert refused("fox_choice", batch_size=0) == "batch_size must be at least 1, got 0"
    assert refused("fox_choice", num_fewshot=-1) == "num_fewshot must be at least 0, got -1"

    unsafe = CHOICE.replace("task: fox_choice", "task: fox_code\nunsafe_code: true")
    places = {"data": folder / "examples.jsonl", "cache": folder / "cache"}
    (folder / "code.yaml").write_text(unsafe.format(**places))
    assert "'fox_code' runs code that the model writes" in refused("fox_code")

    (folder / "examples.jsonl").unlink()
    error = refused("fox_writing")
    assert error.startswith("cannot load fox_writing: Unable to find")
    assert "\n" not in error

    (folder / "group.yaml").write_text("group: fox_group\ntask: [fox_choice, fox_writing]\n")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the data of the tasks: cannot reach http://127.0.0.1:9" in refused(
        "fox_writing", "fox_group"
    )

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refused("fox_choice").startswith("tasks need lm-eval: ")
    assert refused("fox_choice").endswith("pip install -e '.[eval]'")
