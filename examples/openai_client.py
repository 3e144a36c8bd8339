"""A chat through the mesh with the `openai` package: only the base URL is another one.

pip install openai
eval "$(gpumesh env)"
python openai_client.py "Why is the sky blue?" [MODEL]
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main(question: str, model: str | None = None) -> None:
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:11430/v1"),
        # The client wants some key. The gateway looks at it only where mesh.yaml has gateway.api_key_env.
        api_key=os.environ.get("GPUMESH_API_KEY", "none"),
    )
    chosen = model or client.models.list().data[0].id
    answer = client.chat.completions.with_raw_response.create(
        model=chosen, messages=[{"role": "user", "content": question}], stream=True
    )
    for chunk in answer.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print(f"\n({chosen} on {answer.headers['X-GPUMesh-Node']})")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["Why is the sky blue?"])
