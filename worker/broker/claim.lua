-- Take due hints of one queue and hide them for a lease; they come back by themselves unless they are dropped.
-- KEYS[1] the queue's ordinary lane: sorted set, job id -> due time (ms)
-- KEYS[2] wake: list, at most one element
-- KEYS[3…] its other lanes, likewise; most queues have none
-- ARGV[1] limit
-- ARGV[2] lease (ms)
-- ARGV[3…] for each other lane: how much later than in the ordinary one its hints count as due (ms, may be negative)
-- returns { score written to each, wait until the next hint is due (ms, -1 when there is none),
--           then for each lane that gave some: its number (0: the ordinary one), { id, old score, … } }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local hidden = string.format('%.0f', now + ARGV[2])
local lanes = { { number = 0, key = KEYS[1], later = 0 } }
if redis.call('EXISTS', unpack(KEYS, 3)) > 0 then
  for i = 3, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then
      lanes[#lanes + 1] = { number = i - 2, key = KEYS[i], later = tonumber(ARGV[i]) }
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
  for i = 1, #lane.taken, 2 do
    redis.call('ZADD', lane.key, 'XX', hidden, lane.taken[i])
  end
  if #lane.taken > 0 then
    reply[#reply + 1] = lane.number
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
