-- Take due hints of one queue and hide them for a lease; they come back by themselves unless they are dropped.
-- KEYS[1] the queue's ordinary lane: sorted set, job id -> due time (ms)
-- KEYS[2] wake: list, at most one element
-- ARGV[1] limit
-- ARGV[2] lease (ms)
-- ARGV[3] prefix and ARGV[4] suffix of its lanes of another priority than 5, likewise; most queues have none
-- ARGV[5] how much later a hint counts as due for each step of priority (ms)
-- returns { score written to each, wait until the next hint is due (ms, -1 when there is none),
--           then for each lane that gave some: its priority, { id, old score, … } }
local PAGE = 1000 -- ids in one call: Lua's stack holds some thousands
local a, z = ARGV[3], ARGV[4]
local there = redis.call('EXISTS', KEYS[1], a .. 0 .. z, a .. 1 .. z, a .. 2 .. z, a .. 3 .. z, a .. 4 .. z,
    a .. 6 .. z, a .. 7 .. z, a .. 8 .. z, a .. 9 .. z)
if there == 0 then
  return { '0', -1 } -- what an idle worker asks for, again and again
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local hidden = string.format('%.0f', now + ARGV[2])
local lanes = { { priority = 5, key = KEYS[1] } }
if there > 1 or redis.call('EXISTS', KEYS[1]) == 0 then
  for priority = 0, 9 do
    if priority ~= 5 and redis.call('EXISTS', a .. priority .. z) == 1 then
      lanes[#lanes + 1] = { priority = priority, key = a .. priority .. z }
    end
  end
end
for _, lane in ipairs(lanes) do
  lane.due = redis.call('ZRANGEBYSCORE', lane.key, '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
  lane.taken = lane.due
end
if #lanes > 1 then
  -- Within a lane the order of scores is the order of ranks: merge their heads.
  for _, lane in ipairs(lanes) do
    lane.taken = {}
    lane.later = (lane.priority - 5) * ARGV[5]
  end
  for _ = 1, tonumber(ARGV[1]) do
    local first, first_rank
    for _, lane in ipairs(lanes) do
      local score = lane.due[#lane.taken + 2]
      local rank = score and tonumber(score) + lane.later
      if rank and (not first or rank < first_rank or rank == first_rank and lane.later < first.later) then
        first, first_rank = lane, rank
      end
    end
    if not first then
      break
    end
    local at = #first.taken
    first.taken[at + 1], first.taken[at + 2] = first.due[at + 1], first.due[at + 2]
  end
end
local wait = -1
local reply = { hidden, wait }
for _, lane in ipairs(lanes) do
  for first = 1, #lane.taken, 2 * PAGE do
    local scored = {}
    for i = first, math.min(first + 2 * PAGE - 2, #lane.taken), 2 do
      scored[#scored + 1] = hidden
      scored[#scored + 1] = lane.taken[i]
    end
    redis.call('ZADD', lane.key, 'XX', unpack(scored))
  end
  if #lane.taken > 0 then
    reply[#reply + 1] = lane.priority
    reply[#reply + 1] = lane.taken
  end
  local first = redis.call('ZRANGE', lane.key, 0, 0, 'WITHSCORES')
  if first[2] then
    local its_wait = math.max(0, math.ceil(tonumber(first[2]) - now))
    wait = wait < 0 and its_wait or math.min(wait, its_wait)
  end
end
if wait == 0 and redis.call('LLEN', KEYS[2]) == 0 then
  -- More than this worker had room for: another may be idle.
  redis.call('RPUSH', KEYS[2], 1)
  redis.call('PEXPIRE', KEYS[2], 60000)
end
reply[2] = wait
return reply
