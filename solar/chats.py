"""Rows of instruction and preference files, in the shapes that are found in the wild, as conversations.

    {"instruction", "input"?, "output"}            Alpaca; context for the input (Dolly); history, a list of earlier
                                                   [question, answer], beside them (LLaMA-Factory)
    {"prompt", "response"}                         also question or query; completion, output or answer; system or
                                                   system_prompt beside them (OpenOrca)
    {"messages": [{"role", "content"}, ...]}       the roles system, user, assistant
    {"conversations": [{"from", "value"}, ...]}    ShareGPT: human, gpt, system

A preference adds which of two answers is better:

    {"prompt", "chosen", "rejected"}               instruction and input, question, system as above
    ... with chosen and rejected as messages       the whole conversation, or only its last message (UltraFeedback as
                                                   Zephyr binarised it, TRL)
    {"conversations", "chosen", "rejected"}        ShareGPT: the conversation ends with the question
    {"instruction", "completions": [{"response", "overall_score"}, ...]}      UltraFeedback as it was scored

A prompt may be a list of messages, an answer the messages that go on from there. A system message beside messages goes
before them. Where parts of a row contradict each other the row is refused: nothing that was asked is left out unsaid.
What a row must have is checked here, before anything is encoded: a ValueError says in a few words what is wrong.
"""

import hashlib
import statistics
from typing import NamedTuple

QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "response", "completion", "answer")
CONTEXTS = ("input", "context")
SYSTEM = ("system", "system_prompt")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Chat(NamedTuple):
    """A prompt and its answers: one to learn, or two, of which the first is better.

    messages: [(role, content), ...] up to the user's last message. context: Alpaca's input, which belongs to that
    message. origin: the question that this one is a rephrasing of, "" if none is known.
    """

    messages: list[tuple[str, str]]
    answers: list[str]
    context: str = ""
    origin: str = ""

    def conversation(self, answer: int, template: str) -> list[dict] | dict:
        """What `encode_chat` takes, with one of the answers. Alpaca's template has a place of its own for the context;
        in others it stands behind the instruction, after a blank line."""
        if self.context and template == "alpaca" and len(self.messages) == 1:
            return {"instruction": self.messages[-1][1], "input": self.context, "output": self.answers[answer]}
        turns = [*self.messages[:-1], ("user", self._question(-1)), ("assistant", self.answers[answer])]
        return [{"role": role, "content": content} for role, content in turns]

    def opening(self) -> str:
        """What the user says first, or what that is a rephrasing of. The side of a split hangs on it alone, so that one
        question is never on both, whatever its words, the system message, the answer and the rest of the conversation.
        """
        first = self.messages[1:] if self.messages[0][0] == "system" else self.messages
        return (self.origin or (self._question(-1) if len(first) == 1 else first[0][1])).strip()

    def _question(self, index: int) -> str:
        question = self.messages[index][1]
        return f"{question}\n\n{self.context}" if self.context else question


def parse_chat(row) -> Chat:
    """A row to learn from, whatever its shape. Raises ValueError that says what is wrong with it."""
    _check_object(row)
    if "messages" in row or "conversations" in row:
        turns = _conversation(row)
        if turns[-1][0] != "assistant":
            raise ValueError("the conversation does not end with an answer")
        chat = Chat(turns[:-1], [turns[-1][1]])
    else:
        messages, context = _question(row)
        if messages is None:
            raise ValueError(f"no question and no conversation ({', '.join(QUESTIONS)}, messages, conversations)")
        name = next((name for name in ANSWERS if name in row), None)
        if name is None:
            raise ValueError(f"no answer ({', '.join(ANSWERS)})")
        before, answer = _last_answer(row[name], name)
        messages, context = _joined(row, messages, context, before, name)
        chat = Chat(messages, [answer], context)
    return _checked(chat._replace(origin=_origin(row)))


def parse_pair(row, seed: int = 0) -> Chat:
    """A row of a preference file. Raises ValueError that says what is wrong with it.

    seed: for rows of scored completions, where the best is chosen and a random one of those that scored lower rejected,
    as Zephyr did (arXiv:2310.16944, section 4.1): which one, a hash of the seed and the question decides.
    """
    _check_object(row)
    messages, context = (_conversation(row), "") if "conversations" in row else _question(row)
    if "completions" in row:
        chosen, rejected = _best_and_another(row["completions"], f"{seed} {messages}")
    else:
        for name in ("chosen", "rejected"):
            if name not in row:
                raise ValueError(f"no {name!r}")
        (head, chosen), (other, rejected) = (_last_answer(row[name], name) for name in ("chosen", "rejected"))
        if head != other:
            raise ValueError("chosen and rejected are answers to different conversations")
        messages, context = _joined(row, messages, context, head, "chosen")
    if messages is None:
        raise ValueError(f"no question and no conversation ({', '.join(QUESTIONS)}, conversations)")
    chat = _checked(Chat(messages, [chosen, rejected], context, _origin(row)))
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    return chat


def _check_object(row) -> None:
    if not isinstance(row, dict):
        raise ValueError("JSON, but no object")


def _conversation(row: dict) -> list[tuple[str, str]]:
    name = "conversations" if "conversations" in row else "messages"
    return _with_system(_system(row), _turns(row[name], name))


