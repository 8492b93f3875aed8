"""
Holds a dialog with a GPT in the terminal.

    python projects/chat/chat.py
    python projects/chat/chat.py --train=projects/chat/dialogs.txt
    python projects/chat/chat.py --model=out/chat/model
    echo "27 + 48" | python projects/chat/chat.py --model=out/chat/model
    python projects/chat/chat.py --help

The first line talks to microsoft/DialoGPT-small, from the hub. The second trains a
small model that adds numbers, and the next two talk to it.

To the model a dialog is a row of tokens with an end token after each turn: question,
end, answer, end, question, end. The tokens up to the next end are its answer. In
training only the answers count.
"""

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mingpt.bpe import Encoder, bytes_to_unicode
from mingpt.data import read_text
from mingpt.model import GPT
from mingpt.pretrained import crop_model, load_encoder, save_encoder
from mingpt.processes import rank
from mingpt.run import Run
from mingpt.utils import CN, run_script, set_seed, setup_logging

logger = logging.getLogger("mingpt.chat")

HELP = """\
/reset      forget the dialog
/undo       forget the last question and its answer
/save FILE  add the dialog to a text file, in the form that --train reads
/help       show this
/quit       leave (exit and Ctrl-D, too); Ctrl-C stops an answer"""


def get_config() -> CN:
    C = CN()
    C.model = "microsoft/DialoGPT-small"  # to talk to: a folder, or a repository of the hub
    C.temperature = 0.7  # of the answers; 0 takes the likeliest token each time
    C.top_k = None  # draws from so many of the likeliest tokens; None from all
    C.top_p = 0.9  # draws from the likeliest tokens that reach this probability; 1 from all
    C.max_new_tokens = 100  # of an answer, but never more than half of the model's context
    C.seed = 3407

    C.train = ""  # trains on this text of dialogs instead: a turn a line, an empty line between
    C.held_out = 30  # dialogs at the end of the text that are kept for testing

    C.system = CN()
    C.system.work_dir = "./out/chat"  # where the log, the metrics and the trained model go

    # The model to train. Its vocabulary is the bytes.
    C.gpt = GPT.get_default_config()
    del C.gpt.vocab_size
    C.gpt.n_layer = 3
    C.gpt.n_head = 4
    C.gpt.n_embd = 96
    C.gpt.block_size = 128  # bytes that it sees, so some three questions and answers
    C.gpt.embd_pdrop = 0.0
    C.gpt.resid_pdrop = 0.0
    C.gpt.attn_pdrop = 0.0

    C.trainer = Run.get_default_config()
    C.trainer.max_iters = 2000
    C.trainer.batch_size = 16
    C.trainer.learning_rate = 3e-3
    C.trainer.schedule = "cosine"
    C.trainer.warmup_iters = None  # None: a twentieth of all steps
    C.trainer.betas = (0.9, 0.99)
    C.trainer.weight_decay = 1.0  # so much that it learns to add, and does not memorise
    C.trainer.eval_interval = 500
    return C


# -----------------------------------------------------------------------------
# Dialogs and their tokens


