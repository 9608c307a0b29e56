-- Take due hints of one queue and hide them for a lease; they come back by themselves unless they are dropped.
-- KEYS[1] queue: sorted set, job id -> due time (ms)
-- KEYS[2] wake: list, at most one element
-- ARGV[1] limit
-- ARGV[2] lease (ms)
-- returns { score written to each, wait until the next hint is due (ms, -1 when there is none), id, old score, … }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
local hidden = string.format('%.0f', now + ARGV[2])
for i = 1, #due, 2 do
  redis.call('ZADD', KEYS[1], 'XX', hidden, due[i])
end
local wait = -1
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if first[2] then
  wait = math.max(0, math.ceil(tonumber(first[2]) - now))
  if wait == 0 and redis.call('LLEN', KEYS[2]) == 0 then
    -- More than this worker had room for: another may be idle.
    redis.call('RPUSH', KEYS[2], 1)
    redis.call('PEXPIRE', KEYS[2], 60000)
  end
end
local reply = { hidden, wait }
for i = 1, #due do
  reply[i + 2] = due[i]
end
return reply
