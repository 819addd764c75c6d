"""Loading: strict, from every published layout, and never by unpickling."""
import json
import shutil
import struct

import pytest
import singles
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYOUTS, UNET, single_file_shapes, write_folder

from tinytav.errors import InputError
from tinytav.stable_diffusion import single_file
from tinytav.stable_diffusion.checkpoint import build
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE as VAEModel
from tinytav.stable_diffusion.vae import VAEConfig
from tinytav.weights import default_path, load

UNET_FILE, VAE_FILE = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "w")


def rewrite(file, change):
    """Replace a safetensors file by what change(its tensors) makes of it."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, file)


def same(a, b):
    return all(torch.equal(p, b.state_dict()[name]) for name, p in a.state_dict().items())


def test_a_folder(folder):
    sd = load(folder)
    expected = tiny.filled(UNet(UNetConfig.from_json(UNET)))
    assert same(sd.unet, expected) and not any(p.requires_grad for p in sd.unet.parameters())
    assert sd.defaults.frames == 3 and sd.multiple == 2 and sd.schedule.prediction_type == "epsilon"
    assert sd.encode_prompts(["a man", ""]).shape == (2, 77, 24)


def test_the_models_are_on_the_device_that_is_named(folder):
    sd = load(folder, device="meta")            # a device that every machine has
    parts = sd.unet, sd.vae, sd.text_encoder
    assert {p.device.type for part in parts for p in part.parameters()} == {"meta"} and sd.device.type == "meta"


def test_sharded_or_fp16_variant_files(folder):
    expected = load(folder)
    shards = {name: {} for name in ("a", "b")}
    file = folder / UNET_FILE
    for i, (name, tensor) in enumerate(load_file(file).items()):
        shards["ab"[i % 2]][name] = tensor.clone()
    file.unlink()
    for name, tensors in shards.items():
        save_file(tensors, file.with_name(f"{name}.safetensors"))
    index = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    tiny.save_json(file.with_name("diffusion_pytorch_model.safetensors.index.json"), dict(weight_map=index))
    rewrite(folder / VAE_FILE, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    (folder / VAE_FILE).rename(folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    sd = load(folder)
    assert same(sd.unet, expected.unet)
    assert sd.vae.encoder.conv_in.weight.dtype is torch.float32
    torch.testing.assert_close(sd.vae.quant_conv.weight, expected.vae.quant_conv.weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("index", [{}, dict(weight_map=["a"]), dict(weight_map={"conv_in.bias": 5})])
def test_an_index_without_file_names_is_refused(folder, index):
    file = "unet/diffusion_pytorch_model.safetensors.index.json"
    tiny.save_json(folder / file, index)
    with pytest.raises(InputError, match=f"{file} has no weight_map of file names"):
        load(folder)


def test_full_precision_is_read_before_fp16(folder):
    expected = load(folder)
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        tensors = {name: tensor.half() for name, tensor in load_file(folder / file).items()}
        save_file(tensors, (folder / file).with_suffix(".fp16.safetensors"))
    assert load(folder).fingerprint == load(folder, dtype=torch.float16).fingerprint == expected.fingerprint
    assert same(load(folder).unet, expected.unet)


def test_names_and_shapes_of_older_files(folder):
    expected = load(folder)

    def older_vae(tensors):
        new_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, old in new_names.items():
            tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): z for name, z in tensors.items()}
        return {name: z[:, :, None, None] if "query.weight" in name else z for name, z in tensors.items()}
    rewrite(folder / VAE_FILE, older_vae)
    outer = ("proj_in.weight", "proj_out.weight")
    rewrite(folder / UNET_FILE, lambda tensors: {
        name: z.flatten(1) if name.endswith(outer) else z for name, z in tensors.items()})
    rewrite(folder / TEXT_FILE, lambda tensors: {
        **{name.removeprefix("text_model."): z for name, z in tensors.items()},
        "embeddings.position_ids": torch.arange(77)[None]})
    sd = load(folder)
    assert same(sd.vae, expected.vae) and same(sd.unet, expected.unet) and same(sd.text_encoder, expected.text_encoder)


@pytest.mark.parametrize("change, message", [
    (lambda z: {k: v for k, v in z.items() if k != "conv_in.bias"}, "missing: conv_in.bias"),
    (lambda z: z | {"extra.weight": torch.zeros(1)}, "unexpected: extra.weight"),
    (lambda z: z | {"conv_in.bias": torch.zeros(7)}, r"conv_in.bias has the shape \(7,\), not \(16,\)"),
    (lambda z: z | {"conv_in.bias": z["conv_in.bias"] * float("nan")}, "conv_in.bias holds NaN"),
    (lambda z: z | {"conv_in.bias": z["conv_in.bias"] / 0}, "conv_in.bias holds NaN or inf"),
    (lambda z: z | {"conv_in.bias": torch.tensor([float("inf")] + 15 * [0.])}, "conv_in.bias holds NaN or inf"),
    (lambda z: z | {"conv_in.bias": torch.zeros(16, dtype=torch.int32)}, "conv_in.bias is of type torch.int32"),
])
def test_what_does_not_fit_is_named_with_its_place(folder, change, message):
    rewrite(folder / UNET_FILE, change)
    with pytest.raises(InputError, match=f"w/unet.*{message}"):
        load(folder)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def huge_header(file):
    file.write_bytes(struct.pack("<Q", 2 ** 60) + b"{}")


@pytest.mark.parametrize("spoil", [truncate, huge_header, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_named(folder, spoil):
    spoil(folder / UNET_FILE)
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors cannot be read"):
        load(folder)


@pytest.mark.parametrize("lost, message", [
    ("unet/config.json", "No config.json in .*unet"), (UNET_FILE, r"No diffusion_pytorch_model.safetensors .*unet"),
    ("scheduler/scheduler_config.json", "scheduler_config.json cannot be read"),
    ("tokenizer/vocab.json", "No tokenizer beside"), ("tokenizer/merges.txt", "No merges.txt"),
    ("vae/config.json", "No config.json in .*vae"),
    (TEXT_FILE, "No diffusion_pytorch_model.safetensors or model.safetensors")])
def test_a_lost_file_is_named(folder, lost, message):
    (folder / lost).unlink()
    with pytest.raises(InputError, match=message):
        load(folder)


def test_pickles_are_refused_with_the_way_out(folder, tmp_path):
    (folder / UNET_FILE).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="only diffusion_pytorch_model.bin. .*convert .*/w NEW_FOLDER"):
        load(folder)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="not a .safetensors file.*tinytav convert .*model.ckpt .*model.safetensors"):
        load(tmp_path / "model.ckpt")


@pytest.mark.parametrize("settings, name", [
    (dict(down_block_types=["DownBlock2D"] * 3 + ["AttnDownBlock2D"]), "AttnDownBlock2D"),
    (dict(attention_head_dim=[8, 8]), "attention_head_dim")])
def test_blocks_that_do_not_fit_each_other_are_refused_by_name(settings, name):
    with pytest.raises(InputError, match=name):
        UNetConfig.from_json(settings)


def test_the_default_weights(tmp_path):
    tiny.save_json(tmp_path / "toy/model_index.json", {})
    assert default_path(tmp_path) == tmp_path / "toy"
    tiny.save_json(tmp_path / "sd15/model_index.json", {})
    assert default_path(tmp_path) == tmp_path / "sd15"
    save_file({"model.diffusion_model.out.0.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="other.safetensors, sd15.*--weights"):
        default_path(tmp_path)


def test_a_pickle_in_weights_is_passed_over_with_a_warning(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    with pytest.warns(UserWarning, match="model.ckpt is ignored. .*python -m tinytav convert"):
        assert default_path(tmp_path) == tmp_path / "toy"


def test_a_default_that_nobody_knows_is_refused(folder):
    tiny.save_json(folder / "defaults.json", dict(size=32, stepps=5))
    with pytest.raises(InputError, match="defaults.json: stepps is not known"):
        load(folder)


@pytest.mark.parametrize("name", [
    "lora_unet_down_blocks_0_attentions_0_proj_in.alpha", "unet.mid_block.x.lora_A.weight",
    "diffusion_model.x.lora_A.weight",
    "control_model.zero_convs.0.0.weight", "input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight",
    "encoder.conv_in.weight", "emb_params", "<cat-toy>"])
def test_what_cannot_be_used_alone_is_not_the_default(tmp_path, name):
    """Of a file in weights/ the names of its tensors decide; a ControlNet's folder has no model_index.json."""
    save_file({name: torch.ones(1)}, tmp_path / "a.safetensors")
    tiny.save_json(tmp_path / "control/config.json", {}), tiny.save_json(tmp_path / "toy/model_index.json", {})
    assert default_path(tmp_path) == tmp_path / "toy"


