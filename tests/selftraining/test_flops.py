"""Parameters and operations against numbers worked out by hand."""

from dataclasses import replace

import pytest

from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.selftraining.estimates import ModelSize, forward_flops, model_size, sampling_flops, training_flops

CONFIG = T5Config(10, 4, 3, 8, 2, 1, 2)  # 10 ids, width 4, 2 heads of 3, feed-forward 8, 1 + 2 layers

ATTENTION, FEED_FORWARD, NORM, BIAS, HEAD = 4 * 4 * 6, 3 * 4 * 8, 4, 32 * 2, 10 * 4
ENCODER = ATTENTION + FEED_FORWARD + 2 * NORM + BIAS + NORM
DECODER = 2 * (2 * ATTENTION + FEED_FORWARD + 3 * NORM) + BIAS + NORM


@pytest.mark.parametrize("tied", [False, True])
def test_size_has_the_output_layer_but_no_input_embedding(tied):
    assert (ENCODER, DECODER + HEAD) == (268, 708)
    assert model_size(T5(replace(CONFIG, tied=tied))) == ModelSize(268, 708, 1, 2, 4)


def test_size_of_a_decoder_only_model():
    # Source tokens pass the layers, target tokens the output layer too.
    layer = 4 * (6 + 3 + 3) + 6 * 4 + 3 * 4 * 8 + 2 * 4  # query, key, value, output, feed-forward, two norms
    model = Llama(LlamaConfig(10, 4, 8, 2, n_heads=2, n_kv_heads=1, d_head=3))
    assert model_size(model) == ModelSize(2 * layer + 4, 2 * layer + 4 + HEAD, 2, 2, 4)


def test_training_costs_three_forward_passes():
    size = model_size(T5(CONFIG))
    assert forward_flops(size, n_source=3, n_target=5) == 2 * (268 * 3 + 708 * 5) == 8688
    assert training_flops(size, n_source=3, n_target=5) == 3 * 8688
    assert training_flops(size, n_source=3, n_target=5, is_frozen=True) == 2 * 8688  # no gradients of the weights


def test_sampling_prefills_each_prompt_once():
    size = model_size(T5(CONFIG))
    prefill = 3 * (2 * 268 + 2 * 1 * 3 * 4) + 2 * (2 * 268 + 2 * 1 * 2 * 4)
    decoding = sum(n * 1.66 * 708 + 2 * 2 * 4 * n * n / 2 for n in (5, 2, 7))
    assert sampling_flops(size, [3, 2], [5, 2, 7]) == pytest.approx(prefill + decoding)
    assert sampling_flops(size, [3, 2], [5, 2, 7]) == pytest.approx(2784 + 14 * 1175.28 + 8 * (25 + 4 + 49))


def test_a_tokens_cost_is_linear_in_its_position():
    """The paper's printed sum, with its factor i, would make n tokens cost of the order of n³."""
    size = ModelSize(0, 0, 1, 1, 4)  # attention alone
    assert sampling_flops(size, [], [200]) == pytest.approx(4 * sampling_flops(size, [], [100]))
