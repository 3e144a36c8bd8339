-- Batches: their status, and their requests until they are worked on.

local PARTS = { 'bad', 'sorting', 'work', 'tries', 'output', 'failed', 'lines', 'rate' }
local ENDED = { completed = true, failed = true, expired = true, cancelled = true }

local function number_of(id, field)
  return tonumber(call('HGET', batch_key(id), field) or 0)
end

local function status_of(id)
  return call('HGET', batch_key(id), 'status')
end

-- Lets all keys of a batch expire: the kept time after its end, or after the end of its window. Called after each change,
-- because a change may have made a key.
local function keep_batch(id)
  local from = number_of(id, 'ended_at')
  if not ENDED[status_of(id)] then from = math.max(now, number_of(id, 'expires_at')) + DAY_S end
  local seconds = from + number_of(id, 'kept_s')
  expire_at(batch_key(id), seconds)
  for _, part in ipairs(PARTS) do expire_at(batch_key(id, part), seconds) end
  for _, index in ipairs({ ALL, OPEN }) do
    call('EXPIRE', index, 400 * DAY_S)
  end
  return seconds
end

local function end_batch(id, status)
  call('HSET', batch_key(id), 'status', status, 'ended_at', stamp(now))
  call('ZREM', OPEN, id)
  keep_file(call('HGET', batch_key(id), 'file'), keep_batch(id))
  announce_change()
end

-- How many requests of a batch are claimed, and their leases last.
local function count_claimed(id)
  local work = batch_key(id, 'work')
  if call('EXISTS', work) == 0 then return 0 end
  local count = 0
  for _, consumer in ipairs(call('XPENDING', work, GROUP)[4] or {}) do
    if consumer[1] ~= NOBODY then count = count + tonumber(consumer[2]) end
  end
  if count > 0 then
    for _, entry in ipairs(call('XPENDING', work, GROUP, 'IDLE', HORIZON_MS, '-', '+', 10000)) do
      if entry[2] ~= NOBODY then count = count - 1 end
    end
  end
  return count
end

local function end_if_cancelled(id)
  if status_of(id) == 'cancelling' and count_claimed(id) == 0 then end_batch(id, 'cancelled') end
end

local function describe(id)
  end_if_cancelled(id) -- if no worker lives that would do it
  local claimed = ENDED[status_of(id)] and 0 or count_claimed(id)
  return { id, call('HGETALL', batch_key(id)), claimed, call('LRANGE', batch_key(id, 'bad'), 0, -1) }
end

local function batch_answer(id)
  return { 'ok', describe(id) }
end

-- batch, file, seconds of the window, kept seconds, owner, then fields and values. Called a second time, it does nothing.
function functions.create_batch(id, file, window_s, kept_s, owner, ...)
  if call('EXISTS', batch_key(id)) == 0 then
    if call('EXISTS', file_key(file)) == 0 then return no_file(file) end
    call('HSET', batch_key(id), 'status', 'validating', 'created_at', stamp(now), 'expires_at', stamp(now + window_s),
      'file', file, 'window_s', window_s, 'kept_s', kept_s, 'owner', owner, 'read_lines', 0, ...)
    call('ZADD', ALL, stamp(-now * 1e6), id)
    call('ZADD', OPEN, stamp(-now * 1e6), id)
    keep_file(file, keep_batch(id))
    announce_change()
  end
  return batch_answer(id)
end

function functions.get_batch(id)
  if not status_of(id) then return no_batch(id) end
  return batch_answer(id)
end

