"""What a step of decoding launches on CUDA, counted by the operators that reach the emulated card.

Stock attention's own launches stand beside: its kernel, and what it makes of a mask of bool. Nothing is read
by the host, nothing comes from it, and nothing as large as the cache is made: so a CUDA graph can hold the step.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

import stablemask.hf  # noqa: F401
from stablemask import head_decay_rates, pseudo_logsumexp, sink_attention, stable_mask_attention
from stablemask.backends import hardware
from stablemask.distributed import context_parallel
from stablemask.models import StableMaskConfig, StableMaskForCausalLM, layers
from stablemask.models.cache import CACHE
from stablemask.models.positions import position_sink_logits
from tests.cuda_contract import READ_BY_THE_HOST, ContractError
from tests.oracle import sink_definition

aten = torch.ops.aten
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2"}
OF_THE_HOST = {"arange", "empty", "full", "linspace", "ones", "scalar_tensor", "zeros"}
FROM_THE_HOST = {"as_tensor", "from_numpy", "tensor"}
TWICE = {"constant_pad_nd"}  # fills, then copies


class Launches(TorchDispatchMode):
    """Lists the operators that launch something; refuses what no CUDA graph may hold, and large results."""

    def __init__(self, largest):
        super().__init__()
        self.largest, self.names = largest, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if name in READS:
            raise ContractError(f"{name}: the host waits for the device")
        if name not in FREE and not function.is_view:
            self.names += [name] * (2 if name in TWICE else 1)
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.largest:
                    raise ContractError(f"{name} makes something as large as the cache")
        return out


class OfTheDevice(TorchFunctionMode):
    """Refuses tensors of the host: those made without a device, and those read."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READ_BY_THE_HOST:
            raise ContractError(f"{name}: the host waits for the device")
        if name in FROM_THE_HOST:
            raise ContractError(f"{name} copies from the host")
        if name in OF_THE_HOST and (kwargs or {}).get("device") is None:
            raise ContractError(f"{name} makes a tensor of the host")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def graphable(device, monkeypatch):
    """Skipped on a card, which has its own test; under emulation a graph is as if it were captured."""
    if device.type == "cuda":
        pytest.skip("counts the operators of the emulation")
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # a counter is no tracer
    return monkeypatch


def launches(step, cache, monkeypatch):
    with torch.no_grad(), monkeypatch.context() as monkeypatch:
        step()  # as before any capture
        monkeypatch.setattr(hardware, "is_capturing", lambda tensor: True)
        with OfTheDevice(), Launches(cache.numel()) as counted:
            step()
    return counted.names


KV_LEN = 211
SHIFTS = [[layer - head / 4 for head in range(8)] for layer in range(2)]


def inputs(kv_heads, dtype=torch.float16):
    query = torch.randn(2, 8, 1, 64, dtype=dtype)
    key, value = torch.randn(2, 2, kv_heads, KV_LEN, 64, dtype=dtype)
    mask = torch.ones(2, 1, 1, KV_LEN, dtype=torch.bool)
    mask[0, ..., :5] = False
    mask[1] = False  # of which kernels say this and that
    return query, key, value, mask


