"""Texts that a model writes by itself: prose, code, and chats in which it says the words of both."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.chat_form import ChatForm

# Of one word, most beginnings go on as prose.
CODE = (
    '#!/usr/bin/env python\n"""',
    "import os\nimport sys\n\n",
    "def main():\n    ",
    "class Node:\n    def __init__(self",
    "import numpy as np\n\ndef ",
    "from dataclasses import dataclass\n\n@dataclass\nclass ",
    "import json\nimport logging\n\nlogger =",
    "# Copyright (c)",
    "def test_",
    "#include <stdio.h>\n\nint main(",
    "#include <vector>\n#include <string>\n\nclass ",
    "package main\n\nimport (",
    "public class Main {\n    public static void",
    "function ",
    "const express = require(",
    "<!DOCTYPE html>\n<html>\n<head>",
    "SELECT id, name FROM ",
    "CREATE TABLE ",
    "use std::collections::HashMap;\n\nfn ",
    "import React from 'react';\n\n",
    "    def __init__(self, ",
    "    if not isinstance(",
    "        raise ValueError(",
    "#!/bin/bash\n\n",
    "if __name__ == '__main__':\n    ",
    "import unittest\n\nclass Test",
    "from typing import List, Optional\n\n",
    "try:\n    ",
    "```python\ndef ",
    '{\n  "name": ',
    "import re\n\n",
    "from collections import defaultdict\n\n",
    "import argparse\n\nparser = ",
    "async def ",
)

# Of the first words of prose, where the model chooses them; flatter than the rest, for variety.
FIRST_TEMPERATURE = 1.2


class Author:
    """Writes batches of texts with a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prefix: int | None,
        length: int,
        temperature: float,
        form: ChatForm | None,
        tick: Callable[[int], Any],
    ) -> None:
        self.model, self.prefix, self.length = model, prefix, length
        self.temperature, self.form, self.tick = temperature, form, tick
        rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        added = tokenizer.added_tokens_decoder
        ends = model.generation_config.eos_token_id
        special = {number for number, token in added.items() if token.special}
        special |= {*tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}
        known = {number for number in tokenizer.get_vocab().values() if number < rows}
        self.forbidden = torch.tensor(
            [number for number in range(rows) if number in special or number not in known],
            device=model.device, dtype=torch.long,
        )  # fmt: skip
        self.words = sorted(known - special - set(added) - {prefix})
        # A space at the end belongs to the token of the next word.
        code = (tokenizer.encode(text.rstrip(" "), add_special_tokens=False) for text in CODE)
        self.code = [ids[: length - 1] for ids in code if ids[0] != prefix]
        # What opens chats is followed by the name of a role; what begins every text, by text.
        begins_texts = tokenizer.encode("")[:1] == [prefix]
        opens_chats = form is not None and form.opening[0] == prefix and not begins_texts
        self.first = None if prefix is None or opens_chats else self._first_words(prefix)

    def write(self, kind: str, rows: int, rng: np.random.Generator) -> np.ndarray:
        """Texts of one kind, ``(rows, length)``, int32."""
        form = self.form if kind == "chats" else None
        if form is not None:
            beginnings = [form.opening] * rows
        elif kind == "code":
            beginnings = [self.code[number] for number in rng.integers(len(self.code), size=rows)]
        else:
            words = rng.choice(self.words, size=rows)
            if self.first is not None:
                chosen = rng.choice(len(self.first), size=rows, p=self.first)
                words = np.where(np.arange(rows) % 4 > 0, chosen, words)
            beginnings = [[word] for word in words.tolist()]
        front = [] if self.prefix in (None, beginnings[0][0]) else [self.prefix]
        shared = min(map(len, beginnings))
        prompts = torch.tensor(
            [front + ids[:shared] for ids in beginnings], device=self.model.device
        )
        sampler = Sampler(
            [ids[shared:] for ids in beginnings],
            None if form is None else form.turns,
            self.forbidden,
            self.temperature,
            torch.Generator(prompts.device).manual_seed(int(rng.integers(2**63))),
            self.tick,
        )
        # All that a model's own settings may hold, such as end tokens and penalties, is left out by this.
        self.model.generation_config = GenerationConfig(max_new_tokens=self.length - shared)
        output: Any = self.model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            logits_processor=LogitsProcessorList([sampler]),
        )
        self.tick(rows * shared)
        return output[:, len(front) :].to("cpu", torch.int32).numpy()

    def _first_words(self, prefix: int) -> np.ndarray:
        """The model's own probabilities of a text's first token, ``(vocabulary,)``, float64."""
        logits = (
            self.model(torch.tensor([[prefix]], device=self.model.device)).logits[0, -1].double()
        )
        logits[self.forbidden] = -math.inf
        logits[prefix] = -math.inf
        return (logits / FIRST_TEMPERATURE).softmax(-1).cpu().numpy()


class Sampler(LogitsProcessor):
    """Makes the likeliest token, which ``generate`` takes, a sampled one, or one that is laid down.

    The highest of log-probabilities with Gumbel noise is a sample; by this it comes from a generator of
    our own, and the global random state stays as it was.

    Args:
        laid_down: the next tokens of each row, whatever the model says.
        turns: as of :class:`ChatForm`; None outside chats.
    """

    def __init__(
        self,
        laid_down: list[list[int]],
        turns: tuple[list[int], list[int]] | None,
        forbidden: Tensor,
        temperature: float,
        generator: torch.Generator,
        tick: Callable[[int], Any],
    ) -> None:
        self.laid_down = [deque(ids) for ids in laid_down]
        self.turns, self.forbidden, self.tick = turns, forbidden, tick
        self.temperature, self.generator = temperature, generator
        self.speaker = [0] * len(laid_down)
        self.spoken = [False] * len(laid_down)  # the last token is of the speaker's own words

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Of uniform numbers, as `exponential_` takes several times as long on a CPU.
        noise = torch.empty_like(scores).uniform_(generator=self.generator).log_().neg_().log_()
        scores = scores.div_(self.temperature).sub_(noise)
        if self.turns is None:
            scores[:, self.forbidden] = -math.inf
        else:
            self._end_turns(self.turns, input_ids[:, -1].tolist())
            ends = [[self.turns[speaker][0]] for speaker in self.speaker]
            index = torch.tensor(ends, device=scores.device)
            # Nobody says nothing.
            silent = ~torch.tensor(self.spoken, device=scores.device)[:, None]
            ending = scores.gather(1, index).masked_fill(silent, -math.inf)
            scores[:, self.forbidden] = -math.inf
            scores.scatter_(1, index, ending)
        for row, tokens in enumerate(self.laid_down):
            self.spoken[row] = not tokens
            if tokens:
                scores[row, tokens.popleft()] = math.inf
        self.tick(len(scores))
        return scores

    def _end_turns(self, turns: tuple[list[int], list[int]], last: list[int]) -> None:
        for row, speaker in enumerate(self.speaker):
            if self.spoken[row] and last[row] == turns[speaker][0]:
                self.laid_down[row].extend(turns[speaker][1:])
                self.speaker[row], self.spoken[row] = 1 - speaker, False
