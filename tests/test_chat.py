"""projects/chat: dialogs as tokens, answers, commands."""

import io
import itertools
import re
import sys
from unittest import mock

import torch

from common import ROOT, WorkingFolder, run_here, tiny_gpt
from mingpt.pretrained import save_encoder

CHAT = ROOT / "projects" / "chat"
import chat
import sums


def save_parrot(text: str) -> None:
    """Saves a model that says the letter of `text` at each position, whatever it is asked.

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
    model.save_pretrained("parrot")
    save_encoder(chat.get_byte_encoder(), "parrot")


class Dialogs(WorkingFolder):
    def read(self, content: bytes):
        (self.folder / "dialogs.txt").write_bytes(content)
        return chat.read_dialogs(str(self.folder / "dialogs.txt"))

    def test_empty_lines_part_dialogs_and_each_question_has_an_answer(self):
        for content in (b"q\na\n\nr\nb\ns\nc", b"\n \nq\n a \r\n\n\t\n\nr\nb\ns\nc\n\n"):
            self.assertEqual(self.read(content), [["q", "a"], ["r", "b", "s", "c"]])
        for content, line in ((b"q", 1), (b"q\na\n\nr\nb\ns\n\nt\nc", 6), (b"q\na\nr", 3)):
            with self.assertRaisesRegex(ValueError, f"line {line}: .* ends with a question"):
                self.read(content)

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

    def test_sums_of_the_project_are_right_and_none_comes_twice(self):
        dialogs = chat.read_dialogs(str(CHAT / "dialogs.txt"))
        self.assertEqual(dialogs, sums.write_dialogs())
        pairs = (zip(dialog[::2], dialog[1::2]) for dialog in dialogs)
        seen = []
        for question, answer in itertools.chain.from_iterable(pairs):
            numbers = list(map(int, re.findall(r"\d+", question)))
            if numbers:
                self.assertRegex(answer, rf"so {sum(numbers)}\.$")
                for left, right in re.findall(r"([\d+]+)=(\d+)", answer):
                    self.assertEqual(sum(map(int, left.split("+"))), int(right))
                seen.append(frozenset(numbers))
        self.assertEqual((len(seen), len(set(seen))), (900, 900))


class Talk(WorkingFolder):
    def talk(self, *lines: str, args=()) -> str:
        """Returns what the program prints when these lines come through a pipe, after `you: `."""
        spoken = "".join(line + "\n" for line in lines)
        with mock.patch("sys.stdin", io.StringIO(spoken)):
            status, printed, errors = run_here(chat.main, "--model=parrot", *args)
        self.assertEqual((status, errors), (0, ""))
        return printed.replace("you: ", "").rstrip("\n")

    def test_commands(self):
        save_parrot("abcdefgh\0" + "i" * 5 + "\0" + "xyz\0" * 30)
        spoken = self.talk(
            "hey", "/save d.txt", "/undo", "/undo", "/save d.txt", "hey", "/reset", "/save",
            "/what", "hey", "/save .", "/quit", "hey").splitlines()
        self.assertEqual(spoken[1:-3:2], [
            "bot: defgh", "saved in d.txt", "questions and answers left: 0",
            "questions and answers left: 0", "there is nothing to save yet", "bot: defgh",
            "questions and answers left: 0", "name a file: /save FILE",
            "there is no /what; /help shows what there is", "bot: defgh"])
        self.assertIn("not saved: ", spoken[-2])
        self.assertEqual(spoken[-1], "/quit")
        self.assertEqual(chat.read_dialogs("d.txt"), [["hey", "defgh"]])

    def test_an_answer_is_one_printable_line_of_at_most_half_of_the_context(self):
        # Signs that would clear the screen, and an answer that never ends.
        save_parrot("ab\x1b[2J\ncd" + "e" * 200)
        spoken = self.talk("h", args=["--max_new_tokens=5000"])
        self.assertEqual(spoken, "h\nbot: b [2J cd" + "e" * 96)

    def test_an_empty_answer_and_a_question_that_is_too_long_are_forgotten(self):
        save_parrot("q\0\0\0\0\0" + "x" * 34)
        spoken = self.talk("h", "/undo", "a" * 20, "", "  ").splitlines()
        self.assertEqual(spoken, [
            "h", "bot: (an empty answer; the question is forgotten)", "/undo",
            "questions and answers left: 0", "a" * 20,
            "it has 21 tokens, expected at most 20; shorten it"])

    def test_ctrl_c_stops_an_answer_and_gives_up_a_line(self):
        save_parrot("x" * 9)

        def answer(*args):
            yield "so fa"
            yield "r"
            raise KeyboardInterrupt

        lines = ["hi", KeyboardInterrupt, "/save d.txt", EOFError]
        terminal = mock.Mock(isatty=lambda: True)
        with (mock.patch.object(chat, "answer", answer), mock.patch("sys.stdin", terminal),
              mock.patch("builtins.input", side_effect=lines)):
            status, printed, errors = run_here(chat.main, "--model=parrot")
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(printed, "/help shows the commands\nbot: so far\n\nsaved in d.txt\n\n")
        self.assertEqual(chat.read_dialogs("d.txt"), [["hi", "so far"]])

    def test_rows_without_a_token_are_never_said(self):
        model = tiny_gpt(vocab_size=300, block_size=64)
        with torch.no_grad():
            model.lm_head.weight[257:] = 100 * model.lm_head.weight[:1]
        model.save_pretrained("parrot")
        save_encoder(chat.get_byte_encoder(), "parrot")
        self.assertIn("bot: ", self.talk("h", args=["--temperature=1", "--top_p=1"]))

    def test_bad_settings_are_refused_before_the_first_question(self):
        save_parrot("x" * 9)
        tiny_gpt().save_pretrained("other")
        save_encoder(chat.Encoder({"a": 0}, []), "other")
        for message, *args in (("top_p=2", "--model=parrot", "--top_p=2"),
                               ("top_k=2.5", "--model=parrot", "--top_k=2.5"),
                               ("lacks <.endoftext.>", "--model=other")):
            status, printed, errors = run_here(chat.main, *args)
            self.assertEqual((status, printed), (2, ""))
            self.assertRegex(errors, f"^error: .*{message}")
