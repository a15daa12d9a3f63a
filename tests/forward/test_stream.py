import pytest
import torch

from transact_core.base.linalg import second_moments
from transact_core.forward.stream import Stream


@torch.no_grad()
def test_the_stream_is_the_models_own(model, windows):
    windows = windows[0]
    seen = {}
    handles = [
        projection.register_forward_pre_hook(
            lambda _, inputs, key=(number, module): seen.__setitem__(key, inputs[0])
        )
        for number, layer in enumerate(model.model.layers)
        for module, projection in (("mha", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj))
    ]
    hidden = model.model(windows.ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    stream = Stream(model, windows)
    for number in range(len(model.model.layers)):
        torch.testing.assert_close(stream.hidden, hidden[number], rtol=1e-4, atol=1e-4)
        for module in ("mha", "mlp"):
            batches = [
                (transitional.clone(), residual.clone())
                for transitional, residual, _ in stream.advance(number, module)
            ]
            transitional, residual = (torch.cat(each) for each in zip(*batches, strict=True))
            torch.testing.assert_close(transitional, seen[number, module], rtol=1e-4, atol=1e-4)
            assert torch.equal(residual, stream.hidden)
    last = model.model.norm(stream.hidden)
    torch.testing.assert_close(last, hidden[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 5, 40])
def test_second_moments_are_a_plain_product(width):
    torch.manual_seed(0)
    batches = [torch.randn(tokens, width) for tokens in (7, 1, 30)]
    x = torch.cat(batches).double()
    gram = second_moments(iter(batches), width)
    torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram, gram.T)
