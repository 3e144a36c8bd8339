-- Part 2 of 4. What clients were served: ClientCounters of gpumesh/balancer/fairness/client_counters.py

local SERVED_EXPIRE_S = 3600
local MAX_CLIENTS = 4096
local MAX_CHARGE, MAX_LAG = 3000000, 16384  -- client_counters.py
local LEVEL = ''  -- the member with the level of the class; no client has this name

local counters = {}  -- class -> client -> counter, or false if it is not stored; those of this step
local changed_counters = {}  -- class -> client -> true

local function served_key(rank) return prefix .. 'served:' .. rank end

-- The counter of a client, or false if it is not stored.
local function stored_counter(rank, client)
  local known = counters[rank]
  if not known then
    known = {}
    counters[rank], changed_counters[rank] = known, {}
  end
  if known[client] == nil then
    local scores = redis.call('ZMSCORE', served_key(rank), LEVEL, client)
    known[LEVEL] = known[LEVEL] or tonumber(scores[1] or 0)
    if client ~= LEVEL then known[client] = scores[2] and tonumber(scores[2]) end
  end
  return known[client]
end

local function level_of(rank) return stored_counter(rank, LEVEL) end

local function counter_of(rank, client) return stored_counter(rank, client) or level_of(rank) end

local function set_counter(rank, client, counter)
  stored_counter(rank, client)
  counters[rank][client] = counter
  changed_counters[rank][client] = true
end

local function save_counters()
  for rank, clients in pairs(changed_counters) do
    local key, arguments = served_key(rank), {}
    for client in pairs(clients) do
      table.insert(arguments, string.format('%.3f', counters[rank][client]))
      table.insert(arguments, client)
    end
    if #arguments > 0 and redis.call('ZADD', key, unpack(arguments)) > 0 then  -- some were not stored before
      redis.call('EXPIRE', key, SERVED_EXPIRE_S)
      local surplus = redis.call('ZCARD', key) - MAX_CLIENTS
      if surplus > 0 then  -- those that were served least lose the least: they are raised to the level in any case
        redis.call('ZREMRANGEBYRANK', key, 0, surplus - 1)
        redis.call('ZADD', key, string.format('%.3f', level_of(rank)), LEVEL)
      end
    end
  end
end

local function keep_counters()
  for rank = 0, 2 do redis.call('EXPIRE', served_key(rank), SERVED_EXPIRE_S) end
end

local function bounded(tokens) return math.min(math.max(tokens, -MAX_CHARGE), MAX_CHARGE) end

local function correct_charge(rank, client, tokens)
  set_counter(rank, client, counter_of(rank, client) + bounded(tokens))
end

local function charge_waiting(rank, client, tokens)
  local start = math.max(counter_of(rank, client), level_of(rank) - MAX_LAG)
  set_counter(rank, LEVEL, start)
  set_counter(rank, client, start + bounded(tokens))
end

local function charge_unqueued(rank, client, tokens)
  local start = math.max(counter_of(rank, client), level_of(rank))
  set_counter(rank, LEVEL, start)
  set_counter(rank, client, start + bounded(tokens))
end
