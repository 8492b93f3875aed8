"""The chat project: dialogs as tokens, training from end to end, and talking through a pipe and in a terminal."""

import contextlib
import io
import itertools
import json
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

from common import ROOT, Folder, run_python, tiny_gpt, vocabulary_folder
from mingpt.bpe import get_encoder

CHAT = ROOT / "projects" / "chat"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "PYTHONUTF8": "1"}
sys.path.insert(0, str(CHAT))
import chat
import sums

def parrot(text: str, **changes):
    """A model that has a letter of `text` for each position, whatever it is asked; \\0 stands for the end token.

    The embedding of a position is the row of its letter in the head. Tokens and blocks add nothing to it.
    """
    model = tiny_gpt(vocab_size=257, n_embd=258, n_layer=1, block_size=len(text), tie_weights=False, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        for place, letter in enumerate(text):
            model.transformer.wpe.weight[place, 256 if letter == "\0" else ord(letter)] = 1
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
        row = [104, 0xc3, 0xa9, 256, 98, 256, 99, 256, 100, 101, 256, 102, 256, 103, 256] # h é | b | c | d e | f | g |
        targets = [-1, -1, -1, -1, 98, 256, -1, -1, 100, 101, 256, -1, -1, 103, 256]
        x, y = dataset.__getitems__([1, 0, 2])
        for i, start in enumerate((6, 0, 11)): # where c, h and f are
            self.assertEqual(x[i].tolist(), (row + row)[start:start + 8])
            self.assertEqual(y[i].tolist(), (targets + targets)[start + 1:start + 9])
        self.assertEqual([part.tolist() for part in dataset[1]], [x[0].tolist(), y[0].tolist()])
        self.assertEqual(len(list(dataset)), 3)
        with self.assertRaisesRegex(ValueError, "--gpt.block_size=7, expected at least 8"):
            chat.DialogDataset([["hé", "b"]], encoder, 7)

    def test_encoders(self):
        encoder = chat.find_encoder(tiny_gpt(vocab_size=257))
        text = "27 + 48 = 75, naïve 世界 🤗 <|endoftext|>\n"
        self.assertEqual(encoder.encode(text), list(text.encode()))
        self.assertEqual(encoder.decode(encoder.encode(text)), text)
        with mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())):
            self.assertEqual(chat.find_encoder(tiny_gpt(vocab_size=50257)).encoder, get_encoder().encoder)
        with self.assertRaisesRegex(ValueError, "vocabulary of 11 tokens, expected 50257"):
            chat.find_encoder(tiny_gpt())

    def test_the_oldest_turns_go_first(self):
        model, encoder = tiny_gpt(vocab_size=257, block_size=20), chat.get_byte_encoder()
        dialog = ["aaa", "bbb", "ccc", "ddd", "ee"] # 4 tokens each with the end token, the last 3
        for room, kept in ((1, dialog), (2, dialog[2:]), (9, dialog[2:]), (10, dialog[4:]), (17, dialog[4:])):
            expected = sum(chat.encode(encoder, kept), [])
            self.assertEqual(chat.fit_prompt(model, encoder, dialog, room).tolist(), [expected])
        with self.assertRaisesRegex(ValueError, "it has 3 tokens, expected at most 2"):
            chat.fit_prompt(model, encoder, dialog, 18)
        self.assertEqual(len(dialog), 5)

    def test_the_dialogs_of_the_project(self):
        dialogs = chat.read_dialogs(str(CHAT / "dialogs.txt"))
        self.assertEqual(dialogs, sums.write_dialogs())
        self.assertEqual(len(dialogs), 300)
        seen = set()
        for question, answer in itertools.chain.from_iterable(zip(dialog[::2], dialog[1::2]) for dialog in dialogs):
            if numbers := re.findall(r"\d+", question):
                a, b = map(int, numbers)
                self.assertRegex(answer, rf"so {a + b}\.$")
                for left, right in re.findall(r"([\d+]+)=(\d+)", answer):
                    self.assertEqual(sum(map(int, left.split("+"))), int(right))
                self.assertNotIn({a, b}, seen)
                seen.add(frozenset((a, b)))
        self.assertEqual(len(seen), 900)


