"""The projects, run as a user runs them: as scripts, from any folder."""

import contextlib
import copy
import hashlib
import io
import json
import os
import sys
import unittest
import zipfile
from unittest import mock

import numpy as np
import torch

from common import ROOT, Folder, Server, close_log, run_python, tiny_config
from mingpt.trainer import Trainer
from mingpt.utils import run_script

ADDER, CHARGPT = ROOT / "projects" / "adder" / "adder.py", ROOT / "projects" / "chargpt" / "chargpt.py"

sys.path[:0] = [str(ADDER.parent), str(CHARGPT.parent), str(ROOT / "projects")]
import adder
import chargpt
import muon

class Scripts(Folder):
    def run_script(self, path, *args, check=True):
        return run_python(path, *args, cwd=self.folder, check=check)

    def fails(self, path, message, *args):
        result = self.run_script(path, *args, check=False)
        self.assertEqual(result.returncode, 2)
        self.assertRegex(result.stderr, f"^error: .*{message}.*\n$") # one line and nothing else


class AdditionDataset(unittest.TestCase):
    def make(self, split, **changes):
        config = adder.AdditionDataset.get_default_config()
        config.merge_from_dict(changes)
        return adder.AdditionDataset(config, split)

    def test_every_problem_is_in_one_split_once(self):
        for ndigit, tests in ((1, 20), (2, 500)):
            train, test = self.make("train", ndigit=ndigit), self.make("test", ndigit=ndigit)
            problems = [dataset.problems(np.arange(len(dataset))).tolist() for dataset in (train, test)]
            self.assertEqual(sorted(problems[0] + problems[1]), list(range(10 ** (2 * ndigit))))
            self.assertEqual(len(test), tests)

    def test_many_digits(self):
        train, test = self.make("train", ndigit=8), self.make("test", ndigit=8)
        self.assertEqual(len(train) + len(test), 10 ** 16)
        near = np.unique(np.clip(test.test[:, None] + np.arange(-600, 3), 0, len(train) - 1)) # where problems are stepped over
        self.assertFalse(set(train.problems(near).tolist()) & set(test.test.tolist()))
        self.assertEqual(len(set(train.problems(near).tolist())), len(near))
        with self.assertRaisesRegex(ValueError, "ndigit=10"):
            self.make("train", ndigit=10)

    def test_digits(self):
        for reverse, expected in ((True, [8, 5, 5, 0, 5, 3, 1]), (False, [8, 5, 5, 0, 1, 3, 5])):
            dataset = self.make("train", reverse=reverse)
            self.assertEqual(dataset.digits(np.array([8550])).tolist(), [expected])
        dataset = self.make("test", ndigit=3)
        x, y = dataset.__getitems__([0, 7, 499])
        for row, problem in enumerate(dataset.problems([0, 7, 499])):
            a, b = divmod(int(problem), 1000)
            text = f"{a:03d}{b:03d}" + f"{a + b:04d}"[::-1]
            self.assertEqual("".join(map(str, x[row].tolist())), text[:-1])
            self.assertEqual(y[row].tolist(), [-1] * 5 + [int(digit) for digit in text[6:]])
            self.assertEqual(dataset[[0, 7, 499][row]][1].tolist(), y[row].tolist())


    def test_carries(self):
        for n, a, b, carries in ((2, 85, 50, 1), (2, 85, 57, 2), (2, 0, 0, 0), (2, 99, 1, 2), (3, 555, 555, 3), (3, 500, 500, 1), (3, 129, 870, 0)):
            self.assertEqual(adder.count_carries(np.array([a * 10 ** n + b]), n).tolist(), [carries])

    def test_mistakes_are_found(self):
        for reverse in (True, False):
            dataset = self.make("test", reverse=reverse)
            class Oracle: # adds without a mistake but for one problem
                def generate(self, digits, count):
                    text = ["".join(map(str, row)) for row in digits.tolist()]
                    sums = [f"{int(row[:2]) + int(row[2:]) + 5 * (row == spoiled):03d}" for row in text]
                    return torch.tensor([list(map(int, row + (total[::-1] if reverse else total))) for row, total in zip(text, sums)])
            spoiled = f"{dataset.test[3]:04d}"
            problems, sums, right = adder.find_mistakes(Oracle(), dataset, "cpu")
            self.assertEqual(np.flatnonzero(~right).tolist(), [3])
            self.assertEqual(sums[3], int(spoiled[:2]) + int(spoiled[2:]) + 5)
            self.assertEqual(problems.tolist(), dataset.test.tolist())


