"""
The scripts of the projects, as a user runs them: help, a mistake, a run at toy size, a real start.

    python -m unittest tests.test_projects

The computations of a project are tested in its own file.
"""

import concurrent.futures
import importlib.util
import io
import os
import sys
from unittest import mock

from common import ROOT, WorkingFolder, run_here, run_python, vocabulary_folder

PROJECTS = ROOT / "projects"
# All that a user starts with arguments.
SCRIPTS = [path.relative_to(PROJECTS).as_posix() for path in sorted(PROJECTS.rglob("*.py"))
           if "run_script(main)" in path.read_text(encoding="utf-8")]

STEPS = "--trainer.max_iters=2 --trainer.batch_size=2"
TINY = f"--model.n_layer=1 --model.n_head=1 --model.n_embd=8 {STEPS}"
TINY_ADDER = f"--data.ndigit=1 --model.model_type=gpt {TINY}"
TEXT = "--data.path=in.txt --data.block_size=8"
# A script, its settings, and a text that it prints. Later runs find the files
# of earlier ones.
RUNS = [
    ("adder/adder.py", TINY_ADDER, "test: [0-9]+ of 20 sums exact"),
    ("adder/inside.py", "", "the vector of s1 carries after block 0"),
    ("plot.py", "out/adder/metrics.jsonl rows.jsonl", "metrics.png"),
    ("reinforce/reinforce.py", f"{TINY_ADDER} --system.start=0 --trainer.log_interval=1",
     "step      2  held out .*; by carries"),
    ("reinforce/reinforce.py", f"{TINY_ADDER} --system.start=0 --system.rewards=False",
     "the model is in ./out/reinforce"),
    ("chargpt/chargpt.py", f"{TEXT} {TINY}", "bits per byte"),
    ("chargpt/chargpt.py", "--system.mode=sample --system.length=5 --system.prompt=two",
     "^two.{5}\n$"),
    ("finetune/finetune.py", f"{TEXT} {STEPS} --model.model_type=gpt-nano --system.length=5",
     "the model is in out/finetune/model"),
    ("finetune/finetune.py", "--system.mode=sample --system.length=5 --system.prompt=two", "^two"),
    ("chat/chat.py", f"--train=dialogs.txt --held_out=1 --gpt.n_layer=1 {STEPS}",
     "[01] of 1 held-out questions answered right"),
    ("chat/chat.py", "--model=out/chat/model --max_new_tokens=5", "^you: ping\nbot: "),
    ("ladder/ladder.py", f"--data.path=in.txt --model.block_size=8 --system.seconds=0.001 {TINY}",
     r"\| ModernGPT without Muon \|"),
    ("ladder/report.py", "", "the picture is out/ladder/ladder.png"),
    ("pixels/pixels.py", TINY, "the pictures are in ./out/pixels"),
    ("finetune/austen/novels.py", "in.txt novels.txt", "1 chapters"),
    ("bpe/train_bpe.py", "--data.path=in.txt --data.vocab_size=260", "characters.png are in"),
]
# A script, its settings, and words of the error.
MISTAKES = [
    ("plot.py", "nothing.jsonl", "nothing.jsonl"),
    ("adder/adder.py", "--data.ndigit=10", "got --data.ndigit=10, expected 1 to 9"),
    ("adder/inside.py", "nothing", "there is no checkpoint at nothing"),
    ("bench/bench.py", "nothing", "nothing"),
    ("bpe/train_bpe.py", "--data.vocab_size=256", "expected 257 or more"),
    ("chargpt/chargpt.py", "--data.path=Text8", "did you mean text8"),
    ("chargpt/chargpt.py", "--data.path=in.txt --system.prompt=xyz", "the prompt has 'x', 'y'"),
    ("chargpt/chargpt.py", "--system.mode=sample", "there is no model in ./out/chargpt; train"),
    ("chat/chat.py", "--model=/nothing", "there is no folder '/nothing'"),
    ("finetune/finetune.py", "", "expected the name of a text file"),
    ("finetune/finetune.py", "--data.path=same.txt --model.model_type=gpt-nano",
     "same.txt has 99 characters, expected about .* or more"),
    ("finetune/finetune.py", "--system.mode=sample", "there is no model in out/finetune/model"),
    ("finetune/austen/novels.py", "nothing.txt novels.txt", "nothing.txt"),
    ("ladder/ladder.py", "--system.rungs=legs", "got rungs='legs', expected some of .*four heads"),
    ("ladder/report.py", "nothing", "there are no results in nothing"),
    ("pixels/pixels.py", "--no.such=1", "there is no setting --no.such"),
    ("reinforce/reinforce.py", "--trainer.samples=x", "takes a value of type int"),
]


