"""
projects/chat: dialogs as tokens, training from end to end, talking by pipe and terminal.

    python -m unittest tests/test_chat.py
"""

import io
import itertools
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

import torch

from common import ROOT, Folder, run_here, tiny_gpt
from mingpt.pretrained import save_encoder

CHAT = ROOT / "projects" / "chat"
sys.path.insert(0, str(CHAT))
import chat
import sums


def parrot(text: str):
    """Makes a model that says the letter of `text` at each position, whatever it is asked.

    \\0 stands for the end token. The embedding of a position is the row of its letter in
    the head. Tokens and blocks add nothing to it.
    """
    model = tiny_gpt(vocab_size=257, n_embd=258, n_layer=1, block_size=len(text))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        for place, letter in enumerate(text):
            token = 256 if letter == "\0" else ord(letter)
            model.transformer.wpe.weight[place, token] = 1
        model.lm_head.weight.copy_(torch.eye(257, 258))
    return model


class Dialogs(Folder):
    def read(self, content: bytes):
        (self.folder / "dialogs.txt").write_bytes(content)
        return chat.read_dialogs(str(self.folder / "dialogs.txt"))

    def test_files(self):
        for content in (b"q\na\n\nr\nb\ns\nc", b"\n \nq\na\n\n\t\n\nr\nb\ns\nc\n\n",
                        b"\xef\xbb\xbfq\r\n a \r\n\r\nr\nb\ns\nc"):
            self.assertEqual(self.read(content), [["q", "a"], ["r", "b", "s", "c"]])
        for content in (b"", b"\n\n \n"):
            self.assertEqual(self.read(content), [])
        for content, line in ((b"q", 1), (b"q\na\n\nr\nb\ns\n\nt\nc", 6), (b"q\na\nr", 3)):
            with self.assertRaisesRegex(ValueError, f"line {line}: .* ends with a question"):
                self.read(content)
        with self.assertRaisesRegex(ValueError, "not UTF-8"):
            self.read(b"q\n\xff")

    def test_only_answers_are_targets(self):
        encoder = chat.get_byte_encoder()
        dataset = chat.DialogDataset([["hé", "b", "c", "de"], ["f", "g"]], encoder, 8)
        # h é | b | c | d e | f | g |
        row = [104, 0xc3, 0xa9, 256, 98, 256, 99, 256, 100, 101, 256, 102, 256, 103, 256]
        targets = [-1, -1, -1, -1, 98, 256, -1, -1, 100, 101, 256, -1, -1, 103, 256]
        x, y = dataset.__getitems__([1, 0, 2])
        # c, h and f stand there.
        for i, start in enumerate((6, 0, 11)):
            self.assertEqual(x[i].tolist(), (row + row)[start:start + 8])
            self.assertEqual(y[i].tolist(), (targets + targets)[start + 1:start + 9])
        self.assertEqual([part.tolist() for part in dataset[1]], [x[0].tolist(), y[0].tolist()])
        self.assertEqual(len(list(dataset)), 3)
        with self.assertRaisesRegex(ValueError, "--gpt.block_size=7, expected at least 8"):
            chat.DialogDataset([["hé", "b"]], encoder, 7)

    def test_a_token_is_a_byte(self):
        encoder = chat.get_byte_encoder()
        text = "27 + 48 = 75, naïve 世界 🤗 <|endoftext|>\n"
        self.assertEqual(encoder.encode(text), list(text.encode()))
        self.assertEqual(encoder.decode(encoder.encode(text)), text)

    def test_the_oldest_turns_go_first(self):
        model = tiny_gpt(vocab_size=257, block_size=20)
        encoder = chat.get_byte_encoder()
        # With the end token 4 tokens each, the last one 3.
        dialog = ["aaa", "bbb", "ccc", "ddd", "ee"]
        for room, kept in ((1, dialog), (2, dialog[2:]), (9, dialog[2:]), (10, dialog[4:]),
                           (17, dialog[4:])):
            expected = sum(chat.encode(encoder, kept), [])
            prompt = chat.fit_prompt(model, encoder, dialog, room)
            self.assertEqual(prompt.tolist(), [expected])
        with self.assertRaisesRegex(ValueError, "it has 3 tokens, expected at most 2"):
            chat.fit_prompt(model, encoder, dialog, 18)
        self.assertEqual(len(dialog), 5)

    def test_the_dialogs_of_the_project(self):
        dialogs = chat.read_dialogs(str(CHAT / "dialogs.txt"))
        self.assertEqual(dialogs, sums.write_dialogs())
        self.assertEqual(len(dialogs), 300)
        seen = set()
        pairs = (zip(dialog[::2], dialog[1::2]) for dialog in dialogs)
        for question, answer in itertools.chain.from_iterable(pairs):
            numbers = re.findall(r"\d+", question)
            if not numbers:
                continue
            a, b = map(int, numbers)
            self.assertRegex(answer, rf"so {a + b}\.$")
            for left, right in re.findall(r"([\d+]+)=(\d+)", answer):
                self.assertEqual(sum(map(int, left.split("+"))), int(right))
            self.assertNotIn({a, b}, seen)
            seen.add(frozenset((a, b)))
        self.assertEqual(len(seen), 900)


