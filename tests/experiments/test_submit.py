"""Batch scripts and manifests."""

import re
import subprocess

import pytest

from tests.experiments import runs


def test_the_batch_script_holds_the_command_without_what_submits_it():
    words = ("launch", "tiny", "--submit", "slurm", "--nodes=4", "--devices-per-node", "8",
             "--dry-run", "--mesh", "fsdp=4,expert=8", "--set", "seq_len=64", "micro_batch=32",
             "batch_size=32")
    code, out, err = runs.call(*words)
    assert (code, err) == (0, "")
    assert "#SBATCH --nodes=4\n" in out and "#SBATCH --gpus-per-node=8\n" in out
    assert out.splitlines()[-1] == (
        "srun --kill-on-bad-exit=1 python -m experiments launch tiny --devices-per-node 8 "
        "--mesh fsdp=4,expert=8 --set seq_len=64 micro_batch=32 batch_size=32"
    )
    # It is a script that a shell can read.
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_the_manifest_gives_each_pod_what_its_process_needs():
    code, out, err = runs.call("launch", "tiny", "--submit", "k8s", "--nodes", "2", "--image",
                               "registry/it's:1", "--dry-run")
    assert (code, err) == (0, "")
    for line in ("kind: JobSet", "parallelism: 2", "completions: 2", "image: 'registry/it''s:1'",
                 "- 'launch'"):
        assert f" {line}\n" in out or out.startswith(line) or f"\n{line}\n" in out, line
    # Each set has a name of its own, and the first pod is found by it.
    (name,) = re.findall(r"^  name: (deepseek-jax-\d{8}-\d{6})$", out, re.MULTILINE)
    assert f'value: "{name}-hosts-0-0.{name}:20000"\n' in out
    code, out, _ = runs.call("launch", "tiny", "--submit", "k8s", "--image", "a", "--volume",
                             "claim=/shared", "--devices-per-node", "8", "--dry-run")
    for line in ("mountPath: '/shared'", "claimName: 'claim'", "nvidia.com/gpu: 8",
                 "- name: DEEPSEEK_JAX_ARRIVAL"):
        assert code == 0 and f" {line}\n" in out, line
    assert "--volume" not in out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--submit k8s", "--submit k8s needs --image"),
        ("--submit k8s --image a --volume claim", "--volume 'claim' must be CLAIM=PATH"),
        ("--submit k8s --image a --volume claim=/shared --run /else/where",
         "--run /else/where must lie below /shared"),
        ("tiiny --submit slurm", "unknown recipe 'tiiny'"),
        ("tiny --submit slurm --mesh fsdp=32 --nodes 4 --devices-per-node 8",
         "splits a batch over 32 devices, which must divide micro_batch=8"),
        ("tiny --submit slurm --mesh expert=8 --nodes 2 --devices-per-node 3",
         "mesh expert=8 makes 8 devices, and there are 6"),
    ],
)
def test_what_no_host_would_run_is_not_submitted(words, message):
    code, out, err = runs.call("launch", *words.split(), "--dry-run")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
