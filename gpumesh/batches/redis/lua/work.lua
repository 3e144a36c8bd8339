-- Work: requests are claimed, and their results recorded. Results are read.

-- Gives a worker one entry of the stream of work, as `claim` returns it.
local function take(id, worker, entry, lease_ms, lost)
  local fields = {}
  for index = 1, #entry[2], 2 do fields[entry[2][index]] = entry[2][index + 1] end
  call('XCLAIM', batch_key(id, 'work'), GROUP, worker, 0, entry[1], 'IDLE', HORIZON_MS - lease_ms,
    'RETRYCOUNT', lost + 1, 'JUSTID')
  local batch = call('HMGET', batch_key(id), 'file', 'endpoint', 'owner', 'expires_at')
  local tries = call('HGET', batch_key(id, 'tries'), fields.l) or 0
  local content = read_bytes(batch[1], tonumber(fields.o), tonumber(fields.s))
  return { id, fields.l, content, batch[2], batch[3], fields.g, batch[4], tries, lost, entry[1] }
end

local function find_entry(id, token)
  return call('XRANGE', batch_key(id, 'work'), token, token)[1]
end

-- Calls `add` with claims of a batch, until it returns false. Returns false then.
local function claim_of_batch(id, worker, lease_ms, most, add)
  local work = batch_key(id, 'work')
  -- All that were claimed before come before the others in the order of the stream.
  for _, pending in ipairs(call('XPENDING', work, GROUP, 'IDLE', HORIZON_MS, '-', '+', most)) do
    local lost = pending[4] - 1
    if pending[2] ~= NOBODY then lost = lost + 1 end
    if not add(take(id, worker, find_entry(id, pending[1]), lease_ms, lost)) then return false end
  end
  while true do
    local streams = call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', 1, 'STREAMS', work, '>')
    if not streams then return true end
    if not add(take(id, worker, streams[1][2][1], lease_ms, 0)) then return false end
  end
end

-- The count of the deliveries of a claim if this worker still has it, else nil.
local function find_claim(id, token, worker)
  local work = batch_key(id, 'work')
  if call('EXISTS', work) == 0 then return nil end
  local pending = call('XPENDING', work, GROUP, token, token, 1)[1]
  if pending and pending[2] == worker then return pending[4] end
  return nil
end

