"""A model to use, from the directory of a run or from a checkpoint folder of released weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import ModelConfig, Precision, Run, Schedule
from deepseek_jax.huggingface import load_huggingface
from deepseek_jax.huggingface_checkpoint import read_json
from deepseek_jax.huggingface_config import model_config
from deepseek_jax.model import Model
from experiments.data import Tokenizer, load_tokenizer
from experiments.eval import load_run, run_tokenizer, trained_model
from experiments.run_directory import RunDirectory


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and how a chat is written for it."""

    model: Model
    tokenizer: Tokenizer
    begin: tuple[int, ...]  # tokens that a text begins with
    stop: tuple[int, ...]  # tokens that end a text
    chat: dict[str, Any] | None  # tokenizer_config.json where it holds a template


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds released weights; a run's config.json names no model_type."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def run_of(path: Path) -> Run:
    """The Run of a directory; of released weights, a single step of their configuration."""
    if not is_checkpoint(path):
        return RunDirectory(path).read_run()
    return one_step(model_config(read_json(path / "config.json")))


def one_step(config: ModelConfig) -> Run:
    """A Run that is nothing but a model."""
    one = Schedule.constant(1)
    return Run(config=config, steps=1, seq_len=config.max_length, micro_batch=1, batch_size=one,
               learning_rate=one)  # fmt: skip


def load_model(
    path: Path,
    *,
    step: int | None = None,
    precision: str | Precision | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
    """The model of a run, or of a checkpoint folder in a precision ("bf16" by default)."""
    if not is_checkpoint(path):
        if precision is not None:
            raise ValueError(f"{path} is a run, which has its own precision: leave out --precision")
        directory = RunDirectory(path)
        model = trained_model(*load_run(directory, step=step, mesh=mesh))
        tokenizer = run_tokenizer(directory)
        return Loaded(model, tokenizer, (), (tokenizer.eos,), None)
    if step is not None:
        raise ValueError(f"{path} is a checkpoint of released weights, which has no steps")
    # Before the weights, which take longer.
    tokenizer = load_tokenizer(path / "tokenizer.json")
    chosen = Precision(weights="bf16", activations="bf16", matmul="bf16")
    model = load_huggingface(
        path, precision=chosen if precision is None else precision, mesh=mesh
    )
    return Loaded(
        model, tokenizer, begin_tokens(path, tokenizer), stop_tokens(path, tokenizer),
        chat_config(path),
    )  # fmt: skip


def begin_tokens(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that tokenizer_config.json has put before every text; chat templates name it."""
    if not (path / "tokenizer_config.json").is_file():
        return ()
    record = read_json(path / "tokenizer_config.json")
    token = token_name(record, "bos_token")
    if not record.get("add_bos_token") or not token:
        return ()
    return tuple(int(t) for t in tokenizer.encode(token, special=True))


def token_name(record: dict[str, Any], field: str) -> str:
    """The text of a token as tokenizer_config.json writes it; empty where it names none."""
    token = record.get(field)
    text = (token.get("content") if isinstance(token, dict) else token) or ""
    if not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json: {field}={token!r} must be a text")
    return text


def stop_tokens(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end-of-text tokens that generation_config.json or config.json name."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            eos = read_json(path / name).get("eos_token_id")
            if eos is not None:
                tokens = tuple(eos) if isinstance(eos, list) else (eos,)
                if not all(type(token) is int for token in tokens):
                    raise ValueError(f"{name}: eos_token_id={eos!r} must be token numbers")
                return tokens
    return (tokenizer.eos,)


def chat_config(path: Path) -> dict[str, Any] | None:
    """tokenizer_config.json, when it holds a chat template (or chat_template.jinja does)."""
    if not (path / "tokenizer_config.json").is_file():
        return None
    record = read_json(path / "tokenizer_config.json")
    if (path / "chat_template.jinja").is_file():
        record["chat_template"] = (path / "chat_template.jinja").read_text()
    return record if isinstance(record.get("chat_template"), str) else None


def chat_prompt(record: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """A conversation as the model was trained to read it, up to where its answer begins."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(text: str):
        raise ValueError(f"the chat template refuses this conversation: {text}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(record["chat_template"]).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=token_name(record, "bos_token"),
            eos_token=token_name(record, "eos_token"),
        )
    except ValueError:
        raise
    except Exception as error:  # a template is a program, which can fail in any way
        raise ValueError(f"the checkpoint's chat template fails on this conversation: {error} "
                         "(--raw continues the prompt without it)") from error  # fmt: skip
