"""What is refused before a model is loaded, each in one line, by configurations that stand in for vLLM's."""

import sys
from types import SimpleNamespace as Namespace

import pytest
from transformers import LlamaConfig

from stablemask.models import StableMaskConfig
from stablemask.vllm import guard

MASS = {"gamma": 1 / 64, "hold": 63}


def model(stablemask=MASS, **changes):
    text = LlamaConfig(
        num_attention_heads=4, num_hidden_layers=2, hidden_size=32, stablemask=stablemask
    )
    plain = {"use_mla": False, "uses_mrope": False, "is_mm_prefix_lm": False, "rswa_window": None}
    return Namespace(**{"hf_text_config": text, "model": "m", **plain, **changes})


def vllm_config(model_config=None, speculative_config=None, **changes):
    """As vLLM makes it, in what is read of it."""
    plain = {
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "cache_dtype": "auto",
        "kv_sharing_fast_prefill": False,
        **changes,
    }
    return Namespace(
        model_config=model() if model_config is None else model_config,
        cache_config=Namespace(**plain),
        parallel_config=Namespace(**plain),
        speculative_config=speculative_config,
    )


def drafts(method, draft=None):
    return Namespace(method=method, draft_model_config=draft)


REFUSED = {
    "unknown": (vllm_config(model({"gama": 1})), "must be a dict of gamma"),
    "out of range": (vllm_config(model({"gamma": -1.0})), "greater than 0"),
    "mla": (vllm_config(model(use_mla=True)), "MLA"),
    "mrope": (vllm_config(model(uses_mrope=True)), "do not count tokens"),
    "pictures": (vllm_config(model(is_mm_prefix_lm=True)), "tokens see later ones"),
    "rswa": (vllm_config(model(rswa_window=9)), "rswa_window=9"),
    "dcp": (vllm_config(decode_context_parallel_size=2), "decode_context_parallel_size=2"),
    "pcp": (vllm_config(prefill_context_parallel_size=2), "prefill_context_parallel_size=2"),
    "fp8": (vllm_config(cache_dtype="fp8"), "quantized cache"),
    "sharing": (vllm_config(kv_sharing_fast_prefill=True), "kv_sharing_fast_prefill"),
    "eagle": (vllm_config(speculative_config=drafts("eagle", model(None))), "drafts by 'eagle'"),
    "plain draft": (
        vllm_config(speculative_config=drafts("draft_model", model(None))),
        "the draft model 'm', whose",
    ),
    "draft with a mass": (
        vllm_config(model(None), drafts("draft_model", model())),
        "the draft model 'm', whose",
    ),
}


@pytest.mark.parametrize("kind", ["key-sink", "learned-token", "fixed-token", "head-gate"])
def test_a_kind_of_ours_that_the_plugin_does_not_compute_is_refused_by_name(kind):
    config = vllm_config(model(None))
    config.model_config.hf_text_config = StableMaskConfig(attention=kind)
    with pytest.raises(ValueError, match=f"attention='{kind}', which our decoder runs"):
        guard.check(config)
    config.model_config.hf_text_config = StableMaskConfig(attention="stablemask-paper")
    guard.check(config)


@pytest.mark.parametrize("attention", ["softmax1", "learned-sink", "softmax", "stablemask"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_constant_sink_under_alibi_is_for_cpus(attention, on_cpu, monkeypatch):
    """vLLM's kernels for GPUs take a prompt's distances from its first row, which a sink does not bear."""
    platforms = Namespace(current_platform=Namespace(is_cpu=lambda: on_cpu))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    config = vllm_config(model(None))
    config.model_config.hf_text_config = StableMaskConfig(
        attention=attention, position_encoding="alibi"
    )
    if on_cpu or attention in ("softmax", "stablemask"):
        guard.check(config)
    else:
        with pytest.raises(ValueError, match=f"attention='{attention}' and ALiBi"):
            guard.check(config)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_run_something_else_is_refused(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        guard.check(config)
    assert "\n" not in str(error.value)


def test_soft_capped_scores_are_refused():
    capped = vllm_config()
    capped.model_config.hf_text_config.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="attn_logit_softcapping=50"):
        guard.check(capped)


@pytest.mark.parametrize(
    "config",
    [
        vllm_config(),
        vllm_config(speculative_config=drafts("ngram", model())),
        vllm_config(speculative_config=drafts("draft_model", model())),
        # No mass, so all of it is vLLM's own business.
        vllm_config(model(None, use_mla=True), drafts("eagle", model(None)), cache_dtype="fp8"),
        vllm_config(Namespace(hf_text_config=Namespace()), drafts("suffix")),
        Namespace(model_config=None, speculative_config=None),
    ],
)
def test_the_rest_passes(config):
    guard.check(config)
