-- Part 1 of 4. One step of one gateway: takes over what the gateway holds and wants, and answers what it gets. Redis
-- runs the four parts as one script, atomically. All times are Redis' own.
--
-- KEYS[1]  the prefix of all keys of the mesh
-- ARGV[1]  a StepRequest of gpumesh/coordination/step_messages.py as MessagePack; the result is a StepReply
--
-- Stored under the prefix, each for EXPIRE_S seconds after its last change:
--   gateways      hash: gateway -> "SESSION TIME", the time of its last step. Only gateways in it live.
--   node:KEY      JSON: who holds and wants places of the key, and the gateway that uses it alone (``owner``)
--   mail:GATEWAY  JSON: messages that the gateway has not confirmed yet
--   served:CLASS  sorted set: client (a hash) -> what it was served, in weighted tokens; '' -> the level of the class
--   facts         hash: "GATEWAY TOPIC" -> text; facts_version grows with each change
-- What a gateway has in node:KEY counts only while the gateway lives with the same session. So nobody cleans up.

local EXPIRE_S = 60

local prefix = KEYS[1]
local request = cmsgpack.unpack(ARGV[1])
local me = request.gateway
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000

-- Gateways that live, and their mail

local sessions = {}  -- of the gateways that live, by gateway
local last_at = 0  -- the stored time of this gateway's last step
local boxes = {}  -- mail by gateway, loaded when needed

local function load_box(gateway)
  if not boxes[gateway] then
    local text = redis.call('GET', prefix .. 'mail:' .. gateway)
    local box = text and cjson.decode(text)
    if not box or box.session ~= sessions[gateway] then box = {session = sessions[gateway], last = 0, items = {}} end
    boxes[gateway] = box
  end
  return boxes[gateway]
end

local function send_mail(gateway, kind, key, rank, others)
  local box = load_box(gateway)
  box.last = box.last + 1
  local item = {box.last, kind, key, rank, others}
  table.insert(box.items, item)
  box.is_changed = true
  redis.call('PUBLISH', prefix .. 'to:' .. gateway, cmsgpack.pack({box.session, item}))
end

local function save_boxes()
  for gateway, box in pairs(boxes) do
    if box.is_changed then
      box.is_changed = nil
      redis.call('SET', prefix .. 'mail:' .. gateway, cjson.encode(box), 'EX', EXPIRE_S)
    end
  end
end

local function remove_gateway(gateway)
  sessions[gateway], boxes[gateway] = nil, nil
  redis.call('HDEL', prefix .. 'gateways', gateway)
  redis.call('DEL', prefix .. 'mail:' .. gateway)
  for _, field in ipairs(redis.call('HKEYS', prefix .. 'facts')) do
    if string.sub(field, 1, #gateway + 1) == gateway .. ' ' then redis.call('HDEL', prefix .. 'facts', field) end
  end
  redis.call('INCR', prefix .. 'facts_version')
end

local function ask_all_to_sync()  -- so that places of a gateway that has gone are given out at once
  for gateway in pairs(sessions) do
    if gateway ~= me then send_mail(gateway, 'sync', '', 0, 0) end
  end
end

local function load_gateways()
  local flat = redis.call('HGETALL', prefix .. 'gateways')
  local dead = {}
  for index = 1, #flat, 2 do
    local gateway = flat[index]
    local session, last = string.match(flat[index + 1], '^(%d+) (%S+)$')
    if tonumber(last) > now + 1 then  -- Redis' clock was set back
      last = now
      redis.call('HSET', prefix .. 'gateways', gateway, session .. ' ' .. string.format('%.3f', now))
    end
    if now - tonumber(last) > request.dead_s then
      table.insert(dead, gateway)
    else
      sessions[gateway] = tonumber(session)
      if gateway == me then last_at = tonumber(last) end
    end
  end
  for _, gateway in ipairs(dead) do remove_gateway(gateway) end
  if #dead > 0 then ask_all_to_sync() end
end
