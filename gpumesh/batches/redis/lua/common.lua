-- What the functions of all files here need. The files are joined to one script (`script.py`), which is called with
-- the prefix of all keys as KEYS[1], the name of a function as ARGV[1], and the arguments of the function behind it.
--
-- Every key has the mesh's hash tag in its prefix, so all of them are in one slot of a Redis Cluster.
--
--   :files            sorted set   the ids of the files, the newest first
--   :uploads          sorted set   the ids of files that are not whole yet, by the time of their last piece
--   :file:ID          hash         what is known about a file
--   :file:ID:N        string       its bytes from N * SEGMENT_BYTES on
--   :all  :open       sorted set   the ids of all batches, and of those that have not ended, the newest first
--   :room             string       nothing: see `require_memory`
--   :worker:NAME      list         the last call of `claim` of a worker, then batch and entry of each of its claims
--   :changes          stream       an entry for each change to a batch that others may wait for
--   :batch:ID         hash         a batch
--   :batch:ID:bad     list         its bad lines
--   :batch:ID:sorting sorted set   its requests while they are read: Redis sorts them
--   :batch:ID:work    stream       its requests in the order in which they are worked on, with one consumer group
--   :batch:ID:tries   hash         by line: how often a request was tried in vain
--   :batch:ID:output  stream       the results of the requests that were answered
--   :batch:ID:failed  stream       the results of those that have failed: the dead letters
--   :batch:ID:lines   sorted set   by line: where its result is, as "output 12-0" or "failed 13-0"
--   :batch:ID:rate    hash         by second: how many results came
--
-- The consumer group is the state of the requests. One that it has not delivered yet waits. One in the list of pending
-- entries is claimed, or was released: then it belongs to the consumer NOBODY. One that is acknowledged has a result,
-- and XACK answers 1 exactly once for it.
--
-- When a pending entry may be claimed again stands in its idle time, which a script may set: an entry is free as soon as
-- its idle time is HORIZON_MS. So a lease of 60 s begins with an idle time of HORIZON_MS - 60000. The count of its
-- deliveries is 1 + how often its lease has ended.

local call = redis.call
local prefix = KEYS[1]
local FILES, UPLOADS, ALL, OPEN = prefix .. ':files', prefix .. ':uploads', prefix .. ':all', prefix .. ':open'
local CHANGES, SWEPT = prefix .. ':changes', prefix .. ':swept'
local GROUP, NOBODY = 'workers', '-'
local HORIZON_MS = 1000 * 24 * 3600 * 1000
local SEGMENT_BYTES = 256 * 1024 - 64 -- the memory of a string with its header is a power of two then
local PIECE = 1000 -- so many entries are moved in one call, so that a call takes a few milliseconds
local DAY_S = 24 * 3600

local time = call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6 -- seconds since 1970

local functions = {} -- by the name in ARGV[1]

-- A time as it is stored: to the microsecond. Lua would write it with 14 digits only.
local function stamp(seconds)
  return string.format('%.6f', seconds)
end

local function batch_key(id, part)
  return prefix .. ':batch:' .. id .. (part and ':' .. part or '')
end

local function file_key(id, segment)
  return prefix .. ':file:' .. id .. (segment and ':' .. string.format('%d', segment) or '')
end

-- Tells all that wait for it that a batch has changed, or that there is new work.
local function announce_change()
  call('XADD', CHANGES, 'MAXLEN', '~', 100, '*', 'c', '')
  call('EXPIRE', CHANGES, 7 * DAY_S)
end

local function expire_at(key, seconds)
  call('PEXPIREAT', key, string.format('%d', seconds * 1000))
end

-- Fails if Redis has no memory left. Called first, because Redis does not refuse a script that has changed something, and
-- only by functions that need much: what frees memory works on.
local function require_memory()
  call('SETEX', prefix .. ':room', 60, '')
end

local function no_batch(id)
  return { 'not-found', 'there is no batch ' .. id }
end

local function no_file(id)
  return { 'not-found', 'there is no file ' .. id }
end

-- Keeps a file at least until this time.
local function keep_file(id, seconds)
  local left_ms = call('PTTL', file_key(id))
  if left_ms == -2 or (left_ms > 0 and now + left_ms / 1000 >= seconds) then return end
  local size = tonumber(call('HGET', file_key(id), 'size'))
  expire_at(file_key(id), seconds)
  for segment = 0, math.floor(size / SEGMENT_BYTES) do
    expire_at(file_key(id, segment), seconds)
  end
end

-- The ids of an index after `after` (empty: from the first), or nil if the index does not have `after`.
local function ids_after(index, after)
  local first = 0
  if after ~= '' then
    local rank = call('ZRANK', index, after)
    if not rank then return nil end
    first = rank + 1
  end
  return call('ZRANGE', index, first, -1)
end
