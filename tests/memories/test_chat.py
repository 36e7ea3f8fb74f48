"""Chats behind memories: the parts of a conversation, rendered apart, are the conversation rendered whole."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.chats import behind, check_save, read, renderer, turns, whole
from vllm_armt.memories.chat import Message, Outline, digest_of
from vllm_armt.memories.errors import InvalidInput

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.{% if tools %}\n# Tools{% for tool in tools %}\n"
    "{{ tool.name }}{% endfor %}{% endif %}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if loop.first %}<s>{% endif %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
# the first message is written otherwise than others
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.first %}<<SYS>>Help.<</SYS>> {% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
# an answer is written without its thinking once a question follows it
THINKING = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}<think></think>{% endif %}{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "llama2": LLAMA2}
TOOLS = [{"name": "clock"}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_memory_and_a_question_are_the_conversation(template):
    memory, outline = read(template, turns("A long document.", "Read it."))
    assert memory.endswith("Read it.")
    question = turns("Where is Mary?")
    assert memory + behind(template, outline, question) == whole(
        template, turns("A long document.", "Read it.") + question
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_turns_that_are_saved_one_by_one_are_the_conversation(template):
    text, outline, said = "", Outline(), []
    for turn in range(3):
        question = turns(f"question {turn}")
        check_save(template, outline, question)
        blank = " " if template == LLAMA2 else ""
        text += behind(template, outline, question) + f"{blank}answer {turn}"
        outline = outline.followed_by("user", "assistant")
        said += turns(f"question {turn}", f"answer {turn}")
    last = turns("and now?")
    assert text + behind(template, outline, last) == whole(template, said + last)


def test_messages_are_appended_to_messages():
    text, outline = read(CHATML, turns("one"))
    more: list[Message] = [{"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    added = behind(CHATML, outline, more, generate=False)
    assert text + added == asyncio.run(renderer(CHATML)(turns("one") + more, generate=False))


def test_behind_a_plain_text_a_chat_is_rendered_as_it_is():
    assert behind(CHATML, Outline(), turns("Where?")) == whole(CHATML, turns("Where?"))


def test_an_answer_to_a_tool_goes_on_behind_the_call():
    outline = Outline(("user", "assistant"))
    result: list[Message] = [{"role": "tool", "content": "noon", "tool_call_id": "call_0"}]
    assert behind(CHATML, outline, result) == "<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_writes_earlier_messages_otherwise_is_refused():
    with pytest.raises(InvalidInput, match="otherwise once others follow"):
        behind(THINKING, Outline(("user", "assistant")), turns("Where?"))
    with pytest.raises(InvalidInput, match="otherwise than it is generated"):
        check_save(THINKING, Outline(), turns("Where?"))


def test_a_template_that_leaves_a_message_out_is_refused():
    with pytest.raises(InvalidInput, match="'critic'"):
        behind(
            "{% for m in messages if m.role != 'critic' %}{{ m.content }}|{% endfor %}",
            Outline(("critic",)),
            turns("a"),
        )


def test_tools_that_a_memory_has_not_read_are_refused():
    question = turns("What time is it?")
    _, with_tools = read(CHATML, turns("Hello."), TOOLS)
    assert with_tools.tools == digest_of(TOOLS)
    assert behind(CHATML, with_tools, question, tools=TOOLS).startswith("<|im_end|>")
    _, without = read(CHATML, turns("Hello."))
    for outline, tools in ((without, TOOLS), (with_tools, [{"name": "map"}])):
        with pytest.raises(InvalidInput, match="without these tools"):
            behind(CHATML, outline, question, tools=tools)
    # where tools don't stand before the first message, they stand before the question
    later = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% for tool in tools or () %}{{ tool.name }}{% endfor %}"
    )
    assert behind(later, without, question, tools=TOOLS) == "><What time is it?>clock"


def test_an_outline_is_kept_as_roles():
    for outline in (Outline(), Outline(("user",)), Outline(("system", "user"), digest_of(TOOLS))):
        assert Outline.of(outline.stored) == outline
        assert all(len(role) <= 64 for role in outline.stored)
