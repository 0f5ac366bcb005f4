"""Every shape of row that is found in the wild, and every kind of row that must not be learned from."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solar.chats import Chat, parse_chat, parse_pair
from solar.tokenizer import TEMPLATES

ASK, TOLD = ("user", "How many?"), ("assistant", "Three.")
MESSAGES = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
SHAREGPT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three."}]
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, Chat([("user", "Add.")], ["3"], "1 2")),
        ({"instruction": "Add.", "input": "", "output": "3"}, Chat([("user", "Add.")], ["3"])),
        ({"instruction": "Add.", "input": None, "output": "3", "text": "x"}, Chat([("user", "Add.")], ["3"])),
        ({"instruction": "Add.", "input": " \n", "output": "3"}, Chat([("user", "Add.")], ["3"])),
        ({"prompt": "How many?", "response": "Three."}, Chat([ASK], ["Three."])),
        ({"prompt": "How many?", "completion": "Three."}, Chat([ASK], ["Three."])),
        ({"question": "How many?", "answer": "Three."}, Chat([ASK], ["Three."])),
        ({"query": "How many?", "response": "Three.", "type": "GSM_Rephrased"}, Chat([ASK], ["Three."])),
        (
            {"id": "niv.1", "system_prompt": "Be brief.", "question": "How many?", "response": "Three."},
            Chat([("system", "Be brief."), ASK], ["Three."]),
        ),
        ({"system_prompt": "", "question": "How many?", "response": "Three."}, Chat([ASK], ["Three."])),
        ({"messages": MESSAGES}, Chat([ASK], ["Three."])),
        ({"messages": [BRIEF, *MESSAGES]}, Chat([("system", "Be brief."), ASK], ["Three."])),
        ({"messages": [{"role": "system", "content": ""}, *MESSAGES]}, Chat([ASK], ["Three."])),
        ({"messages": MESSAGES * 2, "prompt": "How many?"}, Chat([ASK, TOLD, ASK], ["Three."])),
        ({"conversations": SHAREGPT}, Chat([ASK], ["Three."])),
        ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, Chat([("system", "s"), ASK], ["Three."])),
        ({"conversations": SHAREGPT, "system": "s"}, Chat([("system", "s"), ASK], ["Three."])),
        ({"conversations": MESSAGES}, Chat([ASK], ["Three."])),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, Chat([ASK], ["Three."])),
        ({"prompt": MESSAGES[:1], "completion": [MESSAGES[1], *MESSAGES]}, Chat([ASK, TOLD, ASK], ["Three."])),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES}, Chat([ASK], ["Three."])),
        (
            {"instruction": "Add.", "input": "1 2", "output": [MESSAGES[1], *MESSAGES]},
            Chat([("user", "Add.\n\n1 2"), TOLD, ASK], ["Three."]),
        ),
        ({"prompt": MESSAGES[:1], "completion": "Three.", "system": "s"}, Chat([("system", "s"), ASK], ["Three."])),
        (
            {"prompt": [BRIEF, MESSAGES[0]], "completion": "Three.", "system": "Be brief."},
            Chat([("system", "Be brief."), ASK], ["Three."]),
        ),
        (
            {"messages": [BRIEF | {"content": ""}, *MESSAGES], "system": "s"},
            Chat([("system", "s"), ASK], ["Three."]),
        ),
        # Dolly, LLaMA-Factory, MetaMathQA
        ({"instruction": "Add.", "context": "1 2", "response": "3"}, Chat([("user", "Add.")], ["3"], "1 2")),
        ({"instruction": "Add.", "input": "", "context": "1 2", "output": "3"}, Chat([("user", "Add.")], ["3"], "1 2")),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["How many?", "Three."]], "system": "s"},
            Chat([("system", "s"), ASK, TOLD, ("user", "Add.")], ["3"], "1 2"),
        ),
        ({"instruction": "Add.", "output": "3", "history": []}, Chat([("user", "Add.")], ["3"])),
        (
            {"query": "So: how many?", "response": "Three.", "original_question": "How many?"},
            Chat([("user", "So: how many?")], ["Three."], origin="How many?"),
        ),
    ],
)
def test_rows_to_learn_from(row, chat):
    assert parse_chat(row) == chat


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "no object"),
        ({}, "no question"),
        ({"text": "x"}, "no question"),
        ({"instruction": "Add."}, "no answer"),
        ({"instruction": "Add.", "output": ""}, "an empty answer"),
        ({"instruction": "Add.", "output": " \n"}, "an empty answer"),
        ({"instruction": "", "output": "3"}, "an empty question"),
        ({"instruction": "Add.", "output": 3}, "'output' is no string"),
        ({"instruction": None, "output": "3"}, "an empty question"),
        ({"instruction": 3, "output": "3"}, "'instruction' is no string"),
        ({"instruction": "Add.", "input": 3, "output": "3"}, "'input' is no string"),
        ({"instruction": "Add.", "output": "\ud800"}, "half of a surrogate pair"),
        ({"messages": []}, "no question .* and no conversation"),
        ({"messages": "Hi"}, "no list of messages"),
        ({"messages": ["Hi"]}, "no object"),
        ({"messages": [{"role": "user"}]}, "no string"),
        ({"messages": [{"content": "x"}]}, "role None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": MESSAGES[:1]}, "does not end with an answer"),
        ({"messages": MESSAGES[1:]}, "roles out of order: assistant"),
        ({"messages": [BRIEF, *MESSAGES[1:]]}, "roles out of order: system, assistant"),
        ({"messages": [MESSAGES[0], *MESSAGES]}, "roles out of order: user, user, assistant"),
        ({"messages": [*MESSAGES, BRIEF, *MESSAGES]}, "roles out of order"),
        ({"messages": [BRIEF, BRIEF, *MESSAGES]}, "roles out of order"),
        ({"messages": [{"role": "user", "content": " "}, MESSAGES[1]]}, "an empty user message"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": ""}, *MESSAGES]}, "an empty assistant message"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, MESSAGES[1]]}, "no string"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "role 'observation'"),
        ({"messages": [BRIEF, *MESSAGES], "system": "Be long."}, "two different system messages"),
        ({"prompt": [BRIEF, MESSAGES[0]], "completion": "x", "system": "Be long."}, "two different system messages"),
        ({"prompt": "Why?", "completion": MESSAGES}, "'prompt' says what 'completion' does not"),
        ({"prompt": MESSAGES[:1], "input": "1 2", "completion": "x"}, "'input' says what 'prompt' does not"),
        ({"prompt": MESSAGES[:1], "history": [["a", "b"]], "completion": "x"}, "'history' says what 'prompt' does not"),
        (
            {"instruction": "Add.", "input": "1", "context": "2", "output": "3"},
            "two different inputs: 'input' and 'context'",
        ),
        ({"instruction": "Add.", "output": "3", "history": [["a"]]}, "'history' is no list of"),
        ({"instruction": "Add.", "output": "3", "history": "a"}, "'history' is no list of"),
        ({"instruction": "Add.", "output": "3", "history": [["a", None]]}, "a message of 'history' is no string"),
        ({"instruction": "Add.", "output": "3", "history": [["a", ""]]}, "an empty assistant message"),
        ({"instruction": "Add.", "output": "3", "original_question": 3}, "'original_question' is no string"),
    ],
)
def test_rows_that_cannot_be_learned_from(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_chat(row)


SYSTEM_ASK = Chat([("system", "Be brief."), ASK], ["Three."])
BELOW = "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Output:\n3"


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        # UltraChat, No Robots (whose prompt is the system message where there is one), UltraFeedback binarised
        ({"prompt": " How many?\n", "prompt_id": "ab", "messages": MESSAGES}, Chat([ASK], ["Three."])),
        ({"prompt": "Be brief.", "messages": [BRIEF, *MESSAGES], "category": "Chat"}, SYSTEM_ASK),
        (
            {"prompt": "How many?", "chosen": MESSAGES, "rejected": MESSAGES, "messages": MESSAGES},
            Chat([ASK], ["Three."]),
        ),
        # OpenHermes 2.5, SlimOrca: columns that only some of the sources fill
        (
            {
                "conversations": [turn | {"weight": None} for turn in SHAREGPT], "system_prompt": None, "source": "x",
                "model": None, "custom_instruction": False, "idx": None,
            },
            Chat([ASK], ["Three."]),
        ),
        ({"conversations": SHAREGPT, "system_prompt": "Be brief."}, SYSTEM_ASK),
        # Magpie: the first question and its answer stand beside the conversation
        (
            {"instruction": "How many?", "response": "Three.", "conversations": [*SHAREGPT, *SHAREGPT]},
            Chat([ASK, TOLD, ASK], ["Three."]),
        ),
        # a message may say more than the field
        (
            {"question": "How many?", "messages": [{"role": "user", "content": "Look: a.\nHow many?"}, MESSAGES[1]]},
            Chat([("user", "Look: a.\nHow many?")], ["Three."]),
        ),
        # OpenR1-Math: "answer" is the result alone, beside a conversation or beside a worked answer
        ({"messages": MESSAGES, "problem": "How many?", "answer": "3"}, Chat([ASK], ["Three."])),
        ({"question": "How many?", "response": "One, two, three.", "answer": "3"}, Chat([ASK], ["One, two, three."])),
        # Alpaca as ShareGPT: the columns stay; any white space joins instruction and input
        (
            {
                "instruction": "Add.", "input": "1 2", "output": "3",
                "conversations": [{"from": "human", "value": "Add.\n1  2"}, {"from": "gpt", "value": "3\n"}],
            },
            Chat([("user", "Add.\n1  2")], ["3\n"]),
        ),
        # Alpaca rendered: the whole row once more, under "text" or under "prompt"
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "prompt": BELOW, "text": BELOW},
            Chat([("user", "Add.")], ["3"], "1 2"),
        ),
        # the same under two names, and names that say nothing
        ({"prompt": "How many?", "question": "How many? ", "response": "Three."}, Chat([ASK], ["Three."])),
        ({"prompt": "1 or 2?", "question": "1 or 2?", "response": "2?"}, Chat([("user", "1 or 2?")], ["2?"])),
        ({"instruction": None, "prompt": "How many?", "question": "", "response": "Three."}, Chat([ASK], ["Three."])),
        ({"prompt": "How many?", "output": "", "response": "Three.", "completion": "Three."}, Chat([ASK], ["Three."])),
        ({"prompt": [BRIEF, MESSAGES[0]], "question": "How many?", "answer": "Three."}, SYSTEM_ASK),
        ({"system": "Be brief.", "system_prompt": "Be brief. ", "prompt": "How many?", "output": "Three."}, SYSTEM_ASK),
        ({"system": "", "system_prompt": "Be brief.", "prompt": "How many?", "output": "Three."}, SYSTEM_ASK),
        ({"conversations": SHAREGPT, "messages": [BRIEF, *MESSAGES]}, SYSTEM_ASK),
        ({"conversations": [], "messages": MESSAGES, "prompt": None, "history": None}, Chat([ASK], ["Three."])),
        ({"messages": None, "prompt": "How many?", "output": "Three."}, Chat([ASK], ["Three."])),
        (
            {"messages": [*MESSAGES, *MESSAGES], "history": [["How many?", "Three."]], "query": "How many?"},
            Chat([ASK, TOLD, ASK], ["Three."]),
        ),
    ],
)  # fmt: skip
def test_fields_that_say_the_same(row, chat):
    assert parse_chat(row) == chat


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"instruction": "Answer the question in one word.", "question": "What is 6 plus 6?", "output": "12"},
            "two different questions: 'instruction' and 'question'",
        ),
        (
            {"prompt": "Why?", "question": "How many?", "output": "3"},
            "two different questions: 'prompt' and 'question'",
        ),
        ({"prompt": "Why?", "query": "How many?", "output": "3"}, "two different questions: 'prompt' and 'query'"),
        (ALPACA | {"prompt": BELOW.removesuffix("3")}, "two different questions: 'instruction' and 'prompt'"),
        ({"instruction": "Pick.", "prompt": "Pick.\nA\nB", "output": "B"}, "questions: 'instruction' and 'prompt'"),
        ({"system": "a", "system_prompt": "b", "prompt": "x", "output": "y"}, "'system' and 'system_prompt'"),
        ({"system": "a", "system_prompt": "b", "messages": MESSAGES}, "'system' and 'system_prompt'"),
        ({"messages": [BRIEF, *MESSAGES], "system_prompt": "b"}, "system messages: 'messages' and 'system_prompt'"),
        ({"conversations": SHAREGPT, "messages": [BRIEF, *MESSAGES], "system": "b"}, "'system' and 'messages'"),
        ({"prompt": "How many?", "output": "Three.", "response": "Four."}, "answers: 'output' and 'response'"),
        ({"messages": MESSAGES, "input": "1 2"}, "'input' says what 'messages' does not"),
        ({"messages": MESSAGES, "context": "1 2"}, "'context' says what 'messages' does not"),
        ({"messages": MESSAGES, "prompt": "Why?", "response": "So."}, "says what 'messages' does not"),
        ({"messages": MESSAGES, "prompt": "Why?"}, "'prompt' says what 'messages' does not"),
        ({"messages": MESSAGES, "prompt": "Three."}, "'prompt' says what 'messages' does not"),  # it was not asked
        ({"messages": MESSAGES, "prompt": "How man"}, "'prompt' says what 'messages' does not"),  # no whole words
        (
            {"messages": MESSAGES, "prompt": "How many?", "response": "Four."},
            "'response' says what 'messages' does not",
        ),
        ({"messages": MESSAGES, "prompt": [BRIEF, MESSAGES[0]], "system": "b"}, "two different system messages"),
        ({"messages": MESSAGES, "prompt": [*MESSAGES, MESSAGES[0]]}, "'prompt' says what 'messages' does not"),
        ({"conversations": SHAREGPT, **ALPACA}, "says what 'conversations' does not"),
        ({"conversations": SHAREGPT, "history": [["Why?", "So."]]}, "'history' says what 'conversations' does not"),
        (
            {"conversations": SHAREGPT, "messages": [MESSAGES[0], MESSAGES[1] | {"content": "Four."}]},
            "'messages' says what 'conversations' does not",
        ),
        ({"conversations": SHAREGPT, "messages": MESSAGES * 2}, "'messages' says what 'conversations' does not"),
        ({"prompt": MESSAGES[:1], "question": "Why?", "answer": "x"}, "'question' says what 'prompt' does not"),
    ],
)
def test_fields_that_contradict_each_other(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_chat(row)


GOOD, BAD = {"role": "assistant", "content": "Three."}, {"role": "assistant", "content": "Four."}
PAIR = Chat([ASK], ["Three.", "Four."])


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"prompt": "How many?", "chosen": "Three.", "rejected": "Four."}, PAIR),
        (
            {"instruction": "Add.", "input": "1 2", "output": "x", "chosen": "3", "rejected": "4"},
            Chat([("user", "Add.")], ["3", "4"], "1 2"),
        ),
        (
            {"system": "s", "question": "How many?", "chosen": "Three.", "rejected": "Four."},
            Chat([("system", "s"), ASK], ["Three.", "Four."]),
        ),
        # UltraFeedback as Zephyr binarised it: whole conversations, and the prompt beside them
        (
            {
                "prompt": "How many?", "prompt_id": "ab", "chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD],
                "messages": [MESSAGES[0], GOOD], "score_chosen": 8.0, "score_rejected": 2.0,
            },
            PAIR,
        ),
        ({"chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]}, PAIR),
        ({"prompt": MESSAGES[:1], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        (
            {"system": "s", "chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]},
            Chat([("system", "s"), ASK], ["Three.", "Four."]),
        ),
        (
            {"prompt": [BRIEF, MESSAGES[0]], "chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]},
            Chat([("system", "Be brief."), ASK], ["Three.", "Four."]),
        ),
        (
            {"prompt": MESSAGES[:1], "chosen": [GOOD, MESSAGES[0], GOOD], "rejected": [GOOD, MESSAGES[0], BAD]},
            Chat([ASK, TOLD, ASK], ["Three.", "Four."]),
        ),
        (
            {"prompt": "Why?", "original_question": " How many? ", "chosen": "Three.", "rejected": "Four."},
            Chat([("user", "Why?")], ["Three.", "Four."], origin="How many?"),
        ),
        (
            {"prompt": [BRIEF, *MESSAGES, MESSAGES[0]], "chosen": "Three.", "rejected": "Four."},
            Chat([("system", "Be brief."), ASK, TOLD, ASK], ["Three.", "Four."]),
        ),
        (
            {
                "conversations": [*SHAREGPT, SHAREGPT[0]], "chosen": {"from": "gpt", "value": "Three."},
                "rejected": {"from": "gpt", "value": "Four."},
            },
            Chat([ASK, TOLD, ASK], ["Three.", "Four."]),
        ),
    ],
)  # fmt: skip
def test_preferences(row, chat):
    assert parse_pair(row) == chat


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x", "no object"),
        ({"prompt": "How many?", "chosen": "Three."}, "no 'rejected'"),
        ({"prompt": "How many?", "chosen": "Three.", "rejected": "Three."}, "chosen and rejected are equal"),
        ({"prompt": "How many?", "chosen": "Three.", "rejected": ""}, "an empty answer"),
        ({"prompt": "How many?", "chosen": None, "rejected": "x"}, "'chosen' is no string"),
        ({"chosen": "Three.", "rejected": "Four."}, "no question"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no question"),
        ({"prompt": "How many?", "chosen": [MESSAGES[0]], "rejected": [BAD]}, "'chosen' does not end with an answer"),
        ({"chosen": [MESSAGES[0], GOOD], "rejected": [BRIEF, BAD]}, "answers to different conversations"),
        ({"chosen": [MESSAGES[0], GOOD], "rejected": [BAD]}, "answers to different conversations"),
        ({"conversations": SHAREGPT, "chosen": GOOD, "rejected": BAD}, "roles out of order"),
        (
            {"prompt": "Why?", "chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]},
            "'prompt' says what 'chosen' does not",
        ),
        (
            {"prompt": [*MESSAGES, MESSAGES[0]], "chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]},
            "'prompt' says what 'chosen' does not",
        ),
        (
            {"instruction": "How many?", "input": "1", "chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]},
            "'input' says what 'chosen' does not",
        ),
        ({"instruction": "How many?", "completions": 3}, "no list of objects"),
        ({"instruction": "How many?", "completions": [{"response": "x", "overall_score": 3}]}, "scored above another"),
        ({"instruction": "How many?", "completions": [{"response": "x"}, {"response": "y"}]}, "scored above another"),
        (
            {"completions": [{"response": "x", "overall_score": 1}, {"response": "y", "overall_score": 2}]},
            "no question",
        ),
    ],
)
def test_preferences_that_are_none(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_pair(row)


ANSWERS = {"chosen": GOOD, "rejected": BAD}
TALKS = {"chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How many?", "question": None, "source": "x", **TALKS},  # ORPO-DPO-mix: filled for some sources
        {"prompt": "How many?", "question": "How many?", "completions": None, **TALKS},
        {"conversations": SHAREGPT[:1], "prompt": "How many?", **ANSWERS},
        {"conversations": SHAREGPT[:1], "messages": MESSAGES, "prompt": "", **TALKS},
        {"prompt": "How many?", "messages": [MESSAGES[0], BAD], "chosen": "Three.", "rejected": "Four."},
        {"prompt": "How many?", "output": "Five.", "response": "Six.", **ANSWERS},  # no answer here was asked for
    ],
)
def test_preferences_whose_fields_say_the_same(row):
    assert parse_pair(row) == PAIR


def test_a_copy_of_the_conversation_holds_the_input():
    row = ALPACA | {"messages": [{"role": "user", "content": "Add. 1 2"}], "chosen": "3", "rejected": "4"}
    assert parse_pair(row) == Chat([("user", "Add.")], ["3", "4"], "1 2")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "question": "How many?", **ANSWERS}, "two different questions: 'prompt' and 'question'"),
        ({"prompt": "Why?", "conversations": SHAREGPT[:1], **ANSWERS}, "'prompt' says what 'conversations' does not"),
        ({"input": "1 2", "conversations": SHAREGPT[:1], **ANSWERS}, "'input' says what 'conversations' does not"),
        ({"conversations": [{"from": "human", "value": "Why?"}], **TALKS}, "'conversations' says what 'chosen' does"),
        ({"prompt": "Why?", "messages": MESSAGES, **ANSWERS}, "'messages' says what 'prompt' does not"),
        ({"prompt": "How many?", "messages": MESSAGES * 2, **TALKS}, "'messages' says what 'chosen' does not"),
        ({"prompt": "How many?", "system": "a", "system_prompt": "b", **TALKS}, "'system' and 'system_prompt'"),
        ({"prompt": "How many?", "messages": [BRIEF, *MESSAGES], "system": "b", **TALKS}, "'system' and 'messages'"),
        (
            {"instruction": "Why?", "prompt": "How many?", "completions": [{"response": "x", "overall_score": 1}]},
            "two different questions: 'instruction' and 'prompt'",
        ),
    ],
)
def test_preferences_whose_fields_contradict_each_other(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_pair(row)


def scored(*scores):
    return [{"response": f"answer {i}", "overall_score": score} for i, score in enumerate(scores)]


def test_the_best_scored_answer_against_a_random_one_that_scored_lower():
    rows = [{"instruction": f"Question {n}", "completions": scored(3, 9.5, "7", 9.5)} for n in range(200)]
    pairs = [parse_pair(row) for row in rows]
    assert {pair.answers[0] for pair in pairs} == {"answer 1"}
    rejected = [pair.answers[1] for pair in pairs]
    assert 60 < rejected.count("answer 0") < 140
    assert rejected.count("answer 0") + rejected.count("answer 2") == 200  # never the other best one
    assert pairs == [parse_pair(json.loads(json.dumps(row))) for row in rows]
    assert rejected != [parse_pair(row, seed=1).answers[1] for row in rows]


def test_scores_of_aspects_and_scores_that_are_none():
    def rated(*ratings):
        aspects = ("helpfulness", "honesty", "truthfulness", "instruction_following")
        return {
            aspect: {"Rating": rating, "Rationale": "..."} for aspect, rating in zip(aspects, ratings, strict=False)
        }

    completions = [
        {"response": "poor", "annotations": rated("1", "5", "N/A", "2")},
        {"response": "best", "annotations": rated("5", "4", "N/A", "5")},
        {"response": "unknown", "annotations": rated("N/A")},
        {"response": "not scored", "overall_score": float("nan")},
    ]
    assert parse_pair({"instruction": "How many?", "completions": completions}).answers == ["best", "poor"]


def test_where_a_templates_context_stands():
    chat = Chat([("user", "Add.")], ["3", "4"], "1 2")
    assert chat.conversation(1, "alpaca") == {"instruction": "Add.", "input": "1 2", "output": "4"}
    assert chat.conversation(0, "solar") == [
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    system = chat._replace(messages=[("system", "s"), ("user", "Add.")])
    assert [m["role"] for m in system.conversation(0, "alpaca")] == ["system", "user", "assistant"]
    assert chat.opening() == system.opening() == Chat([("user", " Add.\n\n1 2\n")], ["5"]).opening() == "Add.\n\n1 2"
    assert Chat([ASK, TOLD, ("user", "Why?")], ["x"], "input of the last").opening() == "How many?"
    assert Chat([ASK, TOLD, ("user", "Why?")], ["x"], origin="What?").opening() == "What?"


NAMES = [
    "instruction", "prompt", "input", "output", "response", "messages", "conversations", "chosen", "rejected", "system",
    "completions", "role", "from", "content", "value", "overall_score", "annotations", "Rating",
    "history", "context", "original_question", "question", "answer", "completion", "system_prompt",
]  # fmt: skip
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "gpt", "system", "a", "4"])
ANY = st.recursive(
    LEAF | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)


@given(row=st.dictionaries(st.sampled_from(NAMES), ANY, max_size=6) | ANY)
@settings(max_examples=150)
@pytest.mark.parametrize("parse", [parse_chat, parse_pair])
def test_any_json_is_a_chat_or_a_reason(parse, row):
    try:
        chat, reason = parse(row), ""
    except ValueError as error:
        chat, reason = Chat([ASK], ["x"]), str(error)
    assert len(reason) < 200
    assert "\n" not in reason
    assert all(answer.strip() for answer in chat.answers)
    assert chat.messages[-1][0] == "user"
    assert chat.opening()
    for template, segments in TEMPLATES.items():
        if template != "alpaca" or len(chat.messages) == 1:
            assert "".join(s.text for s in segments(chat.conversation(0, template)) if s.answer).strip() or chat.context
