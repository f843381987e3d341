"""The notebook runs from top to bottom as a reader would run it, and is stored without outputs."""

import re

import pytest

from tests.oracle.reference import QUICK

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.fixture
def notebook(root):
    return nbformat.read(root / "experiments" / "notebooks" / "prototype.ipynb", as_version=4)


def outputs(notebook, kind):
    """The text of all outputs of a kind."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [output for cell in cells for output in cell.outputs if output.output_type == kind]
    return "".join(output.get("text", "") for output in found), found


def test_stored_without_outputs_and_without_the_traces_of_a_run(notebook):
    for cell in notebook.cells:
        assert cell.source.isascii()
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    assert notebook.metadata.kernelspec.name == "python3"


def test_needs_nothing_from_experiments(notebook):
    assert not any(re.search(r"\bexperiments import|import experiments", cell.source)
                   for cell in notebook.cells)


def run(notebook, root):
    """Executes a notebook where it lies; what it printed. Nothing may go to stderr."""
    # The kernel draws into the notebook, and compiles without most optimisations.
    flags = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)
        patch.setenv("XLA_FLAGS", " ".join(flags))
        nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3",
            resources={"metadata": {"path": str(root)}},
        ).execute()  # fmt: skip
    printed, streams = outputs(notebook, "stream")
    assert not [stream.text for stream in streams if stream.name == "stderr"]
    return printed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_runs_as_far_as_the_training(notebook, root):
    [training] = [i for i, cell in enumerate(notebook.cells) if "## Train each" in cell.source]
    notebook.cells = notebook.cells[:training]
    printed = run(notebook, root)
    assert re.search(r"deepseek_v3\s+70,272", printed)
    balance = [float(x) for x in re.findall(r"(?:without bias|updates): ([\d.]+)", printed)]
    assert len(balance) == 4 and balance[-1] < balance[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_runs_and_every_variant_learns(notebook, root):
    losses = re.findall(r"loss ([\d.]+) -> ([\d.]+)", run(notebook, root))
    assert len(losses) == 3
    for first, last in losses:
        assert float(last) < 0.75 * float(first)
    assert any("image/png" in output.data for output in outputs(notebook, "display_data")[1])
