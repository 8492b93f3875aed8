"""
Models and vocabularies in and out: folders of every form, good and bad, and a hub on this machine.

    python -m unittest tests/test_pretrained.py
"""

import functools
import hashlib
import http.server
import json
import os
import pickle
import re
import sys
import threading
import unittest
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn

from common import Folder, get_encoder, run_python, tiny_gpt, vocabulary_folder
from mingpt.bpe import Encoder, bytes_to_unicode
from mingpt.model import GPT, Block
from mingpt.pretrained import load_encoder, save_encoder
from numpy_gpt import compute_logits, openai_layout

WTE = "transformer.wte.weight"
FORMS = ("safetensors", "sharded safetensors", "bin", "sharded bin", "base", "old")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def hub_weights(model: GPT) -> dict:
    """The weights of a model as GPT2LMHeadModel names and stores them, without a tied head."""
    arrays = openai_layout(model)
    if model.is_tied:
        del arrays["lm_head.weight"]
    return {name if name.startswith("lm_head") else f"transformer.{name}":
            torch.tensor(array, dtype=torch.float32).contiguous() for name, array in arrays.items()}


def write_folder(folder: Path, model: GPT, form: str = "bin", **changes) -> None:
    """Writes a folder of the GPT-2 type in a form that is found on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    c = model.config
    write_json(folder / "config.json", dict(
        model_type="gpt2", vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer,
        n_head=c.n_head, n_embd=c.n_embd, tie_word_embeddings=model.is_tied) | changes)
    weights = hub_weights(model)
    kind = "safetensors" if "safetensors" in form else "bin"
    save = save_file if kind == "safetensors" else torch.save
    name = "model" if kind == "safetensors" else "pytorch_model"
    if form.startswith("sharded"):
        index = {}
        for i in range(3):
            file = f"{name}-{i + 1:05d}-of-00003.{kind}"
            part = dict(list(weights.items())[i::3])
            index |= dict.fromkeys(part, file)
            save(part, folder / file)
        write_json(folder / f"{name}.{kind}.index.json", {"weight_map": index})
        return
    if form == "base":
        # GPT2Model has no head, and OpenAI's names no prefix.
        weights = {key.removeprefix("transformer."): w for key, w in weights.items()}
    if form == "old":
        # In the format before zip, with the masks that old transformers stored.
        for layer in range(c.n_layer):
            weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).bool()
            weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        save = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    save(weights, folder / f"{name}.{kind}")


class Seeded(Folder):
    def setUp(self):
        super().setUp()
        torch.manual_seed(1)


class Loading(Seeded):
    def load(self, cls=GPT, name="") -> GPT:
        return cls.from_pretrained(self.folder / name)

    def check(self, model: GPT, loaded: GPT) -> None:
        """The logits are those of GPT-2's formula in NumPy."""
        idx = torch.randint(11, (8,))
        expected = torch.tensor(compute_logits(openai_layout(model), idx, model.config.n_head))
        with torch.no_grad():
            logits = loaded(idx[None])[0][0].double()
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        self.assertFalse(loaded.training)

    def test_every_form_of_weights(self):
        for form in FORMS:
            for tied in (True, False):
                with self.subTest(form, tied=tied):
                    model = tiny_gpt(tie_weights=tied)
                    write_folder(self.folder / form / str(tied), model, form)
                    loaded = self.load(name=f"{form}/{tied}")
                    self.check(model, loaded)
                    self.assertEqual(loaded.is_tied, tied)

    def test_the_head_decides_whether_the_model_is_tied(self):
        model = tiny_gpt(tie_weights=True)
        own = tiny_gpt()
        # What config.json says, the model whose weights are stored, whether it is tied then.
        for said, stored, tied in ((True, own, False), (False, own, False), (False, model, True)):
            write_folder(self.folder, stored, tie_word_embeddings=said)
            with self.subTest(said=said, tied=tied), self.assertLogs("mingpt") as log:
                loaded = self.load()
            self.check(stored, loaded)
            self.assertEqual((loaded.is_tied, loaded.config.tie_weights), (tied, tied))
            self.assertEqual("head of their own" in str(log.output), said and not tied)
        # A stored head that equals the embedding stays tied.
        weights = hub_weights(model)
        write_folder(self.folder, model)
        weights["lm_head.weight"] = weights[WTE].clone()
        torch.save(weights, self.folder / "pytorch_model.bin")
        self.assertTrue(self.load().is_tied)

    def test_activations(self):
        model = tiny_gpt()
        for name, exact in (("gelu_new", False), ("gelu_pytorch_tanh", False), ("gelu_fast", False),
                            ("gelu", True)):
            write_folder(self.folder, model, activation_function=name)
            loaded = self.load()
            self.assertEqual([type(block.mlp.act) is nn.GELU for block in loaded.transformer.h],
                             [exact, exact])
            if not exact:
                self.check(model, loaded)

    def test_a_subclass(self):
        class Sub(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.register_buffer("places", torch.arange(3), persistent=False)
        write_folder(self.folder, tiny_gpt())
        loaded = self.load(Sub)
        self.assertIs(type(loaded), Sub)
        self.assertEqual(loaded.places.tolist(), [0, 1, 2])

    def test_it_is_trained_without_a_change_to_its_file(self):
        write_folder(self.folder, tiny_gpt(tie_weights=True))
        before = (self.folder / "pytorch_model.bin").read_bytes()
        state = torch.get_rng_state()
        model = self.load().train()
        # No fresh weights were drawn, so the caller's seed counts.
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        idx = torch.randint(11, (4, 8))
        losses = []
        for _ in range(5):
            loss = model(idx, idx)[1]
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.assertLess(losses[-1], losses[0])
        self.assertTrue(model.is_tied)
        self.assertEqual((self.folder / "pytorch_model.bin").read_bytes(), before)

    def test_precision_and_end_token_are_kept(self):
        for eos in (7, None):
            write_folder(self.folder, tiny_gpt(), eos_token_id=eos)
            model = self.load().half()
            model.save_pretrained(self.folder)
            again = self.load()
            self.assertEqual(again.lm_head.weight.dtype, torch.float16)
            self.assertEqual(again.config.eos_token_id, eos)
            self.assertEqual(read_json(self.folder / "config.json")["eos_token_id"], eos)

    def test_safetensors_are_preferred_and_home_is_known(self):
        write_folder(self.folder, tiny_gpt(), "safetensors")
        (self.folder / "pytorch_model.bin").write_bytes(b"not read")
        with mock.patch.dict(os.environ, HOME=str(self.folder), USERPROFILE=str(self.folder)):
            self.assertEqual(GPT.from_pretrained("~/").config.vocab_size, 11)

    @unittest.skipUnless(sys.platform == "linux", "resource counts in other units elsewhere")
    def test_it_is_quick_and_takes_little_memory(self):
        model = tiny_gpt(n_layer=8, n_embd=512, n_head=8, vocab_size=8000, tie_weights=True)
        size = sum(p.numel() for p in model.parameters()) * 4
        script = """
import resource, sys
import mingpt.bpe, mingpt.model
heavy = ("transformers", "safetensors", "huggingface_hub", "sympy", "torch._dynamo")
print(*[name for name in heavy if name in sys.modules])
import safetensors.torch, torch
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
for folder in sys.argv[1:]:
    before = peak()
    model = mingpt.model.GPT.from_pretrained(folder)
    loaded = peak() - before
    total = sum(parameter.sum() for parameter in model.parameters())
    print(loaded, peak() - before, *[name for name in heavy if name in sys.modules])
"""
        for form in ("safetensors", "bin"):
            write_folder(self.folder / form, model, form)
        result = run_python("-c", script, self.folder / "safetensors", self.folder / "bin")
        lines = [line for line in result.stdout.splitlines() if "parameters" not in line]
        self.assertEqual(lines[0], "")
        for line in lines[1:]:
            loaded, used, *heavy = line.split()
            self.assertLess(int(loaded), 0.2 * size)
            self.assertLess(int(used), 1.2 * size)
            self.assertEqual(heavy, ["safetensors"])

    def test_packages_are_named_where_they_are_missing(self):
        install = "pip install huggingface_hub safetensors"
        write_folder(self.folder, tiny_gpt(), "safetensors")
        without = {"safetensors.torch": None, "huggingface_hub": None}
        with mock.patch.dict(sys.modules, without):
            with self.assertRaisesRegex(ImportError, "model.safetensors: " + install):
                self.load()
            with self.assertRaisesRegex(ImportError, "no folder 'owner/model'.*" + install):
                GPT.from_pretrained("owner/model")
            # To save takes neither.
            tiny_gpt().save_pretrained(self.folder)
            self.load()


class BadFolders(Seeded):
    """A folder that holds no model is refused in one line with the file and the fault."""

    def setUp(self):
        super().setUp()
        self.model = tiny_gpt(tie_weights=True)
        write_folder(self.folder, self.model)
        self.config = self.folder / "config.json"
        self.weights = self.folder / "pytorch_model.bin"
        self.good = read_json(self.config)

    def refused(self, pattern: str, error=ValueError) -> None:
        with self.assertRaisesRegex(error, pattern) as caught:
            GPT.from_pretrained(self.folder)
        shown = str(caught.exception)
        self.assertNotIn("\n", shown)
        # Torch's text advises to load the file without its guard.
        self.assertNotIn("weights_only", shown)

    def test_fields(self):
        nan = float("nan")
        sizes = ("n_head", "n_layer", "n_embd", "vocab_size", "n_positions")
        impossible = {size: [0, -2, "2", True, 8.5, None, [], {}, nan] for size in sizes}
        for share in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
            impossible[share] = [5, -0.1, nan, "0.1", None, True]
        impossible["n_head"].append(5)
        impossible["n_layer"] += [3, 20000, 10**30]
        impossible |= dict(
            activation_function=["relu", ["gelu"], None], add_cross_attention=[True],
            scale_attn_weights=[False], scale_attn_by_inverse_layer_idx=[True],
            layer_norm_epsilon=[1e-6], model_type=["bert", {}], tie_word_embeddings=["yes", None])
        for field, values in impossible.items():
            named = "block_size" if field == "n_positions" else field
            for value in values:
                write_json(self.config, self.good | {field: value})
                with self.subTest(field=field, value=value):
                    self.refused(rf"config\.json.*{named}")
        for field in sizes:
            write_json(self.config, {k: v for k, v in self.good.items() if k != field})
            self.refused(r"config\.json")
        for changes, named in ((dict(n_positions=9), "wpe.weight"), (dict(n_embd=48), "wte"),
                               (dict(n_embd=3 * 10**9), "make"), (dict(vocab_size=10**15), "make")):
            write_json(self.config, self.good | changes)
            self.refused(named)

    def test_config_json_is_none(self):
        deep = b'{"n_layer":' * 50_000 + b"1" + b"}" * 50_000
        long = b'{"n_layer": ' + b"9" * 5000 + b"}"
        for content in (b"", b"[]", b"null", b"{", b"\xff\xfe\xff", b'{"a": "\xe9"}', deep, long):
            self.config.write_bytes(content)
            with self.subTest(content[:20]):
                self.refused(r"config\.json holds no JSON object")

    def test_tensors(self):
        state = hub_weights(self.model)
        layer = "transformer.h.1.mlp.c_fc.weight"
        cases = [(content, "pytorch_model.bin") for content in ([1, 2], None, 3, [("a", 1)])]
        cases += [
            ({}, "n_layer"),
            ({"model": state}, "dict as 'model'"),
            (state | {0: torch.ones(2)}, "as 0"),
            (state | {WTE: None}, "NoneType as .*wte"),
            (state | {WTE: state[WTE][None]}, WTE),
            (state | {layer: state[layer][None]}, layer),
            (state | {layer: state[layer].int()}, layer),
            (state | {"transformer.other": torch.ones(2)}, "transformer.other"),
            (state | {"wte.weight": state[WTE]}, '"wte.weight"'),
            ({key: value for key, value in state.items() if key != layer}, layer),
            ({key: value for key, value in state.items() if key != WTE}, WTE),
        ]
        for content, named in cases:
            with self.subTest(named):
                torch.save(content, self.weights)
                self.refused(named)

    def test_files_that_hold_no_weights(self):
        good = self.weights.read_bytes()
        for name in ("pytorch_model.bin", "model.safetensors"):
            for content in (b"", b"<html>", good[:100], b"\xff" * 1000, good[:-100],
                            b"PK\x03\x04" + b"\0" * 100):
                (self.folder / name).write_bytes(content)
                with self.subTest(name, content=content[:10]):
                    self.refused(f"{name} cannot be read as weights")

    def test_a_malicious_pickle_is_refused(self):
        folder = self.folder

        class Malicious:
            def __reduce__(self):
                return os.system, (f"touch {folder}/owned",)

        for zipped in (True, False):
            torch.save({"wte": Malicious()}, self.weights, _use_new_zipfile_serialization=zipped)
            self.refused("cannot be read as weights")
        self.weights.write_bytes(pickle.dumps(Malicious(), protocol=2))
        self.refused("cannot be read as weights")
        self.assertFalse((folder / "owned").exists())

    def test_an_index_names_files_of_its_folder_only(self):
        self.weights.unlink()
        index = self.folder / "pytorch_model.bin.index.json"
        maps = [None, ["a.bin"], {"wte.weight": 3}]
        maps += [{"wte.weight": file} for file in ("../other.bin", "/etc/passwd", "a/b.bin", ".")]
        for content in ({}, [], *({"weight_map": weight_map} for weight_map in maps)):
            write_json(index, content)
            with self.subTest(content):
                self.refused(r"pytorch_model\.bin\.index\.json")
        for file in ("pytorch_model-00001-of-00001.bin", "..", ""):
            write_json(index, {"weight_map": {"wte.weight": file}})
            self.refused("cannot be read as weights")

    def test_missing_files(self):
        self.weights.unlink()
        self.refused("no weights in .*model.safetensors", FileNotFoundError)
        self.config.unlink()
        self.refused("config.json", FileNotFoundError)

    def test_names_that_are_no_folder_and_cannot_leave_the_cache(self):
        for name in ("", "nothing", "./out", "../model", "~/nowhere/x", "/nowhere/model", "a/b/c",
                     "out\\model", "a/..", "../x/..", "owner/.git", "owner/model\n", "out/",
                     "a\0/b", "x" * 5000, str(self.config)):
            with self.subTest(name), mock.patch("huggingface_hub.snapshot_download") as fetch:
                for load in (GPT.from_pretrained, lambda name: load_encoder(name, 50257)):
                    with self.assertRaisesRegex(FileNotFoundError, "there is no folder"):
                        load(name)
                fetch.assert_not_called()


class Saving(Seeded):
    def save(self, model: GPT, form: str = "safetensors") -> tuple[GPT, dict]:
        """Saves a model and returns what is read back, and config.json."""
        without = {"safetensors.torch": None} if form == "bin" else {}
        with mock.patch.dict(sys.modules, without):
            model.save_pretrained(self.folder)
        return GPT.from_pretrained(self.folder), read_json(self.folder / "config.json")

    def test_the_same_model_comes_back(self):
        class Sub(GPT):
            pass
        exact = tiny_gpt()
        for block in exact.transformer.h:
            block.mlp.act = nn.GELU()
        untied = tiny_gpt(tie_weights=True)
        untied.lm_head.weight = nn.Parameter(untied.transformer.wte.weight.detach() * 2)
        # Two parameters on the same memory are not one parameter.
        shared = tiny_gpt()
        shared.lm_head.weight = nn.Parameter(shared.transformer.wte.weight.detach())
        looked_at = tiny_gpt()
        looked_at.transformer.h[0].attn.bias
        twice = tiny_gpt()
        twice.transformer.h[1] = twice.transformer.h[0]
        models = [tiny_gpt(), tiny_gpt(tie_weights=True), tiny_gpt(n_layer=3, resid_pdrop=0.0),
                  Sub(tiny_gpt().config).eval(), exact, untied, shared, looked_at, twice]
        idx = torch.randint(11, (2, 8))
        for model in models:
            for form in ("safetensors", "bin"):
                loaded, config = self.save(model, form)
                with torch.no_grad():
                    torch.testing.assert_close(loaded(idx)[0], model(idx)[0])
                self.assertEqual(loaded.is_tied, model.is_tied)
                self.assertEqual(config["tie_word_embeddings"], model.is_tied)
                self.assertEqual(config["activation_function"],
                                 "gelu" if model is exact else "gelu_new")
                self.assertEqual(loaded.config.resid_pdrop, model.config.resid_pdrop)
        for name, tensor in self.save(tiny_gpt().bfloat16())[0].state_dict().items():
            self.assertEqual(tensor.dtype, torch.bfloat16, name)

    def test_a_part_that_gpt2_lacks_is_refused_by_name(self):
        # The name in the message, and the part that is set: module, name, new part.
        changes = (
            ("transformer.h.1.mlp.act", "transformer.h.1.mlp", "act", nn.SiLU()),
            ("transformer.h.1.mlp.act", "transformer.h.1.mlp", "act", nn.GELU()),
            ("transformer.h.0.ln_1", "transformer.h.0", "ln_1", nn.RMSNorm(16)),
            ("transformer.ln_f.eps", "transformer.ln_f", "eps", 1e-6),
            ("lm_head.bias", "", "lm_head", nn.Linear(16, 11)),
            ("lm_head.weight", "", "lm_head", nn.Linear(16, 12, bias=False)),
            ("extra", "", "extra", nn.Linear(2, 2)),
            ("scale", "", "scale", nn.Parameter(torch.ones(1))),
            ("transformer.h.0.mlp", "transformer.h.0", "mlp",
             nn.Sequential(nn.Linear(16, 16), nn.Tanh())),
            ("transformer.h.0.attn.mask", "transformer.h.0.attn", "bias", torch.ones(1, 1, 8, 8)),
            ("transformer.h.2", "transformer.h", "2", Block(tiny_gpt().config)),
            ("transformer.h.1.mlpf", "transformer.h.1", "mlpf", lambda x: x),
            ("transformer.h.0.ln_1.forward", "transformer.h.0.ln_1", "forward", lambda x: x),
            ("transformer.h.0.attn.n_head", "transformer.h.0.attn", "n_head", 1),
        )
        for named, module, name, part in changes:
            model = tiny_gpt()
            setattr(model.get_submodule(module), name, part)
            with self.subTest(named), self.assertRaisesRegex(ValueError, f"model: {named}.* is not"):
                model.save_pretrained(self.folder)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_in_place_of_an_earlier_model(self):
        others = {"tokenizer.json", "model-notes.txt", "my_model.safetensors"}
        for form in FORMS[:4]:
            for name in ("model.safetensors", "pytorch_model.bin"):
                with self.subTest(form, name=name):
                    write_folder(self.folder, tiny_gpt(n_layer=3), form)
                    for other in (*others, "generation_config.json"):
                        (self.folder / other).write_text("stays")
                    self.save(tiny_gpt(), Path(name).suffix[1:])
                    files = {path.name for path in self.folder.iterdir()}
                    self.assertEqual(files, {"config.json", name, *others})

    def test_a_save_that_fails_changes_nothing(self):
        write_folder(self.folder, tiny_gpt(), "sharded bin")
        before = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        full = mock.patch("safetensors.torch.save_file", side_effect=OSError("no space left"))
        with full, self.assertRaises(OSError):
            tiny_gpt().save_pretrained(self.folder)
        after = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.assertEqual(after, before)

    def test_the_end_token_is_gpt2s_only_with_its_vocabulary(self):
        for vocab_size, eos in ((50257, 50256), (60000, None), (11, None)):
            config = self.save(tiny_gpt(vocab_size=vocab_size, n_embd=2, n_layer=1))[1]
            self.assertEqual((config["eos_token_id"], config["bos_token_id"]), (eos, eos))


GERMAN = "Größe und Gewicht: schöne Grüße aus Köln, und 42 weiße Füße.\n" * 5
KOREAN = "안녕하세요 세계, 이것은 한국어 문장입니다.\n" * 5
SAMPLE = ("Grüße<|endoftext|> aus <user>Köln: 한국어! <user><sep> it's 2022,\n\n  naïve 世界 🤗<sep>.")


def byte_encoder(special_tokens: dict | None = None) -> Encoder:
    """A vocabulary of the 256 bytes, two merges and <|endoftext|>."""
    merges = [("l", "i"), ("li", "n")]
    tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    return Encoder({token: i for i, token in enumerate(tokens)}, merges, special_tokens)


class Vocabularies(Seeded):
    def setUp(self):
        super().setUp()
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())))

    def test_transformers_reads_and_writes_the_same(self):
        """The one test with transformers: models and tokenizers, there and back."""
        import transformers
        from tokenizers import ByteLevelBPETokenizer
        from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

        for tied, activation in ((True, "gelu_new"), (False, "gelu")):
            config = GPT2Config(vocab_size=61, n_positions=20, n_embd=24, n_layer=2, n_head=3,
                                tie_word_embeddings=tied, activation_function=activation,
                                bos_token_id=None, eos_token_id=None, initializer_range=0.2)
            theirs = GPT2LMHeadModel(config).eval()
            theirs.save_pretrained(self.folder)
            ours = GPT.from_pretrained(self.folder)
            ours.save_pretrained(self.folder)
            again = GPT2LMHeadModel.from_pretrained(self.folder).eval()
            idx = torch.randint(61, (2, 20))
            with torch.no_grad():
                expected = theirs(idx).logits
                torch.testing.assert_close(ours(idx)[0], expected, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(again(idx).logits, expected)
            self.assertEqual(ours.is_tied, tied)

        plain = get_encoder()
        save_encoder(plain, self.folder / "gpt2")
        small = ByteLevelBPETokenizer()
        small.train_from_iterator([GERMAN, KOREAN], vocab_size=340, min_frequency=1,
                                  special_tokens=["<|endoftext|>", "<pad>"])
        (self.folder / "small").mkdir()
        small.save_model(str(self.folder / "small"))
        write_json(self.folder / "small" / "added_tokens.json", {"<sep>": 340})
        for name, rows in (("gpt2", 50304), ("small", 384)):
            tokenizer = GPT2Tokenizer.from_pretrained(self.folder / name)
            tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
            tokenizer.add_tokens(["Köln"])
            # Transformers 5 writes tokenizer.json alone.
            tokenizer.save_pretrained(self.folder / f"{name} added")
            content = read_json(self.folder / f"{name} added" / "tokenizer.json")
            pairs = content["model"]["merges"]
            content["model"]["merges"] = [" ".join(pair) for pair in pairs]
            write_folder(self.folder / f"{name} old", tiny_gpt())
            write_json(self.folder / f"{name} old" / "tokenizer.json", content)
            first = load_encoder(self.folder / f"{name} added", rows)
            save_encoder(first, self.folder / f"{name} again")
            for kind in ("", " added", " old", " again"):
                folder = self.folder / f"{name}{kind}"
                write_json(folder / "config.json", {"model_type": "gpt2"})
                expected = AutoTokenizer.from_pretrained(folder)
                encoder = load_encoder(folder, rows)
                for text in (SAMPLE, GERMAN, KOREAN):
                    tokens = encoder.encode(text, encoder.special_tokens)
                    with self.subTest(name=name, kind=kind):
                        self.assertEqual(tokens, expected.encode(text))
                        self.assertEqual(encoder.decode(tokens), text)
                self.assertEqual("Köln" in encoder.special_tokens, kind != "")
        self.assertEqual(load_encoder(self.folder / "gpt2", 50257).encoder, plain.encoder)

    def test_a_saved_vocabulary_replaces_the_earlier_one(self):
        (self.folder / "tokenizer.json").write_text("of an earlier model")
        save_encoder(byte_encoder({"<user>": 259}), self.folder)
        encoder = load_encoder(self.folder, 260)
        self.assertEqual(encoder.encode("lin<user>", "<user>"), [257, 259])
        self.assertEqual(encoder.encode("<user>"), byte_encoder().encode("<user>"))
        self.assertEqual(encoder.decode([259, 258]), "<user><|endoftext|>")
        self.assertEqual(encoder.eot_token, 258)
        save_encoder(byte_encoder(), self.folder)
        self.assertEqual(list(load_encoder(self.folder, 259).special_tokens), ["<|endoftext|>"])

    def refused(self, pattern: str, rows: int = 300) -> None:
        with self.assertRaisesRegex(ValueError, pattern) as caught:
            load_encoder(self.folder, rows)
        self.assertNotIn("\n", str(caught.exception))

    def test_openais_vocabulary_is_for_models_of_its_size_without_another(self):
        self.assertEqual(load_encoder(self.folder, 50257).encoder, get_encoder().encoder)
        self.refused("no vocabulary of this model: put its tokenizer.json there", 50304)
        self.refused("put its tokenizer.json there", 257)
        for name in ("spiece.model", "vocab.txt", "tokenizer.model", "vocab.json", "merges.txt"):
            (self.folder / name).write_text("of another kind")
            with self.subTest(name):
                self.refused("put its tokenizer.json there", 50257)
            (self.folder / name).unlink()

    def test_other_tokenizers_are_refused_in_one_line(self):
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
        good = {"normalizer": None, "pre_tokenizer": byte_level, "model": bpe}
        path = self.folder / "tokenizer.json"
        write_json(path, good)
        self.assertEqual(load_encoder(self.folder, 3).encode("abba"), [2, 1, 0])
        for part, changes, named in (
                ("normalizer", {"type": "NFC"}, "normalizer of tokenizer.json has type = 'NFC'"),
                ("pre_tokenizer", None, "pre_tokenizer of tokenizer.json has type = None"),
                ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer of tokenizer.json has type = 'Metaspace'"),
                ("pre_tokenizer", {"add_prefix_space": True}, "add_prefix_space = True"),
                ("pre_tokenizer", {"use_regex": False}, "use_regex = False"),
                ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "'Sequence'"),
                ("model", {"type": "Unigram"}, "model of tokenizer.json has type = 'Unigram'"),
                ("model", {"byte_fallback": True}, "byte_fallback = True"),
                ("model", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix = '</w>'"),
                ("model", {"vocab": {"a": 3}}, "'a' has the number 3, but the model has 3 rows"),
                ("model", {"vocab": {"a": -1}}, "the number -1"),
                ("model", {"vocab": {"a": "x"}}, "the number 'x'"),
                ("model", {"vocab": ["a"]}, "holds no vocabulary"),
                ("model", {"vocab": None}, "holds no vocabulary"),
                ("model", {"merges": [["a", "b", "c"]]}, "holds no vocabulary"),
                ("model", {"merges": ["a"]}, "holds no vocabulary"),
                ("model", {"merges": 3}, "holds no vocabulary"),
                ("model", [1], "holds no vocabulary"),
                ("added_tokens", [{"id": 3, "content": "<x>"}], "'<x>' has the number 3"),
                ("added_tokens", [{"id": 1}], "holds no vocabulary"),
                ("added_tokens", [{"id": 1, "content": ""}], "a token without text"),
                ("added_tokens", {"<x>": 1}, "holds no vocabulary")):
            changed = changes
            if isinstance(changes, dict) and part != "added_tokens":
                changed = (good[part] or {}) | changes
            write_json(path, good | {part: changed})
            with self.subTest(part=part, changes=changes):
                self.refused(re.escape(named), 3)
        for content in (b"", b"[]", b"{", b"\xff"):
            path.write_bytes(content)
            self.refused("tokenizer.json holds no JSON object")

    def test_broken_vocabulary_files(self):
        save_encoder(byte_encoder(), self.folder)
        self.refused("'<|endoftext|>' has the number 258, but the model has 258 rows", 258)
        for content in ("", "#version: 0.2\na b c\n", "#version: 0.2\na"):
            (self.folder / "merges.txt").write_text(content)
            self.refused("holds no vocabulary of this model")
        (self.folder / "merges.txt").write_text("#version: 0.2\n")
        for content in ("", "[]", "{1"):
            (self.folder / "vocab.json").write_text(content)
            self.refused("vocab.json.* holds no JSON object")


class Hub(Seeded):
    """Repositories of a hub on this machine, fetched by huggingface_hub."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def setUp(self):
        super().setUp()
        self.files = {}
        self.fetched = []
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                status, body, headers = test.answer(self.path)
                if self.command == "GET" and "/resolve/" in self.path and status == 200:
                    test.fetched.append(self.path.rpartition("/")[2])
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        for end in (thread.join, server.server_close, server.shutdown):
            self.addCleanup(end)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        self.patch(mock.patch.dict(os.environ, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1"))
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
        disable_progress_bars()
        self.addCleanup(enable_progress_bars)

    def answer(self, path: str) -> tuple[int, bytes, dict]:
        """What the real hub answers to huggingface_hub: (status, body, headers)."""
        path = path.partition("?")[0]
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        file = path.rpartition("/")[2]
        if name not in self.files:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        files = self.files[name]
        sums = {file: hashlib.sha1(body).hexdigest() for file, body in files.items()}
        if path.startswith("/api/"):
            siblings = [dict(rfilename=file) for file in files]
            content = dict(id=name, sha=self.COMMIT, siblings=siblings)
            if "/tree/" in path:
                content = [dict(type="file", path=file, size=len(body), oid=sums[file])
                           for file, body in files.items()]
            return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}
        if name == "owner/gated":
            return 403, b"", {"X-Error-Code": "GatedRepo", "X-Repo-Commit": self.COMMIT}
        if file not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.COMMIT}
        return 200, files[file], {"ETag": f'"{sums[file]}"', "X-Repo-Commit": self.COMMIT}

    def publish(self, name: str, *forms: str) -> GPT:
        """Puts a model on the hub, in one form or in several, and beside it other files."""
        model = tiny_gpt(vocab_size=259)
        for form in forms:
            write_folder(self.folder / name, model, form)
        save_encoder(byte_encoder(), self.folder / name)
        files = {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}
        self.files[name] = files | {"tf_model.h5": b"large", "README.md": b"#"}
        return model

    def fetch(self, name: str, endpoint: str = "") -> tuple[GPT, Encoder]:
        from huggingface_hub import snapshot_download
        here = functools.partial(snapshot_download, endpoint=endpoint or self.endpoint,
                                 cache_dir=self.folder / "cache")
        with mock.patch("huggingface_hub.snapshot_download", here):
            model = GPT.from_pretrained(name)
            return model, load_encoder(name, model.config.vocab_size)

    def test_repositories(self):
        forms = {"owner/both": ("safetensors", "bin"), "owner/bin": ("bin",),
                 "owner/parts": ("sharded safetensors",), "owner/bin-parts": ("sharded bin",),
                 "openai-community/gpt2": ("old", "safetensors")}
        vocabulary = ["vocab.json", "merges.txt"]
        for name, kinds in forms.items():
            model = self.publish(name, *kinds)
            self.fetched.clear()
            with self.subTest(name):
                loaded, encoder = self.fetch(name.removeprefix("openai-community/"))
                self.assertTrue(torch.equal(loaded.lm_head.weight, model.lm_head.weight))
                self.assertEqual(encoder.encode("line"), byte_encoder().encode("line"))
                # Each file once, and one form of weights.
                begin = "pytorch_model" if "bin" in name else "model"
                weights = [file for file in self.files[name] if file.startswith(begin)]
                self.assertEqual(sorted(self.fetched),
                                 sorted(["config.json", *vocabulary, *weights]))
        # What is here already needs no network.
        self.fetched.clear()
        for name in forms:
            self.fetch(name, "http://127.0.0.1:1")
        self.assertEqual(self.fetched, [])

    def test_errors(self):
        self.publish("owner/gated", "bin")
        for name, error in (("owner/nothing", "RepositoryNotFoundError"),
                            ("owner/gated", "GatedRepoError"), ("owner/a..b", "HFValidationError")):
            pattern = f"there is no folder '{name}', and the hub does not give it: {error}"
            with self.subTest(name), self.assertRaisesRegex(OSError, pattern):
                self.fetch(name)
        with self.assertRaisesRegex(OSError, "LocalEntryNotFoundError"):
            self.fetch("owner/nothing", "http://127.0.0.1:1")

    @unittest.skipUnless(os.environ.get("MINGPT_TEST_HUB"), "MINGPT_TEST_HUB=1 fetches gpt2")
    def test_the_real_gpt2(self):
        idx = torch.tensor([get_encoder().encode("The dog")])
        # Transformers tests itself by the same continuation.
        expected = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688,
                    27262, 13, 198, 198, 464, 3290]
        self.assertEqual(GPT.from_pretrained("gpt2").generate(idx, 18)[0].tolist(), expected)


if __name__ == "__main__":
    unittest.main()
