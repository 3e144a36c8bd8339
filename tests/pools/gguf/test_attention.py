"""What a block keeps for each token, for the forms of attention that models have. The numbers are those of real models'
headers, and what llama.cpp makes of them."""

from __future__ import annotations

from gpumesh.pools.base import ModelShape
from gpumesh.pools.gguf.header import parse_header
from tests.pools.gguf.header_bytes import TensorBytes, block_tensors, header, keys_of, llama_keys, llama_tensors


def shape_of(architecture: str, layers: int, parts_of_layers: list[tuple[str, ...]], **numbers: object) -> ModelShape:
    """A model whose blocks have these tensors, repeated as often as needed."""
    tensors = [TensorBytes("token_embd.weight", (64, 300))]
    for layer in range(layers):
        tensors += block_tensors(layer, *parts_of_layers[layer % len(parts_of_layers)])
    keys = {"embedding_length": 64, "attention__head_count": 4} | numbers | {"block_count": layers}
    shape = parse_header(header(keys_of(architecture, **keys), tensors))
    assert isinstance(shape, ModelShape)
    return shape


ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


def test_heads_may_have_a_size_of_their_own() -> None:
    shape = shape_of("qwen3", 2, [ATTENTION], attention__key_length=128, attention__value_length=96)
    assert shape.kv_elements == (4 * (128 + 96),) * 2
    assert shape.head_size == 128


def test_layers_may_differ_in_their_heads() -> None:
    shape = shape_of("deci", 3, [ATTENTION], attention__head_count_kv=[4, 0, 1])
    assert shape.kv_elements == (4 * 32, 0, 32)


def test_gemma3_looks_at_the_whole_context_in_each_sixth_layer() -> None:
    shape = shape_of("gemma3", 8, [ATTENTION], attention__sliding_window=1024)
    assert shape.window == 1024
    assert shape.window_layers == (True, True, True, True, True, False, True, True)


def test_gpt_oss_does_in_each_second_layer() -> None:
    shape = shape_of("gpt-oss", 4, [ATTENTION], attention__sliding_window=128)
    assert shape.window_layers == (True, False, True, False)


def test_a_list_in_the_file_says_which_layers_have_a_window() -> None:
    pattern = [True, False, False]
    shape = shape_of("gemma4", 3, [ATTENTION], attention__sliding_window=512, attention__sliding_window_pattern=pattern)
    assert shape.window_layers == (True, False, False)
    elements = shape_of(
        "gemma4",
        2,
        [ATTENTION],
        attention__sliding_window=512,
        attention__sliding_window_pattern=[True, False],
        attention__key_length=512,
        attention__value_length=512,
        attention__key_length_swa=256,
        attention__value_length_swa=256,
    ).kv_elements
    assert elements == (4 * 512, 4 * 1024)


def test_llama4_has_its_window_without_saying_so() -> None:
    assert shape_of("llama4", 4, [ATTENTION]).window == 8192
    assert shape_of("llama4", 4, [ATTENTION], attention__sliding_window=0).window is None


def test_others_have_no_window_whatever_their_file_says() -> None:
    assert shape_of("qwen2", 4, [ATTENTION], attention__sliding_window=32768).window is None
    assert shape_of("phi3", 4, [ATTENTION], attention__sliding_window=2047).window is None


def test_layers_that_share_keys_have_none_of_their_own() -> None:
    assert shape_of("gemma3n", 30, [ATTENTION], attention__sliding_window=512).kv_elements[18:22] == (128, 128, 0, 0)
    shared = shape_of("gemma4", 3, [ATTENTION], attention__shared_kv_layers=2)
    assert shared.kv_elements == (128, 0, 0)


def test_latent_attention_keeps_one_row_of_keys_and_no_values() -> None:
    """As DeepSeek V3: 512 numbers for all heads, and 64 for the place."""
    shape = shape_of(
        "deepseek2",
        2,
        [("attn_q_a", "attn_kv_a_mqa", "attn_k_b")],
        attention__head_count=128,
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=192,
        attention__value_length_mla=128,
    )
    assert shape.kv_elements == (576, 576)


MAMBA = {"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16, "ssm__group_count": 1}
STATE_BYTES = 4 * (3 * (128 + 2 * 16) + 16 * 128)


def test_mamba_keeps_a_state_and_no_keys() -> None:
    shape = shape_of("mamba2", 2, [("ssm_in", "ssm_conv1d", "ssm_out")], **MAMBA)
    assert shape.kv_elements == (0, 0)
    assert shape.state_bytes == (STATE_BYTES, STATE_BYTES)
    assert not shape.obstacles


def test_mixed_models_keep_either() -> None:
    """As Qwen3 Next: the blocks with a state have a tensor attn_qkv too."""
    linear = ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_out")
    shape = shape_of("qwen3next", 4, [linear, linear, linear, ATTENTION], **MAMBA)
    assert shape.kv_elements == (0, 0, 0, 128)
    assert shape.state_bytes == (STATE_BYTES, STATE_BYTES, STATE_BYTES, 0)


def test_falcon_h1_keeps_both_in_each_block() -> None:
    shape = shape_of("falcon-h1", 2, [(*ATTENTION, "ssm_in")], **MAMBA)
    assert shape.kv_elements == (128, 128)
    assert shape.state_bytes == (STATE_BYTES, STATE_BYTES)


def test_states_of_rwkv_and_of_short_convolutions() -> None:
    rwkv = shape_of("rwkv7", 1, [("time_mix_w1",)], wkv__head_size=16, attention__head_count=0)
    assert rwkv.state_bytes == (4 * 64 * (2 + 16),)
    short = shape_of("lfm2", 2, [("shortconv.conv",), ATTENTION], shortconv__l_cache=3)
    assert short.state_bytes == (4 * 64 * 2, 0)
    assert short.kv_elements == (0, 128)


def test_blocks_that_only_propose_tokens_keep_nothing() -> None:
    assert shape_of("glm4moe", 3, [ATTENTION], nextn_predict_layers=1).kv_elements == (128, 128, 0)


def test_a_cache_of_unknown_size_is_an_obstacle() -> None:
    shape = shape_of("deepseek32", 2, [("attn_kv_a_mqa", "indexer.k_proj")], attention__key_length_mla=192)
    assert shape.obstacles == ("gpumesh does not know how much memory the cache of the architecture deepseek32 needs",)
    assert shape_of("bert", 2, [("ffn_up",)]).obstacles


def test_a_file_that_also_sees_is_an_obstacle() -> None:
    tensors = [*llama_tensors(), TensorBytes("v.blk.0.attn_q.weight", (64, 64))]
    shape = parse_header(header(llama_keys(), tensors))
    assert isinstance(shape, ModelShape)
    assert "sees" in shape.obstacles[0]


def test_a_file_of_ollamas_own_form_is_an_obstacle() -> None:
    assert "Ollama's own form" in shape_of("gptoss", 2, [ATTENTION]).obstacles[0]


def test_the_width_of_experts_counts_for_models_that_have_some() -> None:
    shape = shape_of(
        "qwen3moe",
        1,
        [ATTENTION],
        feed_forward_length=6144,
        expert_count=128,
        expert_used_count=8,
        expert_feed_forward_length=768,
    )
    assert (shape.experts, shape.experts_used, shape.feed_forward) == (128, 8, 768)
