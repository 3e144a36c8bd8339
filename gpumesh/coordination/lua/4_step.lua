-- Part 4 of 4. Facts and messages (gpumesh/coordination/exchange.py), and the step itself.

local function set_facts()
  if #request.facts == 0 then return end
  for _, fact in ipairs(request.facts) do
    local field = me .. ' ' .. fact[1]
    if fact[2] == '' then redis.call('HDEL', prefix .. 'facts', field) else
      redis.call('HSET', prefix .. 'facts', field, fact[2])
    end
  end
  redis.call('INCR', prefix .. 'facts_version')
end

local function read_facts()
  local flat, facts = redis.call('HGETALL', prefix .. 'facts'), {}
  for index = 1, #flat, 2 do
    local gateway, topic = string.match(flat[index], '^(%S+) (.*)$')
    if gateway ~= me and sessions[gateway] then table.insert(facts, {gateway, topic, flat[index + 1]}) end
  end
  return facts
end

-- The step itself

load_gateways()
if request.leaves then
  if sessions[me] == request.session then
    remove_gateway(me)
    ask_all_to_sync()
    save_boxes()
  end
  return cmsgpack.pack({is_known = true})
end
if request.registers then
  -- A step of an earlier connection that Redis runs late must not take over.
  if sessions[me] and sessions[me] >= request.session then return cmsgpack.pack({is_known = false}) end
  remove_gateway(me)
  sessions[me] = request.session
  boxes[me] = {session = request.session, last = 0, items = {}, is_changed = true}
  redis.call('PUBLISH', prefix .. 'all', cmsgpack.pack({me, 'joined', ''}))
elseif sessions[me] ~= request.session then
  return cmsgpack.pack({is_known = false})
end
if request.registers or now - last_at > request.dead_s / 20 then  -- not in each step, as it costs time
  redis.call('HSET', prefix .. 'gateways', me, string.format('%d %.3f', request.session, now))
  redis.call('EXPIRE', prefix .. 'gateways', EXPIRE_S)
end

local box = load_box(me)
while box.items[1] and box.items[1][1] <= request.seen do
  table.remove(box.items, 1)
  box.is_changed = true
end
local replies = {}
for _, item in ipairs(request.keys) do table.insert(replies, sync(item)) end
save_counters()
for _, message in ipairs(request.messages) do
  redis.call('PUBLISH', prefix .. 'all', cmsgpack.pack({me, message[1], message[2]}))
end
set_facts()
local version, facts = -1, {}
if request.facts_version >= 0 then  -- a heartbeat; otherwise the gateway does not ask for facts
  keep_counters()
  redis.call('EXPIRE', prefix .. 'facts', EXPIRE_S)
  redis.call('EXPIRE', prefix .. 'facts_version', EXPIRE_S)
  version = tonumber(redis.call('GET', prefix .. 'facts_version') or 0)
  if version ~= request.facts_version then facts = read_facts() end
end
local others = {}
for gateway in pairs(sessions) do
  if gateway ~= me then table.insert(others, gateway) end
end
save_boxes()
return cmsgpack.pack({
  is_known = true,
  keys = replies,
  mail = box.items,
  gateways = others,
  facts_version = version,
  facts = facts,
})
