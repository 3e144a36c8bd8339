// What test_clients_npm.py asks of the npm package `ollama`. Prints one JSON document.
import { Ollama } from 'ollama'

const [host, model, embedder] = process.argv.slice(2)
const client = new Ollama({ host })
const messages = [{ role: 'user', content: 'Why is the sky blue?' }]
const schema = { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] }
const tools = [{ type: 'function', function: { name: 'weather', description: 'It', parameters: schema } }]

async function failure(asked) {
  try {
    await asked
    return null
  } catch (error) {
    return { status: error.status_code ?? null, message: error.message }
  }
}

const seen = {}
seen.chat = await client.chat({ model, messages })
seen.streamed = []
for await (const part of await client.chat({ model, messages, stream: true })) seen.streamed.push(part)
seen.generated = await client.generate({ model, prompt: 'Why?', options: { num_predict: 3 } })
seen.called = await client.chat({ model, messages, tools })
seen.formatted = await client.chat({ model, messages, format: schema })
seen.embedded = (await client.embed({ model: embedder, input: ['one', 'two'] })).embeddings.length
seen.listed = (await client.list()).models.map((entry) => entry.name)
seen.shown = (await client.show({ model })).details.family
seen.running = (await client.ps()).models.map((entry) => entry.name)
seen.pulled = []
for await (const part of await client.pull({ model: 'new:1b', stream: true })) seen.pulled.push(part)
seen.deleted = await client.delete({ model: 'new:1b' })
seen.missing = await failure(client.chat({ model: 'nobody:1b', messages }))
seen.refused = await failure(client.chat({ model, messages, think: true }))
const endless = await client.chat({ model, messages, stream: true })
endless.abort()
seen.aborted = await failure((async () => { for await (const part of endless) void part })())
console.log(JSON.stringify(seen))
