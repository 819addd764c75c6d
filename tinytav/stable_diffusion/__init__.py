"""Stable Diffusion, untouched by the paper: configs, tokenizer, text encoder, VAE, U-Net, DDIM, the loader."""