def stock(mask, dtype):
    """How many launches stock attention needs, by its source."""
    if mask is None:
        return 1
    with Launches(1 << 30) as counted:
        bias = torch.where(mask, 0.0, torch.scalar_tensor(-torch.inf, dtype=dtype))
        torch.nn.functional.pad(bias, (0, -KV_LEN % 16))
    return 1 + len(counted.names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sink", ["gamma", "learned", "number"])
def test_of_attention(monkeypatch, dtype, kv_heads, padded, sink):
    query, key, value, mask = inputs(kv_heads, dtype)
    mask = mask if padded else None
    learned = torch.nn.Parameter(torch.randn(8, 1, dtype=dtype))

    def step():
        if sink == "gamma":
            return stable_mask_attention(query, key, value, gamma=0.01, attn_mask=mask)
        of_row = learned if sink == "learned" else 0.0
        return sink_attention(query, key, value, of_row, attn_mask=mask)

    names = launches(step, key, monkeypatch)
    assert len(names) <= stock(mask, dtype) + 1, names
    mass = {
        "gamma": pseudo_logsumexp(torch.tensor([KV_LEN - 1]), 0.01),
        "learned": learned.detach(),
        "number": torch.zeros(1, 1),
    }[sink]
    exact = sink_definition(*(t.double() for t in (query, key, value, mass)), visible=mask)
    with torch.no_grad():
        found = step()
    assert (found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize("masks", [{}, {"window": 9}, {"documents": None}, {"alibi_slopes": None}])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_graph_can_hold_any_mask(monkeypatch, masks, rows):
    query, key = torch.randn(2, 4, rows, 64).half(), torch.randn(2, 2, 64, 64).half()
    if "documents" in masks:
        masks = {"documents": torch.arange(64) // 20}
    if "alibi_slopes" in masks:
        masks = {"alibi_slopes": head_decay_rates(4)}
    gamma = torch.full((4,), 0.1)

    def step():
        return stable_mask_attention(query, key, key, gamma=gamma, **masks)

    launches(step, torch.empty(1 << 30, device="meta"), monkeypatch)


class _Cache:
    def __init__(self, key, value):
        self.kept = key, value

    def update(self, key, value, *args, **kwargs):
        return self.kept


@pytest.mark.parametrize(
    "settings",
    [{"gamma": 0.01}, {"gamma": "slopes"}, {"gamma": [0.1] * 8}, {"gamma": 0.01, "shift": SHIFTS}],
)
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_of_a_transformers_layer(monkeypatch, kv_heads, padded, settings):
    query, key, value, mask = inputs(kv_heads)
    mask = mask if padded else None
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=64,
        max_position_embeddings=256, num_hidden_layers=2, attn_implementation="stablemask",
    )  # fmt: skip
    config.stablemask = {**settings, "hold": 255}
    layer = LlamaAttention(config, 0).half().eval()
    hidden = torch.randn(2, 1, 512).half()
    rotary = torch.ones(2, 1, 64).half(), torch.zeros(2, 1, 64).half()
    positions = torch.tensor([[KV_LEN - 6], [KV_LEN - 1]])
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "nothing", lambda module, q, *_, **__: (q, None)
    )

    def step():
        cache = {CACHE: _Cache(key, value)}
        return layer(hidden, rotary, mask, position_ids=positions, **cache)

    ours = launches(step, key, monkeypatch)
    config._attn_implementation = "nothing"
    rest = launches(step, key, monkeypatch)
    assert len(ours) - len(rest) <= stock(mask, torch.float16) + 2, ours


@pytest.mark.parametrize("attention", ["stablemask", "learned-sink", "softmax1"])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_of_a_layer_of_our_decoder(monkeypatch, attention, kv_heads, padded):
    query, key, value, mask = inputs(kv_heads)
    mask = mask if padded else None
    config = StableMaskConfig(
        hidden_size=512, intermediate_size=64, num_attention_heads=8, num_key_value_heads=kv_heads,
        head_dim=64, num_hidden_layers=1, vocab_size=8, attention=attention,
    )  # fmt: skip
    layer = layers.StableMaskAttention(config, 0).half().eval()
    if layer.sinks is not None:
        torch.nn.init.zeros_(layer.sinks)
    hidden = torch.randn(2, 1, 512).half()
    positions = torch.tensor([[KV_LEN - 6], [KV_LEN - 1]])
    with torch.no_grad():
        (sinks,) = position_sink_logits(config, positions)

    def step():
        return layer(hidden, sink_logits=sinks, attn_mask=mask, cache=_Cache(key, value))

    ours = launches(step, key, monkeypatch)
    monkeypatch.setattr(layers, "sink_attention", lambda query, *_, **__: query)
    rest = launches(step, key, monkeypatch)
    assert len(ours) - len(rest) <= stock(mask, torch.float16) + 1, ours


@pytest.mark.parametrize("device", ["sm90"], indirect=True)
def test_positions_of_a_shard_are_made_on_the_device(device, monkeypatch):
    ring = context_parallel._Ring(None, rank=1, size=2, balanced=True)
    monkeypatch.setattr(context_parallel._Ring, "of", lambda *_: ring)
    with OfTheDevice():
        positions = context_parallel.sequence_positions(4, device=device)
    assert positions.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("device", ["sm90"], indirect=True)
@pytest.mark.parametrize("position_encoding", ["rope", "alibi", "learned", "sinusoidal"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": "slopes", "hold": None},
        {"gamma": [0.1, 0.2]},
        {"shift": [[0.5, -1.0], [0.25, 2.0]]},
    ],
)
@pytest.mark.parametrize("length", [1, 3])
def test_a_graph_can_hold_a_pass_of_our_decoder(monkeypatch, position_encoding, settings, length):
    config = StableMaskConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, stablemask=settings,
        position_encoding=position_encoding,
    )  # fmt: skip
    model = StableMaskForCausalLM(config).eval()
    ids = torch.randint(16, (2, 8))
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, :3] = 0
    cache = StaticCache(config=config, max_cache_len=32)

    def step():
        kept = ids[:, -length:]
        return model(kept, attention_mask=mask, **{CACHE: cache}).logits

    with torch.no_grad():
        model(ids[:, :-length], attention_mask=mask, **{CACHE: cache})
    launches(step, torch.empty(1 << 30, device="meta"), monkeypatch)


@pytest.mark.parametrize("device", ["sm90"], indirect=True)
@pytest.mark.parametrize("kind", [StableMaskForCausalLM, LlamaForCausalLM])
def test_a_graph_can_hold_a_pass_over_padding(monkeypatch, kind):
    settings = {
        "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config = kind.config_class(**settings, attn_implementation="stablemask")
    config.stablemask = {"gamma": 0.1}
    model = kind(config).eval()
    ids, mask = torch.randint(16, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    launches(lambda: model(ids, **given), torch.empty(1 << 30, device="meta"), monkeypatch)
