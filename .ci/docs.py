"What quarto reads: project files and the processed notebooks, without quarto itself. `quarto render _proc` makes the site of it."
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar,refresh_quarto_yml
from nbdev.serve import proc_nbs

if __name__=='__main__':
    nbs = get_config().nbs_path
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(path=nbs)
    proc_nbs(nbs, n_workers=2, force=True)
