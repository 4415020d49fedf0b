#!/usr/bin/env bash
# Gemma 4's chat templates as trl 1.16.0 ships them (gemma4.jinja and its second to fourth revision), rendered by
# transformers 5.20.2, seen on 2026-11-30: a call whose arguments are JSON text, as OpenAI's API writes them, is rendered with
# two pairs of braces and JSON's quotes, without an error. The same arguments as an object get one pair and the model's own
# quotes. The fifth revision raises an error. Most data sets have text there, and would teach a syntax that nothing parses.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-deps trl==1.16.0
"$work/venv/bin/pip" install -q transformers==5.20.2 jinja2==3.1.6
"$work/venv/bin/python" - <<'PY'
import importlib.util
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"


def rendered(name: str, arguments: object) -> str:
    """The text of a question and a call."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (text,), _ = render_jinja_template([asked], chat_template=(folder / f"{name}.jinja").read_text(), bos_token="")
    return text


for name in ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4"):
    as_object, as_text = rendered(name, {"town": "Bern"}), rendered(name, '{"town": "Bern"}')
    print(name, "object:", as_object[as_object.index("call:") :][:40], "text:", as_text[as_text.index("call:") :][:40])
    assert 'call:weather{town:<|"|>Bern<|"|>}' in as_object, "objects are written in another way now"
    assert 'call:weather{{"town": "Bern"}}' in as_text, "it does not happen any more"
try:
    rendered("gemma4_v5", '{"town": "Bern"}')
except Exception as error:
    print("gemma4_v5:", type(error).__name__)
else:
    raise SystemExit("the fifth revision takes text now")
PY
