-- Part 2 of 4. What clients were served: ClientCounters of gpumesh/balancer/fairness/client_counters.py

local SERVED_EXPIRE_S = 3600
local MAX_CLIENTS = 4096
local MAX_CHARGE, MAX_LAG = 3000000, 16384  -- gpumesh/balancer/fairness/client_counters.py

local levels = {}

local function level_of(rank)
  if not levels[rank] then levels[rank] = tonumber(redis.call('HGET', prefix .. 'levels', rank) or 0) end
  return levels[rank]
end

local function set_level(rank, level)
  levels[rank] = level
  redis.call('HSET', prefix .. 'levels', rank, string.format('%.3f', level))
  redis.call('EXPIRE', prefix .. 'levels', SERVED_EXPIRE_S)
end

local function stored_counter(rank, client)
  return tonumber(redis.call('ZSCORE', prefix .. 'served:' .. rank, client) or nil)
end

local function counter_of(rank, client)
  return stored_counter(rank, client) or level_of(rank)
end

local function set_counter(rank, client, counter)
  local name = prefix .. 'served:' .. rank
  redis.call('ZADD', name, string.format('%.3f', counter), client)
  redis.call('EXPIRE', name, SERVED_EXPIRE_S)
  local surplus = redis.call('ZCARD', name) - MAX_CLIENTS
  if surplus > 0 then redis.call('ZREMRANGEBYRANK', name, 0, surplus - 1) end
end

local function bounded(tokens) return math.min(math.max(tokens, -MAX_CHARGE), MAX_CHARGE) end

local function charge_waiting(rank, client, tokens)
  local start = math.max(counter_of(rank, client), level_of(rank) - MAX_LAG)
  set_level(rank, start)
  set_counter(rank, client, start + bounded(tokens))
end

local function charge_unqueued(rank, client, tokens)
  local start = math.max(counter_of(rank, client), level_of(rank))
  set_level(rank, start)
  set_counter(rank, client, start + bounded(tokens))
end
