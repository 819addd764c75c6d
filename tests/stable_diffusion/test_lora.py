"""LoRA: every spelling gives what diffusers gives; what does not fit is refused by name and changes nothing."""
import copy
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import close, fill, filled, reference
from torch.nn import functional as F

from tinytav.errors import InputError
from tinytav.stable_diffusion import lora, single_file
from tinytav.stable_diffusion.lora import fingerprint, merge_lora
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.weights import load

SHARED = tiny.DATA.parents[2] / "shared/reference"                          # ../shared/reference
LAYOUTS = tiny.DATA.parents[2] / "shared/sd-layouts"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
RANK = 4


def model():
    """The U-Net and the text encoder that the reference was recorded with."""
    return SimpleNamespace(unet=filled(UNet(UNetConfig.from_json(reference("unet-sd1")[0]))),
                           text_encoder=filled(TextEncoder(TextEncoderConfig.from_json(reference("clip-sd1")[0]))))


def recorded_layers(sd):
    """The layers that the recorded LoRA changes: those of the transformers and the text encoder."""
    return {place: module for place, module in lora.changeable(sd).items()
            if ".attentions." in place[1] or ".encoder." in place[1]}


def pair_for(place, module):
    """The recorded LoRA of one layer: down (rank, in), up (out, rank), with the kernel of a 1x1 convolution."""
    name = "lora." + ".".join(place)
    ones = [1] * (module.weight.ndim - 2)
    down = fill.weight(f"{name}.down.weight", (RANK, module.weight.shape[1]))
    up = fill.weight(f"{name}.up.weight", (len(module.weight), RANK))
    return (torch.from_numpy(z).reshape(*z.shape, *ones) for z in (down, up))


def kohya(name, down, up, alpha=2.):
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}


def flat(text):
    return text.replace(".", "_")


