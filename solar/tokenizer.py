"""Text to token ids and back, the streaming way back, and the prompt templates.

Two kinds of file are read: a sentencepiece model (Mistral, Llama 2), whose own library is the truth for ids and text,
and Hugging Face's `tokenizer.json` (Llama 3, SmolLM) through the optional package `tokenizers`.

    tok = Tokenizer("path/to/model")                       tok.encode("Hello") -> [1, 22557]
    stream = StreamDecoder(tok, ids)                       stream.push(id) -> the text that this id completes
    render("solar", "Hi")                                  "### User:\\nHi\\n\\n### Assistant:\\n"
    encode_prompt(tok, "solar", "Hi")                      the ids of that prompt, as the model expects them
    encode_chat(tok, "solar", messages)                    the ids of a conversation, and which of them are learned
"""

import codecs
import json
import operator
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from solar.jsonfile import brief, read_json

MAX_BYTES = 64 << 20  # the largest tokenizer.json has half of it: do not read 10 GB of weights named by mistake
MAX_ID = 1 << 24  # ids are rows of a matrix
MARKER = re.compile(r"<[|｜].+[|｜]>")  # <|im_start|>, <|eot_id|>: meant as a control token, whatever its flags say

# Byte-level BPE writes each byte as one printable character: printable Latin-1 as itself, the rest from U+0100 on.
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_CHAR = {chr(b): b for b in _PLAIN} | {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*_PLAIN}))}

# sentencepiece writes one U+FFFD for every byte that is not UTF-8; "replace" writes one for a whole broken character.
codecs.register_error("fffd_per_byte", lambda e: ("\ufffd" * (e.end - e.start), e.end))


