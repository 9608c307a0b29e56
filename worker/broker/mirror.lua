-- Make what plain ARQ's clients look at say how one adopted job stands, unless a later enqueue has its id by now.
-- KEYS[1] queue: sorted set, job id -> due time (ms)
-- KEYS[2] payload, KEYS[3] in progress, KEYS[4] result, KEYS[5] retry counter, KEYS[6] aborts: sorted set of ids
-- ARGV[1] the job's id in ARQ
-- ARGV[2] the payload as it was read, '' where there was none
-- ARGV[3] 'waits', 'runs' or 'ended'
-- ARGV[4] in how long its id comes up in the queue again, or how long its result is kept (ms)
-- ARGV[5] how long it is in progress without another word (ms), or its result, '' for none
-- returns 1, or 0 where a later enqueue has the id, or where the end was told before
local there = redis.call('GET', KEYS[2])
if there and there ~= ARGV[2] then
  return 0
end
if ARGV[3] == 'ended' then
  if ARGV[5] ~= '' then
    redis.call('SET', KEYS[4], ARGV[5], 'PX', ARGV[4])
  end
  redis.call('DEL', KEYS[2], KEYS[3], KEYS[5])
  redis.call('ZREM', KEYS[6], ARGV[1])
  redis.call('ZREM', KEYS[1], ARGV[1])
  return 1
end
-- This may come late: the end, which somebody else has told meanwhile, takes the payload and leaves a result.
if ARGV[2] ~= '' and not there or ARGV[2] == '' and redis.call('EXISTS', KEYS[4]) == 1 then
  return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local again = now + ARGV[4]
if ARGV[3] == 'runs' then
  redis.call('SET', KEYS[3], 1, 'PX', ARGV[5])
else
  redis.call('DEL', KEYS[3])
  local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
  if score and math.abs(tonumber(score) - again) < 1000 then
    return 1 -- a score that stays tells early adoption that it knows this one
  end
end
redis.call('ZADD', KEYS[1], string.format('%.0f', again), ARGV[1])
return 1
