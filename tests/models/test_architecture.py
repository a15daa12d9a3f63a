from transact_core.models.architecture import Architecture


def test_tensors_are_those_of_the_checkpoint(model):
    stored = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert dict(Architecture.from_config(model.config).tensors()) == stored


def test_parameters_are_counted_once(model):
    counted = sum(weight.numel() for weight in model.parameters())
    assert Architecture.from_config(model.config).parameters == counted
