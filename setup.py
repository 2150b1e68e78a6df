"Installs what settings.ini describes"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib, repo, tag = cfg["lib_path"], cfg["git_url"], f"v{cfg['version']}"
extras = "dev", "math", "peft", "4bit", "tensorboard", "trackio", "gguf"
data = ["*.json", "*.typed", "samples/*.json", "prompts/*.jsonl", "page/*", "remote/*.py"]


def from_anywhere(markdown):
    "README for a page that is not the repository: pictures and links of this version by their whole address, code as it is"
    parts = re.split(r"(```.*?```)", markdown, flags=re.S)
    raw = repo.replace("//github.com/", "//raw.githubusercontent.com/")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(!\[[^\]]*\]\(|src=\")(?![a-z]+:|[#/])([^)\"\s]+)", rf"\1{raw}/{tag}/\2", parts[i])
        parts[i] = re.sub(r"(\]\(|href=\")(?![a-z]+:|[#/])([^)\"\s]+)", rf"\1{repo}/blob/{tag}/\2", parts[i])
    return "".join(parts)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    license="MIT",
    url=repo,
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Changes": f"{repo}/blob/main/.github/CHANGELOG.md",
        "Issues": f"{repo}/issues",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: Web Environment",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    long_description=from_anywhere((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[lib, lib + ".*"]),
    package_data={lib: data},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={k: cfg[f"{k}_requirements"].split() for k in extras},
    entry_points={"nbdev": [f"{cfg['lib_name']}={lib}._modidx:d"], "console_scripts": ["rlhf_nb=rlhf_nb.__main__:command"]},
)
