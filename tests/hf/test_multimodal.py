"""Models with towers besides the text decoder: the program runs in the decoder, everything else stays stock code."""

import pytest
import torch
import zoo
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    Gemma3Config,
    LlavaConfig,
    Phi4MultimodalConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from turbos import enliven

import depthpass as dp
from depthpass.errors import CacheError, InputError

pytestmark = pytest.mark.usefixtures("one_capture")

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}
IMAGE = 90
SPEC = dp.TurboConn(bridges=[(2, 0)], group=3, rank=4)


def gemma(auto=AutoModelForImageTextToText, **more):
    text = zoo.config("gemma3_text", 3, **more).to_dict()
    config = Gemma3Config(text_config=text, vision_config=VISION, image_token_index=IMAGE, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return enliven(auto.from_config(config).eval())


def llava():
    config = LlavaConfig(
        text_config=zoo.config("llama", 3).to_dict(), image_token_index=IMAGE, image_seq_length=4,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
    )
    torch.manual_seed(0)
    return enliven(AutoModelForImageTextToText.from_config(config).eval())


def qwen():
    """Keys are turned by a token's place in time, height and width; as many blocks in the tower as in the decoder."""
    text = zoo.config("qwen2", 3, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
    config = Qwen2VLConfig(
        text_config=text.to_dict(), image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        vision_config={"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
    )
    torch.manual_seed(0)
    return enliven(AutoModelForImageTextToText.from_config(config).eval())


def smol():
    """Its class around the decoder makes a cache of its own."""
    config = SmolVLMConfig(text_config={**zoo.config("llama", 3).to_dict()}, vision_config={**VISION, "num_hidden_layers": 3},
                           image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    torch.manual_seed(0)
    return enliven(AutoModelForImageTextToText.from_config(config).eval())


def qwen3():
    """How many parts of a key turn by which place is the rotary module's default; its config does not say it."""
    config = Qwen3VLConfig(
        text_config=zoo.config("qwen3", 3).to_dict(), image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93, vision_config={"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2,
                                               "intermediate_size": 24, "deepstack_visual_indexes": [0]},
    )
    torch.manual_seed(0)
    return enliven(AutoModelForImageTextToText.from_config(config).eval())


def windows():
    """Every layer has a window, so that the masks of a decoded token show the last columns alone."""
    return gemma(layer_types=["sliding_attention"] * 3)


def phi():
    """The towers, with their tables of 4 positions, are parts of the decoder's embedding."""
    audio = {"hidden_size": 16, "intermediate_size": 24, "num_blocks": 1, "num_attention_heads": 2, "input_size": 8,
             "nemo_conv_channels": 16, "ext_pw_out_channel": 16, "bias_max_distance": 8}
    config = Phi4MultimodalConfig(
        vision_config={**VISION, "crop_size": 8}, audio_config=audio, original_max_position_embeddings=128,
        **{n: getattr(zoo.config("llama", 3), n) for n in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")},
    )
    torch.manual_seed(0)
    return enliven(AutoModelForCausalLM.from_config(config).eval())


def with_small_image(build):
    """Rows with an image of one token behind padding."""
    ids = zoo.batch([20, 15])["input_ids"].clamp_max(IMAGE - 1)
    ids[:, 8] = IMAGE
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    draw = torch.Generator().manual_seed(0)
    if build is smol:
        return {**given, "pixel_values": torch.randn(2, 1, 3, 8, 8, generator=draw)}
    return {**given, "pixel_values": torch.randn(8, 96, generator=draw), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
            "mm_token_type_ids": (ids == IMAGE).int()}


def inputs(lengths=(20, 14)):
    """Padded rows of text, longer than the vision tower's table of 5 positions and than any window."""
    return zoo.batch(list(lengths))


def with_image():
    ids = zoo.batch([20, 20])["input_ids"].clamp_max(IMAGE - 1)
    ids[:, 3:7] = IMAGE
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def real(output, mask):
    return output[0][mask.bool()]


@pytest.mark.parametrize("style", ["sdpa", "eager"])
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel], ids=["with head", "base"])
def test_text_through_masks_that_the_outer_class_makes(auto, style):
    stock = gemma(auto)
    stock.set_attn_implementation(style)
    transformed, given = dp.transform(stock, dp.Identity()), inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            real(transformed(**given, use_cache=False), given["attention_mask"]),
            real(stock(**given, use_cache=False), given["attention_mask"]),
        )
        alone = {n: x[:1] for n, x in inputs((20,)).items()}
        torch.testing.assert_close(transformed(input_ids=alone["input_ids"])[0], stock(input_ids=alone["input_ids"])[0])


@pytest.mark.parametrize("build", [gemma, llava])
def test_a_padded_row_of_a_program_is_the_row_alone_and_generates_as_it_scores(build):
    transformed, given = dp.transform(build(), SPEC), inputs()
    enliven(transformed.depth, seed=1, least=1)
    with torch.no_grad():
        both = transformed(**given, use_cache=False).logits
        one = transformed(input_ids=given["input_ids"][1:, 6:], use_cache=False).logits
        torch.testing.assert_close(both[1:, 6:], one)
        out = transformed.generate(**given, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
        mask = torch.cat((given["attention_mask"], torch.ones(2, 4, dtype=torch.long)), 1)
        scored = transformed(input_ids=out.sequences[:, :-1], attention_mask=mask, use_cache=False).logits[:, -5:]
    torch.testing.assert_close(torch.stack(out.logits, 1), scored, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [qwen3, windows, phi])
def test_text_generates_as_the_stock_model_does(build):
    stock, given = build(), inputs()
    transformed, options = dp.transform(stock, dp.Identity()), dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(transformed.generate(**given, **options), stock.generate(**given, **options))
    looped = dp.transform(stock, dp.Loop(start=1, end=2, times=2))
    out = looped.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    mask = torch.cat((given["attention_mask"], torch.ones(2, 3, dtype=torch.long)), 1)
    with torch.no_grad():
        scored = looped(input_ids=out.sequences[:, :-1], attention_mask=mask, use_cache=False).logits[:, -4:]
    torch.testing.assert_close(torch.stack(out.logits, 1), scored, atol=1e-4, rtol=1e-4)


def test_as_many_places_as_a_key_has_parts():
    """HunYuan's tokens have four places: nothing in front of them counts tokens."""
    transformers = pytest.importorskip("transformers.models.hunyuan_vl", reason="not in this release")
    text = zoo.config("llama", 3).to_dict() | {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}}
    config = transformers.HunYuanVLConfig(text_config=text, vision_config=VISION, image_token_id=IMAGE).text_config
    torch.manual_seed(0)
    stock = enliven(AutoModel.from_config(config).eval())
    places = torch.randint(12, (4, 2, 9), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": inputs((9, 9))["input_ids"], "position_ids": places, "use_cache": False}
    transformed = dp.transform(stock, dp.Identity())
    with torch.no_grad():
        torch.testing.assert_close(transformed(**given).last_hidden_state, stock(**given).last_hidden_state)
    with pytest.raises(InputError, match="position_ids"):
        transformed(**{**given, "position_ids": places[:3]})


@pytest.mark.parametrize("style", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [gemma, llava])
def test_packed_rows_through_masks_that_the_outer_class_makes(build, style):
    """Windows of 4 in sequences of 9: masks that the outer class makes for packed rows say what position_ids say."""
    stock, lengths = build(), [9, 2, 9]
    stock.set_attn_implementation(style)
    transformed, plain = dp.transform(stock, SPEC), dp.transform(stock, dp.Identity())
    enliven(transformed.depth, seed=1, least=1)
    ids = inputs((20, 20))["input_ids"]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with torch.no_grad():
        actual = transformed(input_ids=ids, position_ids=positions)
        for x, y in zip(actual.logits.split(lengths, 1), ids.split(lengths, 1)):
            torch.testing.assert_close(x, transformed(input_ids=y, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        torch.testing.assert_close(plain(**given).logits, stock(**given).logits, rtol=1e-4, atol=1e-4)
        # Labels that are not separated, and ones that are.
        losses = [transformed(**given, labels=x).loss for x in (ids, ids.masked_fill(positions == 0, -100))]
        assert torch.equal(*losses)


def test_images_that_are_read_causally():
    stock = llava()
    transformed, given = dp.transform(stock, dp.Identity()), with_image()
    with torch.no_grad():
        torch.testing.assert_close(transformed(**given).logits, stock(**given).logits)
        other = transformed(**{**given, "pixel_values": -given["pixel_values"]}).logits
        assert not torch.allclose(other, transformed(**given).logits)
        wanted = stock.generate(**given, max_new_tokens=4, do_sample=False)
        assert torch.equal(transformed.generate(**given, max_new_tokens=4, do_sample=False), wanted)


@pytest.mark.parametrize("build", [qwen, smol])
def test_places_in_images_and_caches_that_outer_classes_make(build):
    stock = build()
    transformed, turbo, given = dp.transform(stock, dp.Identity()), dp.transform(stock, SPEC), with_small_image(build)
    enliven(turbo.depth, seed=1, least=1)
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        wanted = stock(**given).logits
        torch.testing.assert_close(transformed(**given).logits[mask], wanted[mask])
        torch.testing.assert_close(transformed.lm_head(transformed.model(**given).last_hidden_state)[mask], wanted[mask])
        assert not torch.allclose(wanted, stock(**{**given, "pixel_values": -given["pixel_values"]}).logits)
        wanted = stock.generate(**given, max_new_tokens=4, do_sample=False)
        assert torch.equal(transformed.generate(**given, max_new_tokens=4, do_sample=False), wanted)
        out = turbo.generate(**given, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
        more = {n: torch.cat((given[n], x.to(given[n]).expand(2, 4)), 1) for n, x in (
            ("attention_mask", torch.ones(())), ("mm_token_type_ids", torch.zeros(()))) if n in given}
        scored = turbo(**{**given, **more, "input_ids": out.sequences[:, :-1]}, use_cache=False).logits[:, -5:]
    torch.testing.assert_close(torch.stack(out.logits, 1), scored, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scored[:, 0], wanted_logits(stock, given), atol=1e-2)
    cache = DynamicCache()
    with pytest.raises(CacheError, match="expected a DepthCache"):  # one that a caller would go on with
        transformed(**given, **{zoo.CACHE: cache})


def wanted_logits(stock, given):
    with torch.no_grad():
        return stock(**given).logits[:, -1]


@pytest.fixture(scope="module")
def gemma4():
    """Its outer class hands the decoder an input for every block, and labels; returns rows of one image of four tokens, too."""
    transformers = pytest.importorskip("transformers.models.gemma4", reason="not in this release")
    text = zoo.config("gemma4_text", 2, global_head_dim=8, num_global_key_value_heads=2, hidden_size_per_layer_input=8,
                      vocab_size_per_layer_input=zoo.VOCABULARY, layer_types="alternate", sliding_window=4)
    tokens = dict(zip(("boi", "eoi", "boa", "audio", "video"), range(91, 96)))
    config = transformers.Gemma4Config(
        text_config=text.to_dict(), audio_config=None, image_token_id=IMAGE, eoa_token_index=96,
        **{f"{n}_token_id": t for n, t in tokens.items()},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
                       "position_embedding_size": 16},
    )
    torch.manual_seed(0)
    stock = enliven(AutoModelForImageTextToText.from_config(config).eval(), std=0.15)
    given = inputs((14, 11))
    given["input_ids"] = given["input_ids"].clamp_max(IMAGE - 1)
    given["input_ids"][:, 5:9] = IMAGE
    grid = torch.tensor([[x, y] for y in range(4) for x in range(4)]).expand(2, -1, -1)
    return stock, given | {"pixel_values": torch.rand(2, 16, 48, generator=torch.Generator().manual_seed(0)),
                           "image_position_ids": grid}


def test_inputs_of_every_block_and_labels_that_the_outer_class_hands_on(gemma4):
    stock, given = gemma4
    same, mask = dp.transform(stock, dp.Identity()), given["attention_mask"].bool()
    parameters = [p for n, p in stock.named_parameters() if "per_layer" in n or "vision" in n]
    labels = given["input_ids"].masked_fill(~mask, -100)
    outs = [m(**given, labels=labels, use_cache=False) for m in (same, stock)]
    torch.testing.assert_close(*(out.logits[mask] for out in outs))
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    for a, b in zip(*(torch.autograd.grad(out.loss, parameters, allow_unused=True) for out in outs), strict=True):
        torch.testing.assert_close(a, b)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [*range(IMAGE, 97)]}
    assert torch.equal(same.generate(**given, **options), stock.generate(**given, **options))
    turbo = dp.transform(stock, dp.TurboConn(bridges=[(1, 0)], group=3, rank=4))
    enliven(turbo.depth, seed=1, least=1)
    out = turbo.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    longer = torch.cat((given["attention_mask"], torch.ones(2, 3, dtype=torch.long)), 1)
    with torch.no_grad():
        scored = turbo(**given | {"input_ids": out.sequences[:, :-1], "attention_mask": longer}, use_cache=False).logits[:, -4:]
    torch.testing.assert_close(torch.stack(out.logits, 1), scored, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scored[:, 0], wanted_logits(stock, given), atol=1e-2)


def test_text_behind_an_image_that_a_kept_cache_holds():
    """The second turn's places are one number for all axes, from where the image's places ended."""
    stock, given = qwen(), with_small_image(qwen)
    same = dp.transform(stock, dp.Identity())
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [*range(IMAGE, 97)]}
    answers = []
    for model, cache in ((stock, DynamicCache(config=stock.config.get_text_config())), (same, dp.DepthCache(same))):
        first = model.generate(**given, **options, **{zoo.CACHE: cache})
        ids = torch.cat((first, given["input_ids"][:, -4:]), 1)
        mask = torch.cat((given["attention_mask"], torch.ones(2, 7, dtype=torch.long)), 1)
        second = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}
        answers.append(model.generate(**second, **options, **{zoo.CACHE: cache}))
    assert torch.equal(*answers)


def test_images_that_are_added_between_blocks_are_refused_with_the_reason():
    """Qwen3-VL's tower adds to the streams of the first blocks: the message says so, and what runs instead."""
    stock = qwen3()
    given = with_small_image(qwen)
    vision = stock.config.vision_config
    given["pixel_values"] = torch.randn(8, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    assert stock(**given).logits.isfinite().all()  # the inputs are right
    transformed = dp.transform(stock, dp.Identity())
    with pytest.raises(InputError, match=r"visual_pos_masks.*added to the stream between blocks.*text runs.*Qwen2\.5-VL"):
        transformed(**given)


def test_images_that_see_both_ways_are_refused_by_name():
    stock = gemma()
    transformed, given = dp.transform(stock, dp.Identity()), with_image()
    with torch.no_grad():
        torch.testing.assert_close(transformed(**given).logits, stock(**given).logits)
        types = (given["input_ids"] == IMAGE).long()
        with pytest.raises(InputError, match=r"not causal.*token_type_ids"):
            transformed(**given, token_type_ids=types)
        with pytest.raises(InputError, match="not causal"):
            transformed.generate(**given, token_type_ids=types, max_new_tokens=2)
        if "mm_encoder_outputs" in type(stock).forward.__code__.co_varnames:
            image = {"image": stock.model.get_image_features(pixel_values=given.pop("pixel_values"), return_dict=True)}
            torch.testing.assert_close(
                transformed(**given, mm_encoder_outputs=image).logits, stock(**given, mm_encoder_outputs=dict(image)).logits
            )