def kohya_by_diffusers_names(part, name, down, up):
    return kohya({"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + flat(name), down, up)


def kohya_by_ldm_names(part, name, down, up):
    if part == "unet":
        name = LDM_NAMES[name]
    return kohya_by_diffusers_names(part, name, down, up)


def peft(part, name, down, up):
    return {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}


def linear_layers_of_diffusers(part, name, down, up):
    return {f"{part}.{name}.lora_linear_layer.down.weight": down, f"{part}.{name}.lora_linear_layer.up.weight": up}


def attention_processors(part, name, down, up):
    """The oldest files of diffusers: the attention's layers belong to a processor, the others have their own LoRA."""
    path, _, layer = name.removesuffix(".0").rpartition(".")
    if "attn" in path and layer in ("to_q", "to_k", "to_v", "to_out"):
        stem = f"{part}.{path}.processor.{layer}_lora"
    elif layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
        stem = f"{part}.{path}.to_{layer.removesuffix('_proj')}_lora"
    else:
        stem = f"{part}.{name}.lora"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up}


def write(path, sd, spelling):
    tensors = {}
    for (part, name), module in recorded_layers(sd).items():
        tensors |= spelling(part, name, *pair_for((part, name), module))
    save_file(tensors, path)
    return tensors


RESAMPLERS = ["input_blocks.3.0.op", "input_blocks.6.0.op", "input_blocks.9.0.op", "output_blocks.2.1.conv",
              "output_blocks.5.2.conv", "output_blocks.8.2.conv"]


def ldm_names(cfg):
    """{a layer's name: its name in a single file}: all names that could stand there, read by unet_key."""
    with torch.device("meta"):
        layers = lora.changeable(SimpleNamespace(unet=UNet(cfg), text_encoder=TextEncoder()))
    ours = {name for part, name in layers if part == "unet"}
    inner = {name.split(".", 4)[-1] for name in ours if ".attentions." in name} | set(single_file.RESNET)
    blocks = [f"{side}_blocks.{i}.{j}" for side in ("input", "output") for i in range(12) for j in range(2)]
    blocks += ["middle_block.0", "middle_block.1", "middle_block.2"]
    names = [f"{block}.{rest}" for block in blocks for rest in inner] + list(single_file.OUTER) + RESAMPLERS
    read = {single_file.unet_key(f"{name}.weight").removesuffix(".weight"): name for name in names}
    return {name: read[name] for name in ours}


LDM_NAMES = ldm_names(UNetConfig())


@pytest.mark.parametrize("spelling, case", [
    (kohya_by_diffusers_names, "kohya"), (kohya_by_ldm_names, "kohya"), (peft, "peft"),
    (linear_layers_of_diffusers, "peft"), (attention_processors, "peft")])
@torch.no_grad()
def test_each_spelling_gives_what_diffusers_gives(tmp_path, spelling, case):
    sd = model()
    write(tmp_path / "a.safetensors", sd, spelling)
    assert merge_lora(sd, tmp_path / "a.safetensors", 0.8) == 210
    unet, text, expected = reference("unet-sd1")[1], reference("clip-sd1")[1], reference("lora")[1]
    assert close(sd.unet(unet["x"], unet["timestep"], unet["context"]), expected[f"{case}.y"])
    assert close(sd.text_encoder(text["ids"]), expected[f"{case}.hidden"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/reference is not here")
@pytest.mark.parametrize("spelling, name", [(kohya_by_diffusers_names, "lora-kohya"), (peft, "lora-peft")])
def test_the_key_lists_are_those_recorded(tmp_path, spelling, name):
    tensors = write(tmp_path / "a.safetensors", model(), spelling)
    assert {key: list(z.shape) for key, z in tensors.items()} == json.loads((SHARED / f"{name}.keys.json").read_text())


def test_the_first_files_of_diffusers_hold_the_unet_alone_without_its_name(tmp_path):
    sd, other = model(), model()
    tensors = write(tmp_path / "a.safetensors", sd, attention_processors)
    tensors = {key: z for key, z in tensors.items() if key.startswith("unet.")}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({key.removeprefix("unet."): z for key, z in tensors.items()}, tmp_path / "b.safetensors")
    assert merge_lora(sd, tmp_path / "a.safetensors") == merge_lora(other, tmp_path / "b.safetensors") > 100
    assert all(torch.equal(z, other.unet.state_dict()[name]) for name, z in sd.unet.state_dict().items())


def test_ldm_names_are_those_of_the_single_file():
    """All 250 and more layers of Stable Diffusion 1.5, resnets and resamplers too, against unet_key turned round."""
    with torch.device("meta"):
        layers = lora.changeable(SimpleNamespace(unet=UNet(), text_encoder=TextEncoder()))
    names = {name for part, name in layers if part == "unet"}
    assert names == LDM_NAMES.keys()
    assert {ldm: name for name, ldm in LDM_NAMES.items()}.items() <= lora.ldm_names(names).items()


@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="../shared/sd-layouts is not here")
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_ldm_names_are_those_of_a_published_file(name):
    recorded = json.loads((LAYOUTS / name / "keys.json").read_text())["single_file"]
    prefix, end = "model.diffusion_model.", ".weight"
    cfg = UNetConfig.from_json(json.loads((LAYOUTS / name / "unet/config.json").read_text()))
    with torch.device("meta"):
        layers = lora.changeable(SimpleNamespace(unet=UNet(cfg), text_encoder=TextEncoder()))
    ours = lora.ldm_names({name for part, name in layers if part == "unet"})
    theirs = {key[len(prefix):-len(end)]: new[:-len(end)] for key, new in recorded.items()
              if key.startswith(prefix) and key.endswith(end) and ("unet", new[:-len(end)]) in layers}
    assert len(theirs) > 250 and theirs.items() <= ours.items() and set(ours.values()) == set(theirs.values())


def test_no_two_layers_share_a_spelling():
    with torch.device("meta"):
        layers = lora.changeable(SimpleNamespace(unet=UNet(), text_encoder=TextEncoder()))
    found = {(spelling, name) for part, name in layers for one in (name, lora.processor_name(name))
             for spelling in lora.spelled(part, one)}
    ldm = lora.ldm_names({name for part, name in layers if part == "unet"}).items()
    found |= {(spelling, name) for one, name in ldm for spelling in lora.spelled("unet", one)}
    assert len(lora.spellings(layers)) == len(found)


# ---- small: one layer at a time ------------------------------------------------------------------

@pytest.fixture
def sd(tmp_path):
    return load(tiny.write_folder(tmp_path / "w"))


def weights_of(sd):
    return {f"{part}.{name}": z.clone() for part in ("unet", "text_encoder")
            for name, z in getattr(sd, part).state_dict().items()}


def change(sd, tensors, path, scale=1.):
    """What the LoRA adds to the weights: {name: difference} of those that are other than before."""
    save_file(tensors, path)
    before = weights_of(sd)
    merge_lora(sd, path, scale)
    after = weights_of(sd)
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("alpha, factor", [(2., 0.5), (0., 1.), (None, 1.), (-4., -1.)])
def test_alpha_over_rank_and_scale_are_factors(sd, tmp_path, alpha, factor):
    down, up = torch.randn(RANK, 16), torch.randn(16, RANK)
    tensors = kohya("lora_unet_" + flat(QUERY), down, up, alpha or 0.)
    if alpha is None:
        del tensors[f"lora_unet_{flat(QUERY)}.alpha"]
    changed = change(sd, tensors, tmp_path / "a.safetensors", scale=0.3)
    assert changed.keys() == {f"unet.{QUERY}.weight"}
    torch.testing.assert_close(changed[f"unet.{QUERY}.weight"], 0.3 * factor * up @ down, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, layer", [("down_blocks.0.downsamplers.0.conv", dict(stride=2, padding=1)),
                                         ("down_blocks.0.resnets.0.conv1", dict(padding=1)),
                                         ("down_blocks.1.resnets.0.conv_shortcut", {})])
@torch.no_grad()
def test_a_convolutions_lora_is_its_two_convolutions_in_a_row(sd, tmp_path, name, layer):
    module = sd.unet.get_submodule(name)
    out, channels, kernel, _ = module.weight.shape
    down, up = torch.randn(RANK, channels, kernel, kernel), torch.randn(out, RANK, 1, 1)
    x = torch.randn(2, channels, 8, 8)
    before = module(x)
    change(sd, kohya("lora_unet_" + flat(name), down, up), tmp_path / "a.safetensors", scale=0.5)
    expected = before + 0.25 * F.conv2d(F.conv2d(x, down, **layer), up)
    torch.testing.assert_close(module(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["down_blocks.0.attentions.0.proj_in", QUERY])
def test_a_linear_layer_and_a_1x1_convolution_may_stand_for_each_other(sd, tmp_path, name):
    down, up = torch.randn(RANK, 16), torch.randn(16, RANK)
    first = change(sd, peft("unet", name, down, up), tmp_path / "a.safetensors")
    convolution = peft("unet", name, down[:, :, None, None], up[:, :, None, None])
    second = change(sd, convolution, tmp_path / "b.safetensors", scale=-1.)
    torch.testing.assert_close(first[f"unet.{name}.weight"], -second[f"unet.{name}.weight"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_merged_in_float32(tmp_path, dtype):
    """Weights in half precision and a LoRA in another: one rounding, at the end."""
    sd = load(tiny.write_folder(tmp_path / "w"), dtype=torch.bfloat16)
    before = sd.unet.get_submodule(QUERY).weight.float()
    down, up = (0.1 * torch.randn(RANK, 16)).to(dtype), torch.randn(16, RANK).to(dtype)
    save_file(peft("unet", QUERY, down, up), tmp_path / "a.safetensors")
    merge_lora(sd, tmp_path / "a.safetensors")
    after = sd.unet.get_submodule(QUERY).weight
    assert after.dtype is torch.bfloat16 and not after.requires_grad
    assert torch.equal(after, (before + up.float() @ down.float()).bfloat16())


def test_the_checkpoints_file_stays_as_it_is(sd, tmp_path):
    file = tmp_path / "w/unet/diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    assert change(sd, peft("unet", QUERY, torch.randn(RANK, 16), torch.randn(16, RANK)), tmp_path / "a.safetensors")
    assert file.read_bytes() == before


def test_two_loras_add_up_and_the_second_taken_away_leaves_the_first(sd, tmp_path):
    one, two = ((torch.randn(RANK, 16), torch.randn(16, RANK)) for _ in range(2))
    first = change(sd, peft("unet", QUERY, *one), tmp_path / "a.safetensors")
    second = change(sd, peft("unet", QUERY, *two), tmp_path / "b.safetensors")
    away = change(sd, peft("unet", QUERY, *two), tmp_path / "b.safetensors", scale=-1.)
    key = f"unet.{QUERY}.weight"
    torch.testing.assert_close(first[key], one[1] @ one[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second[key], -away[key], atol=1e-5, rtol=1e-5)


def test_the_fingerprint_tells_files_apart(tmp_path):
    for name, value in (("a", 0.), ("b", 0.), ("c", 1.)):
        save_file({"x": torch.full((3,), value)}, tmp_path / name)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 16
    with pytest.raises(InputError, match="cannot be read"):
        fingerprint(tmp_path / "none")


# ---- what is refused -----------------------------------------------------------------------------

GOOD = peft("unet", QUERY, torch.ones(RANK, 16), torch.ones(16, RANK))
KOHYA = "lora_unet_" + flat(QUERY)


@pytest.mark.parametrize("more, message", [
    ({f"{KOHYA}.hada_w1_a": torch.ones(2, 2)}, "is a LoHa, because it holds lora_unet_down_blocks.*hada_w1_a"),
    ({f"{KOHYA}.lokr_w1": torch.ones(2, 2)}, "is a LoKr, because it holds .*lokr_w1"),
    ({f"{KOHYA}.dora_scale": torch.ones(2, 2)}, "is a DoRA, because it holds .*dora_scale"),
    ({f"unet.{QUERY}.lora_magnitude_vector": torch.ones(2)}, "is a DoRA"),
    ({f"{KOHYA}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker decomposition.*lora_mid"),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, "for SDXL, because it holds lora_te2_"),
    ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 2)}, "for SDXL"),
    ({"lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha": torch.ones(())}, "for SDXL"),
    ({"unet." + QUERY.replace("attn1.to_q", "attn2.to_k") + ".lora_A.weight": torch.ones(2, 2048)}, "for SDXL"),
    ({"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.ones(())}, "no layer for lora_unet_double_blocks_0"),
    ({f"{KOHYA}.diff": torch.ones(16, 16)}, "no layer for .*attn1_to_q.diff"),
    ({"lora_te_text_model_encoder_layers_1_mlp_fc1.alpha": torch.ones(())}, "no layer for .*layers_1_mlp_fc1.alpha"),
    (kohya(KOHYA, torch.ones(RANK, 16), torch.ones(16, RANK)), "attn1.to_q twice"),
    ({f"unet.{QUERY[:-1]}v.lora_A.weight": torch.ones(RANK, 16)}, "only a part of the LoRA for unet.*attn1.to_v"),
    ({f"unet.{QUERY[:-1]}v.alpha": torch.ones(())}, "only a part of the LoRA for unet.*attn1.to_v"),
    ({f"unet.{QUERY}.alpha": torch.ones(2)}, r"the file .*alpha \(2,\)"),
    (peft("unet", QUERY, torch.ones(RANK, 17), torch.ones(16, RANK)), r"shape \(16, 16\), the file down \(4, 17\)"),
    (peft("unet", QUERY, torch.ones(RANK, 16), torch.ones(17, RANK)), "does not fit this model"),
    (peft("unet", QUERY, torch.ones(RANK, 16), torch.ones(16, 5)), "does not fit this model"),
    (peft("unet", QUERY, torch.ones(RANK, 16), torch.ones(16, RANK, 3, 3)), "does not fit this model"),
    (peft("unet", QUERY, torch.ones(RANK, 16), torch.ones(16, 1, RANK)), "does not fit this model"),
    (peft("unet", QUERY, torch.ones(RANK, 16, 3, 3), torch.ones(16, RANK)), "does not fit this model"),
    (peft("unet", QUERY, torch.ones(0, 16), torch.ones(16, 0)), "does not fit this model"),
    (peft("unet", QUERY, torch.ones(16), torch.ones(16)), "does not fit this model"),
    (peft("unet", QUERY, torch.ones(RANK, 16).int(), torch.ones(16, RANK)), r"the file down \(4, 16\) torch.int32"),
    (peft("unet", QUERY, torch.ones(RANK, 16) / 0, torch.ones(16, RANK)), "NaN or infinite: unet.down_blocks"),
    (peft("unet", QUERY, torch.full((RANK, 16), 1e30), torch.full((16, RANK), 1e30)), "NaN or infinite: unet.down")])
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(sd, tmp_path, more, message):
    other = peft("text_encoder", "text_model.encoder.layers.0.mlp.fc1", torch.ones(RANK, 24), torch.ones(96, RANK))
    save_file(other | GOOD | more, tmp_path / "bad.safetensors")
    before = weights_of(sd)
    with pytest.raises(InputError, match=f"bad.safetensors.*{message}"):
        merge_lora(sd, tmp_path / "bad.safetensors")
    assert all(torch.equal(z, before[name]) for name, z in weights_of(sd).items())


def test_files_that_are_no_lora_are_refused(sd, tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="is not a LoRA for this model: it holds nothing"):
        merge_lora(sd, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="is not a LoRA for this model: it holds conv_in.bias, conv_in.weight"):
        merge_lora(sd, tmp_path / "w/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="No LoRA at .*none.safetensors"):
        merge_lora(sd, tmp_path / "none.safetensors")
    (tmp_path / "old.pt").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="old.pt is not a .safetensors file. Only .safetensors files are read"):
        merge_lora(sd, tmp_path / "old.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="torn.safetensors cannot be read"):
        merge_lora(sd, tmp_path / "torn.safetensors")
    save_file(GOOD, tmp_path / "good.safetensors")
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"merged {scale} times, gives weights that are NaN or infinite"):
            merge_lora(sd, tmp_path / "good.safetensors", scale)


# ---- Other prefixes, and alpha that no tensor says -------------------------------------------------

LDM_QUERY, TEXT = "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "text_model.encoder.layers.0.mlp.fc1"
PLACES = {"unet": QUERY, "text_encoder": TEXT}


def ends(down, up, *names):
    return {f"{name}.{end}": z.clone() for name in names for end, z in (("lora_A.weight", down), ("lora_B.weight", up))}


@pytest.fixture(scope="module")
def models():
    """The untouched model, and {part: (down, up)} of rank 4 for a layer of each part."""
    sd = model()
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for part, name in PLACES.items():
        out, width = getattr(sd, part).get_submodule(name).weight.shape[:2]
        pairs[part] = torch.randn(4, width, generator=generator), torch.randn(out, 4, generator=generator)
    return sd, pairs


def factor(models, path, part, scale=1.):
    """How many times up @ down the file in `path` adds to the part's layer; it is the same for each of its numbers."""
    plain, pairs = models
    sd = copy.deepcopy(plain)
    merge_lora(sd, path, scale)
    after, before = (getattr(one, part).get_submodule(PLACES[part]).weight for one in (sd, plain))
    change = after - before
    full = (pairs[part][1] @ pairs[part][0]).view(change.shape)
    found = float((change.detach() * full).sum() / (full * full).sum())
    torch.testing.assert_close(change.detach(), found * full, atol=1e-4, rtol=1e-3)
    return found


@pytest.mark.parametrize("part, name", [
    ("unet", f"diffusion_model.{LDM_QUERY}"), ("unet", f"diffusion_model.{QUERY}"), ("unet", f"unet.{LDM_QUERY}"),
    ("unet", f"base_model.model.{QUERY}"), ("text_encoder", f"base_model.model.{TEXT}"),
    ("text_encoder", f"lora_te1_{flat(TEXT)}")])
@pytest.mark.filterwarnings("ignore:.*adapter_config.json")
def test_further_prefixes_are_read(models, tmp_path, part, name):
    save_file(ends(*models[1][part], name), tmp_path / "a.safetensors")
    assert factor(models, tmp_path / "a.safetensors", part) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("settings, unet, text", [
    ({"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}, 2, 0.5),
    ({"unet.r": 4, "unet.lora_alpha": 8}, 2, 1), ({"unet.r": 4}, 2, 1),                 # peft's own alpha is 8
    ({"r": 4, "lora_alpha": 12}, 3, 1),                                                 # as a U-Net alone is saved
    ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4, 1),
    ({"unet.r": 9, "unet.rank_pattern": {"attn1.to_q": 4}, "unet.lora_alpha": 8}, 2, 1),
    ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5, 1),
    ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 16, "to_q|to_v": 1, "attn1.to_q": 2}}, 0.25, 1),
    ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {QUERY: 0}}, 0, 1),
    ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"o_q": 2}}, 2, 1)])     # a name's part begins at a dot