class Talk(Folder):
    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        logger = logging.getLogger("mingpt")
        self.addCleanup(logger.setLevel, logger.level)

    def save(self, text: str) -> None:
        parrot(text).save_pretrained(self.folder / "parrot")
        save_encoder(chat.get_byte_encoder(), self.folder / "parrot")

    def talk(self, *lines: str, args=()) -> str:
        """What the program prints when these lines come through a pipe, after `you: `."""
        spoken = "".join(line + "\n" for line in lines)
        with mock.patch("sys.stdin", io.StringIO(spoken)):
            status, printed, errors = run_here(chat.main, "--model=parrot", *args)
        self.assertEqual((status, errors), (0, ""))
        return printed.replace("you: ", "").rstrip("\n")

    def test_commands(self):
        self.save("abcdefgh\0" + "i" * 5 + "\0" + "xyz\0" * 30)
        with mock.patch.dict(os.environ, HOME=str(self.folder), USERPROFILE=str(self.folder)):
            spoken = self.talk("hey", "/save  ~/d.txt", "/undo", "/undo", "/save d.txt", "hey",
                               "/reset", "/save", "/save .", "/what", "/quit", "hey").splitlines()
        self.assertEqual(spoken[1::2], [
            "bot: defgh", "saved in ~/d.txt", "questions and answers left: 0",
            "questions and answers left: 0", "there is nothing to save yet", "bot: defgh",
            "questions and answers left: 0", "name a file: /save FILE",
            "there is nothing to save yet", "there is no /what; /help shows what there is"])
        self.assertEqual(spoken[-1], "/quit")
        self.assertEqual(chat.read_dialogs("d.txt"), [["hey", "defgh"]])
        self.assertIn(chat.HELP, self.talk("/help"))
        self.assertIn("not saved: ", self.talk("hey", "/save ."))
        for word in ("exit", "quit"):
            self.assertEqual(self.talk(word, "hey"), word)
        self.assertEqual(self.talk(), "")

    def test_answers(self):
        # What would clear the screen, and an answer that never ends.
        self.save("ab\x1b[2J\ncd" + "e" * 200)
        printed = self.talk("h", "i", args=["--max_new_tokens=12"])
        self.assertTrue(printed.startswith("h\nbot: b [2J cdeeee"), printed)
        # An answer is half of the context at most.
        longest = self.talk("h", args=["--max_new_tokens=5000"])
        self.assertEqual(len(longest.splitlines()[1]), len("bot: ") + 104)
        self.save("q\0\0\0\0\0")
        empty = "bot: (an empty answer; the question is forgotten)"
        self.assertEqual(self.talk("h", "/undo"),
                         f"h\n{empty}\n/undo\nquestions and answers left: 0")
        self.save("x" * 40)
        spoken = self.talk("a" * 20, "", "  ", "ok").splitlines()
        refused = "it has 21 tokens, expected at most 20; shorten it"
        self.assertEqual(spoken, ["a" * 20, refused, "", "", "ok", "bot: " + "x" * 20])

    def test_rows_without_a_token_are_never_said(self):
        model = tiny_gpt(vocab_size=300, block_size=64)
        with torch.no_grad():
            model.lm_head.weight[257:] = 100 * model.lm_head.weight[:1]
        model.save_pretrained("parrot")
        save_encoder(chat.get_byte_encoder(), "parrot")
        self.assertIn("bot: ", self.talk("h", args=["--temperature=1", "--top_p=1"]))

    def test_bad_input(self):
        def refused(message, *args):
            with self.subTest(args):
                status, printed, errors = run_here(chat.main, *args)
                self.assertEqual(status, 2, printed)
                self.assertRegex(errors, f"^error: .*({message})")

        refused("there is no folder '/nothing'", "--model=/nothing")
        refused("there is no folder ''", "--model=")
        tiny_gpt().save_pretrained("other")
        refused("put its tokenizer.json there", "--model=other")
        save_encoder(chat.Encoder({"a": 0}, []), "other")
        refused("lacks <.endoftext.>", "--model=other")
        self.save("x" * 9)
        refused("temperature=-1", "--model=parrot", "--temperature=-1")
        refused("top_p=2", "--model=parrot", "--top_p=2")
        refused("max_new_tokens=-3", "--model=parrot", "--max_new_tokens=-3")
        refused("no setting --gpt.vocab_size", "--gpt.vocab_size=5")
        for name, text, message in (("empty", "", "got 0 dialogs"), ("few", "q\na\n", "got 1 dial"),
                                    ("one-sided", "q\na\n\nq\n\nq\na", "line 4")):
            (self.folder / name).write_text(text, encoding="utf-8")
            refused(message, f"--train={name}", "--held_out=1")
        (self.folder / "good").write_text("q\na\n\n" * 3, encoding="utf-8")
        for held_out in (30, 3, 0, -1):
            refused("expected at least one", "--train=good", f"--held_out={held_out}")
        refused("there is no text file", "--train=missing")
        self.assertFalse((self.folder / "out").exists())

    def test_train_then_talk(self):
        logging.getLogger("mingpt").setLevel(logging.INFO)
        text = "ping\npong\n\n" * 9 + "ping\npong\nping\nyou!"
        (self.folder / "dialogs.txt").write_text(text, encoding="utf-8")
        status, printed, errors = run_here(
            chat.main, "--train=dialogs.txt", "--held_out=1", "--system.work_dir=my chat",
            "--gpt.n_layer=1", "--gpt.n_head=1", "--gpt.n_embd=32", "--gpt.block_size=30",
            "--trainer.batch_size=4", "--trainer.learning_rate=0.01", "--trainer.max_iters=80",
            "--trainer.eval_interval=80")
        self.assertEqual((status, errors), (0, ""), printed)
        self.assertRegex(printed, "1 of 2 held-out questions answered right\n'ping' got '.*', not")
        self.assertIn(" '--model=my chat/model'\n", printed)
        folder = self.folder / "my chat"
        saved = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
        self.assertEqual((saved["vocab_size"], saved["eos_token_id"]), (257, 256))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        self.assertEqual([row["right"] for row in rows if row["split"] == "held out"], [1])
        self.assertEqual(self.talk("ping", args=[f"--model={folder / 'model'}"]), "ping\nbot: pong")