-- owner, "1" for the batches of every owner, the last id of the call before, limit, then the statuses (none: all).
function functions.list_batches(owner, every_owner, after, limit, ...)
  local is_wanted, batches = {}, {}
  for _, status in ipairs({ ... }) do is_wanted[status] = true end
  for _, id in ipairs(ids_after(ALL, after) or {}) do
    if #batches >= tonumber(limit) then break end
    end_if_cancelled(id)
    local status = status_of(id)
    if status and (next(is_wanted) == nil or is_wanted[status])
        and (every_owner == '1' or call('HGET', batch_key(id), 'owner') == owner) then
      batches[#batches + 1] = describe(id)
    end
  end
  return { 'ok', batches }
end

-- batch, after_line, through_line, how many errors are kept, how many bad lines, these as JSON, then for each request its
-- member of `sorting`. These may be more than a call of Lua can have, so they are read out of ARGV.
function functions.add_requests(id, after_line, through_line, kept_errors, bad_count)
  require_memory()
  local status = status_of(id)
  if not status then return no_batch(id) end
  if status ~= 'validating' or number_of(id, 'read_lines') ~= tonumber(after_line) then return { 'ok', 0 } end
  local first_bad = 7
  bad_count = tonumber(bad_count)
  local first_request = first_bad + bad_count
  local room = tonumber(kept_errors) - call('LLEN', batch_key(id, 'bad'))
  for index = first_bad, first_bad + math.min(bad_count, room) - 1 do
    call('RPUSH', batch_key(id, 'bad'), ARGV[index])
  end
  for index = first_request, #ARGV do
    call('ZADD', batch_key(id, 'sorting'), 0, ARGV[index])
  end
  call('HINCRBY', batch_key(id), 'error_count', bad_count)
  call('HINCRBY', batch_key(id), 'total', #ARGV - first_request + 1)
  call('HSET', batch_key(id), 'read_lines', through_line)
  keep_batch(id)
  return { 'ok', 1 }
end

-- batch, through_line: moves a piece of the sorted requests to the stream of work. The answer ends with "more" until all
-- are moved, and the batch is in progress.
function functions.finish_validation(id, through_line)
  local status = status_of(id)
  if not status then return no_batch(id) end
  if status ~= 'validating' or number_of(id, 'read_lines') ~= tonumber(through_line) then return batch_answer(id) end
  if number_of(id, 'total') == 0 then
    end_batch(id, 'failed')
    return batch_answer(id)
  end
  local work, sorting = batch_key(id, 'work'), batch_key(id, 'sorting')
  if call('EXISTS', work) == 0 then
    call('XGROUP', 'CREATE', work, GROUP, '0', 'MKSTREAM')
    call('XGROUP', 'CREATECONSUMER', work, GROUP, NOBODY)
  end
  local members = call('ZPOPMIN', sorting, PIECE) -- and their scores, which are all 0
  for index = 1, #members, 2 do
    local line, offset, size, group = string.match(members[index], '^%x* 0*(%d+) (%d+) (%d+) (.*)$')
    call('XADD', work, '*', 'l', line, 'o', offset, 's', size, 'g', group)
  end
  keep_batch(id)
  if call('EXISTS', sorting) == 1 then return { 'ok', describe(id), 'more' } end
  call('HSET', batch_key(id), 'status', 'in_progress', 'in_progress_at', stamp(now), 'is_read', 1)
  announce_change()
  return batch_answer(id)
end

function functions.cancel(id)
  local status = status_of(id)
  if not status then return no_batch(id) end
  if status == 'validating' or status == 'in_progress' then
    call('HSET', batch_key(id), 'status', 'cancelling', 'cancelling_at', stamp(now))
    end_if_cancelled(id)
    announce_change()
  elseif status ~= 'cancelling' and status ~= 'cancelled' then
    return { 'conflict', 'the batch has ended: it is ' .. status }
  end
  return batch_answer(id)
end

-- Lets a request be claimed again as if nobody had ever claimed it.
local function free_request(id, entry)
  call('XCLAIM', batch_key(id, 'work'), GROUP, NOBODY, 0, entry, 'IDLE', HORIZON_MS, 'RETRYCOUNT', 1, 'FORCE', 'JUSTID')
end

-- batch: takes back a piece of the failed results. The answer ends with "more" until none is left, and the batch is in
-- progress again. A batch that was cancelled while its file was read is read again from there on.
function functions.retry(id)
  end_if_cancelled(id)
  local status = status_of(id)
  if not status then return no_batch(id) end
  if not ENDED[status] or status == 'failed' then return { 'conflict', 'the batch is ' .. status } end
  local total = number_of(id, 'total')
  local is_read = number_of(id, 'is_read') == 1
  if is_read and number_of(id, 'completed') == total then return batch_answer(id) end
  local file = call('HGET', batch_key(id), 'file')
  if call('EXISTS', file_key(file)) == 0 then return { 'conflict', 'the input file of the batch was deleted' } end
  local failed = batch_key(id, 'failed')
  for _, entry in ipairs(call('XRANGE', failed, '-', '+', 'COUNT', PIECE)) do
    local line, token, content = entry[2][2], entry[2][4], entry[2][6]
    free_request(id, token)
    call('XDEL', failed, entry[1])
    call('ZREMRANGEBYSCORE', batch_key(id, 'lines'), line, line)
    call('HINCRBY', batch_key(id), 'failed', -1)
    call('HINCRBY', batch_key(id), 'error_bytes', -(#content + 1))
  end
  if call('XLEN', failed) > 0 then return { 'ok', describe(id), 'more' } end
  if is_read then
    for _, entry in ipairs(call('XPENDING', batch_key(id, 'work'), GROUP, '-', '+', 100000)) do
      free_request(id, entry[1]) -- also those that were released or lost before the batch was cancelled
    end
    call('DEL', batch_key(id, 'tries'))
    call('HSET', batch_key(id), 'status', 'in_progress', 'in_progress_at', stamp(now))
  else
    call('HSET', batch_key(id), 'status', 'validating')
  end
  call('HSET', batch_key(id), 'expires_at', stamp(now + number_of(id, 'window_s')), 'expired', 0)
  call('HDEL', batch_key(id), 'ended_at', 'cancelling_at')
  call('ZADD', OPEN, call('ZSCORE', ALL, id), id)
  keep_file(file, keep_batch(id))
  announce_change()
  return batch_answer(id)
end

function functions.delete_batch(id)
  end_if_cancelled(id)
  local status = status_of(id)
  if not status then return no_batch(id) end
  if not ENDED[status] then return { 'conflict', 'the batch has not ended: it is ' .. status } end
  for _, index in ipairs({ ALL, OPEN }) do call('ZREM', index, id) end
  call('UNLINK', batch_key(id))
  for _, part in ipairs(PARTS) do call('UNLINK', batch_key(id, part)) end
  announce_change()
  return { 'ok' }
end

-- Removes the ids of batches that have expired, and consumers that have nothing: each gateway was another one.
local function sweep_batches(silent_s)
  for _, id in ipairs(call('ZRANGE', ALL, 0, -1)) do
    if not status_of(id) then
      for _, index in ipairs({ ALL, OPEN }) do call('ZREM', index, id) end
    end
  end
  for _, id in ipairs(call('ZRANGE', OPEN, 0, -1)) do
    local work = batch_key(id, 'work')
    for _, consumer in ipairs(call('EXISTS', work) == 1 and call('XINFO', 'CONSUMERS', work, GROUP) or {}) do
      local name, pending, idle_ms = consumer[2], consumer[4], consumer[6]
      if name ~= NOBODY and pending == 0 and idle_ms > silent_s * 1000 then
        call('XGROUP', 'DELCONSUMER', work, GROUP, name)
      end
    end
  end
end
