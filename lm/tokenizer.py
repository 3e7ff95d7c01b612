"""Text to ids and back, with the checkpoint's own tokenizer.json, chat template and end tokens.

What users write can never become a control token, and a template never reaches the interpreter.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import jinja2
import jinja2.sandbox
import tokenizers


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used.

    The message names the file and the field, tensor or token.
    """


def read_json(path: Path, data: bytes | None = None) -> dict:
    """The JSON object in `path`, or in `data` where what it holds is in memory already.

    Raises CheckpointError where the file is missing or holds something else.
    """
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
    """What the files of a checkpoint hold that are not tensors, by their names.

    Only those that are there.
    """
    contents = {}
    for name in (*Tokenizer.FILES, "config.json"):
        path = folder / name
        if path.is_file():
            contents[name] = path.read_bytes()
    return contents


def special_tokens(settings: dict) -> dict:
    """bos_token, eos_token and so on of tokenizer_config.json, each as the text of a token."""
    special = {}
    for key, value in settings.items():
        if key.endswith("_token"):
            special[key] = value.get("content") if isinstance(value, dict) else value
    return special


def sandbox(special: dict) -> jinja2.Environment:
    """Where chat templates run: no way to the interpreter, and no clock.

    So no prompt depends on the day. `special` are the tokens that a template may name.
    """

    def refuse(message):
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    env.globals.update(special, raise_exception=refuse)
    return env


def _unused_character(texts: list[str]) -> str:
    """One of Unicode's private characters that none of the texts has."""
    candidates = chain(range(0xE000, 0xF8FF), range(0xF0000, 0x10FFFE))
    return next(c for c in map(chr, candidates) if not any(c in text for text in texts))


class Tokenizer:
    """The checkpoint's own tokenizer.json, chat template and end tokens.

    `size` is one more than the largest id; `end_ids` are all ids that end a completion; `control`
    maps the text of each added token to its id. Raises CheckpointError naming the file that is
    missing, malformed or insufficient.
    """

    FILES = (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )

    def __init__(self, folder: str | Path, files: dict[str, bytes] | None = None):
        """`files` is what `read_files` gives, where it is at hand; `folder` then only names it."""
        folder = Path(folder)
        if files is None:
            files = read_files(folder)
        # written back on save
        self.files = {name: files[name] for name in self.FILES if name in files}

        def optional(name: str) -> dict:
            return read_json(folder / name, files[name]) if name in files else {}

        raw = read_json(folder / "tokenizer.json", files.get("tokenizer.json"))
        settings = optional("tokenizer_config.json")
        generation = optional("generation_config.json")
        config = optional("config.json")

        self._read_tokens(folder / "tokenizer.json", raw)
        special = special_tokens(settings)
        self.end_ids = self._read_end_ids(folder, special.get("eos_token"), (generation, config))
        self.template = self._read_template(folder, settings.get("chat_template"), special)

    def _read_tokens(self, path: Path, raw: dict) -> None:
        """Take over tokenizer.json: its tokens, and which of them are control tokens."""
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
            # The same tokenizer without added tokens, for the text of users: to it "<|im_end|>" is
            # ten characters.
            self.plain = tokenizers.Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))
        # the library raises bare Exception
        except Exception as e:
            raise CheckpointError(f"{path}: not a tokenizer ({e})") from None
        self.plain.no_padding()
        self.plain.no_truncation()

        added = self.tokenizer.get_added_tokens_decoder()
        for token in added.values():
            depends = token.lstrip or token.rstrip or token.single_word
            ordinary = not added.keys().isdisjoint(self.encode(token.content))
            if depends or len(token.content) < 2 or ordinary:
                raise CheckpointError(
                    f"{path}: added token {token.content!r} depends on its surroundings (lstrip, "
                    "rstrip or single_word), is a single character, or comes of ordinary text, "
                    "which is not supported"
                )
        self.size = max(self.tokenizer.get_vocab().values(), default=0) + 1
        self.control = {token.content: i for i, token in added.items()}
        # the longest first, for one may begin as another does; without any a pattern of nothing
        longest_first = sorted(self.control, key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _read_end_ids(
        self, folder: Path, eos_token: object, configs: tuple[dict, ...]
    ) -> frozenset[int]:
        """All ids that any of the files says to end a completion."""
        ends = [self.control.get(str(eos_token))]
        for config in configs:
            # a number or a list of them, in either file
            ids = config.get("eos_token_id")
            ends += ids if type(ids) is list else [ids]
        ends = [i for i in ends if i is not None]
        if not ends or any(type(i) is not int or not 0 <= i < self.size for i in ends):
            raise CheckpointError(
                f"{folder}: end tokens: expected ids below {self.size} from eos_token_id "
                "(config.json, generation_config.json) or eos_token (tokenizer_config.json), "
                f"found {ends}"
            )
        return frozenset(ends)

    def _read_template(self, folder: Path, source, special: dict) -> jinja2.Template:
        """The chat template, of chat_template.jinja or else of `source`."""
        # what Jinja raises, and Python where a template is of a wrong type
        broken = (jinja2.TemplateError, TypeError, AttributeError, LookupError, UnicodeDecodeError)
        try:
            # several named templates: the default one
            if isinstance(source, list):
                source = {named["name"]: named["template"] for named in source}["default"]
            text = self.files.get("chat_template.jinja", b"").decode() or source or None
            return sandbox(special).from_string(text)
        except broken as e:
            raise CheckpointError(
                f"{folder}: chat_template (tokenizer_config.json or chat_template.jinja): "
                f"{'missing' if source is None else e}"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Text -> ids, none of them a control token whatever the text says."""
        # halves of a character, which Python's strings may hold, become question marks
        whole = text.encode("utf-8", "replace").decode()
        return self.plain.encode(whole, add_special_tokens=False).ids

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Messages -> prompt ids up to where the assistant begins.

        Control tokens come from the template alone.
        """
        # Where a content spells a control token, a mark that occurs nowhere else is put inside it
        # before rendering, and taken out again after the text is split at the true ones.
        mark = _unused_character([message["content"] for message in messages])
        try:
            disarmed = [m | {"content": self._disarm(m["content"], mark)} for m in messages]
            # thinking is off: programs have a field for it
            text = self.template.render(
                messages=disarmed, add_generation_prompt=True, enable_thinking=False
            )
        # whatever the template's own code raises
        except Exception as e:
            raise CheckpointError(f"chat template: {type(e).__name__}: {e}") from None

        ids = []
        end = 0
        for control in self.control_pattern.finditer(text):
            ids += self.encode(text[end : control.start()].replace(mark, ""))
            ids.append(self.control[control[0]])
            end = control.end()
        return ids + self.encode(text[end:].replace(mark, ""))

    def _disarm(self, content: str, mark: str) -> str:
        """`content` with the mark behind the first character of each control token it spells."""
        # again, because matches may overlap
        while self.control_pattern.search(content):
            content = self.control_pattern.sub(lambda m: m[0][0] + mark + m[0][1:], content)
        return content

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
