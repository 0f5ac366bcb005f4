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
before them.

Many files say a thing twice: UltraChat's prompt is the first of its messages, Magpie keeps the question and the answer
beside the conversation, a converted file its old columns. So a row may hold more fields than its shape needs, if they
agree; null, "" and [] say nothing. How much white space there is does not count.

    question beside question                       the same text, and so for input and context, the systems, the answers
    anything beside a list of messages             stands in its messages, whole words of one, in their order
    answer beside response, or beside messages     is a bare result (OpenR1-Math), and not compared
    answers beside chosen and rejected             are further answers, and not compared
    prompt of instruction, input and output        is the whole row once more, rendered (code_instructions_120k_alpaca)

Where fields contradict each other the row is refused: nothing that was asked is left out unsaid.
What a row must have is checked here, before anything is encoded: a ValueError says in a few words what is wrong.
"""

import hashlib
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# The names that a part of a row goes by. Of fields that agree, the first in this order is taken.
QUESTIONS = ("instruction", "prompt", "question", "query")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
ANSWERS = ("output", "response", "completion")
RESULTS = ("answer",)  # taken where there is none of ANSWERS
CONVERSATIONS = ("conversations", "messages")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

SECTION = re.compile(r"^### \w+:", re.MULTILINE)  # of Alpaca's prompt

Turn = tuple[str, str]  # (role, content)


class Chat(NamedTuple):
    """A prompt and its answers: one to learn, or two, of which the first is better.

    messages: [(role, content), ...] up to the user's last message. context: Alpaca's input, which belongs to that
    message. origin: the question that this one is a rephrasing of, "" if none is known.
    """

    messages: list[Turn]
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
        return _with_context(self.messages[index][1], self.context)


class Part(NamedTuple):
    """What one field of a row says: its name, and its messages; a text is one message."""

    name: str
    turns: list[Turn]


def parse_chat(row) -> Chat:
    """A row to learn from, whatever its shape. Raises ValueError that says what is wrong with it."""
    _check_object(row)
    conversations, answers = _lists(row, CONVERSATIONS), _answers(row, ANSWERS)
    if any(part.turns[-1][0] != "assistant" for part in conversations):
        raise ValueError("the conversation does not end with an answer")
    if conversations:
        turns, context = _conversation(row, conversations, beside=answers)
    else:
        answer = _one(answers or _answers(row, RESULTS), "answers")
        turns, context = _conversation(row, answer=answer)
        if answer is None:
            raise ValueError(_missing(row, "answer", (*ANSWERS, *RESULTS)))
    return _checked(Chat(turns[:-1], [turns[-1][1]], context, _origin(row)))


def parse_pair(row, seed: int = 0) -> Chat:
    """A row of a preference file. Raises ValueError that says what is wrong with it.

    seed: for rows of scored completions, where the best is chosen and a random one of those that scored lower rejected,
    as Zephyr did (arXiv:2310.16944, section 4.1): which one, a hash of the seed and the question decides.
    """
    _check_object(row)
    conversations = _lists(row, ("conversations",))
    copies = [part._replace(turns=_up_to_answer(part.turns)) for part in _lists(row, ("messages",))]
    if _filled(row, ("completions",)):
        messages, context = _conversation(row, conversations, copies)
        chosen, rejected = _best_and_another(row["completions"], f"{seed} {messages}")
    else:
        for name in ("chosen", "rejected"):
            if name not in row:
                raise ValueError(f"no {name!r}")
        better, worse = (_answer(row, name) for name in ("chosen", "rejected"))
        if better.turns[:-1] != worse.turns[:-1]:
            raise ValueError("chosen and rejected are answers to different conversations")
        turns, context = _conversation(row, conversations, copies, better)
        messages, chosen, rejected = turns[:-1], turns[-1][1], worse.turns[-1][1]
    chat = _checked(Chat(messages, [chosen, rejected], context, _origin(row)))
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    return chat


def _check_object(row) -> None:
    if not isinstance(row, dict):
        raise ValueError("JSON, but no object")


# ------------------------------------------------------------------------------------------------ what a row says


def _conversation(
    row: dict, lists: Sequence[Part] = (), beside: Sequence[Part] = (), answer: Part | None = None
) -> tuple[list[Turn], str]:
    """(all messages, the answer's included if it is given or in a list; the input, if no message holds it).

    The messages are those of the first list: an answer that is a whole conversation, the lists given, a question that
    is a list. Where there is no list they are made of the question, its input and the history. All that the row says
    besides must stand in them. An answer that is no whole conversation goes on from them.
    """
    goes_on = answer.turns if answer else []
    if answer and answer.turns[0][0] != "assistant":
        lists, goes_on = [answer, *lists], []
    questions, contexts = _questions(row), _texts(row, CONTEXTS, "user")
    systems, history = _texts(row, SYSTEMS, "system"), _history(row)
    texts = [part for part in questions if isinstance(row[part.name], str)]
    lists = [*lists, *(part for part in questions if part not in texts)]
    if lists:
        whole, *others = [*lists, *beside, *history, *texts, *contexts]
        return _agreed(whole, systems, others) + goes_on, ""

    question, context = _one(_unrendered(texts, contexts, goes_on), "questions"), _one(contexts, "inputs")
    if question is None:
        raise ValueError(_missing(row, "question", QUESTIONS) + " and no conversation")
    (ask,), more = question.turns, context.turns[0][1] if context else ""
    full_ask = ("user", _with_context(ask[1], more))
    whole = Part(question.name, [*(turn for part in history for turn in part.turns), full_ask])
    turns = _agreed(whole, systems, beside)
    if len(goes_on) > 1:  # the input has its place in a template only where its question is the last
        return turns + goes_on, ""
    return [*turns[:-1], ask, *goes_on], more


def _agreed(whole: Part, systems: Sequence[Part], others: Sequence[Part]) -> list[Turn]:
    """The messages of the whole, behind the one system message of all. Raises ValueError where the others disagree."""
    begins = [Part(part.name, part.turns[:1]) for part in (whole, *systems, *others) if _begins_with_system(part.turns)]
    system = _one(begins, "system messages")
    turns = whole.turns if system is None else system.turns + whole.turns[whole.turns[0][0] == "system" :]
    for part in others:
        if not _stands_in(part.turns, turns):
            raise ValueError(f"{part.name!r} says what {whole.name!r} does not")
    return turns


def _one(parts: Sequence[Part], what: str) -> Part | None:
    """The first of them, None if there is none. Raises ValueError unless all say the same."""
    same = lambda turns: [(role, _words(content)) for role, content in turns]
    for part in parts[1:]:
        if same(part.turns) != same(parts[0].turns):
            raise ValueError(f"two different {what}: {parts[0].name!r} and {part.name!r}")
    return parts[0] if parts else None


def _stands_in(some: Sequence[Turn], turns: Sequence[Turn]) -> bool:
    """Whether each message is one of the turns or a part of one, in their order.

    A question may be a system message there: No Robots' prompt is the first message, whatever its role.
    """
    rest = iter(turns)
    return all(
        any((role == "assistant") == (other == "assistant") and _words(text) in _words(said) for other, said in rest)
        for role, text in some
        if text.strip()
    )


def _unrendered(questions: list[Part], contexts: Sequence[Part], answer: Sequence[Turn]) -> list[Part]:
    """The questions without one whose sections are another question, its input and its answer: that is the whole row.

    Its sections, and not all of its text: "Pick one. A or B?" holds "Pick one." and the answer "B?", and asks more.
    """
    if not answer:
        return questions
    behind = [turn for part in contexts[:1] for turn in part.turns] + [*answer]
    rows = [[_words(content) for _, content in part.turns + behind] for part in questions]
    sections = lambda text: [_words(section) for section in SECTION.split(text)[1:] if section.strip()]
    return [part for part in questions if sections(part.turns[0][1]) not in rows]


def _words(text: str) -> str:
    return f" {' '.join(text.split())} "


def _begins_with_system(turns: Sequence[Turn]) -> bool:
    return bool(turns) and turns[0][0] == "system" and bool(turns[0][1].strip())


def _up_to_answer(turns: list[Turn]) -> list[Turn]:
    return turns[:-1] if turns[-1][0] == "assistant" else turns


def _with_context(question: str, context: str) -> str:
    return f"{question}\n\n{context}" if context.strip() else question


# ------------------------------------------------------------------------------------------------ fields


def _filled(row: dict, names: Sequence[str]) -> list[str]:
    """The names of the fields that say anything: not of those that are null, false, empty or only white space."""
    says = lambda value: value.strip() if isinstance(value, str) else value
    return [name for name in names if says(row.get(name))]


def _missing(row: dict, what: str, names: Sequence[str]) -> str:
    return f"an empty {what}" if any(name in row for name in names) else f"no {what} ({', '.join(names)})"


def _questions(row: dict) -> list[Part]:
    read = lambda name: _list(row, name) if isinstance(row[name], list) else _text_part(row, name, "user")
    return [read(name) for name in _filled(row, QUESTIONS)]


def _texts(row: dict, names: Sequence[str], role: str) -> list[Part]:
    return [_text_part(row, name, role) for name in _filled(row, names)]


def _lists(row: dict, names: Sequence[str]) -> list[Part]:
    return [_list(row, name) for name in _filled(row, names)]


def _answers(row: dict, names: Sequence[str]) -> list[Part]:
    return [_answer(row, name) for name in _filled(row, names)]


def _history(row: dict) -> list[Part]:
    """One part, or none."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in history):
        raise ValueError("'history' is no list of [question, answer]")
    texts = [_text(text, "a message of 'history'") for entry in history for text in entry]
    turns = [*zip(["user", "assistant"] * len(history), texts, strict=True)]
    return [Part("history", turns)] if turns else []


def _origin(row: dict) -> str:
    return _text(row.get("original_question") or "", "'original_question'").strip()


def _answer(row: dict, name: str) -> Part:
    """Of a string, one message, or a list of messages, which must end with an answer."""
    value = row[name]
    if isinstance(value, dict):
        part = Part(name, [_turn(value, name)])
    else:
        part = _list(row, name) if isinstance(value, list) else _text_part(row, name, "assistant")
    if part.turns[-1][0] != "assistant":
        raise ValueError(f"{name!r} does not end with an answer")
    return part


def _text_part(row: dict, name: str, role: str) -> Part:
    return Part(name, [(role, _text(row[name], f"{name!r}"))])


def _list(row: dict, name: str) -> Part:
    """A list of messages, at least one, in either spelling."""
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name!r} is no list of messages")
    return Part(name, [_turn(message, name) for message in messages])


def _turn(message, name: str) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"a message of {name!r} is no object")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"a message of {name!r} has the role {role!a:.40}; known are {', '.join(ROLES)}")
    return ROLES[role], _text(message.get("content", message.get("value")), f"a message of {name!r}")


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair") from None
    return value


# ------------------------------------------------------------------------------------------------ checks and scores


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