def test_alpha_in_the_header_counts_as_in_diffusers(models, tmp_path, settings, unet, text):
    """The numbers of the U-Net are those of diffusers 0.42.1 with peft 0.21.2."""
    tensors = {}
    for part, pair in models[1].items():
        tensors |= ends(*pair, f"{part}.{PLACES[part]}")
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert factor(models, tmp_path / "a.safetensors", "unet") == pytest.approx(unet, rel=1e-4, abs=1e-6)
    assert factor(models, tmp_path / "a.safetensors", "text_encoder", 0.5) == pytest.approx(text / 2, rel=1e-4)


@pytest.mark.parametrize("part", PLACES)
def test_alpha_in_adapter_config_counts_as_in_peft(models, tmp_path, part):
    file = tmp_path / "adapter_model.safetensors"
    save_file(ends(*models[1][part], f"base_model.model.{PLACES[part]}"), file)
    with pytest.warns(UserWarning, match="has no adapter_config.json beside it"):
        assert factor(models, file, part) == pytest.approx(1, rel=1e-4)
    first = fingerprint(file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(r=4, lora_alpha=16, alpha_pattern=None)))
    assert factor(models, file, part) == pytest.approx(4, rel=1e-4)
    assert fingerprint(file) != first
    # by names that are not PEFT's: these settings are not the file's own
    save_file(ends(*models[1][part], f"{part}.{PLACES[part]}"), file)
    assert factor(models, file, part) == pytest.approx(1, rel=1e-4)


