"""What the source model's licence means for an output folder: its files, and lines of its card."""

import json
import shutil
from pathlib import Path

from transact_core.models.checkpoint_folder import own_files
from transact_core.models.licence import Licence, licence_files

LLAMA_SERIES = {
    "llama2": "Llama 2",
    "llama3": "Meta Llama 3",
    "llama3.1": "Llama 3.1",
    "llama3.2": "Llama 3.2",
    "llama3.3": "Llama 3.3",
    "llama4": "Llama 4",
}
"""Name of the models under each licence of Meta's, by the hub's identifier of the licence."""
NAME_BEGINS = {"llama2": "", "llama3": "Llama 3"}
"""How the name of a model that is made from one of these has to begin; `Llama` for later ones.

Sections 1.b.i of the Llama 3 to Llama 4 Community License Agreements; that of Llama 2 asks for
nothing.
"""
NOTICE = "NOTICE"


def keep_licence(licence: Licence | None, output: Path, source: Path | None) -> None:
    """Copies licence and notice files of `source`, and writes the notice that Llama's demands."""
    if source is not None:
        for file in own_files(source, licence_files(source)):
            shutil.copyfile(file, output / file.name)
    series = LLAMA_SERIES.get(_identifier(licence))
    if series and not any(path.name.upper().startswith(NOTICE) for path in output.iterdir()):
        terms = "LLAMA 2" if series == "Llama 2" else series
        (output / NOTICE).write_text(
            f"{series} is licensed under the {terms} Community License, Copyright © Meta "
            "Platforms, Inc. All Rights Reserved.\n",
            encoding="utf-8",
        )


def front_matter_lines(licence: Licence | None) -> str:
    """The lines about the licence in a model card's front matter, each with its line end."""
    if licence is None:
        return ""
    fields = {
        "license": licence.identifier or "other",
        "license_name": licence.name,
        "license_link": licence.link,
    }
    # A JSON string is a YAML string too, whatever it holds.
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items() if value)


def licence_lines(licence: Licence | None) -> str:
    """One or two sentences for a model card: which licence holds, and what it asks to be said."""
    identifier = _identifier(licence)
    if not identifier:
        return "The terms of the dense model's licence hold for this one."
    spelled = "".join(character for character in identifier if character not in "`<>[]")
    line = f"The terms of the dense model's licence, `{spelled}`, hold for this one."
    if identifier in LLAMA_SERIES and identifier != "llama2":
        built_with = "Meta Llama 3" if identifier == "llama3" else "Llama"
        line += f" Built with {built_with}."
    return line


def name_under_licence(name: str, licence: Licence | None) -> str:
    """The name of a model made from `name`, with the beginning that the licence demands."""
    identifier = _identifier(licence)
    if identifier not in LLAMA_SERIES:
        return name
    beginning = NAME_BEGINS.get(identifier, "Llama")
    plain = name.lower().replace("-", " ").replace("_", " ")
    return name if plain.startswith(beginning.lower()) else f"{beginning} {name}"


def _identifier(licence: Licence | None) -> str:
    """The licence's identifier, or its name where the identifier is `other`."""
    if licence is None:
        return ""
    if licence.identifier in (None, "other"):
        return (licence.name or licence.identifier or "").lower()
    return licence.identifier.lower()
