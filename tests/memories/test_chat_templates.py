"""Chats behind memories by templates as models have them: wherever a conversation is cut, its parts are the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.support.chats import behind, check_save, read, turns, whole
from vllm_armt.memories.chat import Outline
from vllm_armt.memories.errors import InvalidInput

OF_VLLM = Path(vllm.__file__).parent / "transformers_utils/chat_templates"
# HuggingFaceTB/SmolLM2-135M-Instruct's (Apache-2.0), as it is
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen 2.5: a default system prompt that tools are added to, and results of one turn in one message of the user
QWEN = """
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}
    {{- '\n\n# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# as Qwen 3: the answer to the last question alone is written with its thinking
QWEN_THINKING = """
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.question and loop.last %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
# as Llama 3.2: a system turn with today's date, tools in the first turn of the user, contents trimmed, one call a turn
LLAMA = """
{{- '<|begin_of_text|>' }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set said = messages[1:] %}
{%- else %}
    {%- set system = '' %}{%- set said = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}
{%- if tools %}
    {%- if said | length == 0 %}{{- raise_exception('There is no first user message.') }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, call one.\n\n' }}
    {%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\n\n' }}{%- endfor %}
    {{- (said[0].content | trim) + '<|eot_id|>' }}
    {%- set said = said[1:] %}
{%- endif %}
{%- for message in said %}
    {%- if message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | trim) + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('Only one call at once.') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
# as Mistral: roles alternate, ids of calls have nine characters, and tools stand before the last question
MISTRAL = """
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list | length %}
{%- set count = namespace(user=0) %}
{{- '<s>' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set count.user = count.user + 1 %}
        {%- if tools and count.user == asked %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
        {{- ']</s>' }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}{{- raise_exception('Ids have nine characters.') }}{%- endif %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content + '</s>' }}
    {%- endif %}
{%- endfor %}
"""
PLAIN = {
    "smollm2": SMOLLM2,
    "vllm's chatml": (OF_VLLM / "template_chatml.jinja").read_text(),
    "vllm's basic": (OF_VLLM / "template_basic.jinja").read_text(),
    "qwen": QWEN,
    "llama": LLAMA,
    "mistral": MISTRAL,
}
WITH_TOOLS = {"qwen": QWEN, "llama": LLAMA}

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("clock", "map")
]
SYSTEM = {"role": "system", "content": "You answer in one word."}


def calling(*names: str) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {"of": "Rome"}}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "abcdefghi", "content": content}


TALK = turns("A long document.", "I have read it.", "Where is Mary?", "In Rome.", "And John?")
TOOL_TALK = [
    *turns("A long document.", "I have read it.", "What time is it in Rome?"),
    calling("clock"),
    result("Noon."),
    *turns("", "It is noon.", "And where is Rome?")[1:],
    calling("map"),
    result("Here."),
    result("There."),
]


def check_every_cut(template: str, said: list[dict[str, Any]], **request: Any) -> None:
    for cut in range(1 + (said[0] is SYSTEM), len(said)):
        memory, outline = read(template, said[:cut], **request)
        question = behind(template, outline, said[cut:], **request)
        assert memory + question == whole(template, said, **request), f"cut before message {cut}"


@pytest.mark.parametrize("template", PLAIN.values(), ids=PLAIN)
def test_a_conversation_cut_anywhere_is_the_whole(template):
    check_every_cut(template, TALK)
    check_every_cut(template, [SYSTEM, *TALK])


@pytest.mark.parametrize("template", WITH_TOOLS.values(), ids=WITH_TOOLS)
def test_calls_and_results_cut_anywhere_are_the_whole(template):
    check_every_cut(template, TOOL_TALK, tools=TOOLS)
    check_every_cut(template, [SYSTEM, *TOOL_TALK], tools=TOOLS)


@pytest.mark.parametrize("template", PLAIN.values(), ids=PLAIN)
def test_a_chat_goes_on_from_its_saved_answer(template):
    check_save(template, Outline(), turns("Where is Mary?"))
    check_save(template, Outline(("user", "assistant")), turns("Where is Mary?"))


@pytest.mark.parametrize("template", WITH_TOOLS.values(), ids=WITH_TOOLS)
def test_tools_that_stand_before_what_was_read_are_refused(template):
    _, outline = read(template, TALK[:1])
    with pytest.raises(InvalidInput, match="without these tools"):
        behind(template, outline, TALK[1:], tools=TOOLS)


def test_tools_that_stand_before_the_question_need_not_have_been_read():
    memory, outline = read(MISTRAL, TALK[:2])
    assert memory + behind(MISTRAL, outline, TALK[2:3], tools=TOOLS) == whole(MISTRAL, TALK[:3], tools=TOOLS)


def test_tools_that_move_to_the_next_question_are_refused():
    _, outline = read(MISTRAL, TALK[:2], tools=TOOLS)
    with pytest.raises(InvalidInput, match="otherwise once others follow"):
        behind(MISTRAL, outline, TALK[2:3], tools=TOOLS)


def test_results_go_on_from_a_call_where_ids_have_a_form():
    said = [*TALK[:1], calling("clock"), result("Noon.")]
    memory, outline = read(MISTRAL, [*said, *turns("", "It is noon.")[1:]])
    assert outline.roles == ("user", "assistant", "tool", "assistant")
    assert memory.endswith("[TOOL_RESULTS]Noon.[/TOOL_RESULTS]It is noon.")
    assert behind(MISTRAL, outline, turns("Thanks.")) == "</s>[INST]Thanks.[/INST]"


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["thinking", "not"])
def test_thinking_that_is_left_out_later_is_refused_before_a_chat_is_saved_and_after(kwargs):
    memory, outline = read(QWEN_THINKING, TALK[:1], **kwargs)
    question = TALK[2:3]
    # behind questions alone nothing was thought
    assert memory + behind(QWEN_THINKING, outline, question, **kwargs) == whole(
        QWEN_THINKING, [*TALK[:1], *question], **kwargs
    )
    with pytest.raises(InvalidInput, match="otherwise than it is generated"):
        check_save(QWEN_THINKING, Outline(), turns("Where is Mary?"), **kwargs)
    _, answered = read(QWEN_THINKING, TALK[:2], **kwargs)
    with pytest.raises(InvalidInput, match="otherwise once others follow"):
        behind(QWEN_THINKING, answered, question, **kwargs)
