"""What all processes of a run must have alike: its configuration and its data."""

import json

from deepseek_jax.config import Run, differing_fields, from_json, to_json
from experiments import processes
from experiments.data import TokenShards


def on_configuration(run: Run) -> None:
    """Raises a ValueError that names the field in which two hosts' runs differ."""
    for other, text in enumerate(processes.texts(json.dumps(to_json(run)))):
        first = json.loads(text) if other == 0 else first
        lines = differing_fields(from_json(Run, first), from_json(Run, json.loads(text)))
        if lines:
            raise ValueError(
                f"processes 0 and {other} have different configurations ({'; '.join(lines)}): "
                "start all with the same command and version"
            )


def on_data(shards: TokenShards) -> None:
    """Raises a ValueError that names two hosts' data when they differ."""
    found = processes.texts(f"corpus {shards.corpus_hash[:12]}, tokenizer "
                            f"{shards.tokenizer_hash[:12]}, {shards.train.num_tokens} tokens")
    for other, text in enumerate(found):
        if text != found[0]:
            raise ValueError(
                f"processes 0 and {other} have different data ({found[0]}; {text}): give all the "
                "same files, best on a shared disk"
            )
