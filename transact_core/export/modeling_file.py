"""A file of code beside a checkpoint whose layers have widths of their own, for other programs.

Stock transformers refuses such a checkpoint. With this file, which is written only where it is
asked for, it loads it under `trust_remote_code=True`. Where all layers have as many query heads,
`config.json` also has the `block_configs` of vLLM's `DeciLMForCausalLM`, which needs
`--trust-remote-code` as well. This program never runs such a file: it reads `per_layer_config`.
"""

import json
from pathlib import Path

from transact_core.models.architecture import Architecture
from transact_core.models.families.table import FAMILIES
from transact_core.models.layer_widths import BLOCK_CLASS, MODELING_CLASS

FILE = "modeling_own_widths.py"
CONFIG = "OwnWidthsConfig"
BLOCK_TYPE = "nemotron-nas"
"""The `model_type` by which vLLM knows models with block configurations."""
AS_BLOCKS = ("llama", "mistral")
"""`model_type` of the classes that compute what vLLM's DeciLM does."""
CODE = '''"""{title}

Made for transformers 5.23; loaded with trust_remote_code=True. The widths of single layers stand in
config.json under per_layer_config; all others have those of the configuration.
"""

import copy
from types import SimpleNamespace

from transformers import {config_class}, {model_class}

WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class {config}({config_class}):
    model_type = "{model_type}"

    def __init__(self, per_layer_config=None, block_configs=None, **fields):
        fields.pop("model_type", None)
        super().__init__(**fields)
        # Under another name: transformers refuses models of a per_layer_config of its own.
        self.widths_of_layers = per_layer_config or {{}}

    def widths_of(self, layer_index):
        own = self.widths_of_layers.get(str(layer_index), {{}})
        return {{name: own.get(name, getattr(self, name)) for name in WIDTHS}}

    def to_dict(self):
        fields = super().to_dict()
        fields["per_layer_config"] = fields.pop("widths_of_layers", {{}})
        return fields
{blocks}

class {model}({model_class}):
    config_class = {config}

    def __init__(self, config):
        super().__init__(config)
        for layer_index, layer in enumerate(self.model.layers):
            own = copy.copy(config)
            for name, width in config.widths_of(layer_index).items():
                setattr(own, name, width)
            self.model.layers[layer_index] = type(layer)(own, layer_index)
        self.post_init()
'''
BLOCKS = '''
    @property
    def block_configs(self):
        """As vLLM's DeciLM reads them."""
        found = []
        for layer_index in range(self.num_hidden_layers):
            widths = self.widths_of(layer_index)
            group = widths["num_attention_heads"] // widths["num_key_value_heads"]
            attention = SimpleNamespace(
                no_op=False, replace_with_linear=False, n_heads_in_group=group
            )
            ffn = SimpleNamespace(
                no_op=False,
                replace_with_linear=False,
                intermediate_size=widths["intermediate_size"],
            )
            found.append(SimpleNamespace(attention=attention, ffn=ffn))
        return found
'''


def has_blocks(architecture: Architecture) -> bool:
    """Whether vLLM's DeciLM can hold these widths: as many query heads in all layers."""
    heads = {widths.num_attention_heads for widths in architecture.layers}
    biased = architecture.attention_bias or architecture.mlp_bias
    return len(heads) == 1 and architecture.model_type in AS_BLOCKS and not biased


def block_configs(architecture: Architecture) -> list[dict[str, dict[str, bool | int]]]:
    """What `config.json` holds under `block_configs`, with an entry for each layer."""
    return [
        {
            "attention": {
                "no_op": False,
                "replace_with_linear": False,
                "n_heads_in_group": widths.num_attention_heads // widths.num_key_value_heads,
            },
            "ffn": {
                "no_op": False,
                "replace_with_linear": False,
                "intermediate_size": widths.intermediate_size,
            },
        }
        for widths in architecture.layers
    ]


def add_modeling_file(folder: Path, architecture: Architecture) -> str:
    """Writes the file into a checkpoint folder, and into its `config.json` what names it.

    Does nothing where all layers have the same widths: stock transformers loads that. Gives what
    the model card says of it.
    """
    if architecture.uniform:
        return ""
    family, blocks = FAMILIES[architecture.model_type], has_blocks(architecture)
    config_class = family.model_class.config_class.__name__
    code = CODE.format(
        title=f"A {family.class_name} whose layers have widths of their own.",
        config_class=config_class,
        model_class=family.class_name,
        config=CONFIG,
        model=MODELING_CLASS,
        model_type=BLOCK_TYPE if blocks else family.model_type,
        blocks=BLOCKS if blocks else "",
    )
    if not blocks:
        code = code.replace("from types import SimpleNamespace\n", "")
    (folder / FILE).write_text(code)
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    module = FILE.removesuffix(".py")
    stored["auto_map"] = {
        "AutoConfig": f"{module}.{CONFIG}",
        "AutoModelForCausalLM": f"{module}.{MODELING_CLASS}",
    }
    stored["architectures"] = [BLOCK_CLASS if blocks else MODELING_CLASS]
    if blocks:
        stored["block_configs"] = block_configs(architecture)
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    for_vllm = (
        f""" `config.json` also has the
`block_configs` of vLLM's `{BLOCK_CLASS}` (`--trust-remote-code`), which has not been tried."""
        if blocks
        else ""
    )
    return f"""

Other programs load it with the code in `{FILE}`, which they run only if told to trust it:
`AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)`.{for_vllm}"""
