"""Text to ids and back, with the checkpoint's own tokenizer.json, chat template and end tokens.

What users write can never become a control token, and a template never reaches the interpreter.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import jinja2.sandbox
import tokenizers


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file and the field, tensor or token."""


def read_json(path: Path, data: bytes | None = None) -> dict:
    """The JSON object in `path`, or in `data` where what it holds is in memory already.

    Raises CheckpointError where the file is missing or holds something else."""
    try:
        if data is None:
            data = path.read_bytes()
        value = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_files(folder: Path) -> dict[str, bytes]:
    """What the files of a checkpoint hold that are not tensors, by their names; those that are there."""
    names = (*Tokenizer.FILES, "config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


class Tokenizer:
    """The checkpoint's own tokenizer.json, chat template and end tokens.

    `size` is one more than the largest id; `end_ids` are all ids that end a completion; `control` maps the text of each
    added token to its id. Raises CheckpointError naming the file that is missing, malformed or insufficient."""
    FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
             "chat_template.jinja")

    def __init__(self, folder: str | Path, files: dict[str, bytes] | None = None):
        """`files` is what `read_files` gives, where it is at hand; `folder` then only names it."""
        folder = Path(folder)
        if files is None:
            files = read_files(folder)
        self.files = {n: files[n] for n in self.FILES if n in files}                        # written back on save
        raw, config, *others = (read_json(folder / n, files.get(n)) if n == self.FILES[0] or n in files else {}
                                for n in (*self.FILES[:3], "config.json"))
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
            # The same tokenizer without added tokens, for the text of users: to it "<|im_end|>" is ten characters.
            self.plain = tokenizers.Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))
        except Exception as e:                                 # the library raises bare Exception
            raise CheckpointError(f"{folder / 'tokenizer.json'}: not a tokenizer ({e})") from None
        self.plain.no_padding(), self.plain.no_truncation()
        added = self.tokenizer.get_added_tokens_decoder()
        if unfit := [t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word or len(t.content) < 2
                     or {*self.encode(t.content)} & {*added}]:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: added token {unfit[0]!r} depends on its surroundings (lstrip, rstrip "
                                  "or single_word), is a single character, or comes of ordinary text, which is not supported")
        self.size = max(self.tokenizer.get_vocab().values(), default=0) + 1
        self.control = {t.content: i for i, t in added.items()}
        self.control_pattern = re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or r"(?!)")

        special = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        ids = [c.get("eos_token_id") for c in others]           # a number or a list of them, in either file
        ends = [self.control.get(str(special.get("eos_token")))] + [i for x in ids for i in (x if type(x) is list else [x])]
        ends = [i for i in ends if i is not None]
        if not ends or any(type(i) is not int or not 0 <= i < self.size for i in ends):
            raise CheckpointError(f"{folder}: end tokens: expected ids below {self.size} from eos_token_id (config.json, "
                                  f"generation_config.json) or eos_token (tokenizer_config.json), found {ends}")
        self.end_ids = frozenset(ends)
        self.template = self._template(folder, config.get("chat_template"), special)

    def _template(self, folder: Path, source, special: dict) -> jinja2.Template:
        """The chat template, sandboxed from the interpreter, and without a clock: no prompt depends on the day."""
        def refuse(message):
            raise jinja2.TemplateError(message)
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                           extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        env.globals.update(special, raise_exception=refuse)
        try:
            if isinstance(source, list):                       # several named templates: the default one
                source = {t["name"]: t["template"] for t in source}["default"]
            return env.from_string(self.files.get("chat_template.jinja", b"").decode() or source or None)
        except (jinja2.TemplateError, TypeError, AttributeError, LookupError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{folder}: chat_template (tokenizer_config.json or chat_template.jinja): "
                                  f"{'missing' if source is None else e}") from None

    def encode(self, text: str) -> list[int]:
        """Text -> ids, none of them a control token whatever the text says."""
        return self.plain.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Messages -> prompt ids up to where the assistant begins. Control tokens come from the template alone: where a content
        spells one, a mark that occurs nowhere else is put inside it before rendering, and taken out again after the text is
        split at the true ones."""
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in m["content"] for m in messages))
        def disarm(content: str) -> str:
            while self.control_pattern.search(content):        # again, because matches may overlap
                content = self.control_pattern.sub(lambda m: m[0][0] + mark + m[0][1:], content)
            return content
        try:                                                   # thinking is off: programs have a field for it
            text = self.template.render(messages=[m | {"content": disarm(m["content"])} for m in messages],
                                        add_generation_prompt=True, enable_thinking=False)
        except Exception as e:                                 # whatever the template's own code raises
            raise CheckpointError(f"chat template: {type(e).__name__}: {e}") from None
        ids, at = [], 0
        for m in self.control_pattern.finditer(text):
            ids += self.encode(text[at:m.start()].replace(mark, "")) + [self.control[m[0]]]
            at = m.end()
        return ids + self.encode(text[at:].replace(mark, ""))

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