class Talk(Folder):
    def save(self, text: str) -> str:
        parrot(text).save_pretrained(self.folder / "parrot")
        return f"--model={self.folder / 'parrot'}"

    def talk(self, *args, lines=()) -> str:
        """What the program prints when these lines are typed in, the lines included."""
        with mock.patch("builtins.input", side_effect=[*lines, EOFError]), mock.patch("sys.stdin", io.StringIO()), \
                contextlib.redirect_stdout(io.StringIO()) as out:
            chat.main([*args])
        return out.getvalue().removesuffix("\n") # at the end of input

    def test_commands(self):
        file = self.folder / "d.txt"
        model = self.save("abcdefgh\0" + "i" * 5 + "\0" + "xyz\0" * 30)
        lines = ["hey", "yo", f"/save  {file}", "/undo", "/undo", "/undo", f"/save {file}", "hey", "/reset", "/save",
                 f"/save {self.folder}", "/what", "/help", "/quit", "hey"]
        spoken = iter(self.talk(model, lines=lines).splitlines())
        answers = [next(spoken) for line in spoken if line in lines and line not in ("/help", "/quit")]
        self.assertRegex(answers.pop(1), "bot: ") # the answer to yo
        self.assertEqual(answers, [
            "bot: defgh", f"saved in {file}", *(f"questions and answers left: {count}" for count in (1, 0, 0)),
            "there is nothing to save yet", "bot: defgh", "questions and answers left: 0", "name a file: /save FILE",
            "there is nothing to save yet", "there is no /what; /help shows what there is"])
        self.assertIn(chat.HELP, self.talk(model, lines=["/help"]))
        self.assertEqual(sum(chat.read_dialogs(str(file)), [])[:3], ["hey", "defgh", "yo"])
        self.assertRegex(self.talk(model, lines=["hey", f"/save {self.folder}"]), "not saved: .*")

    def test_answers(self):
        model = self.save("ab\x1b[2J\ncd" + "e" * 200) # what would clear the screen, and an answer that never ends
        self.assertTrue(self.talk(model, "--max_new_tokens=12", lines=["h", "i"]).startswith("h\nbot: b [2J cdeeee"))
        longest = self.talk(model, "--max_new_tokens=5000", lines=["h"]) # half of the context
        self.assertEqual(len(longest.splitlines()[1]), len("bot: ") + 104)
        model = self.save("q\0\0\0\0\0") # an empty answer is not remembered
        self.assertEqual(self.talk(model, lines=["h", "hi", "/undo"]),
                         "h\nbot: \nhi\nbot: \n/undo\nquestions and answers left: 0\n")
        model = self.save("x" * 40)
        spoken = self.talk(model, lines=["a" * 19, "a" * 20, "", "  ", "ok"]).splitlines()
        refused = "it has 21 tokens, expected at most 20; shorten it"
        self.assertEqual(spoken[2:], ["a" * 20, refused, "", "", "ok", "bot: " + "x" * 20])
        self.assertEqual(self.talk(model), "")

    def test_bad_input(self):
        def fails(message, *args):
            with self.subTest(args), self.assertRaisesRegex((ValueError, OSError), message):
                self.talk(*args, f"--system.work_dir={self.folder / 'out'}", lines=["hi"])

        fails("there is no folder '/nothing'", "--model=/nothing")
        fails("there is no folder ''", "--model=")
        tiny_gpt().save_pretrained(self.folder / "other")
        fails("vocabulary of 11 tokens", f"--model={self.folder / 'other'}")
        model = self.save("x" * 9)
        fails("temperature=-1", model, "--temperature=-1")
        fails("top_p=2", model, "--top_p=2")
        fails("max_new_tokens=-3", model, "--max_new_tokens=-3")
        fails("no setting --gpt.vocab_size", "--gpt.vocab_size=5")
        for name, text, message in (("empty", "", "got 0 dialogs"), ("blank", "\n \n", "got 0 dialogs"),
                                    ("few", "q\na\n", "got 1 dialogs"), ("one-sided", "q\na\n\nq\n\nq\na", "line 4")):
            (self.folder / name).write_text(text, encoding="utf-8")
            fails(message, f"--train={self.folder / name}", "--held_out=1")
        (self.folder / "good").write_text("q\na\n\n" * 3, encoding="utf-8")
        for held_out in (30, 3, 0, -1):
            fails("expected at least one", f"--train={self.folder / 'good'}", f"--held_out={held_out}")
        fails("No such file", f"--train={self.folder / 'missing'}")
        fails("directory|denied", f"--train={self.folder}")
        self.assertFalse((self.folder / "out").exists())

    def test_train_then_talk(self):
        (self.folder / "dialogs.txt").write_text("ping\npong\n\n" * 9 + "ping\npong\nping\nyou!", encoding="utf-8")
        printed = run_python(
            CHAT / "chat.py", "--train=dialogs.txt", "--held_out=1",
            "--gpt.n_layer=1", "--gpt.n_head=1", "--gpt.n_embd=32", "--gpt.block_size=30",
            "--trainer.batch_size=4", "--trainer.warmup_iters=0", "--trainer.learning_rate=0.01",
            "--trainer.max_iters=80", "--trainer.eval_interval=80", cwd=self.folder).stdout
        self.assertRegex(printed, "1 of 2 held-out questions answered right; 'ping' got '.*', not 'you!'")
        self.assertRegex(printed, r"--model=out.chat.model")
        folder = self.folder / "out" / "chat"
        saved = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
        self.assertEqual((saved["vocab_size"], saved["eos_token_id"], saved["n_positions"]), (257, 256, 30))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        self.assertEqual([row["right"] for row in rows if row["split"] == "held out"], [1])

        spoken = subprocess.run( # through a pipe
            [sys.executable, str(CHAT / "chat.py"), "--model=out/chat/model"], input="ping\n\n/quit\nping\n", text=True,
            encoding="utf-8", cwd=self.folder, env=ENVIRONMENT, capture_output=True)
        self.assertEqual((spoken.stdout, spoken.stderr), ("you: ping\nbot: pong\nyou: \nyou: /quit\n", ""))