class Adder(Scripts):
    def test_short_run_from_another_folder(self):
        printed = self.run_script(ADDER, "--data.ndigit=1", "--trainer.max_iters=600", "--trainer.eval_interval=600").stdout
        self.assertRegex(printed, r"step +600  loss .* left")
        self.assertRegex(printed, r"train: 80 of 80 sums exact \(100.00%\)")
        self.assertRegex(printed, r"test: \d+ of 20 sums exact")
        folder = self.folder / "out" / "adder"
        self.assertEqual(sorted(path.name for path in folder.iterdir()), ["args.txt", "checkpoint.pt", "config.json", "log.txt", "metrics.jsonl"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.assertEqual((config["model"]["n_layer"], config["model"]["vocab_size"]), (3, 10)) # the final sizes
        self.assertTrue(printed.endswith((folder / "log.txt").read_text(encoding="utf-8")))

    def test_mistakes_on_the_command_line(self):
        self.fails(ADDER, "no setting --data.ndigits; did you mean --data.ndigit", "--data.ndigits=3")
        self.fails(ADDER, "--data.ndigit=0", "--data.ndigit=0")
        self.assertEqual(list(self.folder.iterdir()), []) # nothing was begun
        self.assertIn("--trainer.max_iters=500", self.run_script(ADDER, "--help").stdout)


class CharGPT(Scripts):
    TINY = ("--model.n_layer=1", "--model.n_head=1", "--model.n_embd=16", "--data.block_size=16", "--trainer.max_iters=30",
            "--trainer.eval_interval=30", "--system.length=40")

    def test_python_help_texts_then_samples(self):
        printed = self.run_script(CHARGPT, *self.TINY).stdout
        self.assertRegex(printed, r"validation loss over all [\d,]+ characters: \d\.\d{4} nats, \d\.\d{4} bits per character")
        sampled = self.run_script(CHARGPT, "--system.mode=sample", "--system.prompt=The ", "--system.length=50").stdout
        self.assertTrue(sampled.startswith("The "))
        self.assertEqual(len(sampled), 4 + 50 + 1) # the prompt, the sample, the end of the line
        self.fails(CHARGPT, "the prompt has '🤗', which the model has never seen", "--system.mode=sample", "--system.prompt=a🤗")

    def test_a_text_of_ones_own(self):
        (self.folder / "in.txt").write_text("Größe! 世界\n" * 100, encoding="utf-8")
        printed = self.run_script(CHARGPT, "--data.path=in.txt", *self.TINY).stdout
        self.assertIn("1,000 characters, 10 of them distinct", printed)
        self.fails(CHARGPT, "the prompt has", "--data.path=in.txt", "--system.prompt=xyz", *self.TINY)

    def test_bad_texts(self):
        for content, message in ((b"", "0 distinct characters"), (b"a" * 1000, "1 distinct character"), (b"good " * 99 + b"\xff", "in.txt is not UTF-8 text: .*0xff in position 495"),
                                 (b"ab" * 20, "row of 4 tokens for a block_size of 16")):
            (self.folder / "in.txt").write_bytes(content)
            self.fails(CHARGPT, message, "--data.path=in.txt", *self.TINY)
        self.fails(CHARGPT, "there is no text file nothing.txt$", "--data.path=nothing.txt", *self.TINY)
        self.fails(CHARGPT, "there is no model in", "--system.mode=sample", "--system.work_dir=nowhere")
        self.fails(CHARGPT, "no checkpoint at", "--trainer.resume=True", *self.TINY)
        self.fails(CHARGPT, "expected train or sample", "--system.mode=chat")

    def test_resume(self):
        whole = self.run_script(CHARGPT, *self.TINY, "--system.work_dir=whole").stdout
        self.run_script(CHARGPT, *self.TINY, "--system.work_dir=parts", "--trainer.max_iters=10", "--trainer.lr_decay_iters=30")
        resumed = self.run_script(CHARGPT, *self.TINY, "--system.work_dir=parts", "--trainer.resume=True").stdout
        last = [[line for line in printed.splitlines() if line.startswith("validation loss")] for printed in (whole, resumed)]
        self.assertEqual(last[0], last[1])

    @unittest.skipIf(os.name == "nt", "torchrun needs a torch with libuv")
    def test_two_processes(self):
        printed = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", CHARGPT, *self.TINY,
                             cwd=self.folder, OMP_NUM_THREADS="1").stdout
        self.assertEqual(printed.count("the model is in"), 1)


def contents(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes() for path in folder.rglob("*")}

class InProcess(Folder):
    """Scripts that run in this process: a hundred of their own would take minutes."""

    TINY = ("--data.path=in.txt", "--data.block_size=8", "--model.n_layer=1", "--model.n_head=1", "--model.n_embd=8",
            "--trainer.max_iters=2", "--trainer.eval_batches=1", "--system.length=4", "--system.work_dir=run")

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        (self.folder / "in.txt").write_text('the "def" of 2024\n' * 40, encoding="utf-8")
        (self.folder / "folder").mkdir()
        (self.folder / "file").write_text("in the way", encoding="utf-8")
        self.addCleanup(close_log)
        self.patch(mock.patch.dict(os.environ, MINGPT_TRACEBACK=""))

    def run_main(self, module, *args) -> tuple:
        """Its exit status, and what it writes to stderr and stdout."""
        printed, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        argv = mock.patch.object(sys, "argv", [module.__file__, *args])
        with argv, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            try:
                run_script(module.main)
                status = 0
            except SystemExit as left:
                status = left.code
            printed.flush()
        close_log()
        return status, errors.getvalue(), printed.buffer.getvalue().decode("utf-8")

    def runs(self, module, *args) -> str:
        status, errors, printed = self.run_main(module, *args)
        self.assertEqual((status, errors), (0, ""), args)
        return printed

    def refused(self, message, module, *args):
        """One line and nothing else, and no file has changed."""
        before = contents(self.folder)
        with self.subTest(module=module.__name__, args=str(args)[-100:]):
            status, errors, printed = self.run_main(module, *args)
            self.assertEqual((status, errors.count("\n"), printed), (2, 1, ""), errors)
            self.assertRegex(errors, f"^error: .*{message}")
            self.assertLess(len(errors), 700)
            self.assertEqual(contents(self.folder), before)


class CommandLines(InProcess):
    def test_what_both_refuse(self):
        deep, long = "[" * 100_000, "9" * 5000
        for arg, message in (
            *((f"--trainer.{name}={value}", f"got {name}=") for name, values in dict(
                grad_accum_steps=(0, -2), batch_size=(0, -8), max_iters=(0, -1), eval_batches=(0,), log_interval=(-1,), eval_interval=(-1,),
                checkpoint_interval=(-1,), num_workers=(-1,), warmup_iters=(-1,), lr_decay_iters=(-1, "soon"), grad_norm_clip=(-1,),
                weight_decay=(-0.1,), learning_rate=(-1,), min_lr=(-1,), seed=(-1, "x"), schedule=("step", "None"), dtype=("float8", ""),
                betas=("(0.9,)", "(0.9,1.5)", "(-0.1,0.9)", "('a','b')", "((1,2),(3,4))", "(0.9,0.99,0.999)"),
                device=("cuda:99", "gpu", "meta", "hpu", "")).items() for value in values),
            ("--trainer.batch_size=30", "batch_size=30, expected a multiple of 4"), ("--trainer.max_iters=1.5", "type int"),
            ("--trainer.max_iters=many", "type int"), ("--trainer.max_iters=True", "type int"), ("--trainer.max_iters=", "type int"),
            ("--trainer.max_iters", "without a value"), ("--trainer.max_iters=1e999", "type int"), (f"--trainer.max_iters={long}", "type int"),
            (f"--trainer.max_iters={deep}", "type int"), (f"--trainer.betas={deep}", "type tuple"), ("--trainer.betas=0.9", "type tuple"),
            ("--trainer.learning_rate=1e999", "type float"), ("--trainer.learning_rate=nan", "type float"),
            (f"--trainer.learning_rate={long}", "type float"), ("--trainer.resume=maybe", "type bool"),
            ("--trainer.resume=True", "no checkpoint at run"), ("--system.seed=-1", "[Ss]eed"), ("--system.seed=1.5", "type int"),
            ("--system.work_dir=", "empty work_dir"), ("--system.work_dir=None", "empty work_dir"), ("--system.work_dir=file", "file"),
            ("--system.work_dir=file/run", "file"), ("--system.work_dir=a\0b", "null"),
            ("--trainer.work_dir=x", "no setting --trainer.work_dir"), # it would be overwritten
            ("--model.vocab_size=3", "no setting --model.vocab_size"), ("--model.block_size=3", "no setting --model.block_size"),
            ("--model.embd_pdrop=2", "embd_pdrop=2.0, expected a share"), ("--model.attn_pdrop=-1", "attn_pdrop=-1"),
            ("--model.model_type=gpt9", "unknown model_type 'gpt9'.*gpt-nano"), ("--model.gelu_approximate=x", "gelu_approximate='x'"),
            ("--model.tie_weights=2", "type bool"), ("--model=3", "no setting --model"), ("--model.n_layer=-1", "n_layer=-1"),
            ("--sistem.seed=3", "did you mean --system.seed"), ("seed=3", "no setting seed"), ("--", "no setting --"), ("", "no setting"),
        ):
            for module, tiny in ((adder, ("--data.ndigit=1", "--system.work_dir=run", "--trainer.grad_accum_steps=4")),
                                 (chargpt, (*self.TINY, "--trainer.grad_accum_steps=4"))):
                self.refused(message, module, *tiny, arg)

    def test_what_one_refuses(self):
        for arg, message in (("--data.ndigit=0", "ndigit=0"), ("--data.ndigit=10", "ndigit=10"), ("--data.ndigit=two", "type int"),
                             ("--data.reverse=2", "type bool"), ("--model.n_layer=4", "'gpt-nano' means n_layer=3, but n_layer=4"),
                             ("--data.block_size=3", "no setting --data.block_size"), ("--system.prompt=x", "no setting --system.prompt")):
            self.refused(message, adder, arg)
        for arg, message in (
            ("--data.path=folder", "no text file folder$"), ("--data.path=nothing.txt", "no text file nothing.txt$"),
            ("--data.path=tinyshakespear", "did you mean tinyshakespeare"), ("--data.path=Text8", "did you mean text8"),
            ("--data.path=enwik9", "did you mean enwik8"), ("--data.block_size=0", "block_size=0"), ("--data.block_size=-3", "block_size=-3"),
            ("--data.block_size=1e12", "block_size of 1000000000000"), ("--data.block_size=2.5", "type int"),
            ("--model.n_head=3", "n_embd=8, expected a multiple of n_head=3"), ("--model.model_type=gpt-nano", "means n_layer=3, but n_layer=1"),
            ("--trainer.optimizer=sgd", "optimizer=sgd, expected muon or adamw"), ("--trainer.momentum=1.0", "momentum=1.0"), ("--system.mode=chat", "mode='chat', expected train or sample"),
            ("--system.length=-1", "length=-1"), ("--system.temperature=-1", "temperature=-1"), ("--system.temperature=1e999", "type float"),
            ("--system.prompt=xyz", "the prompt has 'x', 'y', 'z', which the model has never seen$"),
        ):
            self.refused(message, chargpt, *self.TINY, arg)

    def test_presets(self):
        sizes = ("--model.n_layer=3", "--model.n_head=3", "--model.n_embd=48") # those of gpt-nano may be given, too
        others = [arg for arg in self.TINY if not arg.startswith("--model")]
        for given in ((), sizes):
            self.runs(chargpt, *others, "--model.model_type=gpt-nano", *given)
            model = json.loads((self.folder / "run" / "config.json").read_text(encoding="utf-8"))["model"]
            self.assertEqual((model["model_type"], model["n_layer"], model["n_head"], model["n_embd"]), ("gpt-nano", 3, 3, 48))
        self.refused("'gpt-nano' means n_layer=3, but n_layer=4", chargpt, *others, "--model.model_type=gpt-nano", "--model.n_layer=4")
        self.runs(chargpt, *others, "--model.n_embd", "16", "--model.model_type", "gpt") # a name that says nothing of sizes
        model = json.loads((self.folder / "run" / "config.json").read_text(encoding="utf-8"))["model"]
        self.assertEqual((model["n_layer"], model["n_head"], model["n_embd"]), (4, 4, 16))

    def test_prompts_are_texts_as_typed(self):
        self.runs(chargpt, *self.TINY)
        for prompt, start in (("2024", "2024"), ('"def"', '"def"'), (r"of\nthe", "of\nthe"), ("20", "20"), (r"\n", "\n"), ("4e2", "4e2")):
            for args in ([f"--system.prompt={prompt}"], ["--system.prompt", prompt]):
                printed = self.runs(chargpt, "--system.mode=sample", "--system.work_dir=run", "--system.length=3", *args)
                self.assertTrue(printed.startswith(start), printed)
                self.assertEqual(len(printed), len(start) + 3 + 1)

    def test_a_text_with_a_backslash_and_an_n_but_no_newline(self):
        (self.folder / "in.txt").write_bytes(rb"one\ntwo\n" * 60)
        self.runs(chargpt, *self.TINY, "--data.block_size=40")

    def test_marks_and_line_ends_of_other_systems_are_no_characters(self):
        (self.folder / "in.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode("utf-8"))
        chars, codes = chargpt.load_text("in.txt")
        self.assertEqual("".join(chars[code] for code in codes), "one\ntwo\n")

    def test_a_terminal_without_utf8(self):
        (self.folder / "in.txt").write_text("Größe! 世界\n" * 40, encoding="utf-8")
        self.runs(chargpt, *self.TINY)
        result = run_python(CHARGPT, "--system.mode=sample", "--system.work_dir=run", "--system.prompt=Größe! 世", cwd=self.folder,
                            PYTHONUTF8="1", PYTHONIOENCODING="ascii")
        self.assertEqual((result.stdout[:8], result.stderr), ("Gr??e! ?", ""))


class Resume(InProcess):
    def test_a_refused_resume_touches_nothing(self):
        self.runs(chargpt, *self.TINY)
        shown = self.runs(chargpt, "--system.mode=sample", "--system.work_dir=run")
        (self.folder / "other.txt").write_text('thE "dEf" of 2024\n' * 40, encoding="utf-8") # as many characters, but others
        (self.folder / "more.txt").write_text('the "def" of 2024!\n' * 40, encoding="utf-8")
        more = (*self.TINY, "--trainer.resume=True", "--trainer.max_iters=4")
        for arg, message in (("--data.path=other.txt", "run.checkpoint.pt is a checkpoint of another model: _extra_state"),
                             ("--data.path=more.txt", "another model"), ("--model.n_layer=2", "another model.*more"),
                             ("--trainer.optimizer=adamw", "another optimizer"), ("--trainer.dtype=float16", "has dtype=auto, now it is float16"),
                             ("--trainer.max_iters=2", "has 2 steps already and max_iters=2; raise it"), ("--trainer.max_iters=1", "max_iters=1"),
                             ("--system.prompt=xyz", "the prompt has"), ("--data.path=nothing", "no text file"), ("--trainer.betas=(1,2)", "betas")):
            self.refused(message, chargpt, *more, arg)
        self.assertEqual(self.runs(chargpt, "--system.mode=sample", "--system.work_dir=run"), shown)

        checkpoint = self.folder / "run" / "checkpoint.pt"
        good = checkpoint.read_bytes()
        weights = torch.load(checkpoint, weights_only=True)["model"]["transformer.wte.weight"].numpy().tobytes()
        place = good.index(weights) + 5
        checkpoint.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1:]) # bit rot
        self.refused("run.checkpoint.pt is damaged", chargpt, *more)
        self.refused("run.checkpoint.pt is damaged", chargpt, "--system.mode=sample", "--system.work_dir=run")

    def test_an_accepted_one_notes_its_command_line_and_the_new_settings(self):
        for max_iters, more in ((2, ()), (4, ("--trainer.resume=True", "--trainer.weight_decay=0.3", "--trainer.seed=8", "--trainer.momentum=0.5"))):
            with self.assertLogs("mingpt", "INFO") as logged:
                self.runs(chargpt, *self.TINY, f"--trainer.max_iters={max_iters}", *more)
        printed = "\n".join(logged.output)
        for line in ("weight_decay was 0.1, is 0.3", "seed was 3407, is 8", "max_iters was 2, is 4", "momentum was 0.85, is 0.5"):
            self.assertIn(line, printed)
        lines = (self.folder / "run" / "args.txt").read_text(encoding="utf-8").splitlines()
        self.assertEqual(["resume" in line for line in lines], [False, True])
        config = json.loads((self.folder / "run" / "config.json").read_text(encoding="utf-8"))
        self.assertEqual(config["trainer"]["weight_decay"], 0.3)
        _, muon_state = torch.load(self.folder / "run" / "checkpoint.pt", weights_only=True)["optimizer"]
        self.assertEqual([(group["momentum"], group["weight_decay"]) for group in muon_state["param_groups"]], [(0.5, 0.3)] * 2)

    def test_a_fresh_run_that_dies_at_once_is_not_the_old_one(self):
        self.runs(chargpt, *self.TINY)
        with mock.patch.object(Trainer, "_step", side_effect=ZeroDivisionError), self.assertRaises(ZeroDivisionError):
            self.run_main(chargpt, *self.TINY, "--trainer.max_iters=8")
        close_log()
        self.refused("no checkpoint at run.checkpoint.pt", chargpt, *self.TINY, "--trainer.max_iters=8", "--trainer.resume=True")

    def test_folders_that_hold_no_model_to_sample_from(self):
        self.runs(adder, "--data.ndigit=1", "--trainer.max_iters=1", "--system.work_dir=sums")
        self.refused("sums are not a model of this script", chargpt, "--system.mode=sample", "--system.work_dir=sums")
        self.refused("no model in nowhere", chargpt, "--system.mode=sample", "--system.work_dir=nowhere")
        self.runs(chargpt, *self.TINY)
        config = self.folder / "run" / "config.json"
        model = json.loads(config.read_text(encoding="utf-8"))["model"]
        for text in ("{", "[]", "{}", '{"model": 3}', json.dumps({"model": model | {"n_layer": 2}})):
            config.write_text(text, encoding="utf-8")
            self.refused("run are not a model of this script", chargpt, "--system.mode=sample", "--system.work_dir=run")


