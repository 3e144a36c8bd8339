-- Part 3 of 4. The places of one key.

local GRANTS_BEFORE_SHARE = 16  -- gpumesh/balancer/fairness/lane.py
local SHARED, OWN, OWNED_BY_OTHER = 0, 1, 2  -- Standing in step_messages.py
local RANK, CLIENT, LIMIT, QUEUED_AT, COST = 1, 2, 3, 4, 5  -- of a request; before its storing the fourth is its age

local function load_node(key)
  local text = redis.call('GET', prefix .. 'node:' .. key)
  local node = text and cjson.decode(text) or {gateways = {}, skipped = {}}
  for gateway, entry in pairs(node.gateways) do
    if sessions[gateway] ~= entry.session then node.gateways[gateway] = nil end
  end
  if node.owner and not node.gateways[node.owner] then node.owner, node.asked = nil, nil end
  return node
end

local function save_node(key, node)
  local is_empty, waits = true, {}
  for gateway, entry in pairs(node.gateways) do
    local is_used = entry.held > 0 or #entry.heads > 0 or now - entry.used <= request.share_s
    if not is_used and node.owner ~= gateway then
      node.gateways[gateway] = nil
    else
      is_empty = false
      for _, head in ipairs(entry.heads) do waits[head[RANK]] = true end
    end
  end
  for name in pairs(node.skipped) do  -- a class that does not wait any more begins anew
    if not waits[tonumber(string.match(name, '^%d+'))] then node.skipped[name] = nil end
  end
  if is_empty then
    redis.call('DEL', prefix .. 'node:' .. key)
  else
    redis.call('SET', prefix .. 'node:' .. key, cjson.encode(node), 'EX', EXPIRE_S)
  end
end

local function count_held(node)
  local total = 0
  for _, entry in pairs(node.gateways) do total = total + entry.held end
  return total
end

local function has_place(limit, total) return limit < 0 or total < limit end

-- The waiting requests that a place would suit, each with its gateway and its client's counter.
local function find_servable(node)
  local total, servable = count_held(node), {}
  for gateway, entry in pairs(node.gateways) do
    for index, head in ipairs(entry.heads) do
      if has_place(head[LIMIT], total) then
        local counter = counter_of(head[RANK], head[CLIENT])
        table.insert(servable, {gateway = gateway, index = index, head = head, rank = head[RANK], counter = counter})
      end
    end
  end
  return servable
end

local function goes_before(a, b)
  if a.rank ~= b.rank then return a.rank < b.rank end
  if a.counter ~= b.counter then return a.counter < b.counter end
  if a.head[QUEUED_AT] ~= b.head[QUEUED_AT] then return a.head[QUEUED_AT] < b.head[QUEUED_AT] end
  return a.gateway < b.gateway
end

-- The rule of ``next_lane`` in gpumesh/balancer/fairness/lane.py: a lower class gets a place after 16 of higher classes.
local function find_next(node, servable)
  table.sort(servable, goes_before)
  local first = servable[1]
  for _, waiting in ipairs(servable) do
    local skipped = node.skipped[waiting.rank .. ':' .. first.rank] or 0
    if waiting.rank > first.rank and skipped >= GRANTS_BEFORE_SHARE then return waiting end
  end
  return first
end

local function count_grant(node, servable, rank)  -- as in lane.py
  local is_counted = {}
  for _, waiting in ipairs(servable) do
    local other = waiting.rank
    if not is_counted[other] then
      is_counted[other] = true
      if other > rank then
        for higher = rank, other - 1 do
          local name = other .. ':' .. higher
          node.skipped[name] = (node.skipped[name] or 0) + 1
        end
      elseif other == rank then
        for higher = 0, rank - 1 do node.skipped[rank .. ':' .. higher] = nil end
      end
    end
  end
end

