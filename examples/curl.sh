#!/usr/bin/env bash
# The mesh with nothing but curl, in each of the dialects it speaks. The headers say which node an answer came from.
#
#   eval "$(gpumesh env)"
#   examples/curl.sh [MODEL]
#
# Where mesh.yaml has gateway.api_key_env, set GPUMESH_API_KEY here as well.
set -euo pipefail

url="${OLLAMA_HOST:-http://127.0.0.1:11430}"
model="${1:-qwen2.5:7b}"

ask() { # curl's own arguments; the key comes from a file descriptor, so that `ps` does not show it
    curl --fail-with-body -sSN -H 'Content-Type: application/json' "${@:2}" "$url$1" \
        -K <(printf 'header = "Authorization: Bearer %s"\n' "${GPUMESH_API_KEY:-none}")
    echo
}

echo "# the models of all nodes together"
ask /api/tags

echo "# Ollama"
ask /api/generate -d "{\"model\": \"$model\", \"prompt\": \"Why is the sky blue?\", \"stream\": false}"

echo "# Ollama, streamed, with the answer's headers"
ask /api/chat -i -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Count to three.\"}]}"

echo "# OpenAI"
ask /v1/chat/completions -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}"

echo "# Anthropic"
ask /v1/messages -d "{\"model\": \"$model\", \"max_tokens\": 64, \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}"

echo "# batch work, which lets everybody else go first"
ask /api/generate -H 'X-GPUMesh-Priority: batch' -d "{\"model\": \"$model\", \"prompt\": \"Hello\", \"stream\": false}"
