"""Chat templates of checkpoints: what they write, and that they can do nothing else."""

import json

import pytest

from experiments.models import begin_tokens, chat_config, chat_prompt, stop_tokens

# In the manner of V3's: a namespace that is set in a loop, methods of strings, roles.
TEMPLATE = """{% set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<User>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<Assistant>' + message['content'].split('</think>')[-1] + eos_token }}
    {%- elif message['role'] != 'system' %}{{ raise_exception('no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant>' }}{% endif %}"""

RECORD = {"chat_template": TEMPLATE, "bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_conversation_is_written_up_to_where_the_answer_begins():
    messages = [said("system", "Be short."), said("user", "Hi"),
                said("assistant", "hm</think>Hello"), said("user", "Bye")]  # fmt: skip
    written = chat_prompt(RECORD, messages)
    assert written == "<bos>Be short.<User>Hi<Assistant>Hello<eos><User>Bye<Assistant>"


def test_a_conversation_that_the_template_refuses_is_one_line():
    with pytest.raises(ValueError, match="refuses this conversation: no role tool"):
        chat_prompt(RECORD, [said("tool", "42")])


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ ''.__class__.__mro__ }}", "{{ nothing.at }}", "{{ 1 // 0 }}"]
)
def test_templates_that_are_damaged_or_reach_for_more_are_refused(template):
    with pytest.raises(ValueError, match="chat template fails on this conversation"):
        chat_prompt({"chat_template": template}, [said("user", "Hi")])


def test_texts_begin_with_the_token_that_the_checkpoint_names(tmp_path):
    class Tokenizer:
        def encode(self, text, *, special):
            assert special
            return [{"<bos>": 7}[text]]

    assert begin_tokens(tmp_path, Tokenizer()) == ()
    config = tmp_path / "tokenizer_config.json"
    for added, bos, found in (
        (True, "<bos>", (7,)), (True, {"content": "<bos>"}, (7,)), (False, "<bos>", ()),
        (True, None, ()),
    ):  # fmt: skip
        config.write_text(json.dumps({"add_bos_token": added, "bos_token": bos}))
        assert begin_tokens(tmp_path, Tokenizer()) == found


def test_the_template_is_that_of_the_checkpoint(tmp_path):
    assert chat_config(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<bos>"}))
    assert chat_config(tmp_path) is None
    config.write_text(json.dumps(RECORD))
    assert chat_config(tmp_path) == RECORD
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert chat_prompt(chat_config(tmp_path), [said("user", "Hi")]) == "Hi"


@pytest.mark.parametrize("eos", ["</s>", [1, "</s>"], 1.5, True])
def test_tokens_that_are_no_numbers_or_names_are_refused_by_field(tmp_path, eos):
    config = tmp_path / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id=.* token numbers"):
        stop_tokens(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": 5}')
    with pytest.raises(ValueError, match="tokenizer_config.json: bos_token=5 must be a text"):
        begin_tokens(tmp_path, None)
