"""
A dialog with a GPT in the terminal.

    python projects/chat/chat.py                                        # with microsoft/DialoGPT-small, from the hub
    python projects/chat/chat.py --train=projects/chat/dialogs.txt      # trains a small model that adds numbers
    python projects/chat/chat.py --model=out/chat/model                 # with that model, or one in any other folder
    echo "27 + 48" | python projects/chat/chat.py --model=out/chat/model
    python projects/chat/chat.py --help                                 # every setting

To the model a dialog is a row of tokens with an end token after each turn: question, end, answer, end, question, end.
What it writes up to the next end token is its answer. In training only the answers count.
"""

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mingpt.bpe import Encoder, bytes_to_unicode, get_encoder
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, run_script, set_seed, setup_logging

logger = logging.getLogger("mingpt.chat")

HELP = """\
/reset      forget the dialog
/undo       forget the last question and its answer
/save FILE  add the dialog to a text file, in the form that --train reads
/help       show this
/quit       leave, as Ctrl-D does; Ctrl-C stops an answer"""

def get_config() -> CfgNode:
    C = CfgNode()
    C.model = "microsoft/DialoGPT-small" # to talk to: a folder, or a repository of the hub
    C.temperature = 0.7 # of the answers; 0 is the likeliest token each time
    C.top_k = None # draw from the k likeliest tokens; None from all
    C.top_p = 0.9 # draw from the likeliest tokens that have this much probability together; None from all
    C.max_new_tokens = 100 # of an answer, but never more than half of the model's context
    C.seed = 3407

    C.train = "" # a text of dialogs: train a model on it instead. One turn a line, a blank line between dialogs
    C.held_out = 30 # dialogs at the end of the text that are kept for testing

    C.system = CfgNode()
    C.system.work_dir = "./out/chat" # where the log, the metrics and the trained model go

    C.gpt = GPT.get_default_config() # the model to train
    C.gpt.n_layer, C.gpt.n_head, C.gpt.n_embd = 3, 4, 96
    C.gpt.block_size = 128 # bytes that it sees, so some three questions and answers
    del C.gpt.vocab_size # of bytes
    C.gpt.embd_pdrop = C.gpt.resid_pdrop = C.gpt.attn_pdrop = 0.0

    C.trainer = Trainer.get_default_config()
    del C.trainer.work_dir # it is system.work_dir
    C.trainer.max_iters = 2000
    C.trainer.batch_size = 16
    C.trainer.learning_rate = 3e-3
    C.trainer.betas = (0.9, 0.99)
    C.trainer.weight_decay = 1.0 # so much that it learns how to add, not the dialogs by heart
    C.trainer.warmup_iters = 100
    C.trainer.eval_interval = 500
    return C

# -----------------------------------------------------------------------------
# dialogs and their tokens

def get_byte_encoder() -> Encoder:
    """The encoder of the small model: no merges, so a token is a byte, and 256 ends a turn.

    GPT-2's vocabulary is too large for it: 50,257 rows of weights, and one token for 27, whose digits it has to add.
    """
    return Encoder({char: byte for byte, char in bytes_to_unicode().items()} | {"<|endoftext|>": 256}, [])

def find_encoder(model: GPT) -> Encoder:
    """The encoder that goes with a model, by the size of its vocabulary."""
    encoders = {257: get_byte_encoder, 50257: get_encoder}
    if model.config.vocab_size not in encoders:
        raise ValueError(f"the model has a vocabulary of {model.config.vocab_size} tokens, expected 50257 (GPT-2's) or "
                         "257 (bytes, as trained here)")
    return encoders[model.config.vocab_size]()

def encode(encoder: Encoder, turns: Iterable[str]) -> list[list[int]]:
    """The tokens of each turn, with the end token."""
    return [[*encoder.encode(turn), encoder.eot_token] for turn in turns]

def read_dialogs(path: str) -> list[list[str]]:
    """The dialogs of a text as lists of turns: question, answer, question, answer, ..."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; convert the file first") from None
    dialogs: list[list[str]] = [[]]
    for number, line in enumerate([*lines, ""]):
        if line.strip():
            dialogs[-1].append(line.strip())
        elif len(dialogs[-1]) % 2:
            raise ValueError(f"{path}, line {number}: the dialog ends with a question; the line after it is the answer")
        elif dialogs[-1]:
            dialogs.append([])
    return dialogs[:-1]

class DialogDataset(Dataset):
    """Rows of block_size tokens, one from each question on; the targets of questions are -1.

    The dialogs follow one another, and the first the last. So a question comes at many positions, after many others.
    """

    def __init__(self, dialogs: list[list[str]], encoder: Encoder, block_size: int):
        turns = encode(encoder, chain(*dialogs))
        targets = [turn if i % 2 else [-1] * len(turn) for i, turn in enumerate(turns)]
        self.tokens, self.targets = torch.tensor([*chain(*turns)]), torch.tensor([*chain(*targets)]) # (N,) each
        self.starts = torch.tensor([0, *map(len, turns)]).cumsum(0)[:-1:2] # where a question begins
        self.block_size = block_size
        if block_size < (needed := 2 * max(map(len, turns))): # room for a question and an answer
            raise ValueError(f"got --gpt.block_size={block_size}, expected at least {needed}, twice the longest turn")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: x (B, T) and y (B, T), one token later."""
        places = (self.starts[indices][:, None] + torch.arange(self.block_size + 1)) % len(self.tokens) # (B, T + 1)
        return self.tokens[places[:, :-1]], self.targets[places[:, 1:]]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.__getitems__([range(len(self))[index]]) # range raises IndexError past the end
        return x[0], y[0]

# -----------------------------------------------------------------------------

