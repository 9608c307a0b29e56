-- Put taken hints back into the queue, unless somebody has scored them anew since they were taken.
-- KEYS[1] queue: sorted set, job id -> due time (ms)
-- ARGV[1…] for each hint: job id, the score that its claim wrote, 'at' or 'in', due time (ms) or delay (ms)
-- returns how many hints were put back
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local put = 0
for i = 1, #ARGV, 4 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score and tonumber(score) == tonumber(ARGV[i + 1]) then
    local due = tonumber(ARGV[i + 3])
    if ARGV[i + 2] == 'in' then
      due = now + due
    end
    redis.call('ZADD', KEYS[1], string.format('%.0f', due), ARGV[i])
    put = put + 1
  end
end
return put