-- The claims of this call if the worker has made it before, and its answer was lost; else nil.
local function repeat_claims(worker, number, lease_ms)
  local last = call('LRANGE', prefix .. ':worker:' .. worker, 0, -1)
  if last[1] ~= number then return nil end
  local claims = {}
  for index = 2, #last, 2 do
    local id, token = last[index], last[index + 1]
    local deliveries = find_claim(id, token, worker)
    if deliveries then claims[#claims + 1] = take(id, worker, find_entry(id, token), lease_ms, deliveries - 1) end
  end
  return claims
end

-- worker, a number that each call of a worker has for itself, count, the duration of the leases, the limit for the sum of
-- the contents in bytes, then the batches that are left to other workers until their window has passed.
function functions.claim(worker, number, count, lease_ms, max_bytes)
  count, lease_ms, max_bytes = tonumber(count), tonumber(lease_ms), tonumber(max_bytes)
  if count <= 0 then return { 'ok', {} } end
  require_memory() -- else there would be none for the results
  local repeated = repeat_claims(worker, number, lease_ms)
  if repeated then return { 'ok', repeated } end
  local claims, bytes, last = {}, 0, prefix .. ':worker:' .. worker
  call('DEL', last)
  call('RPUSH', last, number)
  call('EXPIRE', last, 60)
  local function add(claim)
    claims[#claims + 1] = claim
    call('RPUSH', last, claim[1], claim[10])
    bytes = bytes + #claim[3]
    return #claims < count and bytes < max_bytes
  end
  local left = {}
  for index = 7, #ARGV do left[ARGV[index]] = true end
  for _, id in ipairs(call('ZREVRANGE', OPEN, 0, -1)) do -- the oldest first
    local is_open = status_of(id) == 'in_progress' and not (left[id] and number_of(id, 'expires_at') > now)
    if is_open and not claim_of_batch(id, worker, lease_ms, count - #claims, add) then break end
  end
  return { 'ok', claims }
end

-- worker, the duration of the leases, then batch and token of each claim. The answer says for each "1" if it is wanted.
function functions.renew(worker, lease_ms)
  local wanted = {}
  for index = 4, #ARGV, 2 do
    local id, token = ARGV[index], ARGV[index + 1]
    local is_wanted = status_of(id) == 'in_progress' and find_claim(id, token, worker)
    if is_wanted then
      call('XCLAIM', batch_key(id, 'work'), GROUP, worker, 0, token, 'IDLE', HORIZON_MS - lease_ms, 'JUSTID')
    end
    wanted[#wanted + 1] = is_wanted and 1 or 0
  end
  return { 'ok', wanted }
end

-- worker, then of each claim: batch, token, line, the delay, "1" if it was tried in vain.
function functions.release(worker)
  local batches = {}
  for index = 3, #ARGV, 5 do
    local id, token, line, delay_ms, counts = unpack(ARGV, index, index + 4)
    if find_claim(id, token, worker) then
      call('XCLAIM', batch_key(id, 'work'), GROUP, NOBODY, 0, token, 'IDLE', math.max(0, HORIZON_MS - delay_ms), 'JUSTID')
      if counts == '1' then call('HINCRBY', batch_key(id, 'tries'), line, 1) end
      batches[id] = true
    end
  end
  for id in pairs(batches) do
    end_if_cancelled(id)
    keep_batch(id)
  end
  if next(batches) then announce_change() end
  return { 'ok' }
end

local function count_for_rate(id)
  local rate, second = batch_key(id, 'rate'), string.format('%d', now)
  if call('HINCRBY', rate, second, 1) == 1 and call('HLEN', rate) > 1500 then
    for _, old in ipairs(call('HKEYS', rate)) do
      if tonumber(old) < now - 700 then call('HDEL', rate, old) end
    end
  end
end

-- Stores one result, unless the request has one.
local function record_one(id, token, line, kind, is_expired, content)
  if not status_of(id) or call('EXISTS', batch_key(id, 'work')) == 0 then return 0 end
  if call('XACK', batch_key(id, 'work'), GROUP, token) == 0 then return 0 end
  local number = call('HINCRBY', batch_key(id), 'results', 1)
  local position = string.format('%d-0', number)
  call('XADD', batch_key(id, kind), position, 'l', line, 't', token, 'c', content)
  call('ZADD', batch_key(id, 'lines'), line, kind .. ' ' .. position)
  call('HDEL', batch_key(id, 'tries'), line)
  call('HINCRBY', batch_key(id), kind == 'failed' and 'failed' or 'completed', 1)
  call('HINCRBY', batch_key(id), kind == 'failed' and 'error_bytes' or 'output_bytes', #content + 1)
  if is_expired == '1' then call('HINCRBY', batch_key(id), 'expired', 1) end
  count_for_rate(id)
  return 1
end

local function end_if_done(id)
  local status = status_of(id)
  if (status == 'in_progress' or status == 'cancelling')
      and number_of(id, 'completed') + number_of(id, 'failed') == number_of(id, 'total') then
    end_batch(id, number_of(id, 'expired') > 0 and 'expired' or 'completed')
  end
end

-- Of each result: batch, token, line, "output" or "failed", "1" if the window has passed, content.
function functions.record()
  require_memory()
  local batches, new = {}, 0
  for index = 2, #ARGV, 6 do
    local id = ARGV[index]
    new = new + record_one(unpack(ARGV, index, index + 5))
    batches[id] = true
  end
  for id in pairs(batches) do
    if status_of(id) then
      end_if_done(id)
      end_if_cancelled(id)
      keep_batch(id)
    end
  end
  return { 'ok', new }
end

-- The seconds after which what is silent has ended: a file's upload, a gateway.
function functions.settle(silent_s)
  for _, id in ipairs(call('ZRANGE', OPEN, 0, -1)) do end_if_cancelled(id) end
  if call('SET', SWEPT, '1', 'NX', 'EX', 60) then
    sweep_files(tonumber(silent_s))
    sweep_batches(tonumber(silent_s))
  end
  return { 'ok' }
end

function functions.count_recent_results(id, seconds)
  if not status_of(id) then return no_batch(id) end
  local count = 0
  for second = math.floor(now - seconds), math.floor(now) do
    count = count + tonumber(call('HGET', batch_key(id, 'rate'), string.format('%d', second)) or 0)
  end
  return { 'ok', count }
end

-- An entry of a stream of results as `read_results` returns it.
local function result_of(entry, kind)
  return { entry[1], entry[2][2], entry[2][6], kind == 'failed' and 1 or 0 }
end

-- A function that returns the next entry of a stream after a position, or nil, and reads a few at a time.
local function entries_after(key, position)
  local entries, index = {}, 1
  return function()
    if index > #entries then
      entries, index = call('XRANGE', key, '(' .. position, '+', 'COUNT', 8), 1
      if #entries == 0 then return nil end
      position = entries[#entries][1]
    end
    index = index + 1
    return entries[index - 1]
  end
end

local function number_of_position(entry)
  return entry and tonumber(string.match(entry[1], '^%d+')) or math.huge
end

-- batch, position ("0-0": from the first), limit, the limit for the sum of the contents in bytes, then the kinds. The
-- results of both kinds are numbered together, so they are read in the order of the numbers.
function functions.read_results(id, after, limit, max_bytes, ...)
  if not status_of(id) then return no_batch(id) end
  local kinds, sources, heads, results, bytes = { ... }, {}, {}, {}, 0
  for index, kind in ipairs(kinds) do
    sources[index] = entries_after(batch_key(id, kind), after)
    heads[index] = sources[index]() or false
  end
  while #results < tonumber(limit) and bytes < tonumber(max_bytes) do
    local first = 1
    if heads[2] ~= nil and number_of_position(heads[2]) < number_of_position(heads[1]) then first = 2 end
    if not heads[first] then break end
    results[#results + 1] = result_of(heads[first], kinds[first])
    bytes = bytes + #results[#results][3]
    heads[first] = sources[first]() or false
  end
  return { 'ok', results }
end

-- batch, line, limit, the limit for the sum of the contents in bytes.
function functions.read_results_by_line(id, after_line, limit, max_bytes)
  if not status_of(id) then return no_batch(id) end
  local results, bytes = {}, 0
  local places = call('ZRANGEBYSCORE', batch_key(id, 'lines'), '(' .. after_line, '+inf', 'LIMIT', 0, limit)
  for _, place in ipairs(places) do
    if bytes >= tonumber(max_bytes) then break end
    local kind, position = string.match(place, '^(%a+) (.*)$')
    results[#results + 1] = result_of(call('XRANGE', batch_key(id, kind), position, position)[1], kind)
    bytes = bytes + #results[#results][3]
  end
  return { 'ok', results }
end

-- The arguments of long lists are read out of ARGV, as a call of Lua cannot have so many.
return functions[ARGV[1]](unpack(ARGV, 2, math.min(#ARGV, 100)))
