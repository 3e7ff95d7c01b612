"""Execute the notebooks of docs/notebooks in place: `make notebooks`.

What is written has the outputs, and nothing that differs from one execution or machine to the next
for no reason: cell ids are the notebook's name and a number, and there are no times in it.

    python -m studies.notebooks [FILE.ipynb …]          # default: all of them
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS = 1800  # that a cell may take, on a busy machine


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, run in its own folder on one thread.

    Raises nbclient's CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # the kernel takes over this environment
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute(env=environment)
    return tidied(notebook, path.stem)


def tidied(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """Stable ids and kernel, no metadata of the execution."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"{name}-{number:02d}"
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = {}
    return notebook


def main(paths: list[Path]) -> None:
    for path in paths or sorted(FOLDER.glob("*.ipynb")):
        began = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name:24}{time.perf_counter() - began:6.1f} s", flush=True)


if __name__ == "__main__":
    main([Path(argument).resolve() for argument in sys.argv[1:]])
