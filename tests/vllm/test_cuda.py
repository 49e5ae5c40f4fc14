"""StableMask in vLLM's FlashAttention, on CPU tensors: its kernels emulated, the share's kernel in plain torch.

That kernel itself is held against its definition in Triton's interpreter, in tests/backends.
"""

import importlib
import itertools
import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from stablemask.models.settings import complete_settings
from stablemask.vllm import guard
from stablemask.vllm.mass import row_positions
from tests import marks

from . import stand_in
from .flash_contract import flash_attn_varlen_func

pytestmark = marks.triton
INSTALLED = find_spec("vllm") is not None
LAYERS, HEADS, KEY_HEADS, DIM, PAGE, LENGTH = 3, 8, 4, 16, 16, 64
RATES = [0.5, 0.02, 0.1, 0.004, 0.3, 0.05, 0.2, 0.01]
SHIFTS = [[0.1 * h - layer for h in range(HEADS)] for layer in range(LAYERS)]
SETTINGS = {
    "rates, held, a shift of each": {"gamma": RATES, "hold": 20, "shift": SHIFTS},
    "one rate, finite, later": {"gamma": 0.05, "horizon": 30, "start": 2},
}
# What each request had before, and its rows; then rows and requests of padding, as CUDA graphs have them.
STEPS = {
    "decoding": ([30, 0, 7], [1, 1, 1], 0),
    "decoding, padded": ([30, 0, 7], [1, 1, 1, 0, 0], 2),
    "chunks among tokens": ([9, 3, 0, 33], [1, 16, 9, 1], 0),
    "drafts to verify": ([9, 30], [3, 3, 0], 3),
}


@pytest.fixture
def cuda(monkeypatch):
    """``stablemask.vllm.cuda``, on vLLM where it is installed."""
    if not INSTALLED:
        stand_in.install(monkeypatch)
    module = importlib.import_module("stablemask.vllm.cuda")
    monkeypatch.setattr(
        module.stock, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False
    )
    monkeypatch.setattr(module, "take_share", take_share)
    yield module
    if not INSTALLED:
        del sys.modules["stablemask.vllm.cuda"]


def take_share(out, lse, mass, query_start_loc, seq_lens):
    sink = mass.at(row_positions(query_start_loc, seq_lens, len(out))).expand(
        len(out), out.shape[1]
    )
    kept = torch.where(sink == -torch.inf, 1.0, torch.sigmoid(lse.T - sink))
    out.copy_(out.float() * kept.unsqueeze(-1))


