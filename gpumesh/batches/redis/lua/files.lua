-- Files: their bytes are in strings of SEGMENT_BYTES each. One string for all would be copied as it grows, and memory is
-- kept for it to grow further.

local UPLOAD_REMOVED = { 'conflict', 'no part of the file came for too long, so its beginning was removed' }

-- file, number, bytes: stores a segment of a file that is not whole yet. Each has SEGMENT_BYTES, the last one may have
-- fewer.
function functions.put_segment(id, segment, bytes)
  require_memory()
  segment = tonumber(segment)
  if segment > 0 and not call('ZSCORE', UPLOADS, id) then return UPLOAD_REMOVED end
  call('ZADD', UPLOADS, stamp(now), id)
  call('EXPIRE', UPLOADS, DAY_S)
  call('SET', file_key(id, segment), bytes, 'EX', DAY_S) -- it expires if nobody ever calls `settle`
  return { 'ok' }
end

local function delete_segments(id)
  local segment = 0
  while call('UNLINK', file_key(id, segment)) == 1 do
    segment = segment + 1
  end
end

-- file: removes what there is of a file that will not be whole.
function functions.drop_upload(id)
  if call('ZREM', UPLOADS, id) == 1 then delete_segments(id) end
  return { 'ok' }
end

-- file, seconds, then fields and values: the file is whole, and kept for so long. Called a second time, it does nothing.
function functions.finish_upload(id, kept_s, ...)
  if call('EXISTS', file_key(id)) == 0 then
    if call('ZREM', UPLOADS, id) == 0 then return UPLOAD_REMOVED end
    call('HSET', file_key(id), 'created_at', stamp(now), ...)
    call('ZADD', FILES, stamp(-now * 1e6), id)
    call('EXPIRE', FILES, 400 * DAY_S)
    keep_file(id, now + kept_s)
  end
  return { 'ok', call('HGETALL', file_key(id)) }
end

function functions.get_file(id)
  local fields = call('HGETALL', file_key(id))
  if #fields == 0 then return no_file(id) end
  return { 'ok', fields }
end

-- owner, "1" for the files of every owner, the last id of the call before, limit: the ids and fields of the files.
function functions.list_files(owner, every_owner, after, limit)
  local files = {}
  for _, id in ipairs(ids_after(FILES, after) or {}) do
    if #files >= tonumber(limit) then break end
    local fields = call('HGETALL', file_key(id))
    if #fields > 0 and (every_owner == '1' or call('HGET', file_key(id), 'owner') == owner) then
      files[#files + 1] = { id, fields }
    end
  end
  return { 'ok', files }
end

local function read_bytes(id, offset, size)
  local parts = {}
  while size > 0 do
    local segment, start = math.floor(offset / SEGMENT_BYTES), offset % SEGMENT_BYTES
    local length = math.min(size, SEGMENT_BYTES - start)
    parts[#parts + 1] = call('GETRANGE', file_key(id, segment), start, start + length - 1)
    offset, size = offset + length, size - length
  end
  return table.concat(parts)
end

-- file, offset, size: so many bytes of it, fewer at its end.
function functions.read_piece(id, offset, size)
  local file_size = tonumber(call('HGET', file_key(id), 'size'))
  if not file_size then return no_file(id) end
  offset = tonumber(offset)
  return { 'ok', read_bytes(id, offset, math.min(tonumber(size), file_size - offset)) }
end

function functions.delete_file(id)
  if call('EXISTS', file_key(id)) == 0 then return no_file(id) end
  for _, batch in ipairs(call('ZRANGE', OPEN, 0, -1)) do
    if call('HGET', batch_key(batch), 'file') == id then
      return { 'conflict', 'the batch ' .. batch .. ' needs this file and has not ended' }
    end
  end
  call('ZREM', FILES, id)
  call('UNLINK', file_key(id))
  delete_segments(id)
  return { 'ok' }
end

-- Removes files that were not whole for too long, and the ids of files that have expired.
local function sweep_files(silent_s)
  for _, id in ipairs(call('ZRANGEBYSCORE', UPLOADS, '-inf', stamp(now - silent_s))) do
    functions.drop_upload(id)
  end
  for _, id in ipairs(call('ZRANGE', FILES, 0, -1)) do
    if call('EXISTS', file_key(id)) == 0 then call('ZREM', FILES, id) end
  end
end
