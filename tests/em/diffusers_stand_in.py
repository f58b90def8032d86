"""Tiny untrained pipelines, saved in the layouts of the real ones."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from latentdem.priors.calibration import dead_leaves

IMAGES = dead_leaves(1, 64, seed=3)
DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4}


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule(prediction_type):
    return DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type,
        steps_offset=1,
    )  # fmt: skip


def tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "a", "c", "t"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return transformers.CLIPTokenizer(*files, model_max_length=8)


def text_encoder(width=16, projection=False):
    transformers = pytest.importorskip("transformers")
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(
        vocab_size=7, hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, eos_token_id=1, bos_token_id=0,
        pad_token_id=1, projection_dim=12,
    ))  # fmt: skip


def kl_autoencoder(**others):
    return AutoencoderKL(**BLOCKS, down_block_types=DOWN, up_block_types=UP, **others)


def tiny_autoencoder(**others):
    """As TAESD, but two levels of eight channels."""
    widths, blocks = {"encoder": (8, 8), "decoder": (8, 8)}, {"encoder": (1, 1), "decoder": (1, 1)}
    return AutoencoderTiny(
        **{f"{part}_block_out_channels": width for part, width in widths.items()},
        **{f"num_{part}_blocks": count for part, count in blocks.items()}, **others,
    )  # fmt: skip


def text_unet(width=16, **others):
    return UNet2DConditionModel(
        sample_size=16, cross_attention_dim=width, attention_head_dim=2, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **BLOCKS, **others,
    )  # fmt: skip


def saved(pipeline, folder):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline", pipeline


def save_stable_diffusion(folder, prediction_type="epsilon", scheduler=None, vae=None):
    torch.manual_seed(0)
    words, encoder = tokenizer(folder / "words"), text_encoder()
    return saved(StableDiffusionPipeline(
        vae or kl_autoencoder(scaling_factor=0.18215), encoder, words, text_unet(),
        scheduler or schedule(prediction_type), None, None, requires_safety_checker=False,
    ), folder)  # fmt: skip


def save_consistency_model(folder, scheduler):
    torch.manual_seed(0)
    words, encoder = tokenizer(folder / "words"), text_encoder()
    return saved(LatentConsistencyModelPipeline(
        kl_autoencoder(scaling_factor=0.18215), encoder, words, text_unet(time_cond_proj_dim=10),
        scheduler, None, None, requires_safety_checker=False,
    ), folder)  # fmt: skip


def save_xl(folder, force_zeros=True, force_upcast=True, scheduler=None):
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    unet = text_unet(
        24, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )  # fmt: skip
    vae = kl_autoencoder(scaling_factor=0.13025, force_upcast=force_upcast)
    return saved(StableDiffusionXLPipeline(
        vae, text_encoder(8), text_encoder(16, projection=True), words, words, unet,
        scheduler or schedule("epsilon"), force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    ), folder)  # fmt: skip


def save_latent_diffusion(folder):
    torch.manual_seed(0)
    vqvae = VQModel(**BLOCKS, down_block_types=DOWN, up_block_types=UP, latent_channels=3,
                    num_vq_embeddings=32)  # fmt: skip
    unet = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                       **BLOCKS)  # fmt: skip
    return saved(LDMPipeline(vqvae, unet, schedule("epsilon")), folder)


def trajectory(prior, latents, timesteps, last_abar):
    """DDIM, eta = 0, by our own predictions."""
    for here, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        z0, epsilon = prior.predict(latents, here)
        abar = last_abar if after is None else float(prior.alphas_cumprod[after])
        latents = abar**0.5 * z0 + (1 - abar) ** 0.5 * epsilon
    return latents
