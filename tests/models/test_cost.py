import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from stablemask.models import (
    StableMaskForCausalLM,
    count_parameters,
    flops_per_token,
    preset_config,
    training_memory,
)

from .tiny import random_ids, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("name", "size"),
    [("tiny", 3.0e6), ("71m", 71e6), ("160m", 160e6), ("410m", 410e6), ("1.4b", 1.4e9)],
)
def test_presets_have_the_parameters_of_their_name(name, size):
    assert abs(count_parameters(preset_config(name)) / size - 1) < 0.03


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        # embedding, attention, FFN, heads, layers: the paper's appendix E. Of the first, by hand:
        # 2 x 50,257 x 512 = 51,463,168 in the embeddings, 4 x 512 x 512 = 1,048,576 in the attention of a
        # layer, 3 x 512 x 2,048 = 3,145,728 in its FFN and 1,024 in its norms, six times, and 512.
        ("paper-71m", (512, 512, 2048, 8, 6), 76_635_648),
        ("paper-160m", (768, 1536, 3072, 12, 12), 218_771_712),
        ("paper-400m", (1024, 2048, 2048, 16, 16), 337_841_152),
        ("paper-1.4b", (2048, 4096, 8192, 16, 24), 2_219_218_944),
    ],
)
def test_presets_of_the_papers_shapes(name, shape, expected):
    config = preset_config(name)
    ours = (
        config.hidden_size, config.query_width, config.intermediate_size, config.num_attention_heads,
        config.num_hidden_layers,
    )  # fmt: skip
    assert ours == shape
    width, attention, ffn, _, layers = shape
    by_hand = layers * (4 * width * attention + 3 * width * ffn + 2 * width) + width
    assert count_parameters(config) == 2 * 50257 * width + by_hand == expected


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": True}, {"position_encoding": "learned", "head_dim": 6}],
)
def test_parameters_are_those_of_the_model(settings):
    config = tiny_config(attention="learned-sink", **settings)
    model = tiny_model(attention="learned-sink", **settings)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "settings", [{}, {"head_dim": 6, "num_key_value_heads": 1}, {"attention": "head-gate"}]
)
def test_flops_are_those_of_the_matrix_multiplications(settings):
    config, model, context = tiny_config(**settings), tiny_model(**settings), 12
    input_ids = random_ids(2, context)
    linear = flops_per_token(config, 0)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids, labels=input_ids).loss
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.mm] == 2 * context * linear.forward
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.mm] == 2 * context * (linear.training - linear.forward)

    attention = flops_per_token(config, context).forward - linear.forward
    query = torch.empty(1, 4, context, config.head_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        query @ query.mT @ query
    assert attention * context == config.num_hidden_layers * counter.get_total_flops()


def bytes_saved_for_backward(config, dtype, checkpointing):
    model = StableMaskForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weight_shapes = {shape for p in model.parameters() for shape in (p.shape, p.t().shape)}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in weight_shapes:
            saved[storage.data_ptr()] = storage  # kept alive, so that no address comes back
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        output = model.model(random_ids(2, 100), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_a_layers_activations_are_what_autograd_saves(dtype, checkpointing, kv_heads):
    measured, estimated = [], []
    for layers in (2, 4):
        config = preset_config(
            "tiny", vocab_size=64, num_hidden_layers=layers, num_key_value_heads=kv_heads
        )
        measured.append(bytes_saved_for_backward(config, dtype, checkpointing))
        memory = training_memory(config, 2, 100, dtype, checkpointing)
        estimated.append(memory["activations"])
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("kind", ["stablemask-paper", "key-sink", "learned-token", "head-gate"])
def test_what_a_kind_adds_to_a_layers_activations_is_what_autograd_saves(kind, position, dtype):
    def config(layers):
        sizes = {"vocab_size": 64, "num_hidden_layers": layers, "attention": kind}
        return preset_config("tiny", **sizes, position_encoding=position)

    measured = [bytes_saved_for_backward(config(layers), dtype, False) for layers in (2, 3)]
    estimated = [training_memory(config(n), 2, 100, dtype)["activations"] for n in (2, 3)]
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.002)


def test_memory_adds_up():
    config = preset_config("1.4b")
    memory = training_memory(config, 4, 1024, torch.bfloat16)
    assert memory["total"] == sum(nbytes for name, nbytes in memory.items() if name != "total")
    assert memory["weights"] == 4 * count_parameters(config)
    assert memory["optimizer"] == 2 * memory["gradients"]
    saved = training_memory(config, 4, 1024, torch.bfloat16, gradient_checkpointing=True)
    assert saved["activations"] < memory["activations"] / 5


def tracked_peak(config, chunked_loss, mesh=None):
    """Bytes at the peak of a second forward and backward pass, by PyTorch's own count."""
    with FakeTensorMode():
        model = StableMaskForCausalLM(config).train()
        model.chunked_loss = chunked_loss
        ids = random_ids(8, 512)
        if mesh is not None:
            for part in (*model.model.layers, model):
                fully_shard(part, mesh=mesh)
            tracker = FSDPMemTracker(model)
            tracker.track_inputs(())
        else:
            tracker = MemTracker()
            tracker.track_external(model)
        with tracker:
            for _ in range(2):
                model(ids, labels=ids, use_cache=False).loss.backward()
                tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.fixture
def eight_ranks():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield dist.init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize("chunked_loss", [False, True])
def test_memory_of_a_pass_is_what_pytorch_counts(chunked_loss):
    config = preset_config("160m", num_hidden_layers=3)
    memory = training_memory(config, 8, 512, chunked_loss=chunked_loss)
    estimated = memory["total"] - memory["optimizer"]
    assert tracked_peak(config, chunked_loss) == pytest.approx(estimated, rel=0.05)


@pytest.mark.parametrize("chunked_loss", [False, True])
def test_memory_under_fsdp2_is_what_pytorch_counts(chunked_loss, eight_ranks):
    config = preset_config("160m", num_hidden_layers=3)
    memory = training_memory(config, 8, 512, chunked_loss=chunked_loss, devices=8, fsdp=True)
    estimated = memory["total"] - memory["optimizer"]
    assert tracked_peak(config, chunked_loss, eight_ranks) == pytest.approx(estimated, rel=0.05)


def test_memory_on_several_devices():
    config = preset_config("160m")
    one = training_memory(config, 8, 512)
    shared = training_memory(config, 8, 512, devices=4, context_parallel=4)
    assert shared["activations"] == one["activations"] / 4
    assert shared["logits"] == one["logits"] / 4
    assert shared["buckets"] == one["gradients"] == shared["gradients"]
    sharded = training_memory(config, 8, 512, devices=4, fsdp=True)
    assert sharded["optimizer"] == one["optimizer"] / 4
