"""No prediction may know the token that it predicts: changing a token leaves everything before it as it was."""

import functools

import pytest
import torch

from peerscale.config.schema import Config, load
from peerscale.files import ROOT
from peerscale.model.build import build_model
from peerscale.model.transformer import Transformer

FFNS = sorted(path.stem for path in (ROOT / "conf/ffn").glob("*.yaml"))
EXPERT_CHOICE = [ffn for ffn in FFNS if getattr(load([f"ffn={ffn}"]).ffn, "routing", "") == "expert_choice"]
SMALL = ("d_model=16", "n_layers=3", "data.vocab_size=257", "context=8", "replaced=all")
SEQUENCES, TOKENS = 16, 8


@functools.cache
def configured(ffn: str) -> Config:
    return load([f"ffn={ffn}", *SMALL])


def evaluated(ffn: str) -> Transformer:
    """In float64, so that what is equal is equal to many digits, and with statistics of some training batches."""
    torch.manual_seed(0)
    config = configured(ffn)
    assert config.batch_sequences == SEQUENCES
    model = build_model(config).double()
    with torch.no_grad():
        for _ in range(3):
            model(tokens())
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(257, (SEQUENCES, TOKENS))


@pytest.mark.parametrize("ffn", FFNS)
def test_no_logit_depends_on_a_later_token(ffn: str) -> None:
    model, before = evaluated(ffn), tokens()
    for changed in (1, 4, TOKENS - 1):
        after, one = before.clone(), before.clone()
        after[:, changed:] = (after[:, changed:] + 1 + torch.randint(255, after[:, changed:].shape)) % 257
        one[3, changed] = (one[3, changed] + 1) % 257
        with torch.no_grad():
            old, new, of_one = model(before), model(after), model(one)
        torch.testing.assert_close(new[:, :changed], old[:, :changed], rtol=0, atol=1e-12)
        assert (new[:, changed:] - old[:, changed:]).abs().amax(dim=(0, 2)).min() > 1e-3
        torch.testing.assert_close(of_one[3, :changed], old[3, :changed], rtol=0, atol=1e-12)
        assert not torch.allclose(of_one[3, changed:], old[3, changed:])


@pytest.mark.parametrize("ffn", sorted({*FFNS} - {*EXPERT_CHOICE}))
def test_no_sequence_depends_on_the_others(ffn: str) -> None:
    model, text = evaluated(ffn), torch.randint(257, (2 * SEQUENCES, TOKENS))
    with torch.no_grad():
        one_by_one = torch.cat([model(sequence[None]) for sequence in text])
        torch.testing.assert_close(model(text), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ffn", EXPERT_CHOICE)
def test_a_sequence_depends_on_the_others_in_expert_choice(ffn: str) -> None:
    # An expert takes the best tokens of a group. That is why evaluation uses whole batches of the training size: the
    # loss of the same text moves with its company, but not with that of other groups.
    model, text = evaluated(ffn), torch.randint(257, (2 * SEQUENCES, TOKENS))
    with torch.no_grad():
        together, apart = model(text), torch.cat([model(half) for half in text.chunk(2)])
        other_company = model(torch.cat([text[:1], text[SEQUENCES + 1 :]]))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    assert (other_company[0] - apart[0]).abs().max() > 1e-3


@pytest.mark.parametrize("ffn", ["peer", "pkm"])
def test_query_norm_in_training_depends_on_the_batch_and_not_in_evaluation(ffn: str) -> None:
    # The known leak of BatchNorm: its statistics in training are those of all tokens, later ones included.
    model, before = evaluated(ffn), tokens()
    after = before.clone()
    after[:, -1] = (after[:, -1] + 1) % 257
    with torch.no_grad():
        model.train()
        assert (model(before)[:, :-1] - model(after)[:, :-1]).abs().max() > 1e-9
        model.eval()
        torch.testing.assert_close(model(before)[:, :-1], model(after)[:, :-1], rtol=0, atol=1e-12)