class Tokenizer:
    """The tokenizer of a model directory, or one tokenizer file.

    In a directory the first of these counts: `tokenizer.model`, the highest `tokenizer.model.v*` (both sentencepiece),
    `tokenizer.json`. `tokenizer_config.json` and `added_tokens.json` beside the file are read if they are there.

    Attributes: `path` (of the file), `vocab_size` (highest id + 1), `bos_id` and `eos_id` (int or None), `adds_bos`
    (whether this tokenizer puts BOS before a text by its own habit; pass it on: `encode(text, bos=tok.adds_bos)`).
    Raises FileNotFoundError if there is no tokenizer, ValueError with the file's name if it is none that we can read.
    """

    def __init__(self, path: str | Path):
        self.path = path = _find(Path(path))
        config = _beside(path, "tokenizer_config.json")
        self._sp = self._hf = None
        self._ids: dict[str, int] = {}  # piece -> id
        self._bytes: dict[int, bytes] = {}  # id -> what it adds to the text (a hole in the vocabulary: absent)
        self._spelled: dict[int, list[int]] = {}  # id that text must not become -> the ids of its characters
        self._drops: set[int] = set()  # of these ids, the one that begins a text loses its leading space
        self._drops_all = False  # ... and so does the next one, as long as nothing has been written
        self._errors = "fffd_per_byte"
        try:
            (self._load_json if path.suffix == ".json" else self._load_sentencepiece)(path, config)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a tokenizer (damaged: a piece that is not UTF-8)") from None
        if not self._bytes:
            raise ValueError(f"{path}: not a tokenizer (its vocabulary is empty)")
        self.vocab_size = max(self._bytes) + 1
        if self.vocab_size > MAX_ID:
            raise ValueError(f"{path}: an id of {self.vocab_size - 1}; must be below {MAX_ID}")

    def __reduce__(self):  # to a worker process by name: a pickled `tokenizers` object loses encode_special_tokens
        return Tokenizer, (self.path,)

    def _load_sentencepiece(self, path: Path, config: dict):
        self._sp = sp = sentencepiece.SentencePieceProcessor()
        data = path.read_bytes()
        try:
            sp.LoadFromSerializedProto(data)
            whole = {0x0A, 0x12, 0x1A} <= _parts(data)
        except (RuntimeError, IndexError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: not a sentencepiece model (cut short, damaged or another format)")
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id()))
        self.adds_bos = self.bos_id is not None and config.get("add_bos_token") is not False
        self._ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
        for piece, i in self._ids.items():  # unknown renders as " ⁇ ", or whatever the model was trained to write
            unknown = sp.decode([i]).encode() if sp.is_unknown(i) else None
            self._bytes[i] = b"" if sp.is_control(i) else unknown or _piece_bytes(piece)
        self._drops = {i for piece, i in self._ids.items() if piece.startswith("▁") and self._bytes[i]}
        # The model's settings are out of reach, but what decode does with leading spaces shows them: one goes if
        # add_dummy_prefix or remove_extra_whitespaces is on, one from each piece if it is the latter.
        if any(sp.decode([i]).encode() == self._bytes[i] for i in [*self._drops][:1]):
            self._drops = set()
        space = self._ids.get("▁")
        self._drops_all = space is not None and sp.decode([space, space]) == ""
        # sentencepiece finds a "user-defined" symbol in any text: if it is a marker, a user could type it.
        for piece, i in self._ids.items():
            if not sp.is_control(i) and (MARKER.fullmatch(piece) or i in (self.bos_id, self.eos_id)):
                spelled = [[c] if c in self._ids else [f"<0x{b:02X}>" for b in c.encode()] for c in piece]
                self._spelled[i] = [self._ids.get(p, sp.unk_id()) for char in spelled for p in char]
        for i, (piece, special) in _added_tokens(path, config).items():
            if i >= sp.vocab_size():  # what fine-tuning added; encode never makes it of text
                self._ids[piece] = i
                self._bytes[i] = b"" if special or MARKER.fullmatch(piece) else piece.encode()

    def _load_json(self, path: Path, config: dict):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path} needs the optional package tokenizers: pip install tokenizers") from None
        try:
            self._hf = hf = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises Exception itself, nothing narrower
            raise ValueError(f"{path}: not a tokenizer that `tokenizers` can read ({brief(str(e))})") from None
        byte_level, strips = _json_decoder(path, json.loads(hf.decoder.__getstate__()) if hf.decoder else None)
        hf.no_padding()  # a file may carry the padding and truncation of the run that wrote it
        hf.no_truncation()
        self._ids = hf.get_vocab(with_added_tokens=True)
        self.bos_id = self._named(config, "bos_token", "<s>", "<|begin_of_text|>")
        self.eos_id = self._named(config, "eos_token", "</s>", "<|end_of_text|>", "<|endoftext|>")
        # With encode_special_tokens a special token that somebody types stays text. A marker whose file does not call
        # it special is declared so first (it keeps its id); other added tokens are ordinary vocabulary.
        hf.encode_special_tokens = True
        for i, token in hf.get_added_tokens_decoder().items():
            if not token.special and (MARKER.fullmatch(token.content) or i in (self.bos_id, self.eos_id)):
                hf.add_special_tokens([tokenizers.AddedToken(token.content, special=True)])
        control = {i for i, token in hf.get_added_tokens_decoder().items() if token.special}
        to_bytes = _byte_level_bytes if byte_level else _piece_bytes
        self._bytes = {i: b"" if i in control else to_bytes(piece) for piece, i in self._ids.items()}
        self._drops = {i for i, text in self._bytes.items() if strips and text.startswith(b" ")}
        self._errors = "replace" if byte_level else self._errors
        # The post-processor is what happens, add_bos_token only what was written down beside it.
        habit = self._hf_encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]
        hf.post_processor = None  # its job is done, and ByteLevel's takes spaces out of the offsets
        self.adds_bos = self.bos_id is not None and (habit or config.get("add_bos_token") is True)

    def _hf_encode(self, text: str, add_special_tokens: bool = False):
        try:
            return self._hf.encode(text, add_special_tokens=add_special_tokens)
        except Exception as e:  # of a vocabulary without some character, and without a token for the unknown
            raise ValueError(f"{self.path}: cannot encode {brief(text)} ({brief(str(e))})") from None

    def _named(self, config: dict, key: str, *usual: str) -> int | None:
        token = config.get(key, usual[0])
        if token is None:
            return None  # "bos_token": null says that there is none
        token = token.get("content") if isinstance(token, dict) else token
        return next((self._ids[t] for t in (token, *usual) if isinstance(t, str) and t in self._ids), None)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """The ids of `text`, with BOS before and EOS behind it if asked for and if the vocabulary has them.

        Exactly sentencepiece's ids (or those of `tokenizers`), but no text becomes a control token: a typed `</s>` or
        `<|im_start|>` is spelled out even where the library would take it for the token.
        Raises ValueError for what is not Unicode text (a lone surrogate, not a str).
        """
        _check_text(text)
        ids = self._sp.encode(text) if self._sp else self._hf_encode(text).ids
        if not self._spelled.keys().isdisjoint(ids):
            ids = [j for i in ids for j in self._spelled.get(i, [i])]
        head = [self.bos_id] if bos and self.bos_id is not None else []
        return head + ids + ([self.eos_id] if eos and self.eos_id is not None else [])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text, bos=False)`, and for each id the (start, end) of the characters that it stands for.

        Every byte of a character stands for that character. What stands for none, as a dummy prefix may, is given the
        character that follows. Raises ValueError as `encode` does.
        """
        _check_text(text)
        if self._hf:
            found = self._hf_encode(text)
            ids, spans = found.ids, found.offsets
        else:
            ids, spans = _sentencepiece_offsets(self._sp, text)
        last = max(len(text) - 1, 0)
        spans = [(start, end) if end > start else (min(start, last), min(start, last) + 1) for start, end in spans]
        if not self._spelled.keys().isdisjoint(ids):
            spelled = [self._spelled.get(i, [i]) for i in ids]
            spans = [span for span, parts in zip(spans, spelled, strict=True) for _ in parts]
            ids = [i for parts in spelled for i in parts]
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens add nothing. Raises ValueError for an id outside the vocabulary.

        sentencepiece model: equal to sentencepiece's own `decode` for every sequence, broken UTF-8 included.
        tokenizer.json: equal to `tokenizers`, except that with byte fallback it turns a whole run of bytes into U+FFFD
        when one of them is bad; here the good characters remain.
        """
        stream = StreamDecoder(self, strict=True)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to the text; b"" for a control token, and for a hole in the vocabulary."""
        i = operator.index(token_id)  # a torch scalar hashes by identity: a dict would never find it
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self._bytes.get(i, b"")

    def token_id(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary writes it ("▁the", "<s>"), or None."""
        return self._ids.get(piece)

    def vocabulary(self) -> list[tuple[int, str, bytes]]:
        """(id, piece, what it adds to a text) of the whole vocabulary, by id."""
        return sorted((i, piece, self._bytes.get(i, b"")) for piece, i in self._ids.items())

    def piece(self, token_id: int) -> str:
        """The piece of an id, as the vocabulary writes it; "" for a hole in the vocabulary."""
        return next((piece for piece, i in self._ids.items() if i == token_id), "")


class StreamDecoder:
    """Text as a model makes it: O(1) per id, never half a character, the leading space exactly where `decode` has it.

    All pushes and the flush joined are `decode(prompt_ids + new)[len(decode(prompt_ids)):]`, as long as the prompt does
    not end within a character (then the first push completes that character). An id behind the vocabulary stands for no
    text, since a model whose embedding is padded may choose one; `strict` makes it the error that it is to `decode`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = (), strict: bool = False):
        self._tokenizer, self._strict, self._at_start = tokenizer, strict, True
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer._errors)
        for i in prompt_ids:
            self.push(i)

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" within a character."""
        tok, token_id = self._tokenizer, operator.index(token_id)
        if token_id >= tok.vocab_size and not self._strict:
            return ""
        piece = tok.token_bytes(token_id)
        if not piece:  # to sentencepiece the bytes around a control token are not one character, to tokenizers they are
            return self.flush() if tok._sp else ""
        if self._at_start:
            piece = piece[1:] if token_id in tok._drops else piece
            self._at_start = tok._drops_all and not piece
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left of a character that was never finished, as U+FFFD."""
        return self._utf8.decode(b"", True)


class Segment(NamedTuple):
    """A stretch of a conversation. `special`: one control token where the vocabulary has it, else plain text.
    `answer`: what the assistant said, its end token included: what a loss on answers counts."""

    text: str
    special: bool = False
    answer: bool = False


def _solar(messages) -> list[Segment]:
    out = []
    for role, content in _turns(messages):
        out.append(Segment(f"### {role.capitalize()}:\n"))
        # Nothing at all stands behind an answer: the published template goes straight on with "### User:".
        out.append(Segment(content, answer=True) if role == "assistant" else Segment(f"{content}\n\n"))
    return out if role == "assistant" else [*out, Segment("### Assistant:\n")]


def _alpaca(messages) -> list[Segment]:
    row, answers = messages, []
    if not isinstance(row, dict):
        (role, content), *rest = _turns(messages)
        if role == "system" or len(rest) > 1:
            raise ValueError("alpaca takes one user message and its answer: no system message, no second turn")
        row, answers = {"instruction": content}, [Segment(answer, answer=True) for _, answer in rest]
    instruction, context = row.get("instruction"), row.get("input", "")
    if not (isinstance(instruction, str) and isinstance(context, str)):
        raise ValueError('alpaca takes messages or {"instruction": str, "input": str (may be left out)}')
    head = "Below is an instruction that describes a task"
    if context:
        head += ", paired with an input that provides further context"
        context = f"### Input:\n{context}\n\n"
    head += ". Write a response that appropriately completes the request."
    return [Segment(f"{head}\n\n### Instruction:\n{instruction}\n\n{context}### Response:"), *answers]


def _chatml(messages) -> list[Segment]:
    out = []
    for role, content in _turns(messages):
        answer = role == "assistant"
        out += [Segment("<|im_start|>", special=True), Segment(f"{role}\n"), Segment(content, answer=answer)]
        out += [Segment("<|im_end|>", special=True, answer=answer), Segment("\n")]
    return out if answer else [*out, Segment("<|im_start|>", special=True), Segment("assistant\n")]


def _plain(messages) -> list[Segment]:
    out = []
    for role, content in _turns(messages):
        answer = role == "assistant"
        # A prompt ends with the user's last character, so the blank line is the answer's to write.
        out += [Segment("\n\n", answer=answer), Segment(content, answer=answer)]
    return out[1:]


TEMPLATES = {"solar": _solar, "alpaca": _alpaca, "chatml": _chatml, "plain": _plain}  # name -> messages -> segments


def end_ids(tokenizer: Tokenizer, template: str | None = None) -> set[int]:
    """The ids behind which nothing follows: EOS, and for chatml the token that ends every turn."""
    ends = {tokenizer.eos_id, tokenizer.token_id("<|im_end|>") if template == "chatml" else None}
    return ends - {None}


def _turns(messages) -> list[tuple[str, str]]:
    """[(role, content), ...], at least one; a str is one user message, an empty system message is none."""
    try:
        turns = [("user", messages)] if isinstance(messages, str) else [(m["role"], m["content"]) for m in messages]
    except (TypeError, KeyError):
        raise ValueError('messages must be a str or a list of {"role": ..., "content": ...}') from None
    roles = [role for role, _ in turns]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if not said or said != (["user", "assistant"] * len(said))[: len(said)]:
        raise ValueError(f"roles must be system (may be left out), user, assistant, user, ...; got {roles}")
    if not all(isinstance(content, str) for _, content in turns):
        raise ValueError("the content of every message must be a str")
    return turns[1:] if turns[0] == ("system", "") else turns


def _prompt(name: str, messages) -> list[Segment]:
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known are {', '.join(TEMPLATES)}")
    segments = TEMPLATES[name](messages)
    finished = not isinstance(messages, (str, dict)) and messages[-1]["role"] == "assistant"
    return TEMPLATES[name](messages[:-1]) if finished else segments


def render(name: str, messages) -> str:
    """The prompt up to where the answer begins, by one of TEMPLATES.

    `messages`: a str (one user message), a list of {"role", "content"}, or for alpaca {"instruction", "input"}. If the
    last message is the assistant's, the prompt of that answer. Raises ValueError that names what it would have taken.
    """
    return "".join(segment.text for segment in _prompt(name, messages))


def encode_prompt(tokenizer: Tokenizer, name: str, messages) -> list[int]:
    """The ids of `render(name, messages)`: BOS by the tokenizer's habit, control tokens as their ids.

    The text between two control tokens is encoded as one string, by itself: sentencepiece begins each with its dummy
    prefix ("▁user"), as models that learned such tokens saw it. What a user typed never becomes a control token.
    """
    return _encode(tokenizer, _prompt(name, messages))[0]


def encode_chat(tokenizer: Tokenizer, name: str, messages, last_only: bool = False) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, encoded as one text like `encode_prompt`'s, and for each whether it is learned.

    messages: as `render` takes them, the last one the assistant's, or for alpaca {"instruction", "input", "output"}.
    Learned are the ids that hold any of an assistant message's text, one that also holds text around it included, and
    what ends an answer: chatml's <|im_end|>; in the other templates, which have nothing behind an earlier answer, EOS
    behind the last one. Nothing is encoded that comes after the end.
    last_only: earlier answers are part of the prompt and not learned.
    Raises ValueError for malformed messages, and if the vocabulary lacks a control token that the template needs.
    """
    prompt, last = _prompt(name, messages), []
    if isinstance(messages, dict) and isinstance(messages.get("output"), str):
        last = [Segment(messages["output"], answer=True)]
    if not last and (isinstance(messages, (str, dict)) or messages[-1]["role"] != "assistant"):
        raise ValueError("a conversation to learn from ends with an answer")
    segments = TEMPLATES[name](messages) + last
    if last_only:
        segments[: len(prompt)] = [segment._replace(answer=False) for segment in prompt]
    while not segments[-1].answer:
        segments.pop()
    if missing := [s.text for s in segments if s.special and tokenizer.token_id(s.text) is None]:
        raise ValueError(f"{tokenizer.path} has no token {missing[0]}: take another template than {name}")
    ids, learned = _encode(tokenizer, segments)
    if not segments[-1].special:
        if tokenizer.eos_id is None:
            raise ValueError(f"{tokenizer.path} has no EOS, with which the template {name} ends an answer")
        ids, learned = [*ids, tokenizer.eos_id], [*learned, True]
    return ids, learned


def _encode(tokenizer: Tokenizer, segments: list[Segment]) -> tuple[list[int], list[bool]]:
    """The ids of segments, and for each whether it holds any of an answer."""
    ids = [tokenizer.bos_id] if tokenizer.adds_bos else []
    learned, text, answer = [False] * len(ids), "", b""  # answer: for each character of text, is it an answer's?

    def encode_text() -> None:
        new, spans = tokenizer.encode_with_offsets(text)
        ids.extend(new)
        learned.extend(1 in answer[start:end] for start, end in spans)

    for segment in segments:
        special = tokenizer.token_id(segment.text) if segment.special else None
        if special is None:
            text, answer = text + segment.text, answer + bytes([segment.answer]) * len(segment.text)
        else:
            encode_text()
            ids.append(special)
            learned.append(segment.answer)
            text, answer = "", b""
    encode_text()
    return ids, learned


def _check_text(text: str) -> None:
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise ValueError(f"encode takes a str without lone surrogates, got {text!a:.80}") from None


def _parts(data: bytes) -> set[int]:
    """Which parts a sentencepiece model has, by their tags: pieces 0x0A, the trainer's settings 0x12, the normaliser's
    0x1A. The library loads one that is cut between two parts, and puts settings of its own in the place of the last.
    """
    at, found = 0, set()
    while at < len(data):
        found.add(data[at])
        length = shift = 0
        more = True
        while more:
            at, more = at + 1, data[at + 1] & 0x80
            length, shift = length | (data[at] & 0x7F) << shift, shift + 7
        at += 1 + length
    return found


def _sentencepiece_offsets(sp, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    try:
        found = sp.encode(text, return_type="offset_mapping")
        return found["ids"], found["offsets"]
    except TypeError:  # an older sentencepiece (0.2.0) calls the same something else
        pieces = sp.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


def _piece_bytes(piece: str) -> bytes:
    """The text of a piece as sentencepiece writes it: "▁" is a space, <0xNN> one byte."""
    return bytes.fromhex(piece[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", piece) else piece.replace("▁", " ").encode()


def _byte_level_bytes(piece: str) -> bytes:
    whole = all(c in _BYTE_OF_CHAR for c in piece)  # an added token is written as it reads, in any characters
    return bytes(_BYTE_OF_CHAR[c] for c in piece) if whole else piece.encode()


def _find(path: Path) -> Path:
    """The tokenizer file of a model directory; any other path is the file itself."""
    if path.is_dir():
        versions = sorted(path.glob("tokenizer.model.v*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
        candidates = [path / "tokenizer.model", *versions[::-1], path / "tokenizer.json", path / "tekken.json"]
        found = next((p for p in candidates if p.exists()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no tokenizer (tokenizer.model, tokenizer.model.v*, tokenizer.json)")
        path = found
    if path.name == "tekken.json":
        raise ValueError(f"{path}: tekken tokenizers are not supported; put the model's tokenizer.json beside it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: not a tokenizer (a directory, or larger than {MAX_BYTES >> 20} MB)")
    return path


def _beside(path: Path, name: str) -> dict:
    """The JSON object in a file beside the tokenizer, empty if there is none. A pipe or a device is no file."""
    data = read_json(path.with_name(name)) if path.with_name(name).is_file() else {}
    if not isinstance(data, dict):
        raise ValueError(f"{path.with_name(name)}: not a JSON object (cut short, damaged or another format)")
    return data


def _added_tokens(path: Path, config: dict) -> dict[int, tuple[str, bool]]:
    """{id: (piece, special)} of the tokens that the files beside a sentencepiece model add to it."""
    tokens: dict[int, tuple[str, bool]] = {}
    beside = [(i, piece, False) for piece, i in _beside(path, "added_tokens.json").items()]
    try:
        entries = (config.get("added_tokens_decoder") or {}).items()
        decoder = [(int(i), entry["content"], entry.get("special") is True) for i, entry in entries]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path.with_name('tokenizer_config.json')}: malformed added_tokens_decoder") from None
    for name, added in (("added_tokens.json", beside), ("tokenizer_config.json", decoder)):
        for i, piece, special in added:
            # Half of a surrogate pair, which JSON can spell, is no text.
            text = isinstance(piece, str) and piece.encode(errors="ignore").decode() == piece
            if type(i) is not int or i < 0 or not text:
                raise ValueError(f"{path.with_name(name)}: malformed added token {brief(piece)} of id {brief(i)}")
            tokens[i] = piece, special
    return tokens


def _json_decoder(path: Path, spec) -> tuple[bool, bool]:
    """(byte-level?, drops one leading space?) of a tokenizer.json's decoder; ValueError names any other kind."""
    parts = spec["decoders"] if isinstance(spec, dict) and spec.get("type") == "Sequence" else [spec]
    names = [part.get("type") if isinstance(part, dict) else part for part in parts]
    if names == ["ByteLevel"]:
        return True, False
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    llama = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if parts in (llama, [*llama, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]):
        return False, len(parts) == 4
    raise ValueError(
        f"{path}: decoder {brief(names)} is not supported (ByteLevel, or Replace, ByteFallback, Fuse, Strip)"
    )
