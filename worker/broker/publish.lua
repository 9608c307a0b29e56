-- Put hints into a queue and wake one waiting worker.
-- KEYS[1] queue: sorted set, job id -> due time (ms)
-- KEYS[2] wake: list, at most one element
-- ARGV[1] 'always', or 'astray': only hints that are missing or scored later than a claim could have moved them
-- ARGV[2] lease (ms)
-- ARGV[3] prefix of the payload keys
-- ARGV[4] how long a payload outlives its due time (ms)
-- ARGV[5] prefix of the keys by which ARQ's loop says that it runs a job
-- ARGV[6…] for all hints that are alike: delay (ms, may be negative), payload, their job ids of 36 characters with spaces
--   between them, 3,000 at the most, for Lua passes no more to a command
-- returns how many hints were put
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function is_astray(id, due)
  local score = redis.call('ZSCORE', KEYS[1], id)
  return not score or tonumber(score) > math.max(due, now) + ARGV[2]
end

local put = 0
for i = 6, #ARGV, 3 do
  local delay, payload = tonumber(ARGV[i]), ARGV[i + 1]
  local due = now + delay
  local score = string.format('%.0f', due)
  local kept = string.format('%.0f', math.max(delay, 0) + ARGV[4])
  local scored = {}
  local ids = ARGV[i + 2]
  for first = 1, #ids, 37 do -- a pattern that finds them took a tenth of all the time
    local id = string.sub(ids, first, first + 35)
    if ARGV[1] == 'astray' then
      redis.call('DEL', ARGV[5] .. id) -- it waits: who had picked it is dead, or loses the claim
    end
    if ARGV[1] == 'always' or is_astray(id, due) then
      scored[#scored + 1] = score
      scored[#scored + 1] = id
    end
  end
  if #scored > 0 then
    redis.call('ZADD', KEYS[1], unpack(scored)) -- a call each took a quarter of a thousand hints' time
    for j = 2, #scored, 2 do
      redis.call('SET', ARGV[3] .. scored[j], payload, 'PX', kept)
    end
    put = put + #scored / 2
  end
end
if put > 0 and redis.call('LLEN', KEYS[2]) == 0 then
  redis.call('RPUSH', KEYS[2], 1)
  redis.call('PEXPIRE', KEYS[2], 60000)
end
return put
