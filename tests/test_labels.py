"""The laws of studies/labels.py: whole labels are scored, and a liking for some is told apart."""

import numpy as np
import pytest
import torch

from program import Task
from studies import labels as L
from tasks.banking77 import Classify, exact_match

LABELS = ["card_lost", "card_declined", "fee"]


def test_a_label_is_scored_whole_behind_the_opening(tokenizer, model):
    queries = [
        {"text": "my card is gone", "intent": "card_lost"},
        {"text": "a fee", "intent": "fee"},
    ]
    task = Task(Classify(tuple(LABELS)), exact_match, queries, queries, [])
    rows = L.label_rows(task, LABELS, queries, tokenizer)
    found = L.label_logprobs(model, rows, tokenizer.size)

    assert found.shape == (2, 3)
    for q, query in enumerate(queries):
        prompt = tokenizer.encode_chat(task.program.classify.messages({"text": query["text"]}))
        for i, label in enumerate(LABELS):
            ids = prompt + tokenizer.encode(f"{L.REASONING}{label}.")
            first = len(prompt) + len(tokenizer.encode(L.REASONING.rstrip()))
            hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
            logp = (hidden @ model.head[: tokenizer.size].T).log_softmax(-1)
            expected = sum(logp[t - 1, ids[t]].item() for t in range(first, len(ids)))
            assert found[q, i] == pytest.approx(expected, abs=1e-3)


def test_a_liking_for_one_label_hides_what_is_known():
    right = np.array([0, 1, 2])
    known = np.where(np.eye(3) > 0, -1.0, -3.0)
    liked = known + np.array([5.0, 0.0, 0.0])

    raw = L.shares(liked, right)
    calibrated = L.shares(liked - liked.mean(0), right)
    assert raw["right"] == pytest.approx(1 / 3)
    assert calibrated["right"] == 1
    assert raw["labels"] < 1.2
    assert calibrated["labels"] == pytest.approx(3)


def test_a_group_is_mixed_where_some_runs_are_right_and_some_are_not():
    p = np.array([[0.5, 0.5], [1 - 1e-12, 1e-12]])
    found = L.shares(np.log(p), np.array([0, 0]))
    assert found["mixed"] == pytest.approx((1 - 2 * 0.5**8) / 2, abs=1e-6)
    assert found["p(right)"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", ""], "--data: expected a folder"),
        (["--data", "nowhere", "--queries", "0"], "--queries: invalid"),
        (["--data", "nowhere", "--demos", "-1"], "--demos: invalid"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(argv, says, capsys):
    try:
        status = L.main(argv)
    except SystemExit as e:
        status = e.code
    assert status == 2
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told
