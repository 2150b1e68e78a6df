"Learn, run and trust RLHF. Every public name is had from here, wherever it lives: its module is imported when it is asked for"
__version__ = "0.1.0"

from importlib import import_module as _import

def _homes():
    "{name: module} of all public functions and classes"
    from ._modidx import d
    at = [(full.rsplit('.', 1)[1], module) for module,names in d['syms'].items() for full in names if full.count('.')==2]
    modules = {m.rsplit('.', 1)[1] for m in d['syms']}
    return {name:m for name,m in at if not name.startswith('_') and name not in modules}

def __getattr__(name):
    home = None if name.startswith('_') else _homes().get(name)
    if home is None: raise AttributeError(f"module 'rlhf_nb' has no attribute {name!r}")
    return getattr(_import(home), name)

def __dir__(): return sorted([*globals(), *_homes()])
