"""vLLM answers as Transformers does, token for token: `make vllm-test`, in an environment that has it."""

import os
from contextlib import ExitStack, contextmanager

import pytest
import torch

from tests import marks
from tests.vllm import models

pytestmark = marks.vllm

# In this process, so that a test can change what it runs; read when vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PROMPTS = models.prompts()


@contextmanager
def engine(folder, **changes):
    """vLLM with a model: chunks of prompts, cached prefixes, all requests at once."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    arguments = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": models.CONTEXT,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 16,
        "enable_prefix_caching": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 128 << 20,
        **changes,
    }
    with ExitStack() as stack:
        stack.callback(cleanup_dist_env_and_memory)
        llm = LLM(**arguments)
        # The traceback of a test that fails keeps it, and at its end it takes along what a later one runs on.
        stack.callback(llm.llm_engine.engine_core.shutdown)
        yield llm


def ask(llm, prompts=PROMPTS, new=models.NEW, **kwargs):
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, logprobs=1, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(prompts, greedy, use_tqdm=False, **kwargs)


def same(outputs, wanted):
    answers = []
    for output in outputs:
        [first] = output.outputs
        tokens = list(first.token_ids)
        logprobs = [place[token].logprob for place, token in zip(first.logprobs, tokens)]
        answers.append(models.Answer(tokens, logprobs))
    models.assert_same(answers, wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model by its name, and its answers under Transformers."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            folder = models.save(models.MODELS[name](), tmp_path_factory.mktemp("model"))
            made[name] = folder, models.reference(folder, PROMPTS)
        return made[name]

    return get


@pytest.mark.parametrize("name", models.MODELS)
def test_it_answers_as_transformers_cold_and_from_a_cached_prefix(saved, name):
    folder, wanted = saved(name)
    with engine(folder) as llm:
        same(ask(llm), wanted)
        again = ask(llm)
        assert sum(output.num_cached_tokens for output in again) > 500
        same(again, wanted)


@pytest.mark.parametrize("name", ["rates by head", "shifts by layer", "Mistral", "alibi"])
def test_it_does_without_the_compiled_library(saved, name, monkeypatch):
    from stablemask.backends import native

    monkeypatch.setattr(native, "LIBRARY", None)
    folder, wanted = saved(name)
    with engine(folder) as llm:
        same(ask(llm), wanted)
        same(ask(llm), wanted)


@pytest.mark.parametrize("name", ["rates by head", "shifts by layer", "Mistral", "Qwen3", "Gemma"])
def test_layers_of_transformers_run_the_mass(saved, name, monkeypatch):
    from vllm.model_executor.models.transformers import base

    # Which changes the classes of Transformers, and no other test could then make a model of them.
    monkeypatch.setattr(base.Base, "_decorate_for_torch_compile", lambda self: None)
    folder, wanted = saved(name)
    with engine(folder, model_impl="transformers") as llm:
        same(ask(llm), wanted)


@pytest.mark.parametrize("name", ["shifts by layer", "learned rates", "alibi"])
def test_heads_are_shared_by_two_ranks(saved, name, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each takes a NUMA node
    folder, wanted = saved(name)
    with engine(folder, tensor_parallel_size=2) as llm:
        same(ask(llm), wanted)


def test_compiled_layers_run_the_mass(saved):
    from vllm.config import CompilationMode

    folder, wanted = saved("shifts by layer")
    with engine(folder, enforce_eager=False) as llm:
        mode = llm.llm_engine.vllm_config.compilation_config.mode
        assert mode is CompilationMode.DYNAMO_TRACE_ONCE
        same(ask(llm), wanted)


def test_a_draft_model_with_the_same_mass_changes_nothing(saved):
    folder, wanted = saved("one rate")
    speculation = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    with engine(folder, speculative_config=speculation) as llm:
        same(ask(llm), wanted)


def test_requests_that_lost_their_cache_begin_anew(saved):
    folder, _ = saved("shifts by layer")
    prompts, new = PROMPTS[-6:], 60
    wanted = models.reference(folder, prompts, new)
    # A few pages more than the longest of them needs.
    with engine(folder, num_gpu_blocks_override=18, enable_prefix_caching=False) as llm:
        from vllm.v1.core.sched.scheduler import Scheduler

        preempted = []
        original = Scheduler._preempt_request
        Scheduler._preempt_request = lambda self, *a, **k: (
            preempted.append(1),
            original(self, *a, **k),
        )[1]
        try:
            same(ask(llm, prompts, new), wanted)
        finally:
            Scheduler._preempt_request = original
        assert preempted


def test_lora_adapters_and_those_of_another_mass(saved, tmp_path):
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    from stablemask.hf import load_model

    folder, plain = saved("shifts by layer")
    model = load_model(str(folder), dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "own")
    wanted = models.answers(adapted, PROMPTS)
    assert wanted != plain
    adapted.base_model.model.config.stablemask = {"gamma": 0.5, "hold": 3}
    adapted.save_pretrained(tmp_path / "other")
    with engine(folder, enable_lora=True, max_lora_rank=8) as llm:
        own = LoRARequest("own", 1, str(tmp_path / "own"))
        same(ask(llm, lora_request=own), wanted)
        same(ask(llm), plain)
        with pytest.raises(Exception, match="was trained with StableMask"):
            ask(llm, lora_request=LoRARequest("other", 2, str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "quantized cache"),
        ({"speculative_config": {"method": "draft_model"}}, "whose config.stablemask is not"),
    ],
)
def test_it_refuses_at_start_what_would_run_something_else(saved, changes, message):
    folder, _ = saved("one rate")
    if "speculative_config" in changes:
        draft = {"model": str(saved("no mass")[0]), "num_speculative_tokens": 2}
        changes = {"speculative_config": {**changes["speculative_config"], **draft}}
    with pytest.raises(ValueError, match=message), engine(folder, **changes):
        pass


def test_half_precision_is_as_close_as_that_of_transformers(saved):
    from stablemask.hf import load_model

    folder, exact = saved("shifts by layer")
    rounded = models.answers(load_model(str(folder), dtype=torch.bfloat16), PROMPTS, 1)
    distance = max(
        abs(a.logprobs[0] - b.logprobs[0])
        for a, b in zip(rounded, exact)
        if a.tokens[0] == b.tokens[0]
    )
    with engine(folder, dtype="bfloat16") as llm:
        for output, answer in zip(ask(llm, new=1), exact):
            [first] = output.outputs[0].logprobs
            if answer.tokens[0] in first:
                assert abs(first[answer.tokens[0]].logprob - answer.logprobs[0]) <= 2 * distance


@marks.adapted_model
def test_an_adapted_model_answers_as_under_transformers():
    folder = os.environ[marks.ADAPTED_MODEL]
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 200]
    wanted = models.reference(folder, prompts, 16)
    with engine(folder) as llm:
        same(ask(llm, prompts, 16), wanted)
        same(ask(llm, prompts, 16), wanted)


# The last, for vLLM imports numba for it, and 0.32 can then start no other engine in this process.
def test_ngram_speculation_changes_nothing(saved):
    folder, _ = saved("shifts by layer")
    prompts = [prompt * 4 for prompt in PROMPTS[2:6]]  # so that there is something to look up
    wanted = models.reference(folder, prompts)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with engine(folder, speculative_config=speculation) as llm:
        same(ask(llm, prompts), wanted)
