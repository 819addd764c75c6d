"""config.json: the defaults are the published values, and what is not implemented is refused by name."""
from dataclasses import fields

import pytest

from tinytav.errors import InputError
from tinytav.stable_diffusion import controlnet, single_file
from tinytav.stable_diffusion.clip import CLIPConfig, Preprocessor, VisionConfig
from tinytav.stable_diffusion.controlnet import ControlNetConfig
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.text_encoder import TextEncoderConfig
from tinytav.stable_diffusion.unet import UNetConfig
from tinytav.stable_diffusion.vae import VAEConfig

# Each key that is read of the published config.json files: Stable Diffusion 1.5 and 2.1, CLIP ViT-L/14, and
# lllyasviel/control_v11p_sd15_openpose. Where a file leaves one out, the value is what diffusers or transformers takes.
UNET1 = dict(
    in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, norm_num_groups=32,
    norm_eps=1e-05, cross_attention_dim=768, attention_head_dim=8, use_linear_projection=False, upcast_attention=False,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"])
UNET2 = UNET1 | dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True,
                     upcast_attention=True)
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[128, 256, 512, 512],
           layers_per_block=2, norm_num_groups=32, scaling_factor=0.18215)
TEXT1 = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
             max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-05, eos_token_id=49407)
TEXT2 = TEXT1 | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                     hidden_act="gelu")
HINT = dict(conditioning_embedding_out_channels=[16, 32, 96, 256])
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, prediction_type="epsilon")
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
              patch_size=14, hidden_act="quick_gelu", layer_norm_eps=1e-05)
PREPARED = dict(size=224, crop_size=224, image_mean=[0.48145466, 0.4578275, 0.40821073],
                image_std=[0.26862954, 0.26130258, 0.27577711])


@pytest.mark.parametrize("ours, published", [
    (UNetConfig(), UNET1), (single_file.SD2_UNET, UNET2), (VAEConfig(), VAE), (TextEncoderConfig(), TEXT1),
    (single_file.SD2_TEXT, TEXT2), (ControlNetConfig(), UNET1 | HINT), (controlnet.SD2, UNET2 | HINT),
    (Schedule(), SCHEDULE), (VisionConfig(), VISION),
    (CLIPConfig(), dict(projection_dim=768, text_config=TEXT1, vision_config=VISION)),
    (Preprocessor(), PREPARED)])
def test_what_a_file_leaves_out_is_as_published(ours, published):
    Config = type(ours)
    assert {f.name for f in fields(Config)} <= published.keys()         # each one is compared
    assert ours == Config.from_json(published)


def test_sides_are_eight_times_smaller_in_latents_and_hints():
    assert VAEConfig().factor == ControlNetConfig().hint_factor == 8
    controlnet.check_fits(ControlNetConfig(), UNetConfig(), 8)
    with pytest.raises(InputError, match="hints are 8 times as large as the latents, not 16 times"):
        controlnet.check_fits(ControlNetConfig(), UNetConfig(), 16)


# ---- Settings of which only some values are implemented --------------------------------------------

OF_A_UNET = dict(
    in_channels=9, out_channels=8, act_fn="gelu", addition_embed_type="text_time", attention_type="gated",
    center_input_sample=True, class_embed_type="timestep", conv_in_kernel=1, conv_out_kernel=1,
    cross_attention_norm="layer_norm",
    downsample_padding=0, dropout=0.1, dual_cross_attention=True, encoder_hid_dim=768, encoder_hid_dim_type="text_proj",
    flip_sin_to_cos=False, freq_shift=1, mid_block_scale_factor=0.7, mid_block_type="UNetMidBlock2D",
    mid_block_only_cross_attention=True, num_attention_heads=8, num_class_embeds=10, only_cross_attention=True,
    resnet_out_scale_factor=0.7, resnet_skip_time_act=True, resnet_time_scale_shift="scale_shift",
    time_cond_proj_dim=256,
    time_embedding_act_fn="silu", time_embedding_dim=64, time_embedding_type="fourier", timestep_post_act="silu",
    transformer_layers_per_block=[1, 2, 10])
