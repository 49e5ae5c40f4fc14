"""What a model can be told by name: its size, its attention and its positions. Nothing is loaded for it."""

from typing import Any

POSITION_ENCODINGS = ("rope", "alibi", "nope", "learned", "sinusoidal")
ATTENTION_KINDS = ("stablemask", "softmax", "softmax1", "learned-sink")

# From tiny on each within 3 % of its name in parameters; nano and micro, 0.3 and 0.9 million, are for
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
}
