"Star imports are the style of nbdev, and no linter can follow them: each name of a module comes from one place, and from somewhere"
import ast
import builtins
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent/"rlhf_nb"
modules = {f.stem: f.read_text("utf-8") for f in sorted(root.glob("[a-z]*.py"))}
each_module = pytest.mark.parametrize("name", modules)


def public(source):
    "The names of `__all__`"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def stars(source):
    "The modules of ours whose public names are imported"
    return [n.module for n in ast.parse(source).body if isinstance(n, ast.ImportFrom) and n.level == 1 and n.names[0].name == "*"]


def bound(source):
    "Names that the module itself binds at its top level"
    table = symtable.symtable(source, "module", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()} - {"*"}


def used(table):
    "Global names that a module's code reads, in whatever scope"
    top = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return names.union(*(used(child) for child in table.get_children()))


def missing(source, given):
    "Names that nothing defines"
    return sorted(used(symtable.symtable(source, "module", "exec")) - bound(source) - given - set(dir(builtins)) - {"__file__", "__path__"})


@each_module
def test_names_are_defined(name):
    source = modules[name]
    given = set().union(*(public(modules[m]) for m in stars(source)))
    assert not missing(source, given)


@each_module
def test_names_have_one_home(name):
    "No two star imports bring the same name, and the module defines none of theirs again"
    source = modules[name]
    homes = {}
    for m in stars(source):
        for n in public(modules[m]):
            homes.setdefault(n, []).append(m)
    assert not {n: ms for n, ms in homes.items() if len(ms) > 1}
    assert not sorted(bound(source) & set(homes))


def test_missing_sees():
    "The check above is not blind"
    assert missing("def f(a):\n    b = a\n    return b+c+d\nd = 1", set()) == ["c"]
    assert missing("def f(): return [x for x in y if x]", {"y"}) == []


def test_names_of_the_package():
    "`from rlhf_nb import train_ppo` finds it where it lives; the package alone imports nothing heavy"
    code = ("import sys, rlhf_nb\n"
            "assert not {'torch', 'transformers', 'gradio'} & set(sys.modules), 'heavy'\n"
            "from rlhf_nb import Batch, train_ppo, ppo\n"
            "assert train_ppo is ppo.train_ppo and 'train_dpo' in dir(rlhf_nb) and Batch.__module__ == 'rlhf_nb.core'\n"
            "assert not hasattr(rlhf_nb, 'no_such_name')")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root.parent)


def test_public_names_are_unique():
    "A public function or class has one module, so that the package can offer it"
    homes = {}
    for m, source in modules.items():
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public(source):
                homes.setdefault(node.name, []).append(m)
    assert not {n: ms for n, ms in homes.items() if len(ms) > 1}
