"""
Makes the text that the model in this folder learned from: Jane Austen's six novels.

    apt-get install r-cran-janeaustenr
    Rscript -e 'writeLines(janeaustenr::austen_books()$text, "austen.txt")'
    python projects/finetune/austen/novels.py austen.txt novels.txt

Each paragraph becomes one line, and <|endoftext|> stands before each chapter.
"""

import argparse
import re
from pathlib import Path

from mingpt.utils import run_script


def cut_chapters(text: str) -> list[str]:
    """Returns the chapters without their headings, a line for each paragraph."""
    chapters = []
    for part in re.split(r"^(?:chapter|volume) \w+\.?$", text, flags=re.M | re.I):
        # Notes and the title of the next novel follow the end of a novel.
        part = re.split(r"^(?:THE END|FINIS|Finis|A NOTE ON THE TEXT)$", part, flags=re.M)[0]
        paragraphs = [" ".join(paragraph.split()) for paragraph in part.split("\n\n")]
        chapter = "\n".join(paragraph for paragraph in paragraphs if paragraph)
        # A title alone is no chapter.
        if len(chapter) > 1000:
            chapters.append(chapter)
    return chapters


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Cuts Jane Austen's novels into chapters.")
    parser.add_argument("source", type=Path, help="text of the novels")
    parser.add_argument("result", type=Path, help="text to write")
    given = parser.parse_args(args)
    chapters = cut_chapters(given.source.read_text(encoding="utf-8"))
    text = "".join(f"<|endoftext|>{chapter}\n" for chapter in chapters)
    given.result.write_text(text, encoding="utf-8")
    print(f"{len(chapters)} chapters, {len(text):,} characters")


if __name__ == "__main__":
    run_script(main)
