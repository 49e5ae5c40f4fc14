import pytest

from stablemask.evaluation import attention_maps, first_token_attention, perplexity
from stablemask.hf import apply_stablemask

from .. import marks
from ..evaluation.test_activations import tiny_llama
from ..models.tiny import random_ids

ARTICLE = " = Title {} = \n \n Words . \n \n = = Part = = \n \n {} \n \n"


def test_split_gives_whole_articles_that_do_not_meet():
    from adapting import split_articles

    articles = [ARTICLE.format(number, "more words " * (20 + number)) for number in range(40)]
    train, test = split_articles("".join(articles))
    count = train.count(" = Title")
    assert train == "".join(articles[:count])
    assert test == "".join(articles[-test.count(" = Title") :])
    total = sum(map(len, articles))
    assert 0.65 < len(train) / total <= 0.7
    assert 0.1 < len(test) / total <= 0.15


@marks.torchao
def test_measure_and_draw(tmp_path):
    from adapting import draw, measure
    from PIL import Image

    results = {}
    for label in ("before", "at once"):
        model, test = tiny_llama(), random_ids(64)
        if label == "at once":
            apply_stablemask(model, gamma=0.1)
        results[label] = measure(
            model, test, random_ids(64), length=16, long_length=32, sequences=1
        )
        expected = first_token_attention(attention_maps(model, test[:16]))
        assert results[label]["first_token"] == pytest.approx(expected.tolist(), rel=1e-5)
        whole = perplexity(model, test, length=16, stride=16)
        assert results[label]["perplexity"]["16"] == pytest.approx(whole.perplexity)
    assert max(results["before"]["pseudo"]) < 1e-6 < min(results["at once"]["pseudo"])
    for path in draw(results, tmp_path):
        assert Image.open(path).size[0] == 1440
