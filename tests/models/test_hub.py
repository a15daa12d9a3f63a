"""Models of the hub that not everybody may read."""

import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError

from tests.trust.hub import hub_of
from transact_core.base.errors import TransActError
from transact_core.data.corpus import read_corpus
from transact_core.models.hub import download
from transact_core.models.load import load_model

TOKEN = "hf_" + "t" * 34


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """Starts a hub that serves `checkpoint` as tiny/model."""
    (checkpoint / "README.md").write_text("---\nlicense: llama3.2\n---\n# Tiny\n")
    (checkpoint / "LICENSE.txt").write_text("terms")
    servers = []

    def start(**restrictions):
        server = hub_of(checkpoint, 0, **restrictions)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_address[1]}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        return address

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refuse(complaint):
    with pytest.raises(TransActError, match=complaint) as refusal:
        download("tiny/model")
    assert "\n" not in str(refusal.value)


def test_a_public_model_is_fetched_with_its_licence(hub):
    hub()
    loaded = load_model("tiny/model")
    assert loaded.licence.identifier == "llama3.2"
    assert (loaded.folder / "LICENSE.txt").read_text() == "terms"


def test_a_gated_model_says_where_its_licence_is_accepted(hub, monkeypatch):
    address = hub(token=TOKEN, gated=True)
    refuse(
        f"gated: accept its licence at {address}/tiny/model, then log in .*hf auth login.*HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    refuse(f"the present token has no access to it: accept its licence at {address}/tiny/model")


def test_a_private_model_says_how_to_log_in(hub, monkeypatch):
    hub(token=TOKEN)
    refuse("no public model tiny/model; check the id, and if the model is private, log in")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    refuse("no model tiny/model that the present token may read")


@pytest.mark.parametrize("gated", [True, False])
def test_the_token_of_the_environment_or_of_the_login_is_used(hub, monkeypatch, tmp_path, gated):
    hub(token=TOKEN, gated=gated)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_model("tiny/model").weight_files
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    (tmp_path / "token").write_text(TOKEN)
    assert load_model("tiny/model").weight_files


def test_a_dataset_that_is_private_or_gated_says_what_to_do(hub, monkeypatch):
    address = hub(token=TOKEN)
    with pytest.raises(TransActError, match=r"no public dataset tiny/texts.*hf auth login"):
        read_corpus("hub:tiny/texts")

    def gated(*given, **named):
        """As `datasets` does it, whose own error hides the hub's answer."""
        answer = SimpleNamespace(status_code=401, headers={}, request=None)
        raise FileNotFoundError("no such dataset") from GatedRepoError("gated", response=answer)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", gated)
    page = f"{address}/datasets/tiny/texts"
    with pytest.raises(TransActError, match=f"tiny/texts is gated: accept its licence at {page}"):
        read_corpus("hub:tiny/texts")