def test_a_damaged_file_in_weights_is_not_passed_over(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="a.safetensors cannot be read as safetensors"):
        default_path(tmp_path)


@pytest.mark.parametrize("prediction, size", [("epsilon", 512), ("v_prediction", 768)])
def test_the_default_size_is_that_of_the_model(folder, prediction, size):
    (folder / "defaults.json").unlink()
    tiny.save_json(folder / "scheduler/scheduler_config.json", tiny.SCHEDULER | dict(prediction_type=prediction))
    sd = load(folder)
    assert vars(sd.defaults) == dict(size=size, frames=24, steps=500, lr=3e-5, ddim_steps=50, guidance=12.5,
                                     precision=None)


def test_a_fingerprint_stays_what_it_was(tmp_path, monkeypatch):
    """Runs that were made earlier find their weights again. The numbers are of version 0.2."""
    assert load(write_folder(tmp_path / "w")).fingerprint == "b7325e176033e152"
    assert load(write_folder(tmp_path / "half", torch.float16)).fingerprint == "e744e35a7969d6d6"
    singles.make_small(monkeypatch)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny.DATA / "tokenizer" / name, tmp_path)
    save_file(singles.single1(), tmp_path / "a.safetensors"), save_file(singles.single2(), tmp_path / "b.safetensors")
    assert load(tmp_path / "a.safetensors").fingerprint == "3a49f2e15fc340da"
    assert load(tmp_path / "b.safetensors", prediction="v").fingerprint == "1a7d344b741d4f35"