def make_layer(cuda, settings, *, number=1, rank=1, version=3, window=None, slopes=None):
    """The second of two ranks."""
    heads = HEADS // 2
    impl = cuda.StableMaskFlashImpl(heads, DIM, DIM**-0.5, KEY_HEADS // 2, slopes, window, "auto")
    impl.vllm_flash_attn_version = version
    whole = complete_settings(settings, HEADS, LENGTH, LAYERS)
    impl.prepare(SimpleNamespace(), whole, HEADS, LENGTH, number, rank)
    impl.process_weights_after_loading(torch.bfloat16)
    return impl


def make_step(step, key_heads=KEY_HEADS // 2, heads=HEADS // 2):
    past, counts, padding = STEPS[step]
    past = past + [0] * (len(counts) - len(past))
    starts = [0, *itertools.accumulate(counts)]
    lengths = [before + count for before, count in zip(past, counts, strict=True)]
    rows = starts[-1] + padding
    pages = LENGTH // PAGE
    table = torch.randperm(pages * len(counts)).view(len(counts), pages).int()
    metadata = SimpleNamespace(
        num_actual_tokens=rows,
        max_query_len=max(counts),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        max_seq_len=max(lengths),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        scheduler_metadata=None,
        max_num_splits=32,
        causal=True,
        mm_prefix_query_range_tensor=None,
    )
    query = torch.randn(
        rows + 1, heads, DIM
    ).bfloat16()  # and what more there is in the model's buffer
    cache = torch.randn(table.numel(), key_heads, PAGE, 2 * DIM).bfloat16()
    return metadata, query, cache


def log_mass(settings, number, head, position):
    """The definition, column by column."""
    gamma = settings["gamma"]
    rate = gamma[head] if isinstance(gamma, list) else gamma
    if position < settings.get("start", 0):
        return -math.inf
    position = min(position, settings.get("hold", position))
    last = settings.get("horizon", position + 20_000)
    columns = torch.arange(position + 1, max(position + 1, last), dtype=torch.float64)
    shift = settings.get("shift")
    return torch.logsumexp(-rate * columns, 0).item() + (shift[number][head] if shift else 0.0)


def definition(settings, metadata, query, cache, number, rank, window, slopes):
    """Rows of requests one by one, in float64."""
    heads, key_heads = query.shape[1], cache.shape[1]
    starts = metadata.query_start_loc.tolist()
    rows = []
    for request, length in enumerate(metadata.seq_lens.tolist()):
        pages = cache[metadata.block_table[request].long()].transpose(1, 2).flatten(0, 1)[:length]
        keys, values = pages.double().repeat_interleave(heads // key_heads, 1).chunk(2, -1)
        for row in range(starts[request], starts[request + 1]):
            position = length - (starts[request + 1] - row)
            first = max(0, position - window + 1) if window else 0
            scores = (keys[first : position + 1] * query[row].double()).sum(-1) * DIM**-0.5
            if slopes is not None:
                apart = position - torch.arange(first, position + 1)
                scores -= torch.tensor(slopes).double() * apart[:, None]
            mass = [log_mass(settings, number, rank * heads + h, position) for h in range(heads)]
            weights = scores.exp()
            total = weights.sum(0) + torch.tensor(mass).double().exp()
            rows.append(
                (weights.unsqueeze(-1) * values[first : position + 1]).sum(0) / total[:, None]
            )
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("version", "window", "slopes"),
    [
        (2, None, None),
        (2, 5, None),
        (2, None, [0.5, 0.25, 0.1, 0.7]),
        (3, None, None),
        (3, 9, None),
        (4, None, None),
    ],
)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_equals_the_definition(cuda, step, settings, version, window, slopes):
    settings = SETTINGS[settings]
    impl = make_layer(cuda, settings, version=version, window=window, slopes=slopes)
    metadata, query, cache = make_step(step)
    if version == 3:
        metadata.scheduler_metadata = torch.zeros(1, dtype=torch.int32)
    output = torch.full_like(query, math.nan)
    assert impl.forward(None, query, None, None, cache, metadata, output) is output
    exact = definition(settings, metadata, query, cache, 1, 1, window, slopes)
    # Of the weights in float32 no error to speak of; the kernel's output is rounded, and so is its share.
    torch.testing.assert_close(output[: len(exact)].double(), exact, rtol=2**-7, atol=2e-4)


def test_a_graph_finds_each_step_where_it_was_captured(cuda, monkeypatch):
    """Nothing is read by the host, and what the kernels are given is vLLM's own, not a copy."""
    given = {}

    def flash(**arguments):
        given.update(arguments)
        return arguments["out"], torch.empty(HEADS // 2, len(arguments["q"]), device="meta")

    monkeypatch.setattr(cuda.stock, "flash_attn_varlen_func", flash)
    monkeypatch.setattr(cuda, "take_share", lambda *arguments: given.update(share=arguments))
    impl = make_layer(cuda, SETTINGS["one rate, finite, later"])
    metadata, query, cache = make_step("decoding, padded")
    for name in ("query_start_loc", "seq_lens", "block_table"):
        setattr(metadata, name, getattr(metadata, name).to("meta"))  # of which nothing can be read
    output = torch.empty_like(query)
    impl.forward(None, query, None, None, cache.to("meta"), metadata, output)
    out, _, mass, starts, lengths = given["share"]
    assert starts is metadata.query_start_loc is given["cu_seqlens_q"]
    assert lengths is metadata.seq_lens is given["seqused_k"]
    assert out.data_ptr() == given["out"].data_ptr() == output.data_ptr()
    assert given["q"].data_ptr() == query.data_ptr()
    assert mass is impl.mass


def test_weights_that_are_loaded_again_come_to_the_same_place(cuda):
    impl = make_layer(cuda, SETTINGS["rates, held, a shift of each"])
    shift, expected = impl.mass.shift, impl.mass.shift.clone()
    shift.zero_()
    impl.process_weights_after_loading(torch.bfloat16)
    assert impl.mass.shift is shift
    assert shift.equal(expected)


@pytest.mark.parametrize(("versions", "level"), [((3, 3), "ALWAYS"), ((3, 2), "UNIFORM_BATCH")])
def test_graphs_of_mixed_batches_need_version_3_in_each_layer(cuda, monkeypatch, versions, level):
    builder, support = cuda.StableMaskFlashMetadataBuilder, cuda.AttentionCGSupport
    monkeypatch.setattr(builder, "_cudagraph_support", support.ALWAYS)
    layers = {
        str(i): SimpleNamespace(impl=SimpleNamespace(vllm_flash_attn_version=version))
        for i, version in enumerate(versions)
    }
    monkeypatch.setattr(cuda, "get_layers_from_vllm_config", lambda config, kind: layers)
    assert builder.get_cudagraph_support(SimpleNamespace(), None) is support[level]


def test_blackwell_s_kernel_for_wide_heads_gives_way_to_version_2(cuda):
    impl = make_layer(cuda, {"gamma": 0.1}, version=4)
    impl.fa4_hd256 = True
    impl.prepare(
        SimpleNamespace(),
        complete_settings({"gamma": 0.1}, HEADS, LENGTH, LAYERS),
        HEADS,
        LENGTH,
        0,
        0,
    )
    assert impl.vllm_flash_attn_version == 2


def test_what_is_not_causal_is_refused(cuda):
    impl = make_layer(cuda, {"gamma": 0.1})
    metadata, query, cache = make_step("decoding")
    for name, value in (("causal", False), ("mm_prefix_query_range_tensor", torch.zeros(3, 2))):
        changed = SimpleNamespace(**{**vars(metadata), name: value})
        with pytest.raises(ValueError, match="StableMask is causal, and this batch is not"):
            impl.forward(None, query, None, None, cache, changed, torch.empty_like(query))
    with pytest.raises(NotImplementedError, match="no quantized output"):
        impl.forward(None, query, None, None, cache, metadata, query, torch.ones(1))


def test_on_cuda_flash_attention_is_ours_and_chosen_where_none_is_named(cuda, monkeypatch):
    from vllm import platforms
    from vllm.v1.attention.backends import registry

    card = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    registered = {}
    monkeypatch.setattr(platforms, "current_platform", card, raising=False)
    monkeypatch.setattr(registry, "register_backend", registered.__setitem__)
    names = registry.AttentionBackendEnum
    guard.register_backends()
    assert list(registered) == [names.FLASH_ATTN]
    module, _, attribute = registered[names.FLASH_ATTN].rpartition(".")
    assert getattr(importlib.import_module(module), attribute) is cuda.StableMaskFlashBackend
    assert cuda.StableMaskFlashBackend.get_impl_cls() is cuda.StableMaskFlashImpl
    assert cuda.StableMaskFlashBackend.get_builder_cls() is cuda.StableMaskFlashMetadataBuilder
    for named, expected in ((None, names.FLASH_ATTN), (names.FLASHINFER, names.FLASHINFER)):
        config = SimpleNamespace(attention_config=SimpleNamespace(backend=named))
        guard.choose_backend(config)
        assert config.attention_config.backend is expected
