"""The documentation site: nbs/sidebar.yml and nbs/nbdev.yml, and every notebook as quarto is to read it (_proc).

What stands in the sidebar is the table of notebooks in nbs/index.ipynb. `nbdev_docs` does the rest where quarto is.
"""
import re

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs


def sections(index):
    "Its table of notebooks: {section: [files]}"
    cells = nbformat.read(index, 4).cells
    table, = (c.source for c in cells if c.source.startswith("## The notebooks"))
    out, name = {}, "tutorials"
    for first in re.findall(r"^\| (\*\*\w+\*\*|\[.*?\)) \|", table, re.M):
        if first.startswith("**"):
            name = first.strip("*")
            continue
        out.setdefault(name, []).append(re.search(r"\((.+?)\)", first)[1])
    return out


if __name__ == "__main__":
    nbs = get_config().nbs_path
    refresh_quarto_yml()
    contents = [dict(section=name, contents=files) for name, files in sections(nbs / "index.ipynb").items()]
    site = dict(website=dict(sidebar=dict(contents=["index.ipynb", *contents])))
    (nbs / "sidebar.yml").write_text(yaml.dump(site, sort_keys=False))
    proc_nbs(nbs, n_workers=0, force=True)
