"""The projects, run as a user runs them: as scripts, from any folder."""

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

from common import ROOT, Folder, Server, run_python, tiny_config

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
        self.assertIn("--trainer.max_iters=3000", self.run_script(ADDER, "--help").stdout)


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

    def test_two_processes(self):
        printed = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", CHARGPT, *self.TINY,
                             cwd=self.folder, OMP_NUM_THREADS="1").stdout
        self.assertEqual(printed.count("the model is in"), 1)


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
    def test_steps_are_those_of_torch(self):
        torch.manual_seed(1)
        ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((12, 8), (8, 12))]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        pair = (muon.Muon(ours, 0.1, 0.1), torch.optim.Muon(theirs, 0.1, 0.1, adjust_lr_fn="match_rms_adamw"))
        for _ in range(3):
            for p, q in zip(ours, theirs):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            for optimizer in pair:
                optimizer.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, atol=3e-3, rtol=0) # a step changes weights by some 0.02; theirs computes in bfloat16


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
        self.assertEqual({id(p) for p in other.param_groups[0]["params"]}, {id(p) for name, p in model.named_parameters() if name.endswith(
            ("c_attn.weight", "c_fc.weight", "c_proj.weight"))})
        self.assertEqual(sorted(id(p) for group in both.param_groups for p in group["params"]), sorted(map(id, model.parameters())))
        self.assertEqual([group["weight_decay"] for group in both.param_groups], [0.0, 0.1])
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
