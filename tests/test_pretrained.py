"""
Models and vocabularies in and out: folders of every form, good and bad, and a hub.

    python -m unittest tests/test_pretrained.py
"""

import fnmatch
import functools
import itertools
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
# Loaded now: torch would load it while sys.modules is patched, and lose it.
import torch._dynamo  # noqa: F401
from safetensors.torch import save_file
from torch import nn

from common import Folder, byte_encoder, get_encoder, oracle, tiny_gpt, vocabulary_folder
from mingpt.model import GPT, Block
from mingpt.pretrained import crop_model, load_encoder, save_encoder
from numpy_gpt import openai_layout

WTE = "transformer.wte.weight"
FORMS = ("safetensors", "sharded safetensors", "bin", "sharded bin", "base", "old")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def hub_weights(model: GPT) -> dict:
    """Returns a model's weights in GPT2LMHeadModel's names and form, without a tied head."""
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
    path = folder / ("model.safetensors" if "safetensors" in form else "pytorch_model.bin")
    save = save_file if path.suffix == ".safetensors" else torch.save
    if form.startswith("sharded"):
        index = {}
        for i in range(3):
            file = f"{path.stem}-{i + 1:05d}-of-00003{path.suffix}"
            part = dict(list(weights.items())[i::3])
            index |= dict.fromkeys(part, file)
            save(part, folder / file)
        write_json(folder / f"{path.name}.index.json", {"weight_map": index})
        return
    if form == "base":
        # GPT2Model has no head, and OpenAI's names no prefix.
        weights = {key.removeprefix("transformer."): w for key, w in weights.items()}
    if form == "old":
        # In the format before zip, with masks and the head, also a tied one.
        weights.setdefault("lm_head.weight", weights[WTE].clone())
        for mask in ("bias", "masked_bias"):
            weights[f"transformer.h.1.attn.{mask}"] = torch.ones(1, 1, 8, 8).bool()
        save = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    save(weights, path)


class Seeded(Folder):
    def setUp(self):
        super().setUp()
        torch.manual_seed(1)

    def refused(self, pattern: str, load=GPT.from_pretrained, error=ValueError) -> None:
        """Checks that a folder is refused in one line, which names the fault."""
        with self.subTest(pattern):
            with self.assertRaisesRegex(error, pattern) as caught:
                load(self.folder)
            self.assertNotIn("\n", str(caught.exception))
            # Torch's text advises to load a file without its guard.
            self.assertNotIn("weights_only", str(caught.exception))