@unittest.skipIf(os.name == "nt", "needs a pseudo-terminal")
class Terminal(Folder):
    def setUp(self):
        super().setUp()
        import fcntl
        import pty
        import termios
        parrot("a" * 20_000).save_pretrained(self.folder / "parrot")
        save_encoder(chat.get_byte_encoder(), self.folder / "parrot")
        self.terminal, inner = pty.openpty()

        def own_terminal():
            # Ctrl-C is a signal there, which a run of the tests in the background may ignore.
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        command = [sys.executable, str(CHAT / "chat.py"), "--model=parrot"]
        self.process = subprocess.Popen(
            [*command, "--max_new_tokens=20000"], cwd=self.folder, env=os.environ | environment,
            stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            preexec_fn=own_terminal)
        os.close(inner)
        self.addCleanup(os.close, self.terminal)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def see(self, pattern: str) -> str:
        """Waits until the terminal shows this; returns all that is new on it."""
        shown = ""
        end = time.monotonic() + 60
        while not re.search(pattern, shown):
            left = max(0, end - time.monotonic())
            if not select.select([self.terminal], [], [], left)[0]:
                raise AssertionError(f"waited for {pattern!r}, saw {shown!r}")
            try:
                shown += os.read(self.terminal, 4096).decode()
            except OSError:
                raise AssertionError(f"{pattern!r} before the end, saw {shown!r}") from None
        return shown

    def test_ctrl_c_stops_the_answer(self):
        self.see("/help shows the commands(?s:.)*you: ")
        self.type("hi\n")
        self.see("bot: aaa")
        self.type("\x03")
        answer = self.see("you: ")
        self.assertLess(answer.count("a"), 9_900)
        self.type("/save d.txt\n")
        self.see("saved in d.txt(?s:.)*you: ")
        # The answer is what was said so far.
        self.assertRegex((self.folder / "d.txt").read_text(), r"^hi\na+\n\n$")
        self.type("half a li")
        self.see("half a li")
        # Python waits for a key again: a signal before that is seen only with the next key.
        time.sleep(0.2)
        # At the prompt Ctrl-C gives up the line.
        self.type("\x03")
        self.see("you: ")
        self.type("/undo\n")
        self.see("left: 0(?s:.)*you: ")
        # The arrow key brings the last line again.
        self.type("\x1b[A\n")
        self.see("/undo(?s:.)*left: 0(?s:.)*you: ")
        self.type("\x04")
        self.assertEqual(self.process.wait(60), 0)


if __name__ == "__main__":
    unittest.main()
