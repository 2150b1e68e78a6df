"Installs what settings.ini describes"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    author_email=cfg["author_email"], keywords=cfg["keywords"], license="MIT", url=cfg["git_url"],
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]), package_data={cfg["lib_path"]: ["*.json", "*.typed", "samples/*.json", "prompts/*.jsonl", "page/*"]},
    python_requires=">=" + cfg["min_python"], install_requires=cfg["requirements"].split(),
    extras_require={k: cfg[f"{k}_requirements"].split() for k in ("dev", "math", "peft", "4bit")},
    entry_points={"nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"], "console_scripts": ["rlhf_nb=rlhf_nb.__main__:command"]},
)