REFUSED = {
    UNetConfig: OF_A_UNET,
    ControlNetConfig: OF_A_UNET | dict(_class_name="T2IAdapter", conditioning_channels=1,
                                       controlnet_conditioning_channel_order="bgr", global_pool_conditions=True),
    VAEConfig: dict(in_channels=4, out_channels=4, act_fn="gelu", latents_mean=[0.], latents_std=[1.],
                    mid_block_add_attention=False, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
    TextEncoderConfig: dict(hidden_act="relu", attention_dropout=0.1),
    VisionConfig: dict(hidden_act="relu", attention_dropout=0.1, num_channels=1),
    Schedule: dict(beta_schedule="linear", trained_betas=[0.1], rescale_betas_zero_snr=True, prediction_type="sample"),
    Preprocessor: dict(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False, resample=2,
                       rescale_factor=1.)}


@pytest.mark.parametrize("Config, name", [(Config, name) for Config, settings in REFUSED.items() for name in settings])
def test_a_setting_that_is_not_implemented_is_refused_by_name(Config, name):
    with pytest.raises(InputError, match=f"{Config.__name__}: {name} = .* is not implemented"):
        Config.from_json({name: REFUSED[Config][name]})


def test_each_of_them_was_tried():
    assert all(settings.keys() == Config.ONLY.keys() for Config, settings in REFUSED.items())


# ---- Values ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("Config, name", [
    (UNetConfig, "use_linear_projection"), (UNetConfig, "upcast_attention"), (UNetConfig, "center_input_sample"),
    (UNetConfig, "dual_cross_attention"), (UNetConfig, "resnet_skip_time_act"),
    (ControlNetConfig, "global_pool_conditions"), (Schedule, "rescale_betas_zero_snr")])
def test_null_for_true_or_false_is_false_as_in_diffusers(Config, name):
    """diffusers hands null on, and asks whether it is true."""
    assert Config.from_json({name: None}) == Config()


@pytest.mark.parametrize("Config, name", [
    (UNetConfig, "flip_sin_to_cos"), (VAEConfig, "use_quant_conv"), (VAEConfig, "mid_block_add_attention")])
def test_null_is_false_where_only_true_is_implemented_too(Config, name):
    with pytest.raises(InputError, match=f"{name} = False is not implemented"):
        Config.from_json({name: None})


@pytest.mark.parametrize("name, value", [
    ("layers_per_block", True), ("norm_eps", True), ("attention_head_dim", True),
    ("attention_head_dim", [8, True, 8, 8]),
    ("layers_per_block", None), ("norm_eps", "1"), ("block_out_channels", []), ("block_out_channels", 320),
    ("use_linear_projection", 1), ("cross_attention_dim", 0), ("cross_attention_dim", 2 ** 21),
    ("norm_eps", float("nan"))])
def test_a_value_of_another_type_or_size_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"UNetConfig: {name} = "):
        UNetConfig.from_json({name: value})


@pytest.mark.parametrize("Config, settings", [
    (VAEConfig, dict(block_out_channels=[128] * 30_000)), (VAEConfig, dict(layers_per_block=33)),
    (UNetConfig, dict(block_out_channels=[320] * 33)), (UNetConfig, dict(layers_per_block=33)),
    (ControlNetConfig, dict(conditioning_embedding_out_channels=[16] * 33)),
    (TextEncoderConfig, dict(num_hidden_layers=101))])
def test_more_blocks_than_any_model_has_are_refused_before_they_are_built(Config, settings):
    name, = settings
    with pytest.raises(InputError, match=f"{Config.__name__}: {name} "):
        Config.from_json(settings)


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(InputError, match="VAEConfig: a JSON object is expected, not list"):
        VAEConfig.from_json([])
