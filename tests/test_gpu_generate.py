"""Generation by graphs without a GPU: a tape of operations stands in for CUDA graphs."""

import pytest
import torch
from tape import Tape
from torch import nn

import gpu_generate
from attention import Attention, Transformer, TransformerConfig
from gpu_generate import S4Decoder, generate
from s4 import S4, S4Config, S4Model, dlr_mixer, rel_err, s4_mixer, s4d_mixer

SIZES = {"d_model": 16, "n_layers": 2, "vocab_size": 11, "causal": True}


def s4_model(mixer):
    return S4Model(S4Config(**SIZES, d_state=8), mixer)


def transformer(mixer=None, **own):
    config = TransformerConfig(**SIZES, n_heads=4, **own)
    return Transformer(config, mixer=mixer and (lambda *_: S4(16, 8)))


def attention_mixer(*_):
    return Attention(16, 4, causal=True)


MODELS = {
    "S4": lambda: s4_model(s4_mixer),
    "S4D": lambda: s4_model(s4d_mixer),
    "DLR": lambda: s4_model(dlr_mixer),
    "sinusoids": transformer,
    "RoPE": lambda: transformer(rope=True),
    "grouped heads": lambda: transformer(n_kv_heads=2),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    head = nn.Linear(16, 11).double()
    prompt = torch.randint(0, 11, (3, 13))
    return model, head, prompt


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_model(name, temperature, monkeypatch):
    monkeypatch.setattr(gpu_generate, "WINDOW", 8)
    model, head, prompt = build(name)
    torch.manual_seed(1)
    want = model.generate(prompt, 20, head, temperature)
    assert len(set(want.flatten().tolist())) > 2
    torch.manual_seed(1)
    graphs = Tape()
    assert torch.equal(generate(model, prompt, 20, head, temperature, graphs), want)
    # Transformer: 13 + 20 positions, in windows that end at 16, 24, 32 and 33
    assert graphs.captured == (1 if isinstance(model, S4Model) else 3)


def test_a_graph_reads_no_more_positions_than_the_next_window():
    model, _, prompt = build("RoPE")
    _, state = model.prefill(prompt, model.initial_state(3))
    decoder = gpu_generate.TransformerDecoder(model, state, 3000)
    assert [decoder.reach(i) for i in (0, 1010, 1011, 2999)] == [1024, 1024, 2048, 3013]


@torch.no_grad()
def test_a_token_at_a_time_keeps_the_digits_of_the_convolution():
    torch.manual_seed(0)
    model = S4Model(S4Config(8, 1, 64, vocab_size=11, causal=True, dt_min=1e-4))
    decoder = S4Decoder(model, model.initial_state(2), 0)
    tokens = torch.randint(0, 11, (2, 2000))
    outs = [decoder(token, decoder.reach(i)) for i, token in enumerate(tokens.unbind(1))]
    want = model.double()(tokens)
    assert rel_err(torch.stack(outs, 1), want) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1},
        {"prompt": torch.zeros(2, 0)},
        {"prompt": torch.zeros(2)},
    ],
)
def test_nonsense_is_refused(wrong):
    model, head, prompt = build("S4")
    arguments = {"prompt": prompt, "n": 2, "head": head, "graphs": Tape(), **wrong}
    with pytest.raises(ValueError, match="expected temperature"):
        generate(model, **arguments)


@pytest.mark.parametrize("model", [transformer(mixer=S4), s4_model(attention_mixer)])
def test_mixers_of_the_other_model_are_refused(model):
    with pytest.raises(ValueError, match=r"S4Model with Attention, .* use model.generate"):
        generate(model, torch.zeros(2, 3).long(), 2, nn.Linear(16, 11), graphs=Tape())
