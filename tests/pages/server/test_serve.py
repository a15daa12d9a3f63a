"""The server is checked with the very settings and secrets that it will read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SERVE = """
import sys
from pathlib import Path
from pages.server import serve

serve.cli.main = lambda *arguments, **named: print("served")
sys.exit(serve.serve(Path(sys.argv[1]), "localhost", 8501))
"""


@pytest.mark.parametrize(
    ("secrets", "status", "said"),
    [
        ('[auth]\ncookie_secret = "a secret of a test"\n', 0, "served\n"),
        ('[other]\nkey = "value"\n', 2, "error: TRANSACT_USERS says who may come in"),
        ("no TOML", 2, "secrets.toml cannot be read as TOML"),
    ],
)
def test_the_secrets_beside_the_app_are_checked(tmp_path, secrets, status, said):
    app = tmp_path / "installed" / "app.py"
    (app.parent / ".streamlit").mkdir(parents=True)
    app.touch()
    (app.parent / ".streamlit" / "secrets.toml").write_text(secrets)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", SERVE, str(app)],
        cwd=elsewhere,
        env=os.environ
        | {
            "HOME": str(elsewhere),
            "PYTHONPATH": str(ROOT),
            "TRANSACT_USERS": "ada@example.org",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == status, ran.stderr
    assert said in ran.stdout + ran.stderr
