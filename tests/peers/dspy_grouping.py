"""DSPy's own GRPO grouping behind the `group` format: `make conformance IMPL=".venv-peers/bin/python tests/peers/dspy_grouping.py"`.

Runs dspy.GRPO.compile for one step on the trajectories given, with the sampling of runs and the training service replaced,
and prints the groups that would be sent to training. DSPy leaves advantages to the service, so members carry none.
"""
import json
import logging
import sys
import types
from collections import defaultdict

import dspy
from dspy.teleprompt import bootstrap_trace, grpo

logging.disable(logging.CRITICAL)


class Job:
    """Stands for the training service: always ready, forgets everything."""
    def get_status(self):
        return {"pending_batch_ids": [0]}

    def step(self, **_):
        pass

    terminate = step


class Spy:
    """Stands for GRPO's random numbers; sees all groups of a step when they are shuffled."""
    def __init__(self, rng):
        self.rng, self.groups = rng, []

    def sample(self, population, k):
        self.groups = list(population)
        return self.groups

    def __getattr__(self, name):
        return getattr(self.rng, name)


def group(trajectories: list[dict], mode: str) -> list[dict]:
    """Groups as lists of {rollout, call}; raises what DSPy raises."""
    names = sorted({c["module"] for t in trajectories for c in t["calls"]})
    examples = list(dict.fromkeys(t["example"] for t in trajectories))
    size = max(sum(t["example"] == e for t in trajectories) for e in examples)
    lm = dspy.LM("openai/none", api_key="none")
    lm.reinforce = lambda train_kwargs: Job()
    program = dspy.Module()
    for name in names:                                      # other instructions, so other signatures: DSPy tells them apart
        predictor = dspy.Predict(dspy.Signature("x -> y", f"module {name}"))
        predictor.lm = lm
        setattr(program, f"module_{name}", predictor)
    predictors = {name: getattr(program, f"module_{name}") for name in names}

    def traces(dataset, **_):
        data = []
        for t in trajectories:
            if t["status"] == "tool_error":                 # the rollout is dropped
                continue
            trace = []
            for i, c in enumerate(t["calls"]):
                failed = t["status"] == "format_error" and i == len(t["calls"]) - 1
                output = bootstrap_trace.FailedPrediction("?", t["reward"]) if failed else dspy.Prediction(y="y")
                trace.append((predictors[c["module"]], {"x": json.dumps([t["example"], t["rollout"], i])}, output))
            data.append({"example_ind": examples.index(t["example"]), "example": None, "prediction": None, "trace": trace,
                         "score": t["reward"]})
        return data
    grpo.bootstrap_trace_data = lambda dataset, **options: traces(dataset, **options)
    trainer = grpo.GRPO(metric=lambda *_: 0, exclude_demos=True, num_train_steps=1, num_dspy_examples_per_grpo_step=len(examples),
                        num_rollouts_per_grpo_step=size, variably_invoked_predictor_grouping_mode=mode,
                        variably_invoked_predictor_fill_strategy="randint")
    trainer.rng = spy = Spy(trainer.rng)
    trainer.report_validation_metrics = types.MethodType(lambda *_, **__: None, trainer)
    trainer.select_training_sample_and_update_shuffled_trainset = lambda **_: [dspy.Example(x=e).with_inputs("x") for e in examples]
    trainer.compile(program, trainset=[dspy.Example(x=e).with_inputs("x") for e in examples])
    groups, invocations = [], defaultdict(int)
    for members in spy.groups:
        found = [json.loads(m["messages"][-1]["content"].split("<x>\n")[1].split("\n</x>")[0]) for m in members]
        by_example = {(t["example"], t["rollout"]): t for t in trajectories}
        module = by_example[found[0][0], found[0][1]]["calls"][found[0][2]]["module"]
        key = found[0][0], module
        groups.append({"example": key[0], "module": module, "invocation": invocations[key],
                       "members": [{"rollout": r, "call": c} for _, r, c in found]})
        invocations[key] += 1
    return groups


if __name__ == "__main__":
    mode = {"keep": "ragged"}.get(sys.argv[sys.argv.index("--short-groups") + 1] if "--short-groups" in sys.argv else "keep")
    mode = mode or sys.argv[sys.argv.index("--short-groups") + 1]
    print(json.dumps({"groups": group(json.load(sys.stdin)["trajectories"], mode), "excluded": []}))
