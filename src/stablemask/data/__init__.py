"""Text for language models: documents from a source, a tokenizer, packed blocks of tokens.

``sources.py`` reads and splits documents, ``tokenizer.py`` trains or loads a tokenizer,
``packing.py`` turns documents into blocks, and ``corpus.py`` joins the three behind a cache. Start
with :func:`prepare_corpus`.
"""

from stablemask.data.corpus import Corpus, prepare_corpus
from stablemask.data.packing import PackedDataset, tokenize_documents
from stablemask.data.sources import load_documents
from stablemask.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "PackedDataset",
    "load_documents",
    "load_tokenizer",
    "prepare_corpus",
    "tokenize_documents",
    "train_tokenizer",
]