def test_alpha_may_be_an_integer(models, tmp_path):
    down, up = models[1]["unet"]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        alpha = {f"lora_unet_{flat(QUERY)}.alpha": torch.tensor(2, dtype=dtype)}
        save_file(kohya("lora_unet_" + flat(QUERY), down, up) | alpha, tmp_path / "a.safetensors")
        assert factor(models, tmp_path / "a.safetensors", "unet") == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("text, message", [
    ("x", "cannot be read as JSON"), ("5", "cannot be read as JSON"), ('{"unet.lora_alpha": "x"}', "do not say alpha"),
    ('{"unet.alpha_pattern": {"(": 1}}', "do not say alpha"), ('{"unet.lora_alpha": [1]}', "do not say alpha"),
    ('{"unet.lora_alpha": NaN}', "are NaN or infinite")])
def test_a_header_that_says_no_alpha_is_refused(models, tmp_path, text, message):
    save_file(ends(*models[1]["unet"], f"unet.{QUERY}"), tmp_path / "a.safetensors",
              metadata={"lora_adapter_metadata": text})
    with pytest.raises(InputError, match=message):
        factor(models, tmp_path / "a.safetensors", "unet")


def test_alpha_that_is_said_twice_is_refused(models, tmp_path):
    save_file(kohya(f"unet.{QUERY}", *models[1]["unet"]), tmp_path / "a.safetensors",
              metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 2}'})
    with pytest.raises(InputError, match="says alpha twice"):
        factor(models, tmp_path / "a.safetensors", "unet")


def test_a_bundled_word_is_left_out_with_a_warning(models, tmp_path):
    tensors = ends(*models[1]["unet"], f"unet.{QUERY}") | {"bundle_emb.me.string_to_param.*": torch.ones(2, 24)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="holds learned words, which are not used: me"):
        assert factor(models, tmp_path / "a.safetensors", "unet") == pytest.approx(1, rel=1e-4)
