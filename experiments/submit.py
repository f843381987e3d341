"""`launch --submit`: the same command as a Slurm batch script, or as a JobSet on Kubernetes."""

import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.hosts import COORDINATOR, COUNT, PORT, meeting_port
from experiments.processes import ARRIVAL

# Words of the command line that say how to submit, not what to run, and whether a value follows.
OWN = {"--submit": True, "--nodes": True, "--image": True, "--volume": True, "--dry-run": False}
# Seconds that pods have to meet: some pull the image while others run.
PULLING = 1200


def submit(
    kind: str, *, nodes: int, devices: int | None, image: str | None,
    volume: str | None, words: Sequence[str], dry_run: bool,
) -> None:
    """Prints the script or manifest; writes it beside the run and submits it unless `dry_run`."""
    if nodes < 1:
        raise ValueError(f"--nodes {nodes} must be at least 1")
    if kind == "k8s" and image is None:
        raise ValueError("--submit k8s needs --image: a container with this project installed")
    if volume is not None and not re.fullmatch(r"[^=]+=/.+", volume):
        raise ValueError(f"--volume {volume!r} must be CLAIM=PATH with an absolute path")
    command = without_own(words)
    text = (slurm_script(command, nodes, devices) if kind == "slurm"
            else jobset(command, nodes, devices, image, volume))
    print(text, end="")
    if dry_run:
        return
    path = Path("launch.sbatch" if kind == "slurm" else "launch.jobset.yaml")
    path.write_text(text)
    program = ["sbatch", str(path)] if kind == "slurm" else ["kubectl", "apply", "-f", str(path)]
    try:
        subprocess.run(program, check=True)
    except FileNotFoundError:
        raise ValueError(f"{program[0]} is not installed here: submit {path} where it is") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{shlex.join(program)} ended with code {error.returncode}") from error


def without_own(words: Sequence[str]) -> list[str]:
    """The words of the command line without those of OWN."""
    kept, skip = [], False
    for word in words:
        option, equals, _ = word.replace("_", "-").partition("=")
        if skip:
            skip = False
        elif option in OWN:
            skip = OWN[option] and not equals
        else:
            kept.append(word)
    return kept


def slurm_script(words: Sequence[str], nodes: int, devices: int | None) -> str:
    """One task on each node; partition, account and time are read from SBATCH_* by sbatch."""
    gpus = f"#SBATCH --gpus-per-node={devices}\n" if devices is not None else ""
    return f"""\
#!/bin/bash
#SBATCH --job-name=deepseek-jax
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
{gpus}#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
srun --kill-on-bad-exit=1 python -m experiments {shlex.join(words)}
"""


def jobset(
    words: Sequence[str], nodes: int, devices: int | None, image: str, volume: str | None = None
) -> str:
    """One pod on each node; JobSet gives the pods names by which they find the first.

    The set has a name of its own: under that of one that is there nothing would be begun.
    """
    name, container, volumes = f"deepseek-jax-{time.strftime('%Y%m%d-%H%M%S')}", "", ""
    if devices is not None:
        container = f"""
                resources:
                  limits:
                    nvidia.com/gpu: {devices}"""
    if volume is not None:
        claim, path = volume.split("=", 1)
        container += f"""
                volumeMounts:
                - name: shared
                  mountPath: {quoted(path)}"""
        volumes = f"""
              volumes:
              - name: shared
                persistentVolumeClaim:
                  claimName: {quoted(claim)}"""
    arguments = "".join(f"\n                - {quoted(word)}" for word in words)
    return f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  failurePolicy:
    maxRestarts: 0
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          parallelism: {nodes}
          completions: {nodes}
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              containers:
              - name: train
                image: {quoted(image)}
                command: [python, -m, experiments]
                args:{arguments}
                env:
                - name: {COORDINATOR}
                  value: "{name}-hosts-0-0.{name}:{PORT}"
                - name: {COUNT}
                  value: "{nodes}"
                - name: {ARRIVAL}
                  value: "{PULLING}"
                ports:
                - containerPort: {PORT}
                - containerPort: {meeting_port(PORT)}{container}{volumes}
"""


def quoted(word: str) -> str:
    """A word as a YAML string in single quotes."""
    return "'" + word.replace("'", "''") + "'"