def get_byte_encoder() -> Encoder:
    """Makes the encoder of the small model: a token is a byte, and 256 ends a turn.

    GPT-2's vocabulary is too large for it: 50,257 rows of weights, and one token for
    27, whose digits it has to add.
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary["<|endoftext|>"] = 256
    return Encoder(vocabulary, [])


def encode(encoder: Encoder, turns: Iterable[str]) -> list[list[int]]:
    """Returns the tokens of each turn, with the end token."""
    return [[*encoder.encode(turn), encoder.eot_token] for turn in turns]


def read_dialogs(path: str) -> list[list[str]]:
    """Reads dialogs as lists of turns: question, answer, question, answer, ..."""
    lines = read_text(path).split("\n")
    dialogs: list[list[str]] = [[]]

    # The empty line at the end closes the last dialog.
    for number, line in enumerate([*lines, ""]):
        if line.strip():
            dialogs[-1].append(line.strip())
        elif len(dialogs[-1]) % 2:
            raise ValueError(f"{path}, line {number}: the dialog ends with a question; "
                             "the line after it is the answer")
        elif dialogs[-1]:
            dialogs.append([])
    return dialogs[:-1]


class DialogDataset(Dataset):
    """Cuts dialogs into rows of block_size tokens, one from each question on.

    Targets of questions are -1. The dialogs follow one another, and the first one the
    last. So a question comes at many positions, after many others.
    """

    def __init__(self, dialogs: list[list[str]], encoder: Encoder, block_size: int):
        turns = encode(encoder, chain(*dialogs))
        lengths = [len(turn) for turn in turns]
        # There is room for a question and an answer.
        needed = 2 * max(lengths)
        if block_size < needed:
            raise ValueError(f"got --gpt.block_size={block_size}, expected at least {needed}, "
                             "twice the longest turn")
        targets = [turn if i % 2 else [-1] * len(turn) for i, turn in enumerate(turns)]

        self.tokens = torch.tensor(list(chain(*turns)))  # (N,)
        self.targets = torch.tensor(list(chain(*targets)))  # (N,)
        begins = torch.tensor([0, *lengths]).cumsum(0)  # (turns + 1,)
        self.starts = begins[:-1:2]  # (questions,)
        self.block_size = block_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a batch: x (B, T), and y (B, T), one token later."""
        starts = self.starts[indices][:, None]  # (B,) -> (B, 1)
        places = starts + torch.arange(self.block_size + 1)  # (B, T + 1)
        places = places % len(self.tokens)
        return self.tokens[places[:, :-1]], self.targets[places[:, 1:]]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        # A range raises IndexError past its end.
        x, y = self.__getitems__([range(len(self))[index]])  # (1, T)
        return x[0], y[0]


# -----------------------------------------------------------------------------
# Answers


def fit_prompt(model: GPT, encoder: Encoder, dialog: list[str], room: int) -> torch.Tensor:
    """Returns the latest turns that fit with `room` tokens for the answer: (1, T)."""
    turns = encode(encoder, dialog)
    longest = model.block_size - room
    while len(turns) > 1 and sum(map(len, turns)) > longest:
        # The oldest question and its answer go.
        del turns[:2]
    if len(turns[0]) > longest:
        raise ValueError(f"it has {len(turns[0])} tokens, expected at most {longest}; shorten it")
    return torch.tensor([list(chain(*turns))], device=model.lm_head.weight.device)


