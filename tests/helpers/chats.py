"""Chat templates in the manner of well-known models, and folders with a tokenizer and one of them."""

import json
import pathlib

import open_models
import tokenizers
from tokenizers import pre_tokenizers

CHATML = r"""{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As Qwen3: what the assistant thought stays in its last turn only.
THINKING = r"""
{%- set now = namespace(question=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set now.question = messages.index(m) -%}{%- endfor -%}
{%- for m in messages -%}
    {%- set said = m.content -%}
    {%- if m.role == 'assistant' -%}
        {%- if '</think>' in said -%}{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}
        {%- if loop.index0 > now.question -%}
            {%- set said = '<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>\n\n' ~ said -%}
        {%- endif -%}
    {%- endif -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ said ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

# As Llama 2: BOS before each question, EOS behind each answer, the system's words in the first question.
INST = r"""
{%- if messages[0].role == 'system' -%}
    {%- set rules, talk = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n', messages[1:] -%}
{%- else -%}
    {%- set rules, talk = '', messages -%}
{%- endif -%}
{%- for m in talk -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('They must take turns.') }}{%- endif -%}
    {%- if m.role == 'user' -%}
        {{- bos_token ~ '[INST] ' ~ (rules if loop.first else '') ~ m.content.strip() ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ m.content.strip() ~ ' ' ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}"""

# As Llama 3: headers, and an end of turn that is the tokenizer's EOS.
HEADERS = r"""{{- bos_token -}}
{%- for m in messages -%}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

# As Gemma: no system, the assistant has another name, and what ends a turn is not EOS.
TURNS = r"""{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('There is no system here.') -}}{%- endif -%}
{%- for m in messages -%}
    {%- set who = 'model' if m.role == 'assistant' else m.role -%}
    {{- '<start_of_turn>' ~ who ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""

# As DeepSeek-R1: what asks for an answer opens a thought; thoughts are left out of what was said.
REASONING = r"""{%- for m in messages -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' -}}
    {%- if m['content'] is not defined or m['content'] is none -%}
        {%- for call in m['tool_calls'] -%}{{- '<call>' ~ call.function | tojson -}}{%- endfor -%}
    {%- elif '</think>' in m['content'] -%}
        {{- m['content'].split('</think>')[-1] -}}
    {%- else -%}
        {{- m['content'] -}}
    {%- endif -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"""

# As Qwen3 with tools: descriptions, calls and results, and thoughts of their own.
TOOLS = r"""
{%- if tools -%}
    {{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if messages[0].role == 'system' else '') ~ '<tools>' -}}
    {%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}
    {{- '\n</tools><|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
    {%- if m.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
    {%- elif not (tools and loop.first and m.role == 'system') -%}
        {{- '<|im_start|>' ~ m.role ~ '\n' -}}
        {%- if m.reasoning_content is defined and m.reasoning_content is not none -%}
            {{- '<think>\n' ~ m.reasoning_content.strip('\n') ~ '\n</think>\n\n' -}}
        {%- endif -%}
        {{- m.content or '' -}}
        {%- for call in m.tool_calls or [] -%}
            {{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# As Llama 3.2: a system turn with the date, whatever is said, and tools in the first question.
DATED = r"""{{- bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set rules = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set rules = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}
{{- rules + '<|eot_id|>' }}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}{{ raise_exception('One call at a time.') }}{% endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' ~ m.tool_calls[0].function | tojson ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
        {%- if tools is not none and loop.first %}
            {%- for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
        {%- endif %}
        {{- m.content | tojson if m.role == 'tool' else m.content | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# What else templates make use of.
ODD = r"""{%- for m in messages -%}
    {%- if loop.index > 6 -%}{%- break -%}{%- endif -%}
    {{- '<|im_start|>' ~ {'who': m.role, 'é': strftime_now('%Y')} | tojson ~ '\n' -}}
    {%- if m.role == 'assistant' -%}
        {%- generation -%}{{- m.content ~ '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- m.content ~ '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>' ~ dict(who='assistant') | tojson(indent=1) -}}{%- endif -%}"""


def _llama3() -> tokenizers.Tokenizer:
    """Byte-level, and line ends are pieces whatever follows."""
    tokenizer = open_models.byte_level()
    split = pre_tokenizers.Split(tokenizers.Regex(r"\s*[\r\n]+| ?[^\s]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


_IM = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
_LLAMA2 = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    "unk_token": "<unk>",
    "add_bos_token": True,
}
# Template, tokenizer, special tokens that are added to it, tokenizer_config.json.
KINDS = {
    "chatml": (CHATML, open_models.byte_level, ["<|im_start|>", "<|im_end|>"], _IM),
    "thinking": (THINKING, open_models.byte_level, ["<|im_start|>", "<|im_end|>"], _IM),
    "inst": (INST, open_models.sentencepiece_like, [], _LLAMA2),
    "headers": (
        HEADERS,
        _llama3,
        ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin|>", "add_bos_token": True, "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"},
    ),
    "turns": (TURNS, open_models.metaspace, ["<start_of_turn>", "<end_of_turn>"], _LLAMA2),
}


def save(folder: pathlib.Path, kind: str, template: str | None = None, in_file: bool = False) -> str:
    """Writes a tokenizer with its template, and returns the path of its tokenizer.json.

    Args:
      folder: made if it is not there.
      kind: of KINDS.
      template: in place of the kind's own.
      in_file: write it as chat_template.jinja, as newer versions of `transformers` do.
    """
    own, make, special, config = KINDS[kind]
    tokenizer = make()
    tokenizer.add_special_tokens(special)
    template = own if template is None else template
    path = open_models.save_tokenizer(folder, tokenizer, **config, **({} if in_file else {"chat_template": template}))
    if in_file:
        (folder / "chat_template.jinja").write_text(template)
    return path


def message(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def write_lines(path: pathlib.Path, conversations: list[list[dict]]) -> str:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)
