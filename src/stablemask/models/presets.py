"""What a model can be told by name: its size, its attention and its positions. Nothing is loaded for it."""

from typing import Any

POSITION_ENCODINGS = ("rope", "alibi", "nope", "learned", "sinusoidal")
# Names of settings of the pseudo mass: its horizon is the training context, and these go with it.
NAMED_MASSES: dict[str, dict[str, Any]] = {
    "stablemask-paper": {"gamma": "slopes", "suffix": True},
    "stablemask-zero": {"gamma": 0.0},
}
# Kinds that differ in nothing but the sink logits: a model that is built can change from one to another.
SINK_LOGITS_ALONE = ("stablemask", "softmax", "softmax1")
# With a token of no text in front of every sequence.
FRONT_TOKENS = ("learned-token", "fixed-token")
ATTENTION_KINDS = (
    "stablemask",
    *NAMED_MASSES,
    "softmax",
    "softmax1",
    "learned-sink",
    "key-sink",
    *FRONT_TOKENS,
    "head-gate",
)

# From tiny on each within 3 % of its name in parameters, but for the paper's; nano and micro, 0.3 and 0.9 million, are for
# studies of many models. 50304 is GPT-2's vocabulary, padded to a multiple
# of 64.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "micro": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "71m": {
        "vocab_size": 50304,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
    },
    "160m": {
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    },
    "410m": {
        "vocab_size": 50304,
        "hidden_size": 1024,
        "intermediate_size": 2736,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 1024,
    },
    "1.4b": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 5472,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 1024,
    },
    # The shapes of the paper's appendix E, whose heads together are wider than the model in all but the
    # first. Their parameters are not those of their names: 76.6, 218.8, 337.8 and 2,219 million.
    "paper-71m": {
        "vocab_size": 50257,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 512,
    },
    "paper-160m": {
        "vocab_size": 50257,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "head_dim": 128,
        "max_position_embeddings": 512,
    },
    "paper-400m": {
        "vocab_size": 50257,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 1024,
    },
    "paper-1.4b": {
        "vocab_size": 50257,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 1024,
    },
}