def load(name: str):
    """Imports a script by its path in projects/, with the files beside it to be imported."""
    path = PROJECTS / name
    spec = importlib.util.spec_from_file_location(f"projects_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


class Projects(WorkingFolder):
    def setUp(self):
        super().setUp()
        environment = dict(MINGPT_TRACEBACK="", MINGPT_CACHE=str(vocabulary_folder()))
        self.patch(mock.patch.dict(os.environ, environment))
        (self.folder / "in.txt").write_text("one two three\n" * 400, encoding="utf-8")
        (self.folder / "same.txt").write_text("a" * 99, encoding="utf-8")
        # A callback may add rows of its own, without a learning rate.
        row = '{"iteration": 1, "split": "train", "loss": 2.5}\n'
        (self.folder / "rows.jsonl").write_text(row, encoding="utf-8")
        (self.folder / "dialogs.txt").write_text("ping\npong\n\n" * 3, encoding="utf-8")

    def test_each_says_how_it_is_run_and_help_names_every_setting(self):
        for name in SCRIPTS:
            with self.subTest(name):
                module = load(name)
                self.assertIn(f"    python projects/{name}", module.__doc__)
                status, printed, errors = run_here(module.main, "--help")
                self.assertEqual((status, errors), (0, ""))
                if hasattr(module, "get_config"):
                    for field in module.get_config().fields():
                        self.assertIn(f"  --{field}=", printed)

    def test_a_mistake_is_one_line_and_nothing_is_begun(self):
        before = sorted(self.folder.iterdir())
        for name, settings, message in MISTAKES:
            with self.subTest(name, settings=settings):
                status, printed, errors = run_here(load(name).main, *settings.split())
                self.assertEqual((status, errors.count("\n")), (2, 1), printed + errors)
                self.assertRegex(errors, f"^error: .*{message}")
                self.assertEqual(sorted(self.folder.iterdir()), before)

    def test_a_run_at_toy_size_ends_well(self):
        for name, settings, expected in RUNS:
            stdin = mock.patch("sys.stdin", io.StringIO("ping\n"))
            with self.subTest(name, settings=settings), stdin:
                status, printed, errors = run_here(load(name).main, *settings.split())
                self.assertEqual((status, errors), (0, ""), printed)
                self.assertRegex(printed, expected)
        for path in ("adder/heads", "adder/metrics", "ladder/ladder", "pixels/samples",
                     "pixels/completions", "pixels/attention", "bpe/characters"):
            picture = (self.folder / "out" / f"{path}.png").read_bytes()
            self.assertTrue(picture.startswith(b"\x89PNG"))

    def test_every_script_is_in_both_tables(self):
        # The toy run of the bench is in its own file.
        self.assertEqual({name for name, *_ in RUNS} | {"bench/bench.py"}, set(SCRIPTS))
        self.assertEqual({name for name, *_ in MISTAKES}, set(SCRIPTS))

    def test_each_has_a_real_start_from_another_folder(self):
        def start(name):
            return run_python(PROJECTS / name, "--help", cwd=self.folder).stdout

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            for name, printed in zip(SCRIPTS, threads.map(start, SCRIPTS)):
                with self.subTest(name):
                    self.assertRegex(printed, "^usage: |^Settings, each with its default")

    def test_a_real_run_from_another_folder(self):
        script = PROJECTS / "adder" / "adder.py"
        result = run_python(script, *TINY_ADDER.split(), cwd=self.folder)
        log = (self.folder / "out" / "adder" / "log.txt").read_text(encoding="utf-8")
        self.assertIn("step      2  loss", log)
        self.assertTrue(result.stdout.endswith(log))
