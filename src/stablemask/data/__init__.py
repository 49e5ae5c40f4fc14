"""Text for language models: documents from a source, a tokenizer, packed blocks of tokens.

``files.py`` reads files, ``sources.py`` finds documents, ``splitting.py`` holds some of them out,
``tokenizer.py`` trains or loads a tokenizer, ``packing.py`` turns documents into blocks, ``mixture.py``
mixes sources, and ``corpus.py`` joins them behind a cache. ``stream.py`` does without one. ``batches.py``
says which blocks a step trains on. Start with :func:`prepare_corpus`.
"""

from stablemask.data.corpus import Corpus, prepare_corpus, prepare_mixture
from stablemask.data.mixture import Mixture
from stablemask.data.packing import PackedDataset, tokenize_documents
from stablemask.data.sources import load_documents
from stablemask.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "Mixture",
    "PackedDataset",
    "load_documents",
    "load_tokenizer",
    "prepare_corpus",
    "prepare_mixture",
    "tokenize_documents",
    "train_tokenizer",
]
