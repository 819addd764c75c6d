"""Single files as people publish them: other prefixes, keys of trainers, no VAE; and a VAE of its own."""
import shutil

import pytest
import singles
import tiny
import torch
from safetensors.torch import load_file, save_file

from tinytav.errors import InputError
from tinytav.weights import load


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tokenizer, in which single files are small."""
    singles.make_small(monkeypatch)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny.DATA / "tokenizer" / name, tmp_path)
    return tmp_path


def read(place, tensors, metadata=None, **more):
    save_file({name: z.contiguous() for name, z in tensors.items()}, place / "a.safetensors", metadata=metadata)
    return load(place / "a.safetensors", **more)


def same(one, other, parts=("unet", "vae", "text_encoder")):
    return all(torch.equal(z, getattr(other, part).state_dict()[name])
               for part in parts for name, z in getattr(one, part).state_dict().items())


def renamed(tensors, old, new):
    return {name.replace(old, new, 1) if name.startswith(old) else name: z for name, z in tensors.items()}


@pytest.mark.parametrize("make", [singles.single1, singles.single2])
def test_sgms_names_are_read(place, make):
    expected = read(place, make(), prediction="epsilon")
    tensors = renamed(make(), "cond_stage_model.", "conditioner.embedders.0.")
    assert same(read(place, tensors, prediction="epsilon"), expected)


def test_what_trainers_leave_in_a_file_is_passed_over(place):
    names = ["cond_stage_model.transformer.text_projection.weight", "cond_stage_model.transformer.logit_scale",
             "first_stage_model.loss.logvar", "first_stage_model.loss.discriminator.main.0.weight",
             "first_stage_model.model_ema.decay", "first_stage_model.model_ema.decoderconv_inbias", "model_ema.decay",
             "model_sampling.sigmas"]
    more = {name: torch.ones(2) for name in names}
    assert same(read(place, singles.single1() | more), read(place, singles.single1()))


@pytest.mark.parametrize("more", ["first_stage_model.losses.weight", "first_stage_model.decoder.loss.weight"])
def test_what_only_looks_like_it_is_refused(place, more):
    with pytest.raises(InputError, match="unexpected"):
        read(place, singles.single1() | {more: torch.ones(2)})


def test_the_prefix_of_a_compiled_model_is_left_out(place):
    tensors = singles.single1()
    for prefix in ("model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."):
        tensors = renamed(tensors, prefix, f"{prefix}_orig_mod.")
    assert same(read(place, tensors), read(place, singles.single1()))
    folder = tiny.write_folder(place / "w")
    expected = load(folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({f"_orig_mod.{name}": z for name, z in load_file(file).items()}, file)
    assert same(load(folder), expected)


def test_a_folder_whose_text_encoder_has_a_projection_is_read(place):
    folder = tiny.write_folder(place / "w")
    expected = load(folder)
    file = folder / "text_encoder/model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": torch.eye(24)}, file)
    assert same(load(folder), expected)


# ---- What the net predicts -----------------------------------------------------------------------

@pytest.mark.parametrize("make, said, flag, expected", [
    (singles.single2, "v", None, "v_prediction"), (singles.single2, "epsilon", None, "epsilon"),
    (singles.single1, "v", None, "v_prediction"), (singles.single1, None, None, "epsilon"),
    (singles.single2, "v", "epsilon", "epsilon"), (singles.single2, "rf", "v", "v_prediction")])
def test_the_header_says_what_the_net_predicts_and_the_flag_has_the_last_word(place, make, said, flag, expected):
    sd = read(place, make(), said and {"modelspec.prediction_type": said}, prediction=flag)
    assert sd.schedule.prediction_type == expected
    assert sd.defaults.size == (768 if expected == "v_prediction" else 512)


def test_a_prediction_that_is_not_computed_is_refused(place):
    with pytest.raises(InputError, match="predicts 'rf'. Only epsilon and v"):
        read(place, singles.single1(), {"modelspec.prediction_type": "rf"})


# ---- The VAE -------------------------------------------------------------------------------------

def without_vae():
    return {name: z for name, z in singles.single1().items() if not name.startswith("first_stage_model.")}


def other_vae(layout):
    """Another VAE than the single file's, by the names of a layout."""
    own = {name: z for name, z in singles.single1().items() if name.startswith("first_stage_model.")}
    own["first_stage_model.quant_conv.bias"] = own["first_stage_model.quant_conv.bias"] + 1
    if layout == "folder":
        names = {single: name for name, single in singles.vae_single_names().items()}
        return {names[name.removeprefix("first_stage_model.")]: z for name, z in own.items()}
    return renamed(own, "first_stage_model.", layout)