class Muon(unittest.TestCase):
    def test_singular_values(self):
        for shape in ((6, 6), (4, 9), (9, 4)):
            torch.manual_seed(1)
            matrix = torch.randn(shape)
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            s = s / s.square().sum().sqrt()
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
            self.assertTrue(((s > 0.6) & (s < 1.3)).all())
            torch.testing.assert_close(muon.orthogonalize(matrix), u @ s.diag() @ v, atol=1e-4, rtol=1e-4)

    @unittest.skipUnless(hasattr(torch.optim, "Muon"), "this torch has no Muon to compare with")
    def test_steps_are_those_of_torch_with_rows_made_alike(self):
        torch.manual_seed(1)
        lr, decay, beta2 = 0.1, 0.1, 0.95
        joined, tall, wide = ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (12, 8), (8, 12))]
        optimizer = muon.Muon([{"params": [joined], "parts": 3}, {"params": [tall, wide]}], lr, decay, beta2=beta2)
        pieces = [[torch.nn.Parameter(part.clone()) for part in p.detach().chunk(count)] for p, count in zip(ours, (3, 1, 1))]
        plain = torch.optim.Muon(sum(pieces, []), lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw") # the directions, in bfloat16
        expected, means = [p.detach().clone() for p in ours], [0.0] * 3
        for step in range(3):
            for p, own in zip(ours, pieces):
                p.grad = torch.randn_like(p) * torch.linspace(0.1, 3, len(p))[:, None]
                for q, grad in zip(own, p.grad.clone().chunk(len(own))):
                    q.grad = grad
            before = [torch.cat(own).detach() for own in pieces]
            optimizer.step()
            plain.step()
            for i, own in enumerate(pieces):
                direction = before[i] - torch.cat(own).detach()
                means[i] = beta2 * means[i] + (1 - beta2) * (direction ** 2).sum(dim=1)
                direction = direction / means[i].sqrt()[:, None]
                direction *= 0.2 / (direction ** 2).mean().sqrt()
                expected[i] = (1 - lr * decay) * expected[i] - lr * direction
        for p, q in zip(ours, expected):
            torch.testing.assert_close(p.detach(), q, atol=3e-3, rtol=0) # a step changes weights by some 0.02

    def test_a_row_without_gradient_gets_no_nan(self):
        matrix = torch.nn.Parameter(torch.randn(4, 3))
        before, optimizer = matrix.detach().clone(), muon.Muon([matrix], 0.1)
        for grad in (torch.zeros(4, 3), torch.tensor([[0.0, 0, 0], [1, 2, 3], [3, 2, 1], [0, 1, 0]])):
            matrix.grad = grad
            optimizer.step()
            torch.testing.assert_close(matrix[0], before[0])
        self.assertTrue(matrix.isfinite().all() and not torch.equal(matrix, before))


class Optimizers(unittest.TestCase):
    def make(self, **changes):
        torch.manual_seed(1)
        model = chargpt.CharGPT(tiny_config(), "abcdefghijk")
        config = chargpt.get_config().trainer
        config.merge_from_dict(changes)
        return model, model.configure_optimizers(config)

    def step(self, model, optimizer):
        idx = torch.randint(11, (4, 8))
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    def test_each_parameter_has_one_optimizer(self):
        model, both = self.make()
        adamw, other = both.parts
        for group, parts, names in zip(other.param_groups, (3, 1), (("c_attn.weight",), ("c_fc.weight", "c_proj.weight")), strict=True):
            self.assertEqual(group["parts"], parts)
            self.assertEqual({id(p) for p in group["params"]}, {id(p) for name, p in model.named_parameters() if name.endswith(names)})
        self.assertEqual(sorted(id(p) for group in both.param_groups for p in group["params"]), sorted(map(id, model.parameters())))
        self.assertEqual([group["weight_decay"] for group in both.param_groups], [0.0, 0.1, 0.1])
        self.assertEqual([group["momentum"] for group in self.make(momentum=0.7)[1].parts[1].param_groups], [0.7, 0.7])
        self.assertIsInstance(self.make(optimizer="adamw")[1], torch.optim.AdamW)
        with self.assertRaisesRegex(ValueError, "optimizer=sgd"):
            self.make(optimizer="sgd")

    def test_the_rate_reaches_both(self):
        model, both = self.make()
        for group in both.param_groups:
            group["lr"] = 0.0
        before = [p.clone() for p in model.parameters()]
        self.step(model, both)
        self.assertTrue(all(torch.equal(p, old) for p, old in zip(model.parameters(), before)))
        for group in both.param_groups:
            group["lr"] = 1e-2
        self.step(model, both)
        self.assertFalse(any(torch.equal(p, old) for p, old in zip(model.parameters(), before)))
        self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_state_goes_on(self):
        model, both = self.make()
        self.step(model, both)
        other, others = self.make()
        other.load_state_dict(model.state_dict())
        others.load_state_dict(copy.deepcopy(both.state_dict())) # load_state_dict copies no tensors
        for pair in ((model, both), (other, others)):
            torch.manual_seed(2)
            self.step(*pair)
        for one, two in zip(model.parameters(), other.parameters()):
            self.assertTrue(torch.equal(one, two))


class NamedData(Server):
    """tinyshakespeare, text8 and enwik8 from a server on this machine."""

    def setUp(self):
        super().setUp()
        data = {}
        for name, text in (("tinyshakespeare", b"To be, or not to be\n" * 50), ("text8", b" anarchism originated as a term" * 50),
                           ("enwik8", "<page>Größe 世界</page>\n".encode() * 50)):
            body = text
            if name != "tinyshakespeare":
                file = io.BytesIO()
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr(name, text)
                body = file.getvalue()
            self.files[f"/{name}.zip"] = [dict(body=body)]
            data[name] = (f"{self.address}/{name}.zip", hashlib.sha1(text).hexdigest(), chargpt.DATASETS[name][2])
        data["tinyshakespeare"] = (self.address + "/input.txt", *data["tinyshakespeare"][1:])
        self.files["/input.txt"] = self.files["/tinyshakespeare.zip"]
        self.patch(mock.patch.dict(chargpt.DATASETS, data), mock.patch.dict(os.environ, MINGPT_CACHE=str(self.folder)))

    def test_each(self):
        for name, expected in (("tinyshakespeare", "To be, or not to be\n" * 50), ("text8", " anarchism originated as a term" * 50),
                               ("enwik8", ("<page>Größe 世界</page>\n" * 50).encode().decode("latin-1"))):
            chars, codes = chargpt.load_text(name)
            self.assertEqual("".join(chars[code] for code in codes), expected)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["enwik8", "text8", "tinyshakespeare"])
        self.requests.clear()
        chargpt.load_text("text8")
        self.assertEqual(self.requests, [])

    def test_a_failing_download_leaves_nothing_and_the_next_call_recovers(self):
        good = self.files["/text8.zip"][0]
        other = io.BytesIO()
        with zipfile.ZipFile(other, "w") as archive:
            archive.writestr("text8", b"something else")
        for answer, error in ((dict(status=500, body=b""), OSError), (dict(body=b"no archive"), ValueError), (dict(body=other.getvalue()), ValueError),
                              (dict(good, send=50, ranges=False), OSError), (dict(body=good["body"][:60]), ValueError)):
            self.files["/text8.zip"] = [answer]
            with self.assertRaises(error):
                chargpt.load_text("text8")
            self.assertEqual(list(self.folder.iterdir()), [])
        self.files["/text8.zip"] = [good]
        self.assertEqual(len(chargpt.load_text("text8")[1]), 31 * 50)


class CharDataset(Folder):
    def test_encoding_in_blocks(self):
        text = "aé世🤗 \n" * 400_000 # more than one block, characters of every width
        (self.folder / "in.txt").write_text(text, encoding="utf-8")
        chars, codes = chargpt.load_text(str(self.folder / "in.txt"))
        self.assertEqual(chars, "\n aé世🤗")
        self.assertEqual(codes.dtype, np.uint8)
        self.assertEqual("".join(chars[code] for code in codes[-12:]), text[-12:])
        self.assertEqual(len(codes), len(text))


if __name__ == "__main__":
    unittest.main()
