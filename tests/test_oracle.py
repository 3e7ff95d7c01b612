"""The exact gradient against the exact expectation of every estimator (tests/oracle.py prints all of it)."""
import numpy as np
import pytest
import torch

import mmgrpo as G
from studies import oracle

WORLD = oracle.World(1)


@pytest.fixture(scope="module")
def outcome():
    return oracle.report(WORLD, *oracle.expectation(WORLD, 2, oracle.VARIANTS))


def test_the_probabilities_of_all_runs_sum_to_one_and_their_scores_to_zero():
    assert sum(r.probability for r in WORLD.runs) == pytest.approx(1, abs=1e-12)
    score = sum(r.probability * sum(g for _, _, g in r.calls) for r in WORLD.runs)
    assert np.abs(score).max() < 1e-12
    assert len({len(r.calls) for r in WORLD.runs}) == 3 and any(r.failed for r in WORLD.runs)          # ragged, with failures


def test_the_exact_gradient_is_the_derivative_of_the_expected_reward():
    """By finite differences of the probabilities themselves."""
    value = lambda w: sum(r.probability * r.reward for r in w.runs)
    for i in np.ndindex(WORLD.logits.shape):
        up, down = oracle.World(1), oracle.World(1)
        for w, step in ((up, 1e-5), (down, -1e-5)):
            w.logits[i] += step
            rewards = [r.reward for r in WORLD.runs]
            w.rewards.seed(1)
            w.runs = w._runs()
            assert [r.reward for r in w.runs] == rewards
        assert (value(up) - value(down)) / 2e-5 == pytest.approx(WORLD.gradient.reshape(WORLD.logits.shape)[i], abs=1e-8)


@pytest.mark.parametrize("i", range(len(oracle.VARIANTS)), ids=lambda i: "-".join(str(v) for v in oracle.VARIANTS[i].values()))
def test_an_estimator_is_unbiased_exactly_where_theory_says_so(outcome, i):
    assert (outcome[i]["bias"] < 1e-10) == oracle.unbiased(oracle.VARIANTS[i])
    if not oracle.unbiased(oracle.VARIANTS[i]):
        assert outcome[i]["bias"] > 1e-4


def test_without_leave_one_out_the_unbiased_estimator_is_only_shorter(outcome):
    """By (R - 1) / R, everywhere alike."""
    o = next(o for o, v in zip(outcome, oracle.VARIANTS) if v["baseline"] == "example" and oracle.unbiased(v | {"leave_one_out": True})
             and not v["leave_one_out"])
    assert o["cosine"] == pytest.approx(1, abs=1e-12) and o["by prompt"] == pytest.approx([0.5] * 4, abs=1e-12)


def test_the_baseline_of_the_group_takes_from_calls_that_few_runs_reach(outcome):
    """A run that is alone in a later group has advantage 0; against the example's runs it learns."""
    pick = lambda **o: next(r for r, v in zip(outcome, oracle.VARIANTS) if all(v[k] == x for k, x in o.items()))
    common = dict(short_groups="keep", scale_rewards="none", normalize="constant", failing="trained", leave_one_out=True)
    group, example = (pick(baseline=b, **common)["by prompt"] for b in ("group", "example"))
    assert example == pytest.approx([1] * 4) and group[0] == pytest.approx(1) and max(group[1:]) < 0.5 and group[3] < group[1] / 2


def biases(sampler) -> dict[str, float]:
    """Of the exact estimator whose runs are a sampler's, by correction."""
    world = oracle.World(1, sampler)
    assert sum(r.sampled for r in world.runs) == pytest.approx(1, abs=1e-12)
    outcome = oracle.report(world, *oracle.expectation(world, 2, oracle.CORRECTIONS, oracle.estimate_from_sampler))
    return {c: r["bias"] for c, r in zip(oracle.CORRECTIONS, outcome)}


def test_where_the_sampler_is_the_policy_every_correction_is_exact():
    assert max(biases(lambda logits, rng: logits).values()) < 1e-10


def test_what_corrections_make_of_a_sampler_that_is_not_the_policy():
    """Weighing whole runs is exact. Factors token by token take part of the bias back; so does the plain ratio to the sampler,
    until the two are further apart than its clip, which then drops one side of them."""
    near, far = (biases(oracle.noisy(size)) for size in (0.03, 0.3))
    for b in (near, far):
        assert b["whole run"] < 1e-10 and 1e-4 < b["tis"] < 0.95 * b["ignored"]
    assert near["none"] == pytest.approx(near["tis"]) == pytest.approx(near["icepop"])
    assert far["none"] > 1.2 * far["ignored"]


def test_the_gradient_of_the_loss_at_the_first_update_is_what_the_oracle_takes():
    new = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.double, requires_grad=True)
    a, w = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    gradient, = torch.autograd.grad(G.policy_loss(new, new.detach(), a, w), new)
    assert torch.equal(gradient, -w * a)
