"""The exact gradient against the exact expectation of every estimator (`make oracle` prints it)."""

import numpy as np
import pytest
import torch

import mmgrpo as G
from studies import oracle

WORLD = oracle.World(1)


def name_of(variant):
    return "-".join(map(str, oracle.VARIANTS[variant].values()))


def outcome_of(outcome, **options):
    """The first variant's that has these options."""
    for result, variant in zip(outcome, oracle.VARIANTS):
        if options.items() <= variant.items():
            return result
    raise LookupError(options)


def gradient_of(run):
    """Of its log-probability."""
    return sum(gradient for _, _, gradient in run.calls)


@pytest.fixture(scope="module")
def outcome():
    """Of each variant, with two runs."""
    return oracle.report(WORLD, *oracle.expectation(WORLD, 2, oracle.VARIANTS))


# ------------------------------------------------------------------------------------- the gradient
def test_the_probabilities_of_all_runs_sum_to_one_and_their_scores_to_zero():
    assert sum(r.probability for r in WORLD.runs) == pytest.approx(1, abs=1e-12)
    score = sum(r.probability * gradient_of(r) for r in WORLD.runs)
    assert np.abs(score).max() < 1e-12

    # they are ragged, and some fail
    assert len({len(r.calls) for r in WORLD.runs}) == 3
    assert any(r.failed for r in WORLD.runs)


def expected_reward(place, step):
    """Of the world with one logit moved, which changes no reward."""
    world = oracle.World(1)
    world.logits[place] += step
    world.rewards.seed(1)
    world.runs = world._runs()
    assert [r.reward for r in world.runs] == [r.reward for r in WORLD.runs]
    return sum(r.probability * r.reward for r in world.runs)


def test_the_exact_gradient_is_the_derivative_of_the_expected_reward():
    """By finite differences of the probabilities themselves."""
    gradient = WORLD.gradient.reshape(WORLD.logits.shape)
    for place in np.ndindex(gradient.shape):
        difference = expected_reward(place, 1e-5) - expected_reward(place, -1e-5)
        assert difference / 2e-5 == pytest.approx(gradient[place], abs=1e-8)


# ------------------------------------------------------------------------------------------- biases
@pytest.mark.parametrize("i", range(len(oracle.VARIANTS)), ids=name_of)
def test_an_estimator_is_unbiased_exactly_where_theory_says_so(outcome, i):
    bias = outcome[i]["bias"]
    if oracle.unbiased(oracle.VARIANTS[i]):
        assert bias < 1e-10
    else:
        assert bias > 1e-4


def test_without_leave_one_out_the_unbiased_estimator_is_only_shorter(outcome):
    """By (R - 1) / R, everywhere alike."""
    shorter = []
    for result, variant in zip(outcome, oracle.VARIANTS):
        would_be_unbiased = oracle.unbiased(variant | {"leave_one_out": True})
        if variant["baseline"] == "example" and would_be_unbiased and not variant["leave_one_out"]:
            shorter.append(result)
    result = shorter[0]
    assert result["cosine"] == pytest.approx(1, abs=1e-12)
    assert result["by prompt"] == pytest.approx([0.5] * 4, abs=1e-12)


def test_the_baseline_of_the_group_takes_from_calls_that_few_runs_reach(outcome):
    """Alone in a later group a run has advantage 0; against the example's runs it learns."""
    options = {
        "short_groups": "keep",
        "scale_rewards": "none",
        "normalize": "constant",
        "failing": "trained",
        "leave_one_out": True,
    }
    group = outcome_of(outcome, baseline="group", **options)["by prompt"]
    example = outcome_of(outcome, baseline="example", **options)["by prompt"]

    assert example == pytest.approx([1] * 4)
    assert group[0] == pytest.approx(1)
    assert max(group[1:]) < 0.5
    assert group[3] < group[1] / 2


# -------------------------------------------------------------------------------------- corrections
def the_policy(logits, rng):
    return logits


def biases(sampler) -> dict[str, float]:
    """Of the exact estimator whose runs are a sampler's, by correction."""
    world = oracle.World(1, sampler)
    assert sum(r.sampled for r in world.runs) == pytest.approx(1, abs=1e-12)
    means = oracle.expectation(world, 2, oracle.CORRECTIONS, oracle.estimate_from_sampler)
    outcome = oracle.report(world, *means)
    return {correction: result["bias"] for correction, result in zip(oracle.CORRECTIONS, outcome)}


def test_where_the_sampler_is_the_policy_every_correction_is_exact():
    assert max(biases(the_policy).values()) < 1e-10


def test_what_corrections_make_of_a_sampler_that_is_not_the_policy():
    """Weighing whole runs is exact; factors token by token take part of the bias back."""
    near, far = biases(oracle.noisy(0.03)), biases(oracle.noisy(0.3))
    for bias in (near, far):
        assert bias["whole run"] < 1e-10
        assert 1e-4 < bias["tis"] < 0.95 * bias["ignored"]

    # so does the plain ratio to the sampler, until its clip drops one side of what is further apart
    assert near["none"] == pytest.approx(near["tis"]) == pytest.approx(near["icepop"])
    assert far["none"] > 1.2 * far["ignored"]


def test_the_oracle_takes_the_gradient_of_the_loss_at_the_first_update():
    new = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.double, requires_grad=True)
    advantages = torch.tensor([0.5, -1.0, 2.0], dtype=torch.double)
    weights = torch.tensor([0.1, 0.2, 0.3]).double()
    loss = G.policy_loss(new, new.detach(), advantages, weights)
    (gradient,) = torch.autograd.grad(loss, new)
    assert torch.equal(gradient, -weights * advantages)