class Loading(Seeded):
    def test_every_form_loads_and_the_head_decides_whether_the_model_is_tied(self):
        # config.json always says that it is, or once that it is not.
        cases = [*itertools.product(FORMS, (True, False), (True,)), ("bin", True, False)]
        idx = torch.randint(11, (1, 8))
        for form, tied, said in cases:
            with self.subTest(form, tied=tied, said=said):
                model = tiny_gpt(tie_weights=tied)
                folder = self.folder / f"{form} {tied}"
                write_folder(folder, model, form, tie_word_embeddings=said)
                loaded = GPT.from_pretrained(folder)
                logits = loaded(idx)[0].double()
                torch.testing.assert_close(logits, oracle(model, idx), atol=1e-5, rtol=1e-5)
                self.assertEqual((loaded.is_tied, loaded.config.tie_weights), (tied, tied))
                self.assertFalse(loaded.training)

    def test_a_subclass_keeps_what_it_makes_for_itself(self):
        class Sub(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.register_buffer("places", torch.arange(3), persistent=False)

        Sub(tiny_gpt().config).save_pretrained(self.folder)
        loaded = Sub.from_pretrained(self.folder)
        self.assertIs(type(loaded), Sub)
        self.assertEqual(loaded.places.tolist(), [0, 1, 2])

    def test_it_draws_no_fresh_weights(self):
        write_folder(self.folder, tiny_gpt())
        before = torch.get_rng_state()
        GPT.from_pretrained(self.folder)
        self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_safetensors_are_preferred_and_home_is_known(self):
        write_folder(self.folder, tiny_gpt(), "safetensors")
        (self.folder / "pytorch_model.bin").write_bytes(b"not read")
        with mock.patch.dict(os.environ, HOME=str(self.folder), USERPROFILE=str(self.folder)):
            self.assertEqual(GPT.from_pretrained("~/").config.vocab_size, 11)

    def test_a_package_that_is_missing_is_named(self):
        write_folder(self.folder, tiny_gpt(), "safetensors")
        with mock.patch.dict(sys.modules, {"safetensors.torch": None, "huggingface_hub": None}):
            for name in (self.folder, "owner/model"):
                with self.assertRaisesRegex(ImportError, "pip install huggingface_hub safetens"):
                    GPT.from_pretrained(name)


class BadFolders(Seeded):
    def setUp(self):
        super().setUp()
        self.model = tiny_gpt(tie_weights=True)
        write_folder(self.folder, self.model)
        self.config = self.folder / "config.json"
        self.good = read_json(self.config)
        self.weights = self.folder / "pytorch_model.bin"

    def test_a_field_that_no_model_has_is_named(self):
        sizes = ("n_head", "n_layer", "n_embd", "vocab_size", "n_positions")
        wrong = {size: [0, -2, "2", True, 8.5, None, [], float("nan")] for size in sizes}
        wrong["n_head"] += [5]
        wrong["n_layer"] += [3, 20000, 10**30]
        wrong |= dict(
            resid_pdrop=[5, float("nan"), "0.1"], activation_function=["relu", ["gelu"], None],
            add_cross_attention=[True], scale_attn_weights=[False], layer_norm_epsilon=[1e-6],
            scale_attn_by_inverse_layer_idx=[True], model_type=["bert", {}],
            tie_word_embeddings=["yes"])
        for field, values in wrong.items():
            named = "block_size" if field == "n_positions" else field
            for value in values:
                write_json(self.config, self.good | {field: value})
                with self.subTest(value=value):
                    self.refused(rf"config\.json.*{named}")

    def test_sizes_that_the_weights_do_not_have(self):
        for changes in (dict(n_positions=9), dict(n_embd=3 * 10**9), dict(vocab_size=10**15)):
            write_json(self.config, self.good | changes)
            self.refused(r"config\.json and the weights in .* do not make a model")

    def test_a_config_that_is_none(self):
        deep = b'{"n_layer":' * 50_000 + b"1" + b"}" * 50_000
        long = b'{"n_layer": ' + b"9" * 5000 + b"}"
        for content in (b"", b"[]", b"{", b"\xff\xfe\xff", b'{"a": "\xe9"}', deep, long):
            self.config.write_bytes(content)
            self.refused(r"config\.json holds no JSON object")

    def test_tensors_that_make_no_model(self):
        state = hub_weights(self.model)
        layer = "transformer.h.1.mlp.c_fc.weight"
        for content, named in (
            ([1, 2], "pytorch_model.bin"), ({}, "n_layer"), ({"model": state}, "dict as 'model'"),
            (state | {0: torch.ones(2)}, "as 0"), (state | {WTE: None}, "NoneType as .*wte"),
            (state | {WTE: state[WTE][None]}, WTE), (state | {layer: state[layer].int()}, layer),
            (state | {"transformer.other": torch.ones(2)}, "transformer.other"),
            ({key: value for key, value in state.items() if key != layer}, layer),
            ({key: value for key, value in state.items() if key != WTE}, WTE),
        ):
            torch.save(content, self.weights)
            self.refused(named)

    def test_a_file_that_holds_no_weights_runs_nothing(self):
        owned = str(self.folder / "owned")

        class Malicious:
            def __reduce__(self):
                return os.mkdir, (owned,)

        good = self.weights.read_bytes()
        pickled = pickle.dumps(Malicious(), protocol=2)
        torch.save(Malicious(), self.weights)
        contents = [b"", b"<html>", good[:100], good[:-100], pickled, self.weights.read_bytes()]
        names = ("pytorch_model.bin", "model.safetensors")
        for name, content in itertools.product(names, contents):
            (self.folder / name).write_bytes(content)
            self.refused(f"{name} cannot be read as weights")
        self.assertFalse(os.path.exists(owned))

    def test_an_index_names_files_of_its_folder_only(self):
        self.weights.unlink()
        self.refused("no weights in .*model.safetensors", error=FileNotFoundError)
        for content, named in (
            (None, "index.json"), (["a.bin"], "index.json"), ({WTE: 3}, "index.json"),
            ({WTE: "../other.bin"}, "index.json"), ({WTE: "/etc/passwd"}, "index.json"),
            ({WTE: "missing.bin"}, "missing.bin cannot be read"), ({WTE: ".."}, "cannot be read"),
        ):
            write_json(self.folder / "pytorch_model.bin.index.json", {"weight_map": content})
            self.refused(named)

    def test_a_name_that_is_no_folder_cannot_leave_the_cache(self):
        for name in ("", "nothing", "../no/model", "~/nowhere/x", "/nowhere/model", "a/b/c",
                     "no\\model", "a/..", "owner/.git", "owner/model\n", "a\0/b", "x" * 5000,
                     str(self.config)):
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
        untied = tiny_gpt(tie_weights=True)
        untied.lm_head.weight = nn.Parameter(untied.transformer.wte.weight.detach() * 2)
        # Two parameters on the same memory are not one parameter.
        shared = tiny_gpt()
        shared.lm_head.weight = nn.Parameter(shared.transformer.wte.weight.detach())
        # A part of torch's own, and a mask that somebody looked at.
        plain = tiny_gpt()
        plain.transformer.drop = nn.Dropout(0.1).eval()
        plain.transformer.h[0].attn.bias
        plain.transformer.h[1].mlp.dropout = nn.Identity()
        # Cut by hand, as nanoGPT cuts its model.
        cut = tiny_gpt(block_size=12)
        cut.config.block_size = 8
        cut.transformer.wpe.weight = nn.Parameter(cut.transformer.wpe.weight[:8])
        twice = tiny_gpt()
        twice.transformer.h[1] = twice.transformer.h[0]
        idx = torch.randint(11, (2, 8))
        for model in (tiny_gpt(tie_weights=True), tiny_gpt(n_layer=3, resid_pdrop=0.0),
                      tiny_gpt(n_layer=0), untied, shared, plain, cut, twice):
            for form in ("safetensors", "bin"):
                loaded, _ = self.save(model, form)
                torch.testing.assert_close(loaded(idx)[0], model(idx)[0])
                self.assertEqual(loaded.is_tied, model.is_tied)
                self.assertEqual(loaded.config.resid_pdrop, model.config.resid_pdrop)

    def test_a_cropped_model_holds_what_is_left_and_nothing_more(self):
        for tied in (True, False):
            model = tiny_gpt(tie_weights=tied).requires_grad_(False)
            logits = model(torch.arange(5)[None])[0]
            crop_model(model, 5, 9)
            torch.testing.assert_close(model(torch.arange(5)[None])[0], logits[..., :9])
            self.assertEqual(model.is_tied, tied)
            for name, weight in model.named_parameters():
                self.assertFalse(weight.requires_grad)
                self.assertEqual(weight.untyped_storage().nbytes(), weight.nbytes, name)
            self.assertEqual(self.save(model)[0].config.block_size, 5)

    def test_precision_and_end_token_are_kept(self):
        for eos in (7, None):
            write_folder(self.folder, tiny_gpt(), eos_token_id=eos)
            loaded, config = self.save(GPT.from_pretrained(self.folder).bfloat16())
            self.assertEqual(loaded.lm_head.weight.dtype, torch.bfloat16)
            self.assertEqual((loaded.config.eos_token_id, config["eos_token_id"]), (eos, eos))
        # GPT-2's end token goes with GPT-2's vocabulary only.
        for vocab_size, eos in ((50257, 50256), (60000, None)):
            config = self.save(tiny_gpt(vocab_size=vocab_size, n_embd=2, n_layer=1))[1]
            self.assertEqual((config["eos_token_id"], config["bos_token_id"]), (eos, eos))

    def test_a_part_that_gpt2_lacks_is_refused_by_name(self):
        class QuickGELU(nn.GELU):
            def forward(self, x):
                return x * torch.sigmoid(1.702 * x)

        class Twice(nn.Identity):
            def forward(self, x):
                return 2 * x

        for name, part in (
            ("transformer.h.0.mlp.act", QuickGELU()), ("transformer.h.0.mlp.dropout", Twice()),
            ("transformer.h.1.mlp.act", nn.GELU()), ("transformer.h.0.ln_1", nn.RMSNorm(16)),
            ("transformer.ln_f.eps", 1e-6), ("transformer.h.0.attn.n_head", 1),
            ("lm_head", nn.Linear(16, 11)), ("extra", nn.Linear(2, 2)),
            ("transformer.h.0.mlp", nn.Sequential(nn.Linear(16, 16))),
            ("transformer.h.2", Block(tiny_gpt().config)),
            ("transformer.h.1.mlpf", lambda x: x), ("features", lambda x: x),
            ("transformer.h.0.ln_1.forward", lambda x: x),
        ):
            model = tiny_gpt()
            module, _, field = name.rpartition(".")
            setattr(model.get_submodule(module), field, part)
            self.refused(f"this model: {name}.* is not GPT-2's", model.save_pretrained)
        ahead = tiny_gpt()
        ahead.transformer.h[0].attn.bias = torch.ones(1, 1, 8, 8)
        self.refused("this model: .*attn.mask is not GPT-2's", ahead.save_pretrained)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_an_earlier_model_is_replaced(self):
        others = {"tokenizer.json", "model-notes.txt", "my_model.safetensors"}
        for form, name in itertools.product(FORMS[:4], ("model.safetensors", "pytorch_model.bin")):
            with self.subTest(form, name=name):
                write_folder(self.folder, tiny_gpt(n_layer=3), form)
                for other in (*others, "generation_config.json"):
                    (self.folder / other).write_text("stays")
                self.save(tiny_gpt(), Path(name).suffix[1:])
                self.assertEqual(set(os.listdir(self.folder)), {"config.json", name, *others})
                modes = {(self.folder / file).stat().st_mode for file in ("config.json", name)}
                self.assertEqual(len(modes), 1)

    def test_a_save_that_fails_changes_nothing(self):
        write_folder(self.folder, tiny_gpt(), "sharded bin")
        before = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        full = mock.patch("safetensors.torch.save_file", side_effect=OSError("no space left"))
        with full, self.assertRaises(OSError):
            tiny_gpt().save_pretrained(self.folder)
        after = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.assertEqual(after, before)


SAMPLE = "Größe aus <user>Köln<|endoftext|>: 한국어! <user><sep> it's 2022,\n\n naïve 🤗<sep>."


class Transformers(Seeded):
    def setUp(self):
        super().setUp()
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def test_it_reads_and_writes_the_same_models(self):
        from transformers import GPT2Config, GPT2LMHeadModel
        for tied, activation in ((True, "gelu_new"), (False, "gelu")):
            config = GPT2Config(vocab_size=61, n_positions=20, n_embd=24, n_layer=2, n_head=3,
                                tie_word_embeddings=tied, activation_function=activation,
                                bos_token_id=None, eos_token_id=None, initializer_range=0.2)
            theirs = GPT2LMHeadModel(config).double().eval()
            theirs.save_pretrained(self.folder)
            ours = GPT.from_pretrained(self.folder)
            ours.save_pretrained(self.folder)
            again = GPT2LMHeadModel.from_pretrained(self.folder).eval()
            idx = torch.randint(61, (2, 20))
            expected = theirs(idx).logits
            torch.testing.assert_close(ours(idx)[0], expected, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(again(idx).logits, expected)
            self.assertEqual(ours.is_tied, tied)

    def test_it_reads_and_writes_the_same_vocabularies(self):
        from tokenizers import ByteLevelBPETokenizer
        from transformers import AutoTokenizer, GPT2Tokenizer
        theirs, added, ours = (self.folder / name for name in ("theirs", "added", "ours"))
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator([SAMPLE], vocab_size=300, min_frequency=1,
                                    special_tokens=["<|endoftext|>", "<pad>"])
        theirs.mkdir()
        trained.save_model(str(theirs))
        write_json(theirs / "added_tokens.json", {"<sep>": 300})
        tokenizer = GPT2Tokenizer.from_pretrained(theirs)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
        tokenizer.add_tokens(["Köln"])
        # Transformers 5 writes tokenizer.json alone.
        tokenizer.save_pretrained(added)
        save_encoder(load_encoder(added, 384), ours)
        for folder in (theirs, added, ours):
            write_json(folder / "config.json", {"model_type": "gpt2"})
            encoder = load_encoder(folder, 384)
            tokens = encoder.encode(SAMPLE, encoder.special_tokens)
            with self.subTest(folder.name):
                self.assertEqual(tokens, AutoTokenizer.from_pretrained(folder).encode(SAMPLE))
                self.assertEqual(encoder.decode(tokens), SAMPLE)


class Vocabularies(Seeded):
    def setUp(self):
        super().setUp()
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())))

    def refused(self, pattern: str, rows: int) -> None:
        super().refused(pattern, lambda folder: load_encoder(folder, rows))

    def test_a_saved_vocabulary_replaces_the_earlier_one(self):
        (self.folder / "tokenizer.json").write_text("of an earlier model")
        save_encoder(byte_encoder({"<user>": 259}), self.folder)
        encoder = load_encoder(self.folder, 260)
        self.assertEqual(encoder.encode("lin<user>", "<user>"), [257, 259])
        self.assertEqual(encoder.eot_token, 258)
        save_encoder(byte_encoder(), self.folder)
        self.assertEqual(list(load_encoder(self.folder, 259).special_tokens), ["<|endoftext|>"])
        # An added token may stand in the vocabulary as well.
        save_encoder(byte_encoder({"lin": 257}), self.folder)
        encoder = load_encoder(self.folder, 259)
        self.assertEqual(encoder.special_tokens, {"<|endoftext|>": 258, "lin": 257})

    def test_openais_vocabulary_is_for_models_of_its_size_without_another(self):
        self.assertEqual(load_encoder(self.folder, 50257).encoder, get_encoder().encoder)
        self.refused("put its tokenizer.json there", 50304)
        for name in ("spiece.model", "vocab.txt", "tokenizer.model", "vocab.json", "merges.txt"):
            (self.folder / name).write_text("of another kind")
            self.refused("put its tokenizer.json there", 50257)
            (self.folder / name).unlink()

    def test_another_tokenizer_is_refused_in_one_line(self):
        good = {
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}},
        }
        path = self.folder / "tokenizer.json"
        # Old files have a merge as one text.
        for merges in ([["a", "b"]], ["a b"]):
            good["model"]["merges"] = merges
            write_json(path, good)
            self.assertEqual(load_encoder(self.folder, 3).encode("abba"), [2, 1, 0])
        for part, changes, named in (
            ("normalizer", {"type": "NFC"}, "normalizer .* type = 'NFC'"),
            ("pre_tokenizer", None, "pre_tokenizer .* type = None"),
            ("pre_tokenizer", {"add_prefix_space": True}, "add_prefix_space = True"),
            ("pre_tokenizer", {"use_regex": False}, "use_regex = False"),
            ("model", {"type": "Unigram"}, "model .* type = 'Unigram'"),
            ("model", {"byte_fallback": True}, "byte_fallback = True"),
            ("model", {"ignore_merges": True}, "ignore_merges = True"),
            ("model", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix = '</w>'"),
            ("model", {"vocab": {"a": 3}}, "'a' with the number 3, expected .* the 3 rows"),
            ("model", {"vocab": {"a": "x"}}, "the number 'x'"),
            ("model", {"vocab": ["a"]}, "no vocabulary"), ("model", [1], "no vocabulary"),
            ("model", {"merges": [["a", "b", "c"]]}, "no vocabulary"),
            ("added_tokens", [{"id": 3, "content": "<x>"}], "'<x>' with the number 3"),
            ("added_tokens", [{"id": 1}], "no vocabulary"),
            ("added_tokens", [{"id": 1, "content": ""}], "the token '' with the number 1"),
        ):
            changed = (good[part] or {}) | changes if isinstance(changes, dict) else changes
            write_json(path, good | {part: changed})
            self.refused(named, 3)
        write_json(path, [])
        self.refused("tokenizer.json holds no JSON object", 3)

    def test_broken_vocabulary_files_are_refused_in_one_line(self):
        save_encoder(byte_encoder(), self.folder)
        self.refused("'<|endoftext|>' with the number 258, expected .* the 258 rows", 258)
        for content in ("", "#version: 0.2\na b c\n", "#version: 0.2\na"):
            (self.folder / "merges.txt").write_text(content)
            self.refused("holds no vocabulary of this model", 300)


class Hub(Seeded):
    """Puts a folder in the hub's place, and a function in huggingface_hub's."""

    def setUp(self):
        super().setUp()
        self.fetched = []
        self.patch(mock.patch("huggingface_hub.snapshot_download", autospec=True,
                              side_effect=self.download))

    def download(self, name: str, allow_patterns: list[str]) -> str:
        here = self.folder / "cache" / name
        here.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / name).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, here)
                self.fetched.append(path.name)
        return str(here)

    def test_one_form_of_weights_is_fetched_and_the_vocabulary(self):
        for name, forms, fetched in (
            ("owner/bin", ["bin"], ".bin"), ("owner/bin-parts", ["sharded bin"], ".bin"),
            ("owner/parts", ["sharded safetensors"], ".safetensors"),
            ("openai-community/gpt2", ["old", "safetensors"], ".safetensors"),
        ):
            model = tiny_gpt(vocab_size=259)
            for form in forms:
                write_folder(self.folder / name, model, form)
            save_encoder(byte_encoder(), self.folder / name)
            (self.folder / name / "tf_model.h5").write_text("large")
            self.fetched.clear()
            with self.subTest(name):
                short = name.removeprefix("openai-community/")
                loaded = GPT.from_pretrained(short)
                self.assertEqual({file for file in self.fetched if fetched not in file},
                                 {"config.json", "vocab.json", "merges.txt", "added_tokens.json"})
                self.assertTrue(torch.equal(loaded.lm_head.weight, model.lm_head.weight))
                self.assertEqual(load_encoder(short, 259).encode("lin"), [257])

    def test_an_error_of_the_hub_is_one_line(self):
        pattern = "^there is no folder 'owner/model', and the hub does not give it: .*model'$"
        with self.assertRaisesRegex(OSError, pattern):
            GPT.from_pretrained("owner/model")
