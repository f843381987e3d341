"""Places of processes: from the environment, from batch systems, from a number."""

import pytest

from experiments import hosts
from experiments.hosts import Place


def test_a_place_survives_the_environment():
    place = Place(2, 4, "node01:20001", ("node01", "node02", "node03", "node04"))
    assert Place.read(str(place)) == place
    assert place.name(3) == "process 3 of 4 on node04"


@pytest.mark.parametrize(
    "text, names",
    [
        ("a1", ["a1"]),
        ("n[01-03,07],m", ["n01", "n02", "n03", "n07", "m"]),
        ("gpu-[8-10]", ["gpu-8", "gpu-9", "gpu-10"]),
        ("r[1-2]n[1,3],s[2]-ib", ["r1n1", "r1n3", "r2n1", "r2n3", "s2-ib"]),
    ],
)
def test_slurms_short_form_names_every_host(text, names):
    assert hosts.slurm_hosts(text) == names


def test_a_host_of_a_slurm_job_starts_its_own_process(monkeypatch):
    for name, value in (("STEP_NUM_TASKS", "3"), ("STEP_NODELIST", "n[1-3]"), ("PROCID", "2"),
                        ("JOB_ID", "40007")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert hosts.group(None) == [Place(2, 3, "n1:20014", ("n1", "n2", "n3"))]
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n1")
    with pytest.raises(ValueError, match="srun started 3 tasks on 1 nodes: use one a node"):
        hosts.group(None)


def test_a_pod_of_a_job_set_starts_its_own_process(monkeypatch):
    monkeypatch.setenv(hosts.COORDINATOR, "job-hosts-0-0.job:20000")
    monkeypatch.setenv(hosts.COUNT, "2")
    with pytest.raises(ValueError, match="PROCESSES=2 also needs JOB_COMPLETION_INDEX"):
        hosts.group(None)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    (place,) = hosts.group(None)
    assert (place.index, place.count, place.coordinator) == (1, 2, "job-hosts-0-0.job:20000")


def test_one_process_needs_no_others(monkeypatch):
    assert hosts.group(None) == hosts.group(1) == []
    with pytest.raises(ValueError, match="--processes 0 must be at least 1"):
        hosts.group(0)
    with pytest.raises(ValueError, match="--processes 1000 are more than this machine"):
        hosts.group(1000)
    assert [place.index for place in hosts.group(3)] == [0, 1, 2]
