"""The laws of a supervised start: what it trains on, its gradient, and what it leaves."""

import dataclasses

import pytest
import torch
from conftest import make_model
from programs import Two

import mmgrpo as G
import model as M
from program import InputError, Module, Task, parse
from prompts import imitate as I
from prompts.start import shuffled
from run import cli
from run.loading import load_task

CONFIG = G.Config(
    examples=3, imitated=6, imitation_steps=3, lr=1e-3, warmup=0, temperature=0.6, clip_norm=1e9
)


def always_one(example, prediction):
    return 1.0


def shown(example):
    """An example shows one call of `ask` and two of `note`."""
    x = example["x"]
    asked = {"x": x, "y": f"yes {x}"}
    return {"ask": [asked], "note": [asked | {"z": f"{i} of {x}"} for i in range(2)]}


def shows_nothing(example):
    return {}


def make_task(demonstrate=shown):
    examples = [{"x": f"word {i}"} for i in range(12)]
    return Task(Two(), always_one, examples, [{"x": "dev"}], [], demonstrate=demonstrate)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def calls_of(task, tokenizer, examples):
    shown_calls = I.shown_calls(task, examples, tokenizer, context=4096)
    return [call for of_example in shown_calls for call in of_example]


def test_what_is_imitated_is_what_the_program_would_read(tokenizer):
    task = make_task()
    calls = calls_of(task, tokenizer, task.train[:2])
    modules = task.program.modules()

    assert [module for module, _ in calls] == ["ask", "note", "note"] * 2
    for module, completion in calls:
        outputs = parse(modules[module].signature, completion.text)
        assert all(str(value) in completion.text for value in outputs.values())
        assert tokenizer.encode(completion.text) == completion.token_ids[:-1]
    ask = calls[0][1]
    assert ask.prompt_ids == tokenizer.encode_chat(modules["ask"].messages({"x": "word 0"}))


def test_an_imitated_answer_ends_as_the_chat_template_ends_a_turn(tokenizer):
    end = I.end_of_turn(tokenizer)
    turn = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert end in tokenizer.end_ids
    assert end in turn
    task = make_task()
    assert all(c.token_ids[-1] == end for _, c in calls_of(task, tokenizer, task.train[:2]))


def test_of_several_end_tokens_the_written_one_is_taken():
    class TwoEnds:
        end_ids = frozenset({3, 7})

        def encode_chat(self, messages):
            return [1, 7, 2]

    class Unwritten(TwoEnds):
        def encode_chat(self, messages):
            return [1, 2]

    assert I.end_of_turn(TwoEnds()) == 7
    assert I.end_of_turn(Unwritten()) == 3


def test_the_gradient_is_that_of_the_cross_entropy(tokenizer, model):
    """The mean over calls of the mean over tokens, at temperature 1."""
    task = make_task()
    config = dataclasses.replace(CONFIG, temperature=1.0, correction="none")
    calls = calls_of(task, tokenizer, task.train[:2])
    rows = I.rows_of(calls, model, tokenizer, config)
    gradient, _ = G.step_gradient(model, rows, config, tokenizer.size)

    losses = []
    for _, completion in calls:
        ids = completion.prompt_ids + completion.token_ids
        hidden = model(torch.tensor([ids[:-1]]), torch.arange(len(ids) - 1)[None])[0]
        logits = hidden[len(completion.prompt_ids) - 1 :] @ model.head[: tokenizer.size].T
        target = torch.tensor(completion.token_ids)
        losses.append(torch.nn.functional.cross_entropy(logits, target))
    loss = sum(losses) / len(losses)
    expected = torch.autograd.grad(loss, list(model.parameters()))

    for mine, theirs in zip(gradient, expected):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)


def test_the_surprise_is_that_before_each_update_and_falls(tokenizer, model):
    task = make_task()
    config = dataclasses.replace(CONFIG, examples=6, imitation_steps=12)
    seen = []
    first = calls_of(task, tokenizer, shuffled(task, 0)[0])
    rows = I.rows_of(first, model, tokenizer, dataclasses.replace(config, temperature=1.0))
    logprobs = [p for row in rows for p in row.completion.logprobs]

    surprises, examples = I.imitate(task, model, tokenizer, config, lambda *told: seen.append(told))

    assert examples == 6

    assert surprises[0] == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-5)
    assert surprises[-1] < 0.7 * surprises[0]
    # and that after the last one
    assert seen == list(enumerate(surprises[:-1]))
    assert len(surprises) == config.imitation_steps + 1


def test_the_same_seed_gives_the_same_weights(tokenizer):
    trained = []
    for seed in (0, 0, 1):
        model = make_model(vocab_size=tokenizer.size)
        I.imitate(make_task(), model, tokenizer, dataclasses.replace(CONFIG, seed=seed))
        trained.append(weights(model))
    assert all(map(torch.equal, trained[0], trained[1]))
    assert not all(map(torch.equal, trained[0], trained[2]))