-- Gives the free places to the best waiting requests. Returns the classes of those that were this gateway's.
local function distribute(key, node)
  local own_grants = {}
  while true do
    local servable = find_servable(node)
    if #servable == 0 then return own_grants end
    local chosen = find_next(node, servable)
    local entry, head = node.gateways[chosen.gateway], chosen.head
    entry.held, entry.used = entry.held + 1, now
    table.remove(entry.heads, chosen.index)
    charge_waiting(head[RANK], head[CLIENT], head[COST])
    count_grant(node, servable, chosen.rank)
    if chosen.gateway == me then
      table.insert(own_grants, head[RANK])
    else
      send_mail(chosen.gateway, 'grant', key, head[RANK], count_held(node) - entry.held)
    end
  end
end

local function is_same_client(heads, rank, client)
  for _, head in ipairs(heads) do
    if head[RANK] == rank and head[CLIENT] == client then return true end
  end
  return false
end

-- Stores what waits at this gateway. A client that begins to wait is raised to the level of its competitors.
local function set_heads(node, entry, heads)
  local old_heads = entry.heads
  entry.heads = {}
  for _, head in ipairs(heads) do
    head[QUEUED_AT] = now - head[QUEUED_AT]
    local rank, client = head[RANK], head[CLIENT]
    if not is_same_client(old_heads, rank, client) then
      local least = level_of(rank)
      for _, other_entry in pairs(node.gateways) do
        for _, other in ipairs(other_entry.heads) do
          if other[RANK] == rank then least = math.min(least, counter_of(rank, other[CLIENT])) end
        end
      end
      local counter = stored_counter(rank, client)
      if not counter or counter < least then set_counter(rank, client, least) end
    end
    table.insert(entry.heads, head)
  end
end

local function has_other_users(node)
  for gateway, entry in pairs(node.gateways) do
    local is_used = entry.held > 0 or #entry.heads > 0 or now - entry.used < request.share_s
    if gateway ~= me and is_used then return true end
  end
  return false
end

local function waits_elsewhere(node)
  for gateway, entry in pairs(node.gateways) do
    if gateway ~= me and #entry.heads > 0 then return true end
  end
  return false
end

local function count_unseen_grants(key)
  local count = 0
  for _, item in ipairs(load_box(me).items) do
    if item[2] == 'grant' and item[3] == key then count = count + 1 end
  end
  return count
end

-- Takes over what this gateway says of a key. Returns a KeyReply.
local function sync(item)
  local key, takes = item.key, item.takes
  local node = load_node(key)
  local entry = node.gateways[me] or {session = request.session, held = 0, used = 0, heads = {}}
  node.gateways[me] = entry
  for _, charge in ipairs(item.charges) do
    correct_charge(charge[1], charge[2], charge[3])
  end
  local unseen = count_unseen_grants(key)
  entry.held = item.held + unseen
  -- What the gateway announced before it has seen a grant may be the request that has just got it.
  if unseen == 0 then set_heads(node, entry, item.heads) end
  local is_used = entry.held > 0 or #takes > 0 or #entry.heads > 0
  entry.used = is_used and now or math.max(entry.used, now - item.idle_s)
  if item.gives_up and node.owner == me then
    node.owner, node.asked = nil, nil
    for gateway in pairs(node.gateways) do
      if gateway ~= me then send_mail(gateway, 'shared', key, 0, 0) end
    end
  elseif not node.owner and is_used and not has_other_users(node) then
    node.owner = me
  end
  local standing, granted, grants = SHARED, {}, {}
  if node.owner == me then
    standing, entry.heads = OWN, {}
    entry.held = entry.held + #takes
    for _ = 1, #takes do table.insert(granted, true) end
  elseif node.owner then
    standing = OWNED_BY_OTHER
    if is_used and not node.asked then
      node.asked = true
      send_mail(node.owner, 'share', key, 0, 0)
    end
    for _ = 1, #takes do table.insert(granted, false) end
  else
    grants = distribute(key, node)
    for _, take in ipairs(takes) do
      local is_granted = has_place(take[LIMIT], count_held(node))
      if is_granted then
        entry.held = entry.held + 1
        charge_unqueued(take[RANK], take[CLIENT], take[COST])
      end
      table.insert(granted, is_granted)
    end
  end
  local others = count_held(node) - entry.held
  local reply = {standing, others, waits_elsewhere(node), granted, grants}
  save_node(key, node)
  return reply
end
