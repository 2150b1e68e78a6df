"""Run notebooks in a real kernel and save their outputs in place; cells marked `#| eval: false` keep what they show."""
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


# another backend than the kernel's own would draw every picture and store none
os.environ.pop("MPLBACKEND", None)
# a warning that names a folder of this machine, and is of the kernel, not of what runs in it
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress")


class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **kw):
        if re.search(r"^\s*#\|\s*eval:\s*false", cell.source, re.M | re.I):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


# tqdm tells a kernel without ipywidgets so, with a path of this machine, and a notebook is committed with what it says
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
for f in map(Path, sys.argv[1:]):
    nb = nbformat.read(f, 4)
    Client(nb, timeout=900, kernel_name="python3", record_timing=False, coalesce_streams=True,
           resources={"metadata": {"path": str(f.parent)}}).execute()
    nbformat.write(nb, f)
    print("ran", f)