def test_no_more_examples_are_imitated_than_asked_for(tokenizer, model):
    asked = []

    def remember(example):
        asked.append(example["x"])
        return shown(example)

    task = make_task(remember)
    config = dataclasses.replace(CONFIG, imitated=2, imitation_steps=1)
    I.imitate(task, model, tokenizer, config)
    assert set(asked) == {example["x"] for example in shuffled(task, 0)[0][:2]}


def test_an_example_that_a_prompt_shows_is_not_imitated(tokenizer, model, monkeypatch):
    task = make_task()
    example = shuffled(task, 0)[0][0]
    task.program.ask.demos = shown(example)["ask"]
    imitated = []
    rows_of = I.rows_of

    def remember(calls, *rest):
        imitated.extend(completion.text for _, completion in calls)
        return rows_of(calls, *rest)

    monkeypatch.setattr(I, "rows_of", remember)
    config = dataclasses.replace(CONFIG, imitated=12, imitation_steps=1, examples=6)
    I.imitate(task, model, tokenizer, config)
    assert imitated
    assert not any(f"{example['x']}\n" in text for text in imitated)


def test_a_task_that_shows_nothing_is_refused(tokenizer, model):
    before = weights(model)
    with pytest.raises(InputError, match="Task.demonstrate"):
        I.imitate(make_task(shows_nothing), model, tokenizer, CONFIG)
    assert all(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize(
    "form, given", [("str", {}), ("str", {"y": None}), ("Literal['yes', 'no']", {"y": "gone"})]
)
def test_a_demonstration_that_cannot_be_read_back_is_left_out(tokenizer, model, form, given):
    """What fills a gap in a prompt must not become what the LM says."""

    def gap(example):
        return {"ask": [{"x": example["x"]} | given], "note": []}

    task = make_task(gap)
    task.program.ask = Module(f"x -> y: {form}")
    with pytest.raises(InputError, match="with all its outputs"):
        I.imitate(task, model, tokenizer, CONFIG)


def test_a_demonstration_beyond_the_context_is_left_out(tokenizer):
    task = make_task()
    [ask, *notes] = calls_of(task, tokenizer, task.train[:1])
    length = len(ask[1].prompt_ids) + len(ask[1].token_ids)
    assert all(length < len(c.prompt_ids) + len(c.token_ids) for _, c in notes)
    assert len(I.shown_calls(task, task.train[:1], tokenizer, length)[0]) == 1
    assert not I.shown_calls(task, task.train[:1], tokenizer, length - 1)


def test_a_training_that_diverges_says_so_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "start"
    argv = ["imitate", "--task", "banking77", "--imitation-steps", "1", "--examples", "2"]
    assert cli.main([*argv, "--lr", "1e18", "--warmup", "0", "--out", str(out)]) == 2
    assert "diverged after step 1; try a smaller --lr" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_found_before_the_training(monkeypatch, capsys):
    monkeypatch.setattr(cli, "imitate", None)
    assert cli.main(["imitate", "--task", "banking77", "--out", "/dev/null/x"]) == 2
    assert "/dev/null" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise M.safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(M.safetensors.torch, "save_file", full)
    argv = ["imitate", "--task", "banking77", "--imitation-steps", "1", "--examples", "2"]
    assert cli.main([*argv, "--out", str(tmp_path / "start")]) == 2
    assert "start: cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_checkpoint_and_never_over_another(tmp_path, capsys):
    out = tmp_path / "start"
    argv = ["imitate", "--task", "banking77", "--imitation-steps", "2", "--examples", "2"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nats a token of the demonstrations of 64 training examples, 2 steps of 2" in said

    trained, _ = M.load_pretrained(out)
    begun, _ = M.load_pretrained(load_task({"task": "banking77"})[1].model)
    assert trained.config == begun.config
    assert not all(map(torch.equal, weights(trained), weights(begun)))
    assert all(p.isfinite().all() for p in trained.parameters())

    kept = (out / "model.safetensors").read_bytes()
    assert cli.main([*argv, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == kept
    assert cli.main(argv) == 2
    assert "--out" in capsys.readouterr().err


def test_lora_leaves_merged_weights(tmp_path, capsys):
    out = tmp_path / "start"
    argv = ["imitate", "--task", "banking77", "--imitation-steps", "1", "--examples", "2"]
    assert cli.main([*argv, "--lora-rank", "2", "--lr", "0.01", "--out", str(out)]) == 0
    trained, _ = M.load_pretrained(out)
    begun, _ = M.load_pretrained(load_task({"task": "banking77"})[1].model)
    names = [name for name, _ in trained.named_parameters()]
    assert names == [name for name, _ in begun.named_parameters()]
    assert not all(map(torch.equal, weights(trained), weights(begun)))
