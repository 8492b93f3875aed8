"""Weights in and out: against transformers, from files of every kind, and from a hub on this machine that misbehaves."""

import hashlib
import json
import os
import pickle
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import requests
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from common import Folder, Server, get_encoder, run_python, tiny_config, tiny_gpt
from mingpt.model import GPT
from mingpt.utils import set_seed

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

def theirs(cls=GPT2LMHeadModel, **changes):
    """A random GPT-2 of transformers, large enough in its weights that its tokens vary."""
    settings = dict(vocab_size=61, n_positions=70, n_embd=24, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None)
    model = cls(GPT2Config(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.15
    return model

def save_as(model, folder: Path, form: str) -> None:
    """Saves a model of transformers in one of the forms that are found on the hub."""
    if form == "safetensors":
        model.save_pretrained(folder)
    elif form == "sharded safetensors":
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        model.config.save_pretrained(folder)
        state = model.state_dict()
        if "lm_head.weight" in state and model.config.tie_word_embeddings and form != "bin with head":
            del state["lm_head.weight"]
        if form == "bin of old": # with the masks that transformers kept in its files for years, in the format before zip
            for layer in range(model.config.n_layer):
                prefix = next(key for key in state if key.endswith("h.0.ln_1.weight")).removesuffix("0.ln_1.weight")
                state[f"{prefix}{layer}.attn.bias"] = torch.ones(1, 1, 70, 70).tril().bool()
                state[f"{prefix}{layer}.attn.masked_bias"] = torch.tensor(-1e4)
            torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        elif form == "sharded bin":
            names, files = sorted(state), {}
            for i in range(3):
                files |= {name: f"pytorch_model-{i + 1:05d}-of-00003.bin" for name in names[i::3]}
                torch.save({name: state[name] for name in names[i::3]}, folder / f"pytorch_model-{i + 1:05d}-of-00003.bin")
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        else:
            torch.save(state, folder / "pytorch_model.bin")

class Seeded(Folder):
    def setUp(self):
        super().setUp()
        set_seed(1)


class FromTransformers(Seeded):
    def check(self, model, form):
        save_as(model, self.folder, form)
        ours = GPT.from_pretrained(str(self.folder))
        idx = torch.randint(model.config.vocab_size, (2, 12))
        headed = model if isinstance(model, GPT2LMHeadModel) else GPT2LMHeadModel(model.config).eval()
        headed.transformer.load_state_dict(model.state_dict() if headed is not model else model.transformer.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours(idx)[0], headed(idx).logits, atol=1e-4, rtol=0)
        greedy = headed.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=50, do_sample=False, pad_token_id=0)
        self.assertEqual(ours.generate(idx, 50).tolist(), greedy.tolist())
        self.assertFalse(ours.training)
        self.assertEqual(ours.lm_head.weight is ours.transformer.wte.weight, headed.config.tie_word_embeddings)

    def test_safetensors(self):
        self.check(theirs(), "safetensors")

    def test_safetensors_in_shards(self):
        self.check(theirs(n_layer=3), "sharded safetensors")
        self.assertGreater(len(list(self.folder.glob("*.safetensors"))), 2)

    def test_bin(self):
        self.check(theirs(n_embd=40, n_head=5), "bin")

    def test_bin_in_shards(self):
        self.check(theirs(), "sharded bin")

    def test_bin_with_the_tied_head_in_it(self):
        self.check(theirs(n_layer=1), "bin with head")

    def test_bin_with_masks_in_the_old_format(self):
        self.check(theirs(), "bin of old")

    def test_exact_gelu(self):
        self.check(theirs(activation_function="gelu"), "safetensors")

    def test_other_names_of_the_tanh_form(self):
        self.check(theirs(activation_function="gelu_pytorch_tanh"), "bin")

    def test_separate_head(self):
        self.check(theirs(tie_word_embeddings=False), "safetensors")

    def test_separate_head_in_a_bin(self):
        self.check(theirs(tie_word_embeddings=False, activation_function="gelu"), "bin")

    def test_base_model_without_head_and_prefix(self):
        for form in ("safetensors", "bin"):
            self.check(theirs(GPT2Model), form)
            for file in self.folder.iterdir():
                file.unlink()

    def test_half_precision_stays(self):
        theirs().half().save_pretrained(self.folder)
        self.assertEqual(GPT.from_pretrained(str(self.folder)).lm_head.weight.dtype, torch.float16)

    def test_it_can_be_trained(self):
        save_as(theirs(), self.folder, "bin")
        before = (self.folder / "pytorch_model.bin").read_bytes()
        model = GPT.from_pretrained(str(self.folder)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        idx = torch.randint(61, (4, 20))
        losses = []
        for _ in range(10):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.assertLess(losses[-1], losses[0])
        self.assertEqual((self.folder / "pytorch_model.bin").read_bytes(), before)

    def test_no_random_number_is_drawn(self):
        save_as(theirs(), self.folder, "bin")
        state = torch.get_rng_state()
        GPT.from_pretrained(str(self.folder))
        self.assertTrue(torch.equal(torch.get_rng_state(), state))

    def test_memory_stays_near_the_size_of_the_weights(self):
        config = tiny_config(n_layer=12, n_embd=512, n_head=8, vocab_size=20000) # 192 MB
        model = GPT(config)
        size = sum(p.numel() for p in model.parameters()) * 4
        model.save_pretrained(self.folder)
        model.cpu()
        script = """
import resource, sys
from mingpt.model import GPT
import torch
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
model = GPT.from_pretrained(sys.argv[1])
print(peak() - before)
model(torch.arange(8)[None])
for parameter in model.parameters():
    parameter.sum()
print(peak() - before)
"""
        loaded, used = map(int, run_python("-c", script, self.folder).stdout.split())
        self.assertLess(loaded, 1.2 * size)
        self.assertLess(used, 1.2 * size)

    def test_what_the_model_cannot_be_is_named(self):
        theirs().save_pretrained(self.folder)
        good = json.loads((self.folder / "config.json").read_text())
        for field, value in (("activation_function", "relu"), ("add_cross_attention", True), ("scale_attn_weights", False),
                             ("scale_attn_by_inverse_layer_idx", True), ("n_inner", 50), ("layer_norm_epsilon", 1e-6), ("model_type", "bert")):
            (self.folder / "config.json").write_text(json.dumps(good | {field: value}))
            with self.subTest(field), self.assertRaisesRegex(ValueError, f"{field} = {value!r}"):
                GPT.from_pretrained(str(self.folder))
        (self.folder / "config.json").write_text(json.dumps({k: v for k, v in good.items() if k != "n_embd"}))
        with self.assertRaisesRegex(ValueError, "lacks n_embd"):
            GPT.from_pretrained(str(self.folder))
        for changes, message in ((dict(n_layer=3), "Missing key"), (dict(n_layer=1), "Unexpected key"), (dict(n_positions=9), "wpe.weight")):
            (self.folder / "config.json").write_text(json.dumps(good | changes))
            with self.subTest(message), self.assertRaisesRegex(ValueError, f"(?s)do not fit its config.json.*{message}"):
                GPT.from_pretrained(str(self.folder))

    def test_a_malicious_pickle_is_refused(self):
        theirs().config.save_pretrained(self.folder)
        class Malicious:
            def __reduce__(self):
                return os.system, (f"touch {folder}/owned",)
        folder = self.folder
        for legacy in (True, False):
            torch.save({"wte.weight": Malicious()}, self.folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
            with self.assertRaisesRegex(ValueError, "cannot be read as weights"):
                GPT.from_pretrained(str(self.folder))
        (self.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
        with self.assertRaisesRegex(ValueError, "cannot be read as weights"):
            GPT.from_pretrained(str(self.folder))
        self.assertFalse((self.folder / "owned").exists())

    def test_an_index_cannot_name_files_elsewhere(self):
        theirs().config.save_pretrained(self.folder)
        for shard in ("../other.bin", "/etc/passwd", "a/b.bin"):
            (self.folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
            with self.assertRaisesRegex(ValueError, "outside its folder"):
                GPT.from_pretrained(str(self.folder))

    def test_a_folder_without_weights(self):
        with self.assertRaisesRegex(FileNotFoundError, "config.json"):
            GPT.from_pretrained(str(self.folder))
        theirs().config.save_pretrained(self.folder)
        with self.assertRaisesRegex(FileNotFoundError, "no weights"):
            GPT.from_pretrained(str(self.folder))


class SavePretrained(Seeded):
    def test_transformers_reads_it_and_so_do_we(self):
        for changes in (dict(), dict(tie_weights=False), dict(gelu_approximate="none"), dict(n_layer=3, n_head=4, resid_pdrop=0.0)):
            with self.subTest(changes):
                model, folder = tiny_gpt(vocab_size=31, **changes), self.folder / str(len(list(self.folder.iterdir())))
                model.save_pretrained(folder)
                other, again = GPT2LMHeadModel.from_pretrained(folder).eval(), GPT.from_pretrained(str(folder))
                idx = torch.randint(31, (3, 8))
                with torch.no_grad():
                    torch.testing.assert_close(other(idx).logits, model(idx)[0], atol=1e-5, rtol=0)
                self.assertEqual(again.config.to_dict(), model.config.to_dict() | {"model_type": "gpt"})
                for (name, mine), (_, read) in zip(model.state_dict().items(), again.state_dict().items()):
                    self.assertTrue(torch.equal(mine, read) and mine.dtype == read.dtype, name)

    def test_bfloat16_comes_back_bit_for_bit(self):
        model = tiny_gpt().bfloat16()
        model.save_pretrained(self.folder)
        again = GPT.from_pretrained(str(self.folder))
        for mine, read in zip(model.state_dict().values(), again.state_dict().values()):
            self.assertTrue(torch.equal(mine, read) and mine.dtype == read.dtype)

    def test_over_the_folder_that_it_came_from(self):
        tiny_gpt().save_pretrained(self.folder)
        model = GPT.from_pretrained(str(self.folder))
        with torch.no_grad():
            model.transformer.wpe.weight.zero_()
        model.save_pretrained(self.folder)
        self.assertEqual(GPT.from_pretrained(str(self.folder)).transformer.wpe.weight.abs().sum().item(), 0)
        idx = torch.randint(11, (1, 8))
        torch.testing.assert_close(GPT.from_pretrained(str(self.folder))(idx)[0], model(idx)[0])

    def test_not_beside_other_weights(self):
        theirs().save_pretrained(self.folder)
        with self.assertRaisesRegex(ValueError, "other weights, model.safetensors"):
            tiny_gpt().save_pretrained(self.folder)
        self.assertFalse((self.folder / "pytorch_model.bin").exists())


class Hub(Server):
    """Models from a hub: whatever it does, nothing broken stays in the cache, and the next call recovers."""

    def setUp(self):
        super().setUp()
        set_seed(2)
        self.source, self.cache = self.folder / "source", self.folder / "cache"
        self.source.mkdir()
        self.cache.mkdir()
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(self.cache), HF_ENDPOINT=self.address))
        self.model = theirs(n_embd=120)
        self.idx = torch.randint(61, (1, 9))

    def publish(self, name="owner/model", form="bin"):
        """Puts the model on the hub as the real one has it: large files behind a redirect that names their sha256."""
        save_as(self.model, self.source, form)
        for file in self.source.iterdir():
            body = file.read_bytes()
            answer = dict(body=body)
            if file.suffix != ".json":
                self.files[f"/storage/{file.name}"] = [answer]
                answer = dict(status=302, body=b"", headers={"Location": f"/storage/{file.name}", "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"'})
            self.files[f"/{name}/resolve/main/{file.name}"] = [answer]

    def loads(self, name="owner/model"):
        with torch.no_grad():
            torch.testing.assert_close(GPT.from_pretrained(name)(self.idx)[0], self.model(self.idx).logits, atol=1e-4, rtol=0)

    def kept(self):
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file())

    def test_every_form_and_then_without_a_network(self):
        for form in ("bin", "sharded bin", "safetensors", "sharded safetensors"):
            with self.subTest(form):
                self.files.clear()
                for file in self.source.iterdir():
                    file.unlink()
                name = f"owner/{form.replace(' ', '-')}"
                self.publish(name, form)
                self.loads(name)
                self.requests.clear()
                self.files.clear()
                self.loads(name)
                self.assertEqual(self.requests, [])

    def test_the_short_names(self):
        self.publish("openai-community/gpt2")
        self.loads("gpt2")
        self.publish("distilbert/distilgpt2")
        self.loads("distilgpt2")
        self.assertTrue((self.cache / "openai-community" / "gpt2" / "pytorch_model.bin").exists())

    def test_a_name_that_does_not_exist(self):
        with self.assertRaisesRegex(FileNotFoundError, "404"):
            GPT.from_pretrained("owner/nothing")
        self.assertEqual(self.kept(), [])
        with self.assertRaisesRegex(ValueError, "neither a folder"):
            GPT.from_pretrained("../model")

    def misbehave(self, path, *answers, error=(OSError, ValueError)):
        good = self.files[path]
        self.files[path] = list(answers)
        with self.assertRaises(error):
            GPT.from_pretrained("owner/model")
        self.files[path] = good
        broken = [name for name in self.kept() if not name.endswith(("config.json", ".part"))]
        self.assertEqual(broken, [])
        self.loads()
        self.assertEqual(self.kept(), ["owner/model/config.json", "owner/model/pytorch_model.bin"])

    def test_weights_break_off_for_ever(self):
        self.publish()
        body = self.files["/storage/pytorch_model.bin"][0]["body"]
        self.misbehave("/storage/pytorch_model.bin", dict(body=body, send=100_000), dict(body=body, hang=3), error=OSError)
        self.assertTrue(any(begin for path, begin in self.requests if path == "/storage/pytorch_model.bin"))

    def test_weights_cut_short_with_a_matching_length(self):
        self.publish()
        self.misbehave("/storage/pytorch_model.bin", dict(body=self.files["/storage/pytorch_model.bin"][0]["body"][:100_000]), error=ValueError)

    def test_weights_with_wrong_bytes(self):
        self.publish()
        body = bytearray(self.files["/storage/pytorch_model.bin"][0]["body"])
        body[len(body) // 2] ^= 1
        self.misbehave("/storage/pytorch_model.bin", dict(body=bytes(body)), error=ValueError)

    def test_an_error_page_for_weights_without_a_digest(self):
        self.publish()
        for headers in ({"Content-Type": "text/html"}, {}):
            self.misbehave("/owner/model/resolve/main/pytorch_model.bin", dict(body=b"<html>We are sorry", headers=headers), error=ValueError)
            (self.cache / "owner/model/pytorch_model.bin").unlink()

    def test_an_error_page_or_half_a_file_for_the_config(self):
        self.publish()
        body = self.files["/owner/model/resolve/main/config.json"][0]["body"]
        for answer in (dict(body=b"<html>We are sorry"), dict(body=body[:50]), dict(body=b"[]"), dict(status=500, body=b"")):
            self.misbehave("/owner/model/resolve/main/config.json", answer)
            for name in self.kept():
                (self.cache / name).unlink()

    def test_the_server_is_down(self):
        self.publish()
        self.misbehave("/owner/model/resolve/main/config.json", dict(body=b"{}", hang=3), error=OSError)


class Imports(unittest.TestCase):
    def test_optional_packages_only_when_needed(self):
        script = "import sys; import mingpt.model, mingpt.bpe, mingpt.trainer; print([m for m in ('transformers', 'safetensors', 'requests') if m in sys.modules])"
        self.assertEqual(run_python("-c", script).stdout.strip(), "[]")

    def test_a_safetensors_file_without_the_package_says_what_to_install(self):
        with tempfile.TemporaryDirectory() as folder:
            theirs().save_pretrained(folder)
            with mock.patch.dict(sys.modules, {"safetensors.torch": None}), self.assertRaisesRegex(ImportError, "pip install safetensors"):
                GPT.from_pretrained(folder)


class RealGPT2(unittest.TestCase):
    def test_known_continuation(self):
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        try:
            requests.head(endpoint, timeout=5)
        except requests.RequestException:
            self.skipTest(f"the hub at {endpoint} cannot be reached")
        idx = torch.tensor([get_encoder().encode("The dog")])
        expected = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
        self.assertEqual(GPT.from_pretrained("gpt2").generate(idx, 18)[0].tolist(), expected) # what transformers tests itself by


if __name__ == "__main__":
    unittest.main()