def fit_prompt(model: GPT, encoder: Encoder, dialog: list[str], room: int) -> torch.Tensor:
    """The latest turns of a dialog, as many as fit with `room` tokens for the answer: (1, T)."""
    turns = encode(encoder, dialog)
    while len(turns) > 1 and sum(map(len, turns)) + room > model.block_size:
        del turns[:2] # the oldest question and its answer
    if sum(map(len, turns)) + room > model.block_size:
        raise ValueError(f"it has {len(turns[0])} tokens, expected at most {model.block_size - room}; shorten it")
    return torch.tensor([[*chain(*turns)]], device=model.lm_head.weight.device)

def answer(model: GPT, encoder: Encoder, dialog: list[str], config: CfgNode) -> Iterator[str]:
    """Yields the answer to the last turn of a dialog, in pieces of whole characters as they come."""
    room = min(config.max_new_tokens, model.block_size // 2)
    prompt = fit_prompt(model, encoder, dialog, room)
    tokens = model.stream(prompt, room, config.temperature, True, config.top_k, config.top_p, encoder.eot_token)
    numbers = (token.item() for token in tokens)
    return encoder.decode_stream(number for number in numbers if number != encoder.eot_token)

def train(config: CfgNode) -> None:
    dialogs, encoder, T = read_dialogs(config.train), get_byte_encoder(), config.gpt.block_size
    count = len(dialogs) - config.held_out
    if count < 1 or config.held_out < 1:
        raise ValueError(f"got {len(dialogs)} dialogs in {config.train} and --held_out={config.held_out}, "
                         "expected at least one to train on and one to hold out")
    held_out = dialogs[count:]
    train_dataset, test_dataset = DialogDataset(dialogs[:count], encoder, T), DialogDataset(held_out, encoder, T)
    config.gpt.vocab_size = len(encoder.encoder)
    config.gpt.bos_token_id = config.gpt.eos_token_id = encoder.eot_token # for transformers
    if config.trainer.lr_decay_iters is None:
        config.trainer.lr_decay_iters = config.trainer.max_iters
    config.trainer.work_dir = config.system.work_dir
    model = GPT(config.gpt)
    config.gpt = model.config
    trainer = Trainer(config.trainer, model, train_dataset, test_dataset)
    setup_logging(config) # only now: a refused resume changes no file
    greedy = CfgNode(max_new_tokens=config.max_new_tokens, temperature=0, top_k=None, top_p=None)

    def ask(trainer: Trainer) -> None:
        """Asks each question of the held-out dialogs, after the turns before it. Right is the same text, all of it."""
        asked, wrong = 0, []
        for dialog in held_out:
            for i in range(1, len(dialog), 2):
                got = "".join(answer(model, encoder, dialog[:i], greedy))
                asked += 1
                if got != dialog[i]:
                    wrong.append(f"; {dialog[i - 1]!r} got {got!r}, not {dialog[i]!r}")
        logger.info(f"{asked - len(wrong)} of {asked} held-out questions answered right{''.join(wrong[:3])}")
        trainer.write_metrics(split="held out", right=asked - len(wrong), asked=asked)

    trainer.add_callback("on_eval_end", ask)
    trainer.run()
    if trainer.rank == 0:
        model.save_pretrained(Path(config.system.work_dir) / "model")
    logger.info(f"talk to it: python {sys.argv[0]} --model={Path(config.system.work_dir) / 'model'}")

# -----------------------------------------------------------------------------

def run_command(line: str, dialog: list[str]) -> str:
    """Does what a line such as '/undo' says and returns what to tell the user."""
    command, _, name = line.partition(" ")
    if command == "/reset":
        dialog.clear()
    elif command == "/undo":
        del dialog[-2:]
    elif command == "/save":
        if not name or not dialog:
            return "there is nothing to save yet" if name else "name a file: /save FILE"
        try:
            with open(name, "a", encoding="utf-8", errors="replace") as file:
                file.write("\n".join(dialog) + "\n\n")
        except OSError as error:
            return f"not saved: {error}"
        return f"saved in {name}"
    elif command == "/help":
        return HELP
    else:
        return f"there is no {command}; /help shows what there is"
    return f"questions and answers left: {len(dialog) // 2}"

def talk(config: CfgNode) -> None:
    logging.getLogger("mingpt").setLevel(logging.WARNING) # the dialog alone is wanted
    model = GPT.from_pretrained(config.model)
    encoder, dialog = find_encoder(model), []
    answer(model, encoder, [""], config) # refuses bad settings before the first question
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError): # Windows has none
            import readline # gives input() line editing and a history
        print("/help shows the commands")
    while True:
        try:
            line = " ".join(input("you: ").split())
        except EOFError:
            print()
            return
        except KeyboardInterrupt: # at the prompt it gives up the line
            print()
            continue
        if not sys.stdin.isatty():
            print(line) # a terminal has shown it
        if line == "/quit":
            return
        if line.startswith("/"):
            print(run_command(line, dialog))
        elif line:
            say_next(model, encoder, dialog, line, config)

def say_next(model: GPT, encoder: Encoder, dialog: list[str], question: str, config: CfgNode) -> None:
    """Prints the answer to a question as it comes, and adds both to the dialog."""
    try:
        pieces = answer(model, encoder, [*dialog, question], config)
    except ValueError as error: # the question is too long
        return print(error)
    print("bot: ", end="", flush=True)
    said = ""
    with contextlib.suppress(KeyboardInterrupt): # what was said so far counts
        for piece in pieces:
            piece = "".join(char if char.isprintable() else " " for char in piece) # an answer is one line of text
            print(piece, end="", flush=True)
            said += piece
    print()
    if said.strip():
        dialog += [question, said.strip()]

def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.seed)
    run = train if config.train else talk
    run(config)

if __name__ == "__main__":
    run_script(main)