def _with_system(system: list[tuple[str, str]], turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns behind the system message, if there is one; where they have one of their own it must be the same."""
    own = turns[:1] if turns[0][0] == "system" and turns[0][1].strip() else []
    if not system or not system[0][1].strip():
        return turns
    if own and own[0][1].strip() != system[0][1].strip():
        raise ValueError("two different system messages")
    return turns if own else system + turns[turns[0][0] == "system" :]


def _joined(
    row: dict, messages: list[tuple[str, str]] | None, context: str, head: list[tuple[str, str]], name: str
) -> tuple[list[tuple[str, str]] | None, str]:
    """(messages, context) of a question and of what stands in the answer before its last message.

    That goes on from the question if it begins with an answer; else it is the whole conversation, and must ask what the
    question beside it asks.
    """
    if not head:
        return messages, context
    if messages is None:
        return _with_system(_system(row), head), ""
    question = f"{messages[-1][1]}\n\n{context}" if context.strip() else messages[-1][1]
    messages = [*messages[:-1], (messages[-1][0], question)]
    if head[0][0] == "assistant":
        return messages + head, ""
    system = messages[:1] if messages[0][0] == "system" else []
    strip = lambda turns: [(role, content.strip()) for role, content in turns if role != "system"]
    asked, said = strip(messages), strip(head)
    if not (said[: len(asked)] == asked or (len(asked) == 1 and asked[0] in said)):
        raise ValueError(f"prompt and {name} ask different things")
    return _with_system(system, head), ""


def _turns(messages, name: str) -> list[tuple[str, str]]:
    """[(role, content), ...] of a list of messages, at least one, in either spelling."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name!r} is no list of messages")
    return [_turn(message, name) for message in messages]


def _turn(message, name: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"a message of {name!r} is no object")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"a message of {name!r} has the role {role!a:.40}; known are {', '.join(ROLES)}")
    return ROLES[role], _text(message.get("content", message.get("value")), f"a message of {name!r}")


def _question(row: dict) -> tuple[list[tuple[str, str]] | None, str]:
    """The messages up to the answer, and the input that belongs to the last; (None, "") if the row has no question."""
    name = next((name for name in QUESTIONS if name in row), None)
    if name is None:
        return None, ""
    context, history = _context(row), _history(row)
    if isinstance(row[name], list):
        if history or context.strip():
            raise ValueError(f"{'history' if history else 'input'!r} beside a list of messages")
        return _with_system(_system(row), _turns(row[name], name)), ""
    return [*_system(row), *history, ("user", _text(row[name], f"{name!r}"))], context


def _context(row: dict) -> str:
    texts = [_text(row[name], f"{name!r}") for name in CONTEXTS if row.get(name)]
    texts = [text for text in texts if text.strip()]
    if len(texts) > 1 and texts[0] != texts[1]:
        raise ValueError(f"both {' and '.join(CONTEXTS)}")
    return texts[0] if texts else ""


def _history(row: dict) -> list[tuple[str, str]]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in history):
        raise ValueError("'history' is no list of [question, answer]")
    texts = [_text(text, "a message of 'history'") for entry in history for text in entry]
    return [*zip(["user", "assistant"] * len(history), texts, strict=True)]


def _origin(row: dict) -> str:
    return _text(row.get("original_question") or "", "'original_question'").strip()


def _system(row: dict) -> list[tuple[str, str]]:
    name = next((name for name in SYSTEM if row.get(name)), None)
    return [("system", _text(row[name], f"{name!r}"))] if name else []


def _last_answer(value, name: str) -> tuple[list[tuple[str, str]], str]:
    """(what stands before the answer, the answer) of a string, one message, or a list of messages."""
    if not isinstance(value, (dict, list)):
        return [], _text(value, f"{name!r}")
    turns = [_turn(value, name)] if isinstance(value, dict) else _turns(value, name)
    if turns[-1][0] != "assistant":
        raise ValueError(f"{name!r} does not end with an answer")
    return turns[:-1], turns[-1][1]


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair") from None
    return value


def _checked(chat: Chat) -> Chat:
    """The chat without an empty system message, after a look at its roles and for messages without text."""
    messages = chat.messages
    if messages[:1] and messages[0][0] == "system" and not messages[0][1].strip():
        messages = messages[1:]
    roles = [role for role, _ in messages]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if len(said) % 2 == 0 or said != (["user", "assistant"] * len(said))[: len(said)]:
        raise ValueError(f"roles out of order: {', '.join([*roles, 'assistant'])[:80]}")
    for role, content in messages:
        if not content.strip():
            raise ValueError(f"an empty {role} message")
    if not all(answer.strip() for answer in chat.answers):
        raise ValueError("an empty answer")
    return chat._replace(messages=messages, context=chat.context if chat.context.strip() else "")


def _best_and_another(completions, key: str) -> tuple[str, str]:
    if not isinstance(completions, list) or not all(isinstance(entry, dict) for entry in completions):
        raise ValueError("'completions' is no list of objects")
    scored = [(score, entry) for entry in completions if (score := _score(entry)) is not None]
    best = max((score for score, _ in scored), default=None)
    others = [entry for score, entry in scored if score < best]
    if not others:
        raise ValueError("no completion is scored above another")
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    another = others[int.from_bytes(digest, "big") % len(others)]
    chosen = next(entry for score, entry in scored if score == best)
    return tuple(_text(entry.get("response"), "a completion's 'response'") for entry in (chosen, another))


def _score(completion: dict) -> float | None:
    """overall_score, or else the mean of the ratings of the aspects in annotations; None if there is neither."""
    overall = _number(completion.get("overall_score"))
    annotations = completion.get("annotations")
    if overall is not None or not isinstance(annotations, dict):
        return overall
    ratings = [_number(aspect.get("Rating")) for aspect in annotations.values() if isinstance(aspect, dict)]
    known = [rating for rating in ratings if rating is not None]
    return statistics.fmean(known) if known else None


def _number(value) -> float | None:
    """A finite number, also one that is written as a string ("4"; "N/A" is none)."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) < float("inf") else None
