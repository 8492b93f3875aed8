"""
Writes dialogs.txt: 300 short dialogs in which a bot adds numbers up to 99 as on paper.

    python projects/chat/sums.py

One turn a line, questions and answers in turn, an empty line between dialogs. No two
numbers are added twice, also not in the other order: the sums of dialogs that are held
out of training are new to the bot.
"""

import random
from pathlib import Path

QUESTIONS = ("what is {} + {}?", "{} + {}", "what is {} plus {}?", "add {} and {}", "{} and {}?")
SMALL_TALK = (
    ("hi", "hello! what shall I add?"),
    ("hello", "hello! what shall I add?"),
    ("who are you?", "a small GPT that adds."),
    ("what can you do?", "I add numbers up to 99."),
    ("thanks", "you are welcome."),
    ("thank you", "you are welcome."),
)


def add(a: int, b: int) -> str:
    """Works out a sum, the last digits first: add(6, 3) -> "6+3=9, 0+0=0, so 9."

    A carry is a step of its own: add(27, 48) -> "7+8=15, 2+4=6, 6+1=7, so 75."
    """
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10
    carry = f", {tens}+1={tens + 1}" if ones > 9 else ""
    return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}={tens}{carry}, so {a + b}."


def write_dialogs(count: int = 300) -> list[list[str]]:
    """Returns dialogs as lists of turns: three sums, and in every second one small talk."""
    rng = random.Random(1)
    pairs = [(a, b) for a in range(100) for b in range(a + 1)]
    sums = rng.sample(pairs, 3 * count)
    dialogs = []

    for i in range(count):
        exchanges = []
        for pair in sums[3 * i:3 * i + 3]:
            # The numbers come in either order.
            a, b = rng.sample(pair, 2)
            exchanges.append((rng.choice(QUESTIONS).format(a, b), add(a, b)))
        if rng.random() < 0.5:
            exchanges.insert(rng.randrange(4), rng.choice(SMALL_TALK))
        dialogs.append([turn for exchange in exchanges for turn in exchange])
    return dialogs


if __name__ == "__main__":
    text = "\n\n".join("\n".join(dialog) for dialog in write_dialogs())
    (Path(__file__).parent / "dialogs.txt").write_text(text + "\n", encoding="utf-8")