def answer(model: GPT, encoder: Encoder, dialog: list[str], config: CN) -> Iterator[str]:
    """Yields the answer to the last turn, in pieces of whole characters as they come."""
    room = min(config.max_new_tokens, model.block_size // 2)
    prompt = fit_prompt(model, encoder, dialog, room)
    tokens = model.stream(prompt, room, config.temperature, do_sample=True, top_k=config.top_k,
                          top_p=config.top_p, stop_token=encoder.eot_token)
    numbers = (token.item() for token in tokens)
    return encoder.decode_stream(number for number in numbers if number != encoder.eot_token)


# -----------------------------------------------------------------------------
# Training


def train(config: CN) -> None:
    dialogs = read_dialogs(config.train)
    encoder = get_byte_encoder()
    count = len(dialogs) - config.held_out
    if count < 1 or config.held_out < 1:
        raise ValueError(f"got {len(dialogs)} dialogs in {config.train} and "
                         f"--held_out={config.held_out}, expected at least one to train on "
                         "and one to hold out")
    held_out = dialogs[count:]
    T = config.gpt.block_size
    train_dataset = DialogDataset(dialogs[:count], encoder, T)
    test_dataset = DialogDataset(held_out, encoder, T)

    config.gpt.vocab_size = len(encoder.encoder)
    model = GPT(config.gpt)
    # For transformers.
    model.config.bos_token_id = encoder.eot_token
    model.config.eos_token_id = encoder.eot_token
    config.gpt = model.config
    if config.trainer.warmup_iters is None:
        config.trainer.warmup_iters = config.trainer.max_iters // 20
    work_dir = Path(config.system.work_dir).expanduser()
    run = Run(config.trainer, model, train_dataset, test_dataset, work_dir=work_dir)
    # Only now: a refused resume changes no file.
    setup_logging(config)
    greedy = CN(max_new_tokens=config.max_new_tokens, temperature=0, top_k=None, top_p=None)

    def ask(run: Run) -> None:
        """Asks each question of the held-out dialogs, after the turns before it.

        An answer is right if all of its text is the expected one.
        """
        asked = 0
        wrong = []
        for dialog in held_out:
            for i in range(1, len(dialog), 2):
                got = "".join(answer(model, encoder, dialog[:i], greedy))
                asked += 1
                if got != dialog[i]:
                    wrong.append(f"{dialog[i - 1]!r} got {got!r}, not {dialog[i]!r}")

        right = asked - len(wrong)
        lines = [f"{right} of {asked} held-out questions answered right", *wrong[:3]]
        logger.info("\n".join(lines))
        run.write_metrics(split="held out", right=right, asked=asked)

    run.add_callback("on_eval_end", ask)
    run.run()
    if rank() == 0:
        model.save_pretrained(work_dir / "model")
        save_encoder(encoder, work_dir / "model")
    command = shlex.join(["python", sys.argv[0], f"--model={work_dir / 'model'}"])
    logger.info(f"talk to it: {command}")


# -----------------------------------------------------------------------------
# Talking


def run_command(line: str, dialog: list[str]) -> str:
    """Does what a line such as '/undo' says; returns what to tell the user."""
    command, _, name = line.partition(" ")
    if command == "/reset":
        dialog.clear()
    elif command == "/undo":
        del dialog[-2:]
    elif command == "/save":
        return save_dialog(name, dialog)
    elif command == "/help":
        return HELP
    else:
        return f"there is no {command}; /help shows what there is"

    return f"questions and answers left: {len(dialog) // 2}"


def save_dialog(name: str, dialog: list[str]) -> str:
    """Adds a dialog to a text file; returns what to tell the user."""
    if not name:
        return "name a file: /save FILE"
    if not dialog:
        return "there is nothing to save yet"
    try:
        with open(Path(name).expanduser(), "a", encoding="utf-8", errors="replace") as file:
            file.write("\n".join(dialog) + "\n\n")
    except OSError as error:
        return f"not saved: {error}"
    return f"saved in {name}"


def talk(config: CN) -> None:
    # Only the dialog is wanted.
    logging.getLogger("mingpt").setLevel(logging.WARNING)
    model = GPT.from_pretrained(config.model)
    encoder = load_encoder(config.model, model.config.vocab_size)
    if encoder.eot_token is None:
        raise ValueError(f"the vocabulary of {config.model} lacks <|endoftext|>, which ends a turn")
    # Rows without a token could be drawn.
    crop_model(model, model.block_size, max(encoder.decoder) + 1)
    # Bad settings are refused before the first question.
    answer(model, encoder, [""], config)

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # It gives input() line editing and a history. Windows has none.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print("/help shows the commands")
    dialog: list[str] = []
    while True:
        try:
            line = " ".join(input("you: ").split())
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            # At the prompt it gives up the line.
            print()
            continue
        if not is_terminal:
            # A terminal has shown it.
            print(line)
        if line in ("/quit", "quit", "exit"):
            return
        if line.startswith("/"):
            print(run_command(line, dialog))
        elif line:
            say_next(model, encoder, dialog, line, config)


def say_next(model: GPT, encoder: Encoder, dialog: list[str], question: str, config: CN) -> None:
    """Prints the answer to a question as it comes, and adds both to the dialog."""
    try:
        pieces = answer(model, encoder, [*dialog, question], config)
    except ValueError as error:
        # The question is too long.
        print(error)
        return

    print("bot: ", end="", flush=True)
    said = ""
    # After Ctrl-C the answer is what was said so far.
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            # An answer is one line of text.
            shown = "".join(char if char.isprintable() else " " for char in piece)
            print(shown, end="", flush=True)
            said += shown

    if said.strip():
        print()
        dialog += [question, said.strip()]
    else:
        print("(an empty answer; the question is forgotten)")


def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.seed)
    if config.train:
        train(config)
    else:
        talk(config)


if __name__ == "__main__":
    run_script(main)