@unittest.skipIf(os.name == "nt", "needs a pseudo-terminal")
class Terminal(Folder):
    def setUp(self):
        super().setUp()
        import fcntl, pty, termios
        parrot("a" * 40_000).save_pretrained(self.folder / "parrot")
        self.terminal, inner = pty.openpty()

        def own_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0) # so that Ctrl-C is a signal
            signal.signal(signal.SIGINT, signal.SIG_DFL) # which a run of the tests in the background may ignore
        self.process = subprocess.Popen(
            [sys.executable, str(CHAT / "chat.py"), "--model=parrot", "--max_new_tokens=40000"], cwd=self.folder,
            env=ENVIRONMENT | {"TERM": "dumb"}, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            preexec_fn=own_terminal)
        os.close(inner)
        self.addCleanup(os.close, self.terminal)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def see(self, pattern: str) -> str:
        """Waits until the terminal shows this, and returns all that it has shown since the last time."""
        shown, end = "", time.monotonic() + 60
        while not re.search(pattern, shown):
            if not select.select([self.terminal], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"waited for {pattern!r}, saw {shown!r}")
            try:
                shown += os.read(self.terminal, 4096).decode()
            except OSError: # the program has ended
                raise AssertionError(f"waited for {pattern!r}, saw {shown!r} and the end") from None
        return shown

    def test_ctrl_c_stops_the_answer(self):
        self.see("/help shows the commands(?s:.)*you: ")
        self.type("hi\n")
        self.see("bot: aaa")
        self.type("\x03")
        answer = self.see("you: ")
        self.assertLess(answer.count("a"), 19_900)
        self.type("/save d.txt\n")
        self.see("saved in d.txt(?s:.)*you: ")
        self.assertRegex((self.folder / "d.txt").read_text(), r"^hi\na+\n\n$") # what was said so far
        self.type("half a li")
        self.see("half a li")
        time.sleep(0.2) # until Python waits for a key again: it sees a signal before that only with the next key
        self.type("\x03") # at the prompt it gives up the line
        self.see("you: ")
        self.type("/undo\n")
        self.see("left: 0(?s:.)*you: ")
        self.type("\x1b[A\n") # the last line again, by the arrow key
        self.see("/undo(?s:.)*left: 0(?s:.)*you: ")
        self.type("\x04")
        self.assertEqual(self.process.wait(60), 0)

    def test_quit(self):
        self.see("you: ")
        self.type("/quit\n")
        self.assertEqual(self.process.wait(60), 0)


if __name__ == "__main__":
    unittest.main()