def test_a_file_without_a_vae_says_how_to_name_one(place):
    with pytest.raises(InputError, match="a.safetensors has no VAE: name one with --vae"):
        read(place, without_vae())


@pytest.mark.parametrize("layout, make", [("", without_vae), ("first_stage_model.", singles.single1),
                                          ("vae.", singles.single1), ("folder", without_vae)])
def test_a_vae_of_its_own_takes_the_place(place, layout, make):
    save_file(other_vae(layout), place / "vae.safetensors")
    expected = read(place, singles.single1())
    sd = read(place, make(), vae=place / "vae.safetensors")
    assert torch.equal(sd.vae.quant_conv.bias, expected.vae.quant_conv.bias + 1) and same(sd, expected, ["unet"])
    assert torch.equal(sd.vae.decoder.conv_in.weight, expected.vae.decoder.conv_in.weight)
    assert sd.fingerprint != expected.fingerprint and sd.source["vae"] == str(place / "vae.safetensors")


@pytest.mark.parametrize("whole", [False, True])
def test_a_vaes_folder_takes_the_place_of_a_folders_own(place, whole):
    folder, other = tiny.write_folder(place / "w"), tiny.write_folder(place / "other")
    file = other / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, file)
    expected = load(folder)
    for _ in range(2):
        sd = load(folder, vae=other if whole else other / "vae")
        assert torch.equal(sd.vae.quant_conv.bias, expected.vae.quant_conv.bias + 1)
        shutil.rmtree(folder / "vae", ignore_errors=True)               # the second time there is none to replace
    with pytest.raises(InputError, match="w has no VAE: name one with --vae"):
        load(folder)


def test_a_vae_of_another_latent_space_is_refused(place):
    folder = tiny.write_folder(place / "w")
    tiny.save_json(folder / "vae2/config.json", tiny.VAE | dict(scaling_factor=0.13025))
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / "vae2")
    with pytest.raises(InputError, match="vae2 scales its latents by 0.13025, .*w by 0.18215"):
        load(folder, vae=folder / "vae2")


@pytest.mark.parametrize("name, message", [
    ("none.safetensors", "No VAE at .*none"), ("a.pt", "not a .safetensors file.*convert"),
    ("lora.safetensors", "missing")])
def test_what_is_no_vae_is_refused(place, name, message):
    torch.save({}, place / "a.pt"), save_file({"x": torch.ones(2)}, place / "lora.safetensors")
    with pytest.raises(InputError, match=message):
        read(place, singles.single1(), vae=place / name)


# ---- Names that people meet ----------------------------------------------------------------------

def test_a_suffix_in_capitals_is_the_same_suffix(place):
    save_file(singles.single1(), place / "A.SAFETENSORS")
    assert load(place / "A.SAFETENSORS").schedule


def test_other_kinds_of_files_are_told_apart(place):
    for name, message in (("a.gguf", "GGUF holds rounded numbers.*Look for the same"), ("a.zip", "a.zip is not a")):
        (place / name).write_bytes(b"GGUF")
        with pytest.raises(InputError, match=message) as caught:
            load(place / name)
        assert "tinytav convert" not in str(caught.value)               # which would refuse it


def test_the_command_that_converts_is_quoted(place):
    (place / "a; touch x #.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match="convert '.*/a; touch x #.ckpt' '.*/a; touch x #.safetensors'$"):
        load(place / "a; touch x #.ckpt")


def test_the_hubs_own_folder_and_an_unusual_variant_are_explained(place):
    folder = tiny.write_folder(place / "models--a--b/snapshots/abc")
    with pytest.raises(InputError, match="Name a folder in its snapshots/"):
        load(place / "models--a--b")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(InputError, match="only diffusion_pytorch_model.non_ema.safetensors: rename it"):
        load(folder)