def test_the_fingerprint_tells_weights_apart(folder):
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    rewrite(folder / VAE_FILE, lambda z: z | {"quant_conv.bias": z["quant_conv.bias"] + 1e-3})
    assert load(folder).fingerprint != first


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_says_where():
    tokenizer = Tokenizer.from_folder(tiny.DATA / "tokenizer")
    with pytest.warns(UserWarning, match="cut before 'skiing"):
        ids = tokenizer(["man " * 75 + "skiing on snow"])
    assert ids.shape == (1, 77) and ids[0, -1] == tokenizer.end


def test_single_files_that_are_something_else_are_refused(tmp_path):
    def unet(channels, width):
        return {single_file.FIRST: torch.zeros(8, channels, 3, 3), single_file.CONTEXT: torch.zeros(8, width)}
    cases = {"lora": ({"lora_unet.weight": torch.zeros(1)}, "not for Stable Diffusion"),
             "inpainting": (unet(9, 768), "inpaint"), "sdxl": (unet(4, 2048), "2048 wide"),
             "sd2": (unet(4, 1024), "--prediction")}
    for name, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=message):
            load(tmp_path / f"{name}.safetensors")


# ---- The four published layouts, on the meta device ----------------------------------------------

MODELS = dict(unet=(UNet, UNetConfig), vae=(VAEModel, VAEConfig), text_encoder=(TextEncoder, TextEncoderConfig))
layouts = pytest.mark.skipif(not LAYOUTS.is_dir(), reason="../shared/sd-layouts is not here")


def meta(shape):
    return torch.empty(shape, device="meta")


@layouts
@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21-base", "sd21"])
def test_published_key_lists_load_strictly(name):
    keys = json.loads((LAYOUTS / name / "keys.json").read_text())
    for part, (Model, Config) in MODELS.items():
        config = Config.from_json(json.loads((LAYOUTS / name / part / "config.json").read_text()))
        build(Model, config, {key: meta(shape) for key, shape in keys[part].items()}, part)
    Schedule.from_json(json.loads((LAYOUTS / name / "scheduler/scheduler_config.json").read_text()))
    file = {key: meta(shape) for key, shape in single_file_shapes(keys)}
    ignored = ["model_ema.decay", "betas", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "posterior_variance"]
    if name.startswith("sd21"):             # the last layer of OpenCLIP's tower and its head, which the file may hold
        ignored += [f"cond_stage_model.model.{key}" for key in (
            "transformer.resblocks.23.ln_1.weight", "text_projection", "logit_scale")]
    for part, (config, tensors) in single_file.components(file | {key: meta([]) for key in ignored}, "it").items():
        if name in ("sd14", "sd15") and part == "text_encoder":             # merges may lack the prefix
            tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
            tensors["embeddings.position_ids"] = meta([1, 77])
        build(MODELS[part][0], config, tensors, part)


@layouts
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_every_key_of_a_single_file_means_what_diffusers_says(name):
    keys = json.loads((LAYOUTS / name / "keys.json").read_text())["single_file"]
    for old, new in keys.items():
        if old.startswith("model.diffusion_model."):
            assert single_file.unet_key(old.removeprefix("model.diffusion_model.")) == new
        elif old.startswith("first_stage_model."):
            assert single_file.vae_key(old.removeprefix("first_stage_model.")) == new
        elif old.startswith("cond_stage_model.model."):
            ours = single_file.openclip_tensors({old.removeprefix("cond_stage_model.model."): torch.zeros(3)})
            assert [f"text_model.{key}" for key in ours] == (new if isinstance(new, list) else [new])


@layouts
@pytest.mark.filterwarnings("ignore:The prompt has")
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_published_tokenizer(name, tmp_path):
    for file in [*(LAYOUTS / "tokenizer").iterdir(), *(LAYOUTS / name / "tokenizer").iterdir()]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    for case in json.loads((LAYOUTS / "tokenizer/cases.json").read_text())[name]:
        assert tokenizer([case["text"]])[0].tolist() == case["ids"], case["text"]
