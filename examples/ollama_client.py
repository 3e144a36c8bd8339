"""A chat through the mesh with the `ollama` package, which needs nothing but OLLAMA_HOST.

pip install ollama
eval "$(gpumesh env)"
python ollama_client.py "Why is the sky blue?" [MODEL]
"""

from __future__ import annotations

import os
import sys

from ollama import Client


def main(question: str, model: str | None = None) -> None:
    key = os.environ.get("GPUMESH_API_KEY")
    client = Client(
        host=os.environ.get("OLLAMA_HOST", "http://127.0.0.1:11430"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    chosen = model or str(client.list().models[0].model)
    for chunk in client.chat(model=chosen, messages=[{"role": "user", "content": question}], stream=True):
        print(chunk.message.content or "", end="", flush=True)
    print(f"\n({chosen})")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["Why is the sky blue?"])
